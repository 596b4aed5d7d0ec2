# SPDX-License-Identifier: Apache-2.0
"""How many images of each class train, validate and test: counted, warned of, printed."""

from __future__ import annotations

import logging
import statistics
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from vtclip.data.records import Records
from vtclip.data.splits import Split
from vtclip.files import Json, printable, several
from vtclip.names import option

logger = logging.getLogger(__name__)
ROLES = ("train", "val", "test")
LISTED = 20  # classes up to which each has its line
FEWEST = 3  # classes that are named where not all are


def images_per_class(records: Records, split: Split) -> Json:
    """Class name to its numbers of "train", "val" and "test" images."""
    counts = {role: _counts(records, getattr(split, role)) for role in ROLES}
    return {
        name: {role: counts[role][k] for role in ROLES}
        for k, name in enumerate(records.class_names)
    }


def usual_count(records: Records, split: Split) -> int:
    """Training images of the class in the middle, at least 1; all classes have them, as a rule."""
    return max(1, statistics.median_low(_counts(records, split.train)))


def warn_of_few(records: Records, split: Split, shots: int | str | None) -> None:
    """Say which classes train on fewer images than the `shots` that were named, or have no test."""
    names, train = records.class_names, _counts(records, split.train)
    if isinstance(shots, int):
        few = [f"{printable(name)} {n}" for name, n in zip(names, train, strict=True) if n < shots]
        if few:
            logger.warning(
                "%s %d: %d of %d classes %s on fewer images: %s",
                option("shots"), shots, len(few), len(names),
                "trains" if len(few) == 1 else "train", _some(few),
            )  # fmt: skip
    test = _counts(records, split.test)
    untested = [printable(name) for name, n in zip(names, test, strict=True) if not n]
    if untested:
        logger.warning(
            "%d of %d classes %s no test image, so that no number says how good %s: %s",
            len(untested), len(names),
            *(("has", "it is") if len(untested) == 1 else ("have", "they are")), _some(untested),
        )  # fmt: skip


def class_table(counts: Mapping[str, Mapping[str, int]]) -> str:
    """One line per class; of more than 20 the smallest, median and largest number of each role."""
    if len(counts) <= LISTED:
        rows = [(printable(name), [row[role] for role in ROLES]) for name, row in counts.items()]
        return _table(several(len(rows), "class", "classes"), rows)
    columns = [sorted(row[role] for row in counts.values()) for role in ROLES]
    rows = [
        ("fewest", [column[0] for column in columns]),
        ("median", [statistics.median_low(column) for column in columns]),
        ("most", [column[-1] for column in columns]),
    ]
    smallest = sorted(counts, key=lambda name: (counts[name]["train"], sum(counts[name].values())))
    rows += [
        (printable(name), [counts[name][role] for role in ROLES]) for name in smallest[:FEWEST]
    ]
    return _table(f"{len(counts)} classes, those with the fewest below", rows)


def _table(title: str, rows: Sequence[tuple[str, Sequence[int]]]) -> str:
    first = max(len(title), *(len(name) for name, _ in rows))
    lines = [f"{title:<{first}}" + "".join(f" {role:>6}" for role in ROLES)]
    lines += [f"{name:<{first}}" + "".join(f" {n:>6}" for n in numbers) for name, numbers in rows]
    return "\n".join(lines)


def _counts(records: Records, index: Tensor) -> list[int]:
    counted: list[int] = torch.bincount(
        records.label[index], minlength=len(records.class_names)
    ).tolist()
    return counted


def _some(words: Sequence[str]) -> str:
    return ", ".join(words[:5]) + (", ..." if len(words) > 5 else "")
