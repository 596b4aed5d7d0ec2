# SPDX-License-Identifier: Apache-2.0
"""A table of drawn features, to time fits on: `python benchmarks/synthetic_table.py OUT.npz`

Class texts are random directions; an image lies near its text and near a centre of its class that
the text does not know, so that every method has something to learn. Then

    vtclip bench OUT.npz --shots 16 --seeds 1 --out results --threads 2

prints the seconds of each method.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--classes", type=int, default=100)
    parser.add_argument("--per-class", type=int, default=48)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=49, help="spatial features; 0: none")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    draw = np.random.default_rng(args.seed)
    K, n, C, L = args.classes, args.per_class, args.width, args.tokens

    def directions(*shape: int) -> np.ndarray:
        rows = draw.standard_normal((*shape, C), dtype=np.float32)
        return rows / np.linalg.norm(rows, axis=-1, keepdims=True)

    text, centre = directions(K), directions(K)
    label = np.repeat(np.arange(K), n)
    image = 0.12 * text[label] + 0.25 * centre[label] + directions(K * n)
    arrays = {"image": image.astype(np.float16), "label": label, "text": text}
    arrays["classname"] = np.array([f"class {k}" for k in range(K)])
    if L:
        spatial = directions(K * n, L)
        spatial[np.arange(K * n), label % L] += 0.5 * text[label]
        arrays["spatial"] = spatial.astype(np.float16)
    np.savez(args.out, **arrays)
    print(f"{args.out}: {K} classes x {n} images of width {C}, {L} tokens")


if __name__ == "__main__":
    main()
