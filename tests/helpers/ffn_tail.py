# SPDX-License-Identifier: Apache-2.0
"""Inputs of ffn_cosine_logits as a trained layer has them, and how much cancels in its logits."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from vtclip.testing.problems import OPS

NAMES = OPS["ffn_cosine_logits"].differentiable


def draw(B: int, K: int, C: int, width: int) -> list[Tensor]:
    """In the order of NAMES."""
    return [
        torch.randn(B, K, width).relu(),
        torch.randn(C, width) * max(width, 1) ** -0.5,
        0.3 * torch.randn(C),
        torch.randn(B, K, C),
        1 + 0.3 * torch.randn(C),
        0.3 * torch.randn(C),
        torch.randn(K, C),
        torch.randn(B, C),
    ]


def largest_terms(inputs: Iterable[Tensor], residual: float, scale: float) -> float:
    """A cosine is a sum of products of both signs: the size of the largest such sum."""
    hidden, weight, bias, x, norm_weight, norm_bias, text, image = inputs
    z = F.layer_norm(x + hidden @ weight.T + bias, weight.shape[:1], norm_weight, norm_bias)
    y = F.normalize(text + residual * z, dim=-1)
    terms = (y * F.normalize(image, dim=-1)[:, None]).abs().sum(-1)
    return scale * float(terms.amax()) if terms.numel() else 0.0
