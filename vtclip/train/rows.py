# SPDX-License-Identifier: Apache-2.0
"""Which rows of a table train, validate and test, and what training may see of them."""

from __future__ import annotations

import logging

import torch
from torch import Tensor
from torch.nn import functional as F

from vtclip.data.records import Batch, Records
from vtclip.data.splits import Split, few_shot_split, split_by_roles
from vtclip.heads import Support
from vtclip.names import SHOTS

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
    records: Records, learns: bool, shots: int, seed: int, test_fraction: float
) -> Split:
    """Train, validation and test rows; a method that learns nothing may test on every row.

    Rows that have roles were drawn already, and keep them.
    """
    if not learns and test_fraction == 1:
        shots = 0
    elif learns and shots < 1:
        raise ValueError(f"shots must be at least 1 to train, got {shots}")
    if records.roles is not None:
        return split_by_roles(records.label, records.names, records.roles)
    split = few_shot_split(
        records.label,
        records.names,
        shots=shots,
        seed=seed,
        test_fraction=test_fraction,
        class_names=records.class_names,
    )
    if len(split.test) == 0:
        raise ValueError(f"test_fraction {test_fraction} leaves no test images")
    return split


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

    def batch(self, index: Tensor, augment_pass: int = 0) -> Batch:
        outside = index[~self._allowed[index]]
        if len(outside):
            raise IndexError(f"row {int(outside[0])} is neither a training nor a validation row")
        return self._batch(index, augment_pass)


def shuffled(index: Tensor, seed: int, epoch: int) -> Tensor:
    """The order of one epoch, a function of seed and epoch alone: resuming needs no state."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    return index[torch.randperm(len(index), generator=generator)]


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
