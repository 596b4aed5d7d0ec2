# SPDX-License-Identifier: Apache-2.0
"""Device, threads, shots and rows of a fit, from what was asked for."""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from .data.records import Records
from .data.splits import Split, few_shot_split, split_by_roles
from .names import SHOTS

logger = logging.getLogger(__name__)


def check_threads(threads: int | None) -> None:
    if threads is not None and threads < 1:
        raise ValueError(f"threads must be at least 1, got {threads}")


def set_threads(threads: int | None) -> None:
    check_threads(threads)
    if threads is not None:
        torch.set_num_threads(threads)


def choose_device(device: str | torch.device | None) -> torch.device:
    """The named device, or the first GPU where there is one, else the CPU."""
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError:
        raise ValueError(f"device must be cpu, cuda or cuda:N, got {str(device)!r}") from None
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device {chosen}: this torch sees {torch.cuda.device_count()} GPUs")
    if chosen.type not in ("cpu", "cuda"):
        raise ValueError(f"device must be cpu, cuda or cuda:N, got {str(device)!r}")
    return chosen


def usual_shots(records: Records, test_fraction: float) -> int:
    """16, or the largest of 8, 4, 2, 1 that every class has besides its test share."""
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
