# SPDX-License-Identifier: Apache-2.0
"""Peak memory of one forward+backward of the RAda head, ours and the released layer.

    python benchmarks/memory.py [--images 8] [--classes 1000] [--width 512] [--alone]

What torch's allocator hands out above what was held before, as in `timing.peak_bytes`. The results
are first held against each other; --alone leaves the others out, for sizes that they cannot hold.
"""

from __future__ import annotations

import argparse
import functools

import torch
from registry import Work, rada_head
from timing import peak_bytes


def step(work: Work, name: str) -> None:
    """One forward and backward of one provider."""
    out = work.providers[name](*work.leaves)
    torch.autograd.grad(out, work.wanted(name), torch.ones_like(out))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=8)
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--alone", action="store_true", help="ours only")
    args = parser.parse_args()
    work = rada_head(args.device, torch.float32, args.images, args.classes, args.width, args.heads)
    names = ["vtclip"]
    if not args.alone:
        names += ["released layer", "shared and reduced in plain torch"]
    with torch.no_grad():
        expected = work.providers[names[-1]](*work.leaves)
        for name in names:
            error = (
                work.providers[name](*work.leaves) - expected
            ).abs().max() / expected.abs().max()
            assert error < 1e-5, f"{name} differs by {error:.1e}"
    peaks = {}
    for name in names:
        call = functools.partial(step, work, name)
        call()
        peaks[name] = peak_bytes(call, args.device)
    print(f"peak MiB, forward+backward, B={args.images} K={args.classes} D={args.width}")
    for name, peak in peaks.items():
        print(f"{peak / 2**20:9.1f} {peak / peaks['vtclip']:6.2f}x  {name}")


if __name__ == "__main__":
    main()
