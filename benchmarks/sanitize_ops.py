# SPDX-License-Identifier: Apache-2.0
"""Every operator once, forward and backward, at small odd sizes, for compute-sanitizer to watch.

    compute-sanitizer --tool memcheck python benchmarks/sanitize_ops.py [--impl triton|cuda]

One line per call, and a last line that says how many. `parse` reads what the tool prints.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)] * (str(ROOT) not in sys.path)  # where vtclip is not installed
CHECKS = ("memcheck", "racecheck", "initcheck", "synccheck")
# odd sizes; width 24 fills neither a tile nor a vector
ODD = {"B": 3, "K": 19, "L": 35, "H": 2, "d": 24, "D": 37, "C": 37, "F": 4}
COLUMNS = ("check", "impl", "calls", "errors", "kernels", "exit_code")  # of what `parse` returns
FINISHED = "calls finished"
FINDING = re.compile(
    r"=+\s+(Invalid __|Uninitialized |Misaligned |Barrier error|Error: Race|Error: Potential"
    r"|Warning: Race|Program hit|Malloc|Out-of-range|Unused|Divergent)"
)


def tool() -> str | None:
    """compute-sanitizer on the path or in the toolkit."""
    homes = [os.environ.get("CUDA_HOME", ""), "/usr/local/cuda"]
    folders = [Path(home, sub) for home in homes if home for sub in ("bin", "compute-sanitizer")]
    places = os.pathsep.join([os.environ.get("PATH", ""), *map(str, folders)])
    return shutil.which("compute-sanitizer", path=places)


def under(sanitizer: str | None, check: str, command: list[str]) -> list[str]:
    """The command, watched by one tool of compute-sanitizer where there is one."""
    if sanitizer is None or check not in CHECKS:
        return command
    return [sanitizer, "--tool", check, "--error-exitcode", "7", "--print-limit", "20", *command]


def parse(text: str, check: str, impl: str, code: int | None) -> dict[str, object]:
    """Errors of a run, the kernels they are in, and whether all calls were made."""
    calls = re.findall(rf"^(\d+) {FINISHED}", text, re.MULTILINE)
    counted = re.findall(r"ERROR SUMMARY: (\d+) error", text)
    counted += re.findall(r"RACECHECK SUMMARY: (\d+) hazard", text)
    where, seen = [], False
    for line in text.splitlines():
        seen = seen or FINDING.match(line) is not None
        found = re.match(r"=+\s+at (?:0x[0-9a-f]+ in )?([\w:<>~,]+)", line)
        found = found or re.match(r"=+\s+(?:Write|Read) Thread .* (\w+)\+0x", line)
        if seen and found:
            where.append(found[1])
            seen = False
    errors = int(counted[-1]) if counted else None
    exit_code = "time over" if code is None else code
    values = check, impl, int(calls[-1]) if calls else None, errors, sorted(set(where)), exit_code
    return dict(zip(COLUMNS, values, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--impl", default="triton", choices=("triton", "cuda"))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--only", help="operators whose name contains this")
    args = parser.parse_args()
    if args.device == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"  # read when triton is first imported
    import torch

    from vtclip.testing.problems import FUNCTIONS

    made = 0
    for name, op in FUNCTIONS.items():
        if args.only and args.only not in name:
            continue
        for dtype in (torch.bfloat16, torch.float32):
            leaves = op.draw(ODD, dtype=dtype, device=args.device)
            try:
                out = op(*leaves, impl=args.impl)
            except NotImplementedError as refused:
                print(f"left out: {refused}", flush=True)
                break
            torch.autograd.grad(out, leaves, torch.ones_like(out))
            if args.device == "cuda":
                torch.cuda.synchronize()
            made += 1
            print(f"{args.impl} {name} {dtype}", flush=True)
    print(f"{made} {FINISHED}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
