# SPDX-License-Identifier: Apache-2.0
"""Few-shot images without labels: per class the images that zero-shot is surest of.

The pool is every image that is not a test image; of a data set with official lists, its training
list. Each is given the class of its largest zero-shot logit, and of those named alike the `shots`
with the largest probability are kept (arXiv 2204.03649, section 3.2). No true label of the pool is
read, and there are no validation images: what they would choose keeps its default.
"""

from __future__ import annotations

import copy
import dataclasses
import logging

import torch
from torch import Tensor

from vtclip.data.records import Records
from vtclip.data.splits import Split
from vtclip.files import Json, printable
from vtclip.heads import HEADS
from vtclip.names import option
from vtclip.train import engine
from vtclip.train.methods import zero_shot_head
from vtclip.train.rows import split_rows

logger = logging.getLogger(__name__)


def check_pseudo_labels(method: str, shots: int | str | None, **others: bool) -> None:
    """Refuse what pseudo-labels cannot be combined with."""
    name = option("pseudo_labels")
    if not HEADS[method].learns:
        raise ValueError(f"method {method} learns nothing from images: {name} cannot be set")
    if isinstance(shots, int) and shots < 1:
        raise ValueError(f"{option('shots')} must be at least 1 with {name}, got {shots}")
    for other, value in others.items():
        if value:
            raise ValueError(f"{name} cannot be combined with {option(other)}")


def unlabelled_split(records: Records, seed: int, test_fraction: float) -> Split:
    """The test rows of a labelled run; train holds the pool, val nothing."""
    split = split_rows(records, False, 0, seed, test_fraction)
    pool = split.train
    if "set" not in records.info:
        held_out = torch.zeros(len(records), dtype=torch.bool)
        held_out[split.test] = True
        held_out[split.val] = True  # validation images of the source's own
        pool = (~held_out).nonzero().flatten()
    if not len(pool):
        raise ValueError(
            f"{option('pseudo_labels')}: every image is a test image, so that none is left to name"
        )
    return dataclasses.replace(split, train=pool, val=split.val[:0])


def pseudo_labelled(
    records: Records, split: Split, shots: int, device: torch.device
) -> tuple[Records, Split]:
    """The records with pseudo-labels as labels, and the split with the kept rows as train.

    split: as `unlabelled_split` gives it. Rows that are not kept get the label 0, so that the
    result holds no true label. A class named fewer than `shots` times keeps what it has.
    """
    zero_shot = zero_shot_head(records, device)
    logits, _ = engine.all_logits(zero_shot, records, split.train, device=device)
    kept, label = surest(logits, shots)
    counts = torch.bincount(label, minlength=len(records.class_names)).tolist()
    short = [
        f"{printable(name)} {n}"
        for name, n in zip(records.class_names, counts, strict=True)
        if n < shots
    ]
    if short:
        logger.warning(
            "pseudo-labels: %d of %d classes have fewer than %d images: %s%s",
            len(short), len(counts), shots, ", ".join(short[:5]), ", ..." if short[5:] else "",
        )  # fmt: skip
    named = copy.copy(records)
    named.label = torch.zeros_like(records.label)
    named.label[split.train[kept]] = label
    return named, dataclasses.replace(split, train=split.train[kept])


def surest(logits: Tensor, shots: int) -> tuple[Tensor, Tensor]:
    """logits [N, K] -> rows in ascending order and their classes: per argmax, the surest `shots`.

    Of equally sure rows the first are kept.
    """
    probability, label = logits.double().softmax(dim=1).max(dim=1)
    order = probability.argsort(descending=True, stable=True)
    per_class = [order[label[order] == k][:shots] for k in range(logits.shape[1])]
    kept = torch.cat(per_class).sort().values
    return kept, label[kept]


def pseudo_report(named: Records, records: Records, split: Split) -> Json:
    """What true labels say of the kept rows' pseudo-labels, for the record only."""
    right = named.label[split.train] == records.label[split.train]
    return {"pseudo_labels": True, "pseudo_label_accuracy": float(right.double().mean())}
