# SPDX-License-Identifier: Apache-2.0
"""Rows as a benchmark writes them, made by hand, for the tests of its report."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

CLASSES = ("ant", "bee", "cat", "dog")
COUNT = 200


def bins(draw: random.Random) -> list[list[float | None]]:
    found: list[list[float | None]] = [[None, None, 0] for _ in range(15)]
    for number in range(4, 15):
        share = draw.uniform(0.2, 1.0)
        found[number] = [(number + 0.5) / 15, share, draw.randrange(1, 30)]
    return found


def values(accuracy: float, draw: random.Random, classes: Iterable[str]) -> dict[str, Any]:
    return {
        "accuracy": accuracy,
        "interval95": [accuracy - 0.04, accuracy + 0.06],
        "macro_f1": accuracy,
        "nll": draw.uniform(0.3, 1.0),
        "ece": draw.uniform(0.05, 0.1),
        "nll_scaled": draw.uniform(0.2, 0.3),
        "ece_scaled": draw.uniform(0.01, 0.05),
        "temperature": draw.uniform(0.8, 2.0),
        "count": COUNT,
        "per_class": {name: draw.random() for name in classes},
        "reliability": {"raw": bins(draw), "scaled": bins(draw)},
    }


def make_row(
    source: str = "animals",
    method: str = "rada",
    shots: int = 4,
    seed: int = 1,
    accuracy: float = 0.7,
    *,
    zero_shot: float = 0.6,
    data: str | None = None,
    model: str = "RN50:openai",
    classes: Iterable[str] = CLASSES,
    config: Mapping[str, Any] | None = None,
    **more: Any,
) -> dict[str, Any]:
    """One finished run; `data`: the root of a data set with its official split."""
    classes = list(classes)
    draw = random.Random(ascii((source, method, shots, seed)))
    return {
        "key": f"{source}-{method}-{shots}-{seed}",
        "time": 1000.0,
        "source": source,
        "method": method,
        "shots": shots,
        "seed": seed,
        "accuracy": accuracy,
        "zero_shot": values(zero_shot, random.Random(ascii(source)), classes),
        "adapted": values(accuracy, draw, classes),
        "seconds": {"features": 0.1, "train": draw.uniform(1, 2), "total": 3.0},
        "memory_mb": {"train": 300.0},
        "peak_memory_mb": 500.0 + seed,
        "device": "cpu (1 threads)",
        "versions": {"vtclip": "1.2.3", "torch": "2.15.0"},
        "revision": "0123456789abcdef0123",
        "config": {
            "source": source,
            "data": data,
            "model": model,
            "templates": None,
            "spatial": None,
            "prompt": None,
            "test_fraction": 0.5,
            "augment_passes": 0,
            "base_to_new": False,
            "fit": {"epochs": 10 * shots, "lr": 0.001},
            **(config or {}),
        },
        "digests": {"images": "a1" * 32, "split": f"{seed:064x}"},
        "split": f"{shots * 100 + seed:064x}",
        "classes": classes,
        "test": {"images": COUNT, "unreadable": []},
        **more,
    }


def grid(
    sources: Iterable[str] = ("animals",),
    methods: Iterable[str] = ("rada", "proker"),
    shots: Iterable[int] = (1, 4, 16),
    seeds: Iterable[int] = (1, 2, 3),
    **more: Any,
) -> list[dict[str, Any]]:
    """A row for every combination, accuracies drawn between 0.55 and 0.95."""
    draw = random.Random(7)
    return [
        make_row(source, method, number, seed, round(draw.uniform(0.55, 0.95), 6), **more)
        for source in sources
        for method in methods
        for number in shots
        for seed in seeds
    ]


def write(folder: Path, rows: Iterable[Mapping[str, Any]], tail: str = "") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "results.jsonl").write_text(lines + tail, encoding="utf-8")
    return folder
