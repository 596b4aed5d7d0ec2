# SPDX-License-Identifier: Apache-2.0
"""What the candidates of `--method auto` cost: `python benchmarks/fit_cost.py`

Fits each to drawn features of several sizes as `auto` does, the choice by validation images
included, and prints seconds of one processor beside what `vtclip.train.cost` expects, by which
`--budget` decides. The clock is that of the process, so that other work on the machine counts
little.
"""

from __future__ import annotations

import argparse
import time

import torch
from torch.nn import functional as F

from vtclip.data import few_shot_split
from vtclip.data.records import Records
from vtclip.train import auto, cost
from vtclip.train.steps import TrainingRun

CPU = torch.device("cpu")
SIZES = ("19x4", "19x16", "100x4", "100x16")
METHODS = ("proker", "takl", "clip-adapter", "tip-adapter-f", "rada")


def drawn(classes: int, per_class: int, width: int) -> Records:
    """Features of length 1 near a text and a centre per class."""
    draw = torch.Generator().manual_seed(0)

    def directions(count: int) -> torch.Tensor:
        return F.normalize(torch.randn(count, width, generator=draw), dim=-1)

    text, centre = directions(classes), directions(classes)
    label = torch.arange(classes).repeat_interleave(per_class)
    image = F.normalize(0.12 * text[label] + 0.25 * centre[label] + directions(len(label)), dim=-1)
    names = [f"class {k}" for k in range(classes)]
    return Records.from_tensors(image, label, text, names)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", nargs="+", default=SIZES, help="CLASSESxSHOTS")
    parser.add_argument("--methods", nargs="+", default=METHODS)
    parser.add_argument("--width", type=int, default=512)
    args = parser.parse_args()
    torch.set_num_threads(1)
    run = TrainingRun(CPU, 1, balanced=True)
    print(f"{'':16}{'classes':>8}{'shots':>6}{'width':>6}{'seconds':>9}{'expected':>9}")
    for size in args.sizes:
        classes, shots = map(int, size.split("x"))
        records = drawn(classes, 2 * (shots + 4) + 2, args.width)
        split = few_shot_split(records.label, records.names, shots=shots, seed=1)
        for name in args.methods:
            started = time.process_time()
            auto.judged_candidate(name, records, split, shots, run)
            seconds = time.process_time() - started
            expected = cost.expected_seconds(name, records, split, shots)
            print(
                f"{name:16}{classes:>8}{shots:>6}{args.width:>6}{seconds:>9.2f}{expected:>9.2f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
