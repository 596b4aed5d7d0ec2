# SPDX-License-Identifier: Apache-2.0
"""`--method auto`: fit several methods on the same shots, keep what validation images prefer."""

from __future__ import annotations

import dataclasses
import itertools
import math
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from . import engine, metrics
from .data.records import Records
from .data.splits import Split
from .fitting import fit_head
from .heads import HEADS
from .heads.auto import Auto
from .recipes import RECIPES

CANDIDATES = ("zeroshot", "proker", "tip-adapter-f", "clip-adapter", "rada", "vtclip")
BLIND = ("proker", "rada")  # averaged where there is nothing to choose by
MAX_FOLDS = 4
REPORTED = ("accuracy", "nll_scaled", "temperature", "count")


def candidates(records: Records) -> list[str]:
    """The methods that these features allow."""
    able = records.has_spatial
    return [name for name in CANDIDATES if able or not getattr(HEADS[name], "needs_spatial", 0)]


def fit_auto(
    records: Records,
    split: Split,
    shots: int,
    *,
    device: torch.device,
    seed: int,
    log: Callable[[dict[str, Any]], None],
    progress: bool = False,
) -> tuple[Auto, list[dict[str, Any]]]:
    """The kept head, and for each candidate what validation images say of it and what it cost.

    Every candidate is fitted as it would be by its own name. Where there are no validation images,
    a cross-validation over the shots (`folds`) takes their place, and what it chose is then fitted
    on all of them.
    """

    def fitted(name: str, part: Split) -> Any:
        return fit_head(
            name,
            records,
            part,
            RECIPES[name](shots),
            device=device,
            seed=seed,
            log=lambda row: log({"candidate": name, **row}),
            progress=progress,
        )

    heads: dict[str, Any] = {}
    logits: dict[str, Tensor] = {}
    label = torch.empty(0, dtype=torch.long)
    rows: dict[str, dict[str, Any]] = {}
    for name in candidates(records):
        started = time.perf_counter()
        heads[name] = fitted(name, split)
        parts = folds(records, split) if len(split.val) == 0 else [split]
        seen = []
        for part in parts:
            head = heads[name] if part is split else fitted(name, part)
            allowed = engine.TrainingRows(records, part.val)
            seen.append(engine.all_logits(head, allowed, part.val, device=device))
        rows[name] = {"method": name}
        if seen:
            logits[name], label = (torch.cat(column) for column in zip(*seen, strict=True))
            temperature = metrics.fit_temperature(logits[name], label)
            found = metrics.report(logits[name], label, temperature)
            rows[name] |= {key: found[key] for key in REPORTED}
        rows[name]["seconds"] = time.perf_counter() - started
    chosen = choose_members(logits, label) if len(label) else dict.fromkeys(BLIND, 0.5)
    for name, row in rows.items():
        row["weight"] = chosen.get(name, 0.0)
    members = [
        {
            "method": name,
            "options": heads[name].options(),
            "temperature": rows[name].get("temperature", 1.0),
            "weight": weight,
        }
        for name, weight in chosen.items()
    ]
    kept = Auto(records.text.to(device), members=members, logit_scale=records.logit_scale)
    for head, name in zip(kept.heads, chosen, strict=True):
        head.load_state_dict(heads[name].state_dict())
    return kept.to(device).eval(), list(rows.values())


def folds(records: Records, split: Split) -> list[Split]:
    """Up to MAX_FOLDS splits of the training rows: each row validates once; none for one shot.

    Rows go round by their order within their class, so that every fold has every class to train on.
    """
    label = records.label[split.train]
    counts = torch.bincount(label)
    order = torch.zeros_like(label)
    for k in counts.nonzero().flatten().tolist():
        order[label == k] = torch.arange(int(counts[k]))
    smallest = int(counts[counts > 0].min()) if len(label) else 0
    number = min(MAX_FOLDS, smallest)
    if number < 2:
        return []
    parts = [(order % number) == i for i in range(number)]
    return [
        dataclasses.replace(split, train=split.train[~part], val=split.train[part])
        for part in parts
    ]


def choose_members(logits: Mapping[str, Tensor], label: Tensor) -> dict[str, float]:
    """Method to weight: the best pair by likelihood where it beats the best single method.

    logits: of each candidate [N, K] on the N validation images; each is given the temperature
    that suits it there (metrics.fit_temperature) before likelihoods and averages are taken.
    """
    shares = {
        name: (rows.double() / metrics.fit_temperature(rows, label)).log_softmax(dim=1)
        for name, rows in logits.items()
    }
    scores: dict[tuple[str, ...], float] = {
        (name,): metrics.nll(rows, label) for name, rows in shares.items()
    }
    for one, two in itertools.combinations(shares, 2):
        mean = torch.logaddexp(shares[one], shares[two]) - math.log(2)
        scores[one, two] = metrics.nll(mean, label)
    best = min(scores, key=lambda names: scores[names])
    return {name: 1 / len(best) for name in best}
