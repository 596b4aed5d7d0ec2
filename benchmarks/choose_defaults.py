# SPDX-License-Identifier: Apache-2.0
"""How the defaults of a method were chosen: `python benchmarks/choose_defaults.py SOURCE...`

Fits the recipe of --method, and every setting that differs from it in one option, on few-shot draws
of each source, and prints accuracy and negative log-likelihood on images that neither train nor
test: per class the rows of the training half that were not drawn. The test half is cut off before
anything is fitted. The draws are those of seeds 101 and 102, so that reported seeds are others.
Nothing is chosen by validation images here: the head's defaults are what is compared.

A row is better by more than chance where it gains about a point on average over the columns.
"""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from vtclip.data import Records, few_shot_split, open_source
from vtclip.data.splits import Split
from vtclip.heads import HEADS
from vtclip.heads.config import FitConfig
from vtclip.train import engine, metrics
from vtclip.train.fit_head import fit_head
from vtclip.train.steps import TrainingRun

CPU = torch.device("cpu")
# option -> the values tried for it, each with the recipe's value of every other option; "a b" sets
# two options at once
TRAINING: dict[str, list[Any]] = {
    "lr": [3e-4, 1e-3, 3e-3, 1e-2],
    "epochs": [10, 20, 40, 50, 100, 200],
    "lr epochs": ["3e-4 200", "1e-3 100", "3e-3 40", "6e-3 20"],
    "weight_decay": [5e-4, 1e-1],
    "batch_size": [64, 256],
    "label_smoothing": [0.0, 0.1, 0.2],
}
HEAD: dict[str, list[Any]] = {
    "penalty": ["none 0", "l1 1", "mse 0.1", "mse 1", "mse 10", "linf 0.1", "linf 1"],
    "temperature": [0.1, 0.3, 1.0, 3.0],
    "ratio": [0.1, 0.2, 0.4],
    "l2": [1e-1, 1e-2, 1e-3, 1e-4, 1e-5],
    "beta2": [0.0, 0.1, 0.3, 1.0],
    "beta3": [0.0, 0.03, 0.1, 0.3],
}
GRID = {**TRAINING, **HEAD}


def options_of(method: str) -> list[str]:
    """What of GRID the method has."""
    takes = inspect.signature(HEADS[method]).parameters
    trained = list(TRAINING) if HEADS[method].recipe(1).epochs else []
    return trained + [name for name in HEAD if name in takes]


def settings(method: str, shots: int, only: list[str]) -> Iterator[tuple[str, FitConfig]]:
    """(name, config): the recipe first."""
    recipe = HEADS[method].recipe(shots)
    yield "recipe", recipe
    for option in only:
        for value in GRID[option]:
            config = changed(recipe, option, value)
            if config != recipe:
                yield f"{option} {value}", config


def changed(recipe: FitConfig, option: str, value: Any) -> FitConfig:
    if option == "lr epochs":
        lr, epochs = value.split()
        return dataclasses.replace(recipe, lr=float(lr), epochs=int(epochs))
    if option == "penalty":
        kind, weight = value.split()
        head = {**recipe.head, "penalty": kind}
        return dataclasses.replace(recipe, penalty_weight=float(weight), head=head)
    if option in HEAD:
        return dataclasses.replace(recipe, head={**recipe.head, option: value})
    return dataclasses.replace(recipe, **{option: value})


def held_out(records: Records, *used: torch.Tensor) -> torch.Tensor:
    """The numbers of the rows that are in none of `used`."""
    held = torch.ones(len(records), dtype=torch.bool)
    for rows in used:
        held[rows] = False
    return held.nonzero().flatten()


def rows_of(records: Records, shots: int, seed: int) -> tuple[Split, torch.Tensor]:
    """A split without validation rows, and the rows that are neither training nor test."""
    split = few_shot_split(records.label, records.names, shots=shots, seed=seed)
    held = held_out(records, split.train, split.test)
    nothing = torch.tensor([], dtype=torch.long)
    return dataclasses.replace(split, val=nothing, test=nothing), held


def measure(
    method: str, records: Records, config: FitConfig, shots: int, seed: int
) -> dict[str, Any]:
    """Metrics on the held-out rows."""
    split, held = rows_of(records, shots, seed)
    head = fit_head(
        method,
        records,
        split,
        config,
        TrainingRun(CPU, seed),
    )
    return metrics.all_metrics(*engine.all_logits(head, records, held, device=CPU))


def parser_of(doc: str, seeds: list[int]) -> argparse.ArgumentParser:
    """The options of every comparison over sources and shots."""
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("sources", nargs="+", metavar="SOURCE")
    parser.add_argument("--shots", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--seeds", type=int, nargs="+", default=seeds)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    return parser


def heading(cells: list[tuple[str, int]]) -> None:
    """The names of the columns, source and shots."""
    print(f"{'':26}" + "".join(f"{name[-9:]:>13}{shots:>3}" for name, shots in cells) + "     mean")


def main() -> None:
    parser = parser_of(__doc__, seeds=[101, 102])
    parser.add_argument("--method", choices=[m for m in HEADS if m != "auto"], default="rada")
    parser.add_argument("--only", nargs="+", choices=list(GRID))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    start = time.perf_counter()
    only = [name for name in options_of(args.method) if args.only is None or name in args.only]
    spatial = HEADS[args.method].needs_spatial
    tables = {
        Path(source).stem: open_source(source, need_spatial=spatial, progress=False)
        for source in args.sources
    }
    cells = [(name, shots) for name in tables for shots in args.shots]
    for name, records in tables.items():
        print(f"{name}: {records!r}")
    print(f"{args.method}, held-out accuracy / NLL, seeds {args.seeds}; columns: source, shots")
    heading(cells)
    line("zero-shot", [[measure("zeroshot", tables[name], FitConfig(epochs=0), shots, seed)
                        for seed in args.seeds] for name, shots in cells])  # fmt: skip
    per_shots = {shots: list(settings(args.method, shots, only)) for shots in args.shots}
    names = dict.fromkeys(name for rows in per_shots.values() for name, _ in rows)
    for label in names:
        columns = []
        for name, shots in cells:
            # the recipe of some shots may have a value that is another's change
            config = dict(per_shots[shots]).get(label, HEADS[args.method].recipe(shots))
            rows = [measure(args.method, tables[name], config, shots, s) for s in args.seeds]
            columns.append(rows)
        line(label, columns)
    print(f"{time.perf_counter() - start:.0f} s, {torch.get_num_threads()} threads")


def line(label: str, columns: list[list[dict[str, Any]]]) -> None:
    """One row of the table: the mean over seeds per column, then over columns."""
    accuracy = [100 * sum(row["accuracy"] for row in seeds) / len(seeds) for seeds in columns]
    nll = [sum(row["nll"] for row in seeds) / len(seeds) for seeds in columns]
    text = "".join(f"{a:>9.2f}/{n:.4f}" for a, n in zip(accuracy, nll, strict=True))
    mean = f"{sum(accuracy) / len(accuracy):>9.2f}/{sum(nll) / len(nll):.4f}"
    print(f"{label:26}{text}{mean}", flush=True)


if __name__ == "__main__":
    main()
