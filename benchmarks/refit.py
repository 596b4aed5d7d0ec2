# SPDX-License-Identifier: Apache-2.0
"""What training on the validation images is worth once they have chosen:
`python benchmarks/refit.py SOURCE... --method auto`

Draws each source as `vtclip fit` draws a folder of images (up to N per class, up to 4 of each class
validate), fits, and fits once more on training and validation images with the settings that came
out. Both heads are judged on the test half, at the temperature that the validation images gave the
first; "T = 1" is the negative log-likelihood of the second without it. Percent (NLL: nats per
image), mean of the seeds; "worst" is the cell of a source and a number of shots, and the
single draw, with the smallest difference. Seconds are those of the first fit and of the second.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import NamedTuple

import torch

from vtclip.data import few_shot_split, open_source
from vtclip.data.records import Records
from vtclip.data.splits import UP_TO
from vtclip.heads import HEADS, Head
from vtclip.heads.auto import Auto
from vtclip.train import engine
from vtclip.train.auto import fit_auto, refit_auto
from vtclip.train.fit_head import calibrate, fit_head, refit_head, refit_rows
from vtclip.train.steps import TrainingRun

CPU = torch.device("cpu")


class Both(NamedTuple):
    """Of the first fit and of the second: accuracy; ECE and NLL, both at T; NLL; seconds."""

    accuracy: tuple[float, float]
    ece: tuple[float, float]
    nll: tuple[float, float]
    nll_unscaled: tuple[float, float]
    seconds: tuple[float, float]


def measured(records: Records, method: str, shots: int, seed: int) -> Both:
    """One draw."""
    split = few_shot_split(records.label, records.names, shots=shots, seed=seed, rule=UP_TO)
    run = TrainingRun(CPU, seed, balanced=True)
    recipe = HEADS[method].recipe(shots)
    marks = [time.perf_counter()]
    first: Head
    if method == "auto":
        first = fit_auto(records, split, shots, run)[0]
    else:
        first = fit_head(method, records, split, recipe, run)
    marks.append(time.perf_counter())
    rows = refit_rows(split)
    if isinstance(first, Auto):
        second: Head = refit_auto(first, records, rows, shots, run)
    else:
        second = refit_head(first, records, rows, recipe, run)
    marks.append(time.perf_counter())
    T = calibrate(first, records, split.val, CPU)
    values = [
        engine.head_metrics(head, records, split.test, device=CPU, temperature=T)
        for head in (first, second)
    ]
    accuracy, ece, nll, unscaled = (
        (factor * float(values[0][key]), factor * float(values[1][key]))
        for key, factor in (("accuracy", 100), ("ece_scaled", 100), ("nll_scaled", 1), ("nll", 1))
    )
    return Both(accuracy, ece, nll, unscaled, (marks[1] - marks[0], marks[2] - marks[1]))


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def line(name: str, draws: list[Both]) -> str:
    columns = [
        mean([getattr(draw, kind)[which] for draw in draws])
        for kind in ("accuracy", "ece", "nll", "seconds")
        for which in (0, 1)
    ]
    gain = columns[1] - columns[0]
    unscaled = mean([draw.nll_unscaled[1] for draw in draws])
    return (
        f"{name:<36} {columns[0]:>7.2f} {columns[1]:>7.2f} {gain:>+7.2f} "
        f"{columns[2]:>6.2f} {columns[3]:>6.2f} {columns[4]:>7.3f} {columns[5]:>7.3f} "
        f"{unscaled:>7.3f} {columns[6]:>7.1f} {columns[7]:>7.1f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sources", nargs="+", type=Path)
    parser.add_argument("--method", default="auto", help="with commas (default: auto)")
    parser.add_argument("--shots", default="1,2,4,8", help="images per class, with commas")
    parser.add_argument("--seeds", default="1,2,3", help="with commas")
    args = parser.parse_args()
    shots, seeds = ([int(n) for n in text.split(",")] for text in (args.shots, args.seeds))
    for method in args.method.split(","):
        print(
            f"{method:<36} {'first':>7} {'second':>7} {'gain':>7} {'ECE':>6} {'':>6} {'NLL':>7} "
            f"{'':>7} {'T = 1':>7} {'seconds':>7}"
        )
        cells: dict[tuple[str, int], list[Both]] = {}
        for source in args.sources:
            records = open_source(source)
            for number in shots:
                draws = [measured(records, method, number, seed) for seed in seeds]
                cells[source.stem, number] = draws
                print(line(f"{source.stem} {number}", draws), flush=True)
            own = [draw for place, row in cells.items() if place[0] == source.stem for draw in row]
            print(line(f"{source.stem}, mean", own), flush=True)
        every = [draw for row in cells.values() for draw in row]
        print(line("all, mean", every))
        gains = {
            place: [draw.accuracy[1] - draw.accuracy[0] for draw in row]
            for place, row in cells.items()
        }
        worst = min(gains, key=lambda place: mean(gains[place]))
        least = min(min(row) for row in gains.values())
        print(
            f"worst cell {mean(gains[worst]):+.2f} ({worst[0]} {worst[1]}), worst draw {least:+.2f}"
        )


if __name__ == "__main__":
    main()
