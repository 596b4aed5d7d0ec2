# SPDX-License-Identifier: Apache-2.0
"""How support heads choose hyper-parameters: `python benchmarks/choose_search.py SOURCE...`

Fits every head that keeps a support set on few-shot draws of each source, lets it choose alpha,
beta and the like by several rules, and prints accuracy and negative log-likelihood, each at its own
temperature, on images that neither train nor validate nor test. The draws are those of seeds 101 to
106, so that reported seeds are others.

    default     nothing is chosen
    accuracy    validation accuracy, ties broken by likelihood, then by the prior
    likelihood  without a prior
    factor F    likelihood with the prior, PRIOR_FACTOR = F; 2 is the package's rule
    val alone   factor 2, and tip-adapter and tip-x do not compare support images with each other
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from choose_defaults import CPU, heading, held_out, line, parser_of
from torch import Tensor

from vtclip.data import Records, few_shot_split, open_source
from vtclip.heads import HEADS, _support
from vtclip.train import engine, metrics
from vtclip.train.methods import build_head
from vtclip.train.rows import support_of
from vtclip.train.steps import TrainingRun

SUPPORT_METHODS = ("tip-adapter", "tip-x", "proker", "takl", "proto-clip", "tip-adapter-f")
RULES = ("default", "accuracy", "likelihood", "factor 1.5", "factor 2", "factor 4", "val alone")
NLL = _support.scaled_nll


def hits_first(logits: Tensor, label: Tensor) -> float:
    """A wrong prediction costs more than any likelihood."""
    return 1e6 * int((logits.argmax(dim=1) != label).sum()) + NLL(logits, label)


@contextmanager
def searching_by(rule: str) -> Iterator[None]:
    factor = {"likelihood": math.inf, "factor 1.5": 1.5, "factor 4": 4.0}.get(rule, 2.0)
    before = _support.PRIOR_FACTOR
    _support.PRIOR_FACTOR = factor
    _support.scaled_nll = hits_first if rule == "accuracy" else NLL
    try:
        yield
    finally:
        _support.PRIOR_FACTOR, _support.scaled_nll = before, NLL


def trained(method: str, records: Records, train: Tensor, shots: int, seed: int) -> Any:
    """The head before it chooses."""
    config = HEADS[method].recipe(shots)
    torch.manual_seed(seed)
    head: Any = build_head(method, records, config, CPU)
    rows = engine.TrainingRows(records, train)
    head.fit_support(support_of(rows, train, CPU))
    if config.epochs:
        nothing = torch.tensor([], dtype=torch.long)
        engine.train_head(
            head,
            rows,
            train,
            nothing,
            config,
            TrainingRun(CPU, seed),
        )
    return head


def measure(method: str, records: Records, shots: int, seed: int) -> dict[str, dict[str, Any]]:
    """Metrics on the held-out rows, by rule."""
    split = few_shot_split(records.label, records.names, shots=shots, seed=seed)
    held = held_out(records, split.train, split.val, split.test)
    head = trained(method, records, split.train, shots, seed)
    start = {name: getattr(head, name) for name in ("alpha", "beta", "lam", "gamma")
             if hasattr(head, name)}  # fmt: skip
    val = support_of(records, split.val, CPU)
    results = {}
    for rule in RULES:
        for name, value in start.items():
            setattr(head, name, value)
        head.trains_keys = rule == "val alone" or getattr(type(head), "trains_keys", False)
        with searching_by(rule):
            if rule != "default":
                head.choose(val)
        logits, label = engine.all_logits(head, records, held, device=CPU)
        logits = logits / metrics.fit_temperature(logits, label)
        values = {"accuracy": metrics.accuracy(logits, label), "nll": metrics.nll(logits, label)}
        results[rule] = values
    return results


def main() -> None:
    parser = parser_of(__doc__, seeds=list(range(101, 107)))
    parser.add_argument("--methods", nargs="+", default=SUPPORT_METHODS, choices=SUPPORT_METHODS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    start = time.perf_counter()
    tables = {Path(source).stem: open_source(source, progress=False) for source in args.sources}
    cells = [(name, shots) for name in tables for shots in args.shots]
    print(f"held-out accuracy / NLL at T, seeds {args.seeds}; columns: source, shots")
    heading(cells)
    for method in args.methods:
        columns = [
            [measure(method, tables[name], shots, seed) for seed in args.seeds]
            for name, shots in cells
        ]
        for rule in RULES:
            line(f"{method} {rule}", [[by_rule[rule] for by_rule in seeds] for seeds in columns])
    print(f"{time.perf_counter() - start:.0f} s, {torch.get_num_threads()} threads")


if __name__ == "__main__":
    main()
