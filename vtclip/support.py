# SPDX-License-Identifier: Apache-2.0
"""Rows of a table as the few labelled images that a head keeps or chooses by."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from vtclip.heads import Support

if TYPE_CHECKING:
    from .data.records import Records
    from .steps import TrainingRows


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
