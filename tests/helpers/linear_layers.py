# SPDX-License-Identifier: Apache-2.0
"""Two linear layers side by side, by `projections` and one by one."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from vtclip.ops._projections import Layer, projections

Score = Callable[..., Tensor]


def layers() -> tuple[list[Tensor], Score, Score]:
    """Six float64 leaves: input, weight and bias of each; the score of both ways to the outputs."""
    draws = torch.Generator().manual_seed(0)

    def new(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draws, dtype=torch.float64).requires_grad_()

    leaves = [t for rows in ((4,), (4, 3)) for t in (new(*rows, 5), new(6, 5), new(6))]

    def fused(*tensors: Tensor) -> Tensor:
        outputs = projections([Layer(*tensors[:3]), Layer(*tensors[3:])])
        return sum(out.sin().sum() for out in outputs)

    def plainly(*tensors: Tensor) -> Tensor:
        pairs = (tensors[:3], tensors[3:])
        return sum(torch.nn.functional.linear(*each).sin().sum() for each in pairs)

    return leaves, fused, plainly
