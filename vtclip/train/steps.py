# SPDX-License-Identifier: Apache-2.0
"""The pieces of a training: where it runs, the loss of one step, its optimizer and its errors."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from vtclip.distributed import Interrupted
from vtclip.heads import Head
from vtclip.heads.config import FitConfig, check_seed
from vtclip.train.checkpoint import Checkpoint
from vtclip.train.sigmoid import Sigmoid, sigmoid_loss

if TYPE_CHECKING:
    from vtclip.data.records import Batch


@dataclass(frozen=True)
class TrainingRun:
    """Where and how a training runs, whatever it trains.

    log: called with each row of numbers. checkpoint: where the state is saved, if anywhere, and,
    with `resume`, where the training goes on from. balanced: every class is shown as often as every
    other, however many images it has.
    """

    device: torch.device
    seed: int
    log: Callable[[Mapping[str, object]], None] = lambda row: None
    checkpoint: Checkpoint | None = None
    resume: bool = False
    balanced: bool = False
    progress: bool = False

    def start(self, module: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[int, float]:
        """Seed torch, or restore the saved state; returns the steps done and the epoch's losses."""
        torch.manual_seed(check_seed(self.seed))
        if self.checkpoint is None or not self.resume:
            return 0, 0.0
        return self.checkpoint.load(module, optimizer)

    def steps(self, first: int, total: int) -> tqdm[int]:
        """The numbers of the steps to do, behind a progress bar where stderr is a terminal."""
        hidden = None if self.progress else True
        return tqdm(range(first, total), "train", disable=hidden, initial=first, total=total,
                    leave=False)  # fmt: skip

    def each(self, names: Sequence[str], what: str) -> Iterator[str]:
        """The names one by one, behind a bar that shows the one at work."""
        hidden = None if self.progress else True
        with tqdm(total=len(names), desc=what, disable=hidden, leave=False) as bar:
            for name in names:
                bar.set_postfix_str(name)
                yield name
                bar.update()

    def interrupted(self, signum: int, step: int) -> Interrupted:
        return Interrupted(signum, step, None if self.checkpoint is None else self.checkpoint.path)


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


def training_loss(
    head: Head,
    batch: Batch,
    config: FitConfig,
    device: torch.device,
    sigmoid: Sigmoid | None = None,
) -> Tensor:
    """`class_loss`, + penalty_weight * mean penalty where that is above 0.

    The weight 0 leaves the penalty uncomputed. sigmoid: the loss is `sigmoid_loss`, of rows that
    may have more than one class.
    """

    def loss_of(logits: Tensor) -> Tensor:
        if sigmoid is not None and batch.targets is not None:
            return sigmoid_loss(logits.float(), batch.targets.to(device), sigmoid)
        return class_loss(logits.float(), batch.label.to(device), config)

    if not config.penalty_weight:
        return loss_of(compute_logits(head, batch, device))
    logits, penalty = head.forward_with_penalty(batch.image.to(device))
    return loss_of(logits) + config.penalty_weight * penalty.mean()


def make_optimizer(parameters: list[nn.Parameter], config: FitConfig) -> torch.optim.Optimizer:
    if config.optimizer == "sgd":
        return torch.optim.SGD(
            parameters, config.lr, momentum=0.9, weight_decay=config.weight_decay
        )
    return torch.optim.AdamW(
        parameters, config.lr, eps=config.eps, weight_decay=config.weight_decay
    )


@torch.no_grad()
def copy_into(targets: Iterable[Tensor], values: Iterable[Tensor]) -> None:
    for target, value in zip(targets, values, strict=True):
        target.copy_(value)


def check_weights_finite(
    parameters: list[nn.Parameter], good: Iterable[Tensor] | None = None
) -> None:
    """Refuse weights that are not finite, with those of `good` back in their place, if given."""
    if not all(bool(parameter.isfinite().all()) for parameter in parameters):
        if good is not None:
            copy_into(parameters, good)
        raise FloatingPointError("fit: the last step left weights that are not finite")


def backward(
    loss: Tensor, optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter]
) -> Tensor:
    """New gradients of all parameters, and their norm."""
    optimizer.zero_grad(set_to_none=True)
    loss.backward()  # type: ignore[no-untyped-call]
    return nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])


def not_finite(
    loss: float, number: int, epoch: int, lr: float, rows: Tensor, last: float
) -> FloatingPointError:
    """The error of a step whose loss, or else whose gradient, is not finite; `last` is the last
    loss that was.
    """
    what = "gradient" if math.isfinite(loss) else "loss"
    at = f"step {number} (epoch {epoch}, lr {lr:g}, rows {rows[:4].tolist()}...)"
    return FloatingPointError(f"fit: {what} is not finite at {at}, last finite loss {last:.6g}")
