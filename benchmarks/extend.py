# SPDX-License-Identifier: Apache-2.0
"""Classes added to a run against a run fitted on all classes.

    python benchmarks/extend.py TABLE.npz --new N [--shots 4 16] [--seeds 1 2 3] [--methods ...]

The last N classes of the table are new. Per method and number of shots, means over the seeds:
accuracy on the old classes' test images among the old classes and among all, on the new classes'
among all, on all of them, that of a fit of all classes on the same images, and the seconds of
`vtclip.extend`. Zero-shot of the first three stands before them.
"""

from __future__ import annotations

import argparse
import logging
import tempfile
import time
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np

import vtclip

DEFAULT_METHODS = ("zeroshot", "proker", "tip-adapter-f", "clip-adapter", "rada", "auto")
PLACES = {"before": "old alone", "old_classes": "old", "new_classes": "new"}


def part(source: Path, target: Path, classes: list[int]) -> Path:
    """The rows of some classes as a table of their own; global features only."""
    arrays: dict[str, Any] = dict(np.load(source))
    rows = np.flatnonzero(np.isin(arrays["label"], classes))
    names = arrays.get("fname", np.arange(len(arrays["label"])).astype(str))
    arrays["image"], arrays["fname"] = arrays["image"][rows], names[rows]
    arrays["label"] = np.array([classes.index(k) for k in arrays["label"][rows]])
    arrays["classname"] = arrays["classname"][classes]
    arrays["text"] = arrays["text"][..., classes, :]
    for name in ("spatial", "spatial_index", "projection"):
        arrays.pop(name, None)
    np.savez(target, **arrays)
    return target


def measure(tables: list[Path], method: str, shots: int, seed: int) -> list[float]:
    old, new, both = tables
    common: dict[str, Any] = {"method": method, "shots": shots, "seed": seed, "device": "cpu"}
    with tempfile.TemporaryDirectory() as folder:
        run = vtclip.fit(old, out=Path(folder) / "old", **common)
        start = time.perf_counter()
        larger = vtclip.extend(run, new, out=Path(folder) / "larger", device="cpu")
        seconds = time.perf_counter() - start
        whole = vtclip.fit(both, out=Path(folder) / "both", **common)
    result = larger.result
    shares = [
        result[place][key]["accuracy"] for key in ("zero_shot", "adapted") for place in PLACES
    ]
    return [100 * share for share in (*shares, larger.accuracy, whole.accuracy)] + [seconds]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("table", type=Path)
    parser.add_argument("--new", type=int, required=True)
    parser.add_argument("--shots", type=int, nargs="+", default=[4, 16])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--methods", nargs="+", default=list(DEFAULT_METHODS))
    args = parser.parse_args()
    logging.basicConfig(level=logging.ERROR)
    K = len(np.load(args.table)["classname"])
    first = K - args.new
    heads = [f"{key} {name}" for key in ("zs", "") for name in PLACES.values()]
    print(f"{'method':14} {'shots':>5} " + " ".join(f"{name.strip():>12}" for name in heads)
          + f" {'all':>6} {'fit of all':>10} {'seconds':>7}")  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        wanted = {"old": range(first), "new": range(first, K), "all": range(K)}
        tables = [part(args.table, Path(folder) / f"{n}.npz", list(k)) for n, k in wanted.items()]
        for method in args.methods:
            for shots in args.shots:
                rows = [measure(tables, method, shots, seed) for seed in args.seeds]
                *shares, total, whole, seconds = (
                    mean(column) for column in zip(*rows, strict=True)
                )
                cells = " ".join(f"{share:12.1f}" for share in shares)
                print(f"{method:14} {shots:5} {cells} {total:6.1f} {whole:10.1f} {seconds:7.2f}",
                      flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
