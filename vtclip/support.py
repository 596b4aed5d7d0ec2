# SPDX-License-Identifier: Apache-2.0
"""The labelled images that a head may keep or choose by: a few-shot set as one table."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

if TYPE_CHECKING:
    from .data.records import Records
    from .steps import TrainingRows


class Support(NamedTuple):
    """image [N, C] of length 1, label [N]; spatial [N, L, Cs] where it was asked for."""

    image: Tensor
    label: Tensor
    spatial: Tensor | None = None


def support_of(
    rows: TrainingRows | Records, index: Tensor, device: torch.device, *, spatial: bool = False
) -> Support:
    """Rows `index`; image is the normalised mean over the augmented passes, where there are any.

    The spatial features are those of the plain pass.
    """
    plain = rows.batch(index, 0)
    passes = range(1, rows.num_passes + 1)
    images = [rows.batch(index, one).image for one in passes] or [plain.image]
    mean = torch.stack([F.normalize(image, dim=-1) for image in images]).mean(dim=0)
    tokens = plain.spatial.to(device) if spatial and plain.spatial is not None else None
    return Support(F.normalize(mean, dim=-1).to(device), plain.label.to(device), tokens)
