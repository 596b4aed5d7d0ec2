# SPDX-License-Identifier: Apache-2.0
"""Published accuracies, read from published.json: what was printed, where, and what to know of it.

Numbers in percent, as printed. They come from other code, splits of the same official lists and
often other choices of hyper-parameters, so that differences of about a point mean little.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from types import MappingProxyType

__all__ = ["Published", "Tables", "matching", "mean_over", "read_published"]


@dataclass(frozen=True)
class Published:
    """One printed number.

    shots: images per class; 0 for none, None for a whole training set.
    part: of base-to-new: "base", "new" or "harmonic mean".
    templates: of ImageNet, where it is known: "one", or "imagenet7" for the mean of seven.
    recomputed: what the printed entries give, where that is another number.
    """

    method: str
    set: str
    backbone: str
    shots: int | None
    setting: str
    accuracy: float
    source: str
    part: str | None = None
    variant: str | None = None
    templates: str | None = None
    recomputed: float | None = None
    caveat: str | None = None


@dataclass(frozen=True)
class Tables:
    """All records; titles of sets; sets of each average; title and place of each source."""

    records: tuple[Published, ...]
    sets: Mapping[str, str]
    averages: Mapping[str, Sequence[str]]
    sources: Mapping[str, Mapping[str, str]]


@functools.cache
def read_published() -> Tables:
    file = resources.files("vtclip.bench").joinpath("published.json")
    content = json.loads(file.read_text(encoding="utf-8"))
    records = tuple(Published(**record) for record in content["records"])
    read_only = (MappingProxyType(content[name]) for name in ("sets", "averages", "sources"))
    return Tables(records, *read_only)


def matching(
    method: str,
    name: str,
    backbone: str,
    shots: int,
    *,
    part: str | None = None,
    templates: str | None = None,
) -> list[Published]:
    """What was printed for this set, backbone and shots, the one to compare with first.

    part: None for all classes. templates: those of the other side; records that are known to be of
    the same come first.
    """
    settings = ("base-to-new",) if part else ("zero-shot",) if shots == 0 else ("few-shot",)
    if part and method == "zeroshot":
        shots = 16  # printed in the tables of 16 shots, which it does not use
    records = [
        record
        for record in read_published().records
        if record.setting in settings
        and (record.method, record.set, record.backbone) == (method, name, backbone)
        and (record.shots, record.part) == (shots, part)
    ]
    preferred = "imagenet7" if templates == "imagenet7" else "one"
    return sorted(records, key=lambda record: record.templates != preferred)


def mean_over(
    method: str, names: Sequence[str], backbone: str, shots: int, *, templates: str | None = None
) -> float | None:
    """Mean of what was printed for each of the sets, or None where one has no number."""
    rows = [matching(method, name, backbone, shots, templates=templates) for name in names]
    if not rows or not all(rows):
        return None
    return sum(row[0].accuracy for row in rows) / len(rows)
