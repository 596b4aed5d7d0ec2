# SPDX-License-Identifier: Apache-2.0
"""Which rows of a table train, validate and test, and what training may see of them."""

from __future__ import annotations

import logging

import torch
from torch import Tensor
from torch.nn import functional as F

from vtclip.data.records import Batch, Records
from vtclip.data.splits import ALL, EXACT, Split, few_shot_split, split_by_roles
from vtclip.heads import Support
from vtclip.names import SHOTS, option

logger = logging.getLogger(__name__)


def usual_shots(records: Records, test_fraction: float) -> int:
    """16, or the largest of 8, 4, 2, 1 that every class has beyond its test share."""
    counts = torch.bincount(records.label, minlength=len(records.class_names)).tolist()
    smallest = min((count - int(count * test_fraction) for count in counts), default=0)
    shots = next((known for known in reversed(SHOTS) if known <= smallest), min(SHOTS))
    if shots < max(SHOTS) and test_fraction < 1:
        logger.warning(
            "shots %d: the smallest class has %d images besides its test share", shots, smallest
        )
    return shots


def split_rows(
    records: Records,
    learns: bool,
    shots: int | str,
    seed: int,
    test_fraction: float,
    rule: str = EXACT,
) -> Split:
    """Train, validation and test rows; a method that learns nothing may test on every row.

    rule: "exact" or "up to", see `vtclip.data.splits`; a run's config has it as "draw", and runs
    from before there were two lack it, which means "exact".
    Rows of a data set were drawn already, and keep their roles; those that a folder or a list
    gives its images are pools to draw from.
    """
    if not learns and test_fraction == 1:
        shots = 0
    elif learns and shots != ALL and (isinstance(shots, str) or shots < 1):
        raise ValueError(f"{option('shots')} must be at least 1 to train, got {shots}")
    if records.roles is not None and "set" in records.info:
        return split_by_roles(records.label, records.names, records.roles)
    split = few_shot_split(
        records.label,
        records.names,
        shots=shots,
        seed=seed,
        test_fraction=test_fraction,
        class_names=records.class_names,
        rule=rule,
        roles=records.roles,
    )
    if len(split.test) == 0:
        raise ValueError(no_test_images(test_fraction))
    return split


def no_test_images(test_fraction: float) -> str:
    """The error of a split without test images."""
    return (
        f"{option('test_fraction')} {test_fraction:g} leaves no test images: name some as "
        f"{option('test')} SOURCE, or keep a share above 0 and train on all images after the "
        f"evaluation with {option('final')}"
    )


def test_rows(records: Records) -> Tensor:
    """Every row, or those that the source calls test rows."""
    if records.roles is None:
        return torch.arange(len(records))
    return (records.roles == 2).nonzero().flatten()


class TrainingRows:
    """The rows of `records` that training may see; any other row is an IndexError."""

    def __init__(self, records: Records, *indices: Tensor) -> None:
        self.num_passes = records.num_passes
        self.several = records.targets is not None  # a row may have more than one class
        self._batch = records.batch
        self._allowed = torch.zeros(len(records), dtype=torch.bool)
        for index in indices:
            self._allowed[index] = True
        self._records = records

    def labels(self, index: Tensor) -> Tensor:
        """The classes [n] of rows that training may see."""
        return self._records.label[self._checked(index)]

    def batch(self, index: Tensor, augment_pass: int = 0) -> Batch:
        return self._batch(self._checked(index), augment_pass)

    def _checked(self, index: Tensor) -> Tensor:
        outside = index[~self._allowed[index]]
        if len(outside):
            raise IndexError(f"row {int(outside[0])} is neither a training nor a validation row")
        return index


def shuffled(index: Tensor, seed: int, epoch: int) -> Tensor:
    """The order of one epoch, a function of seed and epoch alone: resuming needs no state."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    return index[torch.randperm(len(index), generator=generator)]


def epoch_rows(index: Tensor, label: Tensor | None, seed: int, epoch: int) -> Tensor:
    """The rows of one epoch in their order, each class as often as every other.

    label: of the rows `index`; None leaves classes as frequent as they are. Where all classes have
    as many rows, an epoch has each row once, in the order of `shuffled`. Else every class has as
    many as the mean: a larger one leaves out others of its rows in each epoch, a smaller one
    repeats its own.
    """
    each = _rows_per_class(label)
    if label is None or each is None:
        return shuffled(index, seed, epoch)
    order = shuffled(torch.arange(len(index)), seed, epoch)
    rows = []
    for k in sorted(set(label.tolist())):
        own = order[label[order] == k]
        rows.append(own.repeat(-(-each // len(own)))[:each])
    return index[shuffled(torch.cat(rows), seed, epoch)]


def epoch_size(index: Tensor, label: Tensor | None) -> int:
    """How many rows `epoch_rows` has."""
    each = _rows_per_class(label)
    return len(index) if label is None or each is None else each * len(set(label.tolist()))


def _rows_per_class(label: Tensor | None) -> int | None:
    """The mean number of rows of a class, at least 1; None where all classes have as many."""
    if label is None or not len(label):
        return None
    counts = torch.bincount(label)
    counts = counts[counts > 0]
    if bool((counts == counts[0]).all()):
        return None
    return max(1, round(len(label) / len(counts)))


def support_of(
    rows: TrainingRows | Records, index: Tensor, device: torch.device, *, spatial: bool = False
) -> Support:
    """Rows `index`; image is the normalised mean over the augmented passes, where there are any;
    spatial, where asked for, is that of the plain pass.
    """
    plain = rows.batch(index, 0)
    passes = range(1, rows.num_passes + 1)
    images = [rows.batch(index, number).image for number in passes] or [plain.image]
    mean = torch.stack([F.normalize(image, dim=-1) for image in images]).mean(dim=0)
    tokens = plain.spatial.to(device) if spatial and plain.spatial is not None else None
    return Support(F.normalize(mean, dim=-1).to(device), plain.label.to(device), tokens)
