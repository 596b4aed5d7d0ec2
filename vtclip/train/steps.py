# SPDX-License-Identifier: Apache-2.0
"""The pieces of one training step: its rows, its order, its loss, its optimizer."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vtclip.heads import Head
from vtclip.heads.config import FitConfig

if TYPE_CHECKING:
    from vtclip.data.records import Batch


def compute_logits(head: Head, batch: Batch, device: torch.device) -> Tensor:
    """Logits [B, K] of one batch, which is moved to `device` first."""
    image = batch.image.to(device)
    if not head.needs_spatial:
        return head(image)
    mask = None if batch.spatial_mask is None else batch.spatial_mask.to(device)
    spatial = None if batch.spatial is None else batch.spatial.to(device)
    return head(image, spatial, mask)


def class_loss(logits: Tensor, label: Tensor, config: FitConfig) -> Tensor:
    """Mean over the batch of cross-entropy or of the generalised one; see `FitConfig.loss`."""
    if config.loss == "ce":
        return F.cross_entropy(logits, label, label_smoothing=config.label_smoothing)
    log_p = -F.cross_entropy(logits, label, reduction="none")
    q = config.gce_q
    return (-torch.expm1(q * log_p) / q).mean()


def training_loss(head: Head, batch: Batch, config: FitConfig, device: torch.device) -> Tensor:
    """`class_loss`, + penalty_weight * mean penalty where that is above 0.

    The weight 0 leaves the penalty uncomputed.
    """
    label = batch.label.to(device)
    if not config.penalty_weight:
        logits = compute_logits(head, batch, device).float()
        return class_loss(logits, label, config)
    seen = head.forward_with_penalty(batch.image.to(device))
    loss = class_loss(seen.logits.float(), label, config)
    return loss + config.penalty_weight * seen.penalty.mean()


def make_optimizer(parameters: list[nn.Parameter], config: FitConfig) -> torch.optim.Optimizer:
    if config.optimizer == "sgd":
        return torch.optim.SGD(
            parameters, config.lr, momentum=0.9, weight_decay=config.weight_decay
        )
    return torch.optim.AdamW(
        parameters, config.lr, eps=config.eps, weight_decay=config.weight_decay
    )


def put_back(parameters: list[nn.Parameter], good: list[Tensor]) -> None:
    with torch.no_grad():
        for parameter, kept in zip(parameters, good, strict=True):
            parameter.copy_(kept)


def backward(
    loss: Tensor, optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter]
) -> Tensor:
    """New gradients of all parameters, and their norm."""
    optimizer.zero_grad(set_to_none=True)
    loss.backward()  # type: ignore[no-untyped-call]
    return nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])


def not_finite(
    loss: float, number: int, epoch: int, lr: float, rows: Tensor, note: str = ""
) -> FloatingPointError:
    """The error of a step whose loss, or else whose gradient, is not finite."""
    what = "gradient" if math.isfinite(loss) else "loss"
    at = f"step {number} (epoch {epoch}, lr {lr:g}, rows {rows[:4].tolist()}...)"
    return FloatingPointError(f"fit: {what} is not finite at {at}{note}")
