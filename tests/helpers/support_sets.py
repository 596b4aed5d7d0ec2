# SPDX-License-Identifier: Apache-2.0
"""Small support sets in float64, heads fitted to them, and what their search minimises."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from vtclip.heads import Support


def unit(x: Tensor) -> Tensor:
    return x / x.norm(dim=-1, keepdim=True)


def table(K: int, label: Tensor, C: int = 8, B: int = 6) -> tuple[Tensor, Tensor, Support]:
    """text [K, C], image [B, C], support with these labels; none of length 1."""
    text, image = torch.randn(K, C).double(), 3 * torch.randn(B, C).double()
    return text, image, Support(2 * torch.randn(len(label), C).double(), label)


def fitted(kind: Any, text: Tensor, support: Support, **options: Any) -> Any:
    head = kind(text, **options)
    head.fit_support(support)
    return head


def scaled_nll(logits: Tensor, label: Tensor) -> float:
    """Sum of the losses at the best of seven temperatures, each with its prior."""
    return min(
        float(F.cross_entropy(logits / 2 ** (step / 2), label, reduction="sum"))
        + (step / 2 * math.log(2)) ** 2 / 2
        for step in range(-3, 4)
    )
