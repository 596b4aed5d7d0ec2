# SPDX-License-Identifier: Apache-2.0
"""Whole `vtclip` commands on a folder of small images, by two checkouts in turn.

    python benchmarks/warm_fit.py OLD NEW [--commands fit-proker,...] [--pairs N] [--work DIR]

OLD and NEW are folders with the package `vtclip` in them, each with its `_C` built, such as two
git worktrees. Each has a cache of features and of compiled modules of its own, which one run fills
before the pairs are timed. A pair is the same command by both, and the pairs alternate in which
goes first. The measure is processor time of the child process, user and system, on one thread:
imports and start are in it. Printed are the median seconds of both and the median of the pairs'
ratios, NEW / OLD.

`fit-METHOD` is `vtclip fit IMAGES --method METHOD` from the warm cache, `extract` the zero-shot fit
with an empty cache, `evaluate` is of the first `fit` run and `predict` is of the folder with it.
"""

from __future__ import annotations

import argparse
import os
import resource
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import median

import numpy as np
from PIL import Image

COMMANDS = ("fit-proker", "fit-zeroshot", "fit-auto", "evaluate", "predict", "extract")


def draw_folder(root: Path, images: int, classes: int, side: int) -> None:
    """PNGs of noise, equally many of each class."""
    for number in range(images):
        path = root / f"thing {number % classes:02d}" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(number).integers(0, 256, (side, side, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path)


class Side:
    """One checkout: its package, its cache and its runs."""

    def __init__(self, name: str, checkout: Path, work: Path, images: Path) -> None:
        self.name, self.checkout, self.images = name, checkout.resolve(), images
        self.cache, self.cold, self.runs, self.compiled = (
            work / f"{part}-{name}" for part in ("cache", "cold", "runs", "compiled")
        )

    def arguments(self, command: str) -> Sequence[str | Path]:
        if command.startswith("fit-") or command == "extract":
            method = command.removeprefix("fit-") if command != "extract" else "zeroshot"
            out = self.runs / command
            return ["fit", self.images, "--method", method, "--out", out, "--overwrite"]
        run = self.runs / "fit-proker"
        return [command, run] if command == "evaluate" else [command, run, self.images]

    def seconds(self, command: str) -> float:
        """Processor seconds of the command."""
        shutil.rmtree(self.cold, ignore_errors=True)
        paths = os.pathsep.join(filter(None, [str(self.checkout), os.environ.get("PYTHONPATH")]))
        cache = self.cold if command == "extract" else self.cache
        env = {**os.environ, "PYTHONPATH": paths, "VTCLIP_CACHE": str(cache)}
        env |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        env |= {"PYTHONPYCACHEPREFIX": str(self.compiled), "PYTHONDONTWRITEBYTECODE": ""}
        line = [sys.executable, "-m", "vtclip", *self.arguments(command)]
        line += ["--device", "cpu", "--threads", "1"]
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run(
            line, env=env, cwd=self.cache.parent, capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise SystemExit(f"{self.name}: vtclip {command}: {done.stderr[-2000:]}")
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description="Commands by two checkouts, in turn.")
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--commands", default=",".join(COMMANDS[:5]), help=", ".join(COMMANDS))
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--classes", type=int, default=20)
    parser.add_argument("--side", type=int, default=8)
    parser.add_argument("--work", type=Path, help="folder for images, caches and runs, kept")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="vtclip-warm-") as temporary:
        work = (args.work or Path(temporary)).resolve()
        compare(args, work)


def compare(args: argparse.Namespace, work: Path) -> None:
    images = work / "images"
    if not images.exists():
        draw_folder(images, args.images, args.classes, args.side)
    sides = [Side("old", args.old, work, images), Side("new", args.new, work, images)]
    for side in sides:
        side.seconds("fit-proker")  # fills the cache, and is the run to evaluate and predict with
    print(
        f"{args.images} images of {args.side} x {args.side}, {args.pairs} pairs, processor seconds"
    )
    print(f"{'command':<14} {'old':>8} {'new':>8} {'new/old':>8}   of the pairs")
    for command in args.commands.split(","):
        pairs = []
        for number in range(args.pairs):
            order = sides if number % 2 else sides[::-1]
            seconds = {side.name: side.seconds(command) for side in order}
            pairs.append((seconds["old"], seconds["new"]))
        ratios = sorted(new / old for old, new in pairs)
        old, new = (median(column) for column in zip(*pairs, strict=True))
        print(
            f"{command:<14} {old:>8.2f} {new:>8.2f} {median(ratios):>8.3f}   "
            f"{ratios[0]:.3f}..{ratios[-1]:.3f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
