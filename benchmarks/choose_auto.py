# SPDX-License-Identifier: Apache-2.0
"""How the rule of `--method auto` was chosen: `python benchmarks/choose_auto.py SOURCE...`

Fits every candidate on few-shot draws of each source and prints the accuracy, on images that
neither train nor validate nor test, of each of them and of several ways to make one decision of
them. All ways see the validation images only; the test half is never looked at. The draws are those
of seeds from 101 on, so that reported seeds are others.
"""

from __future__ import annotations

import argparse
import itertools
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from choose_defaults import CPU, held_out
from torch import Tensor

from vtclip.data import few_shot_split, open_source
from vtclip.data.records import Records
from vtclip.heads import HEADS
from vtclip.train import auto, engine, metrics
from vtclip.train.fit_head import choose_by, fit_head
from vtclip.train.steps import TrainingRun

Logits = dict[str, Tensor]


def average(log_p: Mapping[str, Tensor], weights: Mapping[str, float]) -> Tensor:
    """log of the weighted mean of probabilities [N, K]."""
    parts = [log_p[name] + math.log(weight) for name, weight in weights.items() if weight]
    return torch.stack(parts).logsumexp(dim=0)


def equal(names: Iterator[str] | list[str]) -> dict[str, float]:
    listed = list(names)
    return dict.fromkeys(listed, 1 / len(listed))


def ways(val: Logits, label: Tensor) -> dict[str, dict[str, float]]:
    """Name of a way to its weights of the methods."""
    log_p = {
        name: (rows.double() / metrics.fit_temperature(rows, label)).log_softmax(dim=1)
        for name, rows in val.items()
    }
    singles = [equal([name]) for name in val]
    pairs = [equal(list(pair)) for pair in itertools.combinations(val, 2)]

    def likeliest(choices: list[dict[str, float]]) -> dict[str, float]:
        return min(choices, key=lambda weights: metrics.nll(average(log_p, weights), label))

    return {
        "likeliest method": likeliest(singles),
        "likeliest pair": likeliest(pairs),
        "likeliest of both": likeliest([*singles, *pairs]),
        "average of all": equal(name for name in val if name != "zeroshot"),
        "average of the trusted": equal(name for name in val if name in auto.TRUSTED),
        "auto": auto.choose_weights(val, label),
    }


def measure(records: Records, shots: int, seed: int) -> dict[str, float]:
    """Accuracy on the rows that neither train nor validate nor test."""
    split = few_shot_split(records.label, records.names, shots=shots, seed=seed)
    index = held_out(records, split.train, split.val, split.test)
    val, rest = {}, {}
    label, true = records.label[split.val], records.label[index]
    for name in auto.candidates(records):
        config = HEADS[name].recipe(shots)
        head = fit_head(name, records, split, config, TrainingRun(CPU, seed), choose=False)
        val[name], _ = auto.unseen_logits(head, records, split.val, CPU)
        choose_by(head, records, split.val, CPU)
        logits, _ = engine.all_logits(head, records, index, device=CPU)
        rest[name] = (logits.double() / metrics.fit_temperature(val[name], label)).log_softmax(1)
    shares = {name: metrics.accuracy(rows, true) for name, rows in rest.items()}
    for name, weights in ways(val, label).items():
        shares[name] = metrics.accuracy(average(rest, weights), true)
    return shares


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sources", nargs="+", type=Path)
    parser.add_argument("--spatial", action="store_true", help="only rows with spatial features")
    parser.add_argument("--shots", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--draws", type=int, default=4)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    table: dict[str, list[float]] = defaultdict(list)
    for source in args.sources:
        records = open_source(source, need_spatial=args.spatial, progress=False)
        for shots in args.shots:
            draws = [measure(records, shots, 101 + draw) for draw in range(args.draws)]
            for name in draws[0]:
                table[name].append(sum(draw[name] for draw in draws) / len(draws))
    columns = [f"{source.stem[-12:]}-{shots}" for source in args.sources for shots in args.shots]
    print(" " * 24 + "".join(f"{column:>18}" for column in columns) + f"{'mean':>8}")
    for name, row in table.items():
        cells = "".join(f"{100 * value:>17.2f}%" for value in row)
        print(f"{name:<24}{cells}{100 * sum(row) / len(row):>7.2f}%")


if __name__ == "__main__":
    main()
