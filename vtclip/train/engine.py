# SPDX-License-Identifier: Apache-2.0
"""Training and evaluation of a head over a table of features: two flat functions, no hooks.

`fit` sees rows through `TrainingRows` only, which cannot hand out a row it was not given.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from tqdm import tqdm

from vtclip.distributed import Interrupted, StopSignal
from vtclip.files import Json
from vtclip.heads import Head
from vtclip.heads.config import FitConfig, check_seed
from vtclip.train import metrics
from vtclip.train.checkpoint import Checkpoint
from vtclip.train.rows import TrainingRows, shuffled
from vtclip.train.steps import (
    backward,
    compute_logits,
    make_optimizer,
    not_finite,
    put_back,
    training_loss,
)

if TYPE_CHECKING:
    from vtclip.data.records import Records

__all__ = ["TrainingRows", "all_logits", "evaluate", "fit"]


def fit(
    head: Head,
    records: TrainingRows,
    train_index: Tensor,
    val_index: Tensor,
    config: FitConfig,
    *,
    device: torch.device,
    seed: int,
    log: Callable[[Json], None],
    checkpoint: Checkpoint | None = None,
    resume: bool = False,
    progress: bool = False,
) -> None:
    """Train `head` in place by `training_loss`; the weights of the last epoch stay in it.

    An epoch is floor(N / batch_size) full batches, or one smaller one where N < batch_size. Epoch e
    uses augmentation pass 1 + e % num_passes where there are any. A loss or gradient that is not
    finite raises FloatingPointError with the head back at the last weights whose loss was finite.
    SIGINT and SIGTERM save a checkpoint after the running step and raise `Interrupted`.
    """
    parameters = [parameter for parameter in head.parameters() if parameter.requires_grad]
    if not parameters:
        raise ValueError("fit: head has no trainable parameters")
    if len(train_index) == 0 or config.epochs < 1:
        raise ValueError(
            f"fit: {len(train_index)} rows and {config.epochs} epochs leave no step to train"
        )
    optimizer = make_optimizer(parameters, config)
    torch.manual_seed(check_seed(seed))
    steps = max(1, len(train_index) // config.batch_size)  # per epoch
    epochs = config.num_epochs(steps, head.num_classes)
    schedule = dataclasses.replace(config, epochs=epochs)
    first, loss_sum, last_loss = 0, 0.0, math.nan
    if resume and checkpoint is not None:
        first, loss_sum = checkpoint.load(head, optimizer)
    good = [parameter.detach().clone() for parameter in parameters]
    order, augment_pass, started = train_index, 0, time.perf_counter()

    with StopSignal() as stop:
        quiet = None if progress else True  # None: tqdm is quiet where stderr is no terminal
        for number in tqdm(range(first, epochs * steps), "train", disable=quiet):
            epoch, step = divmod(number, steps)
            if step == 0 or number == first:
                head.train()
                order = shuffled(train_index, seed, epoch)
                augment_pass = 1 + epoch % records.num_passes if records.num_passes else 0
            lr = schedule.rate(number, steps)
            for group in optimizer.param_groups:
                group["lr"] = lr
            rows = order[step * config.batch_size : (step + 1) * config.batch_size]
            loss = training_loss(head, records.batch(rows, augment_pass), config, device)
            norm, value = backward(loss, optimizer, parameters).item(), loss.item()
            if not math.isfinite(value + norm):
                if not math.isfinite(value):  # the step before this one broke the weights
                    put_back(parameters, good)
                last = value if math.isfinite(value) else last_loss
                raise not_finite(value, number, epoch, lr, rows, f", last finite loss {last:.6g}")
            for copy, parameter in zip(good, parameters, strict=True):
                copy.copy_(parameter.detach())
            optimizer.step()
            loss_sum, last_loss = loss_sum + value, value

            ends = step + 1 == steps
            due = ends and schedule.is_due(epoch)
            if ends:
                row = {"epoch": epoch, "step": number + 1, "lr": lr, "loss": loss_sum / steps}
                loss_sum = 0.0
            if due:
                row |= validation(head, records, val_index, device)
            if checkpoint is not None and (due or stop.received):
                checkpoint.save(head, optimizer, number + 1, loss_sum)
            if ends:
                log(row | {"seconds": time.perf_counter() - started})
            if stop.received:
                saved_in = None if checkpoint is None else checkpoint.path
                raise Interrupted(stop.received, number + 1, saved_in)
    if not all(bool(parameter.isfinite().all()) for parameter in parameters):
        put_back(parameters, good)
        raise FloatingPointError("fit: the last step left weights that are not finite")


def validation(
    head: Head, records: TrainingRows, index: Tensor, device: torch.device
) -> dict[str, float]:
    """Accuracy and NLL of the rows `index`; nothing where there are none."""
    if not len(index):
        return {}
    seen = metrics.report(*all_logits(head, records, index, device=device))
    return {"val_accuracy": seen["accuracy"], "val_nll": seen["nll"]}


@torch.no_grad()
def all_logits(
    head: Head,
    records: TrainingRows | Records,
    index: Tensor,
    *,
    device: torch.device,
    batch_size: int = 256,
) -> tuple[Tensor, Tensor]:
    """Logits [N, K] and labels [N] of the plain (never augmented) rows `index`, in that order."""
    head.eval()
    logits, label = [], []
    for rows in torch.split(index, batch_size):
        batch = records.batch(rows, 0)
        logits.append(compute_logits(head, batch, device).float().cpu())
        label.append(batch.label)
    return torch.cat(logits), torch.cat(label)


def evaluate(
    head: Head,
    records: Records,
    index: Tensor,
    *,
    device: torch.device,
    temperature: float | None = None,
) -> Iterator[tuple[str, Any]]:
    """Yield (name, value) of every metric over the rows `index`, each counted once."""
    different = len(set(index.tolist()))
    if len(index) != different:
        raise ValueError(f"evaluate: {len(index)} rows, of which {different} differ")
    logits, label = all_logits(head, records, index, device=device)
    yield from metrics.report(logits, label, temperature).items()
