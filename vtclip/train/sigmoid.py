# SPDX-License-Identifier: Apache-2.0
"""Probabilities of classes that do not exclude each other, and the loss that trains them.

    p_k = sigmoid(z_k),  z_k = a * s_k + c_k

s [B, K] are the logits of a head. Softmax knows no level, only differences: CLIP's logits, 100
times a cosine, all lie near 25, where a sigmoid is 1 for every class. So a scale a > 0 and an
offset c_k per class are needed, as in SigLIP's loss (arXiv 2303.15343, eq. 1, with one offset for
all) and in Platt's calibration (1999, one per classifier):

    loss = 1 / B * sum over b, k of -log sigmoid(y_bk * z_bk),  y = 1 or -1

`fit_sigmoid` minimises the sum of these over rows whose logits are given, plus the negative logs of
the priors log a ~ N(0, 1) and b_k ~ N(log(q / (1 - q)), 2). Here b_k = c_k + a * (mean of s_k) is
the offset about the mean logit and q the share of positive entries. Each prior weighs about as much
as one image, which keeps classes that are separated without error, or do not occur, finite.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

WIDTH = 2.0  # standard deviation of the prior of an offset


@dataclass(frozen=True)
class Sigmoid:
    """The scale a and the offsets c [K] of the module's docstring."""

    scale: float
    offset: Tensor

    def __call__(self, logits: Tensor) -> Tensor:
        """z [B, K] of the head's logits."""
        return self.scale * logits + self.offset.to(logits)

    def to_json(self) -> dict[str, Any]:
        return {"scale": self.scale, "offset": self.offset.tolist()}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Sigmoid:
        return cls(float(values["scale"]), torch.tensor(values["offset"], dtype=torch.float64))


def sigmoid_loss(logits: Tensor, targets: Tensor, sigmoid: Sigmoid) -> Tensor:
    """The loss of logits [B, K] and targets [B, K]: summed over classes, mean over the batch."""
    z = sigmoid(logits)
    return F.binary_cross_entropy_with_logits(z, targets.to(z), reduction="sum") / len(z)


def fit_sigmoid(logits: Tensor, targets: Tensor) -> Sigmoid:
    """The scale and offsets that make targets [N, K] most likely, by L-BFGS in float64."""
    s, y = logits.detach().cpu().double(), targets.detach().cpu().double()
    if s.shape != y.shape or s.dim() != 2 or not len(s):
        raise ValueError(
            f"sigmoid: logits and targets must be [N, K], got {list(s.shape)} and {list(y.shape)}"
        )
    middle = s.mean(dim=0)
    share = (y.sum() + 0.5) / (y.numel() + 1)
    prior = math.log(float(share / (1 - share)))
    log_a = s.new_zeros((), requires_grad=True)
    b = s.new_full((s.shape[1],), prior).requires_grad_()
    optimizer = torch.optim.LBFGS([log_a, b], max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        z = log_a.exp() * (s - middle) + b
        loss = F.binary_cross_entropy_with_logits(z, y, reduction="sum")
        loss = loss + log_a**2 / 2 + ((b - prior) ** 2).sum() / (2 * WIDTH**2)
        (loss / len(s)).backward()  # type: ignore[no-untyped-call]
        return (loss / len(s)).detach()

    with torch.enable_grad():
        optimizer.step(closure)  # type: ignore[no-untyped-call]
    a = math.exp(float(log_a.detach()))
    return Sigmoid(a, b.detach() - a * middle)
