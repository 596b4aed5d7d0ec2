# SPDX-License-Identifier: Apache-2.0
"""Training and evaluation of a head over a table of features: flat functions, no hooks.

`train_head` sees rows through `TrainingRows` only, which cannot hand out a row it was not given.
"""

from __future__ import annotations

import dataclasses
import math
import time
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vtclip.distributed import StopSignal
from vtclip.files import Json
from vtclip.heads import Head
from vtclip.heads.config import FitConfig
from vtclip.machine import BatchSize
from vtclip.train import metrics, multi_label
from vtclip.train.rows import TrainingRows, epoch_rows, epoch_size
from vtclip.train.steps import (
    TrainingRun,
    backward,
    check_weights_finite,
    compute_logits,
    copy_into,
    make_optimizer,
    not_finite,
    training_loss,
)

if TYPE_CHECKING:
    from vtclip.data.records import Records


def train_head(
    head: Head,
    records: TrainingRows,
    train_index: Tensor,
    val_index: Tensor,
    config: FitConfig,
    run: TrainingRun,
) -> None:
    """Train `head` in place by `training_loss`; the weights of the last epoch stay in it.

    An epoch is floor(N / batch_size) full batches, or one smaller one where N < batch_size; see
    `epoch_rows` for its rows where the run is balanced and classes have different numbers. Epoch e
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
    label = records.labels(train_index) if run.balanced else None
    steps = max(1, epoch_size(train_index, label) // config.batch_size)  # per epoch
    epochs = config.num_epochs(steps, head.num_classes)
    schedule = dataclasses.replace(config, epochs=epochs)
    sigmoid = None  # of the untrained head, before a checkpoint is loaded
    if records.several:
        sigmoid = multi_label.starting_sigmoid(head, records, train_index, run.device)
    first, loss_sum = run.start(head, optimizer)
    good = [parameter.detach().clone() for parameter in parameters]
    last_loss = math.nan
    order, augment_pass, started = train_index, 0, time.perf_counter()

    with StopSignal() as stop:
        for number in run.steps(first, epochs * steps):
            epoch, step = divmod(number, steps)
            if step == 0 or number == first:
                head.train()
                order = epoch_rows(train_index, label, run.seed, epoch)
                augment_pass = 1 + epoch % records.num_passes if records.num_passes else 0
            lr = schedule.rate(number, steps)
            for group in optimizer.param_groups:
                group["lr"] = lr
            rows = order[step * config.batch_size : (step + 1) * config.batch_size]
            loss = training_loss(
                head, records.batch(rows, augment_pass), config, run.device, sigmoid
            )
            norm, value = backward(loss, optimizer, parameters).item(), loss.item()
            if not math.isfinite(value + norm):
                if not math.isfinite(value):  # the step before this one broke the weights
                    copy_into(parameters, good)
                last = value if math.isfinite(value) else last_loss
                raise not_finite(value, number, epoch, lr, rows, last)
            copy_into(good, parameters)
            optimizer.step()
            loss_sum, last_loss = loss_sum + value, value

            ends = step + 1 == steps
            due = ends and schedule.is_due(epoch)
            if ends:
                row = {"epoch": epoch, "step": number + 1, "lr": lr, "loss": loss_sum / steps}
                loss_sum = 0.0
            if due:
                row |= validation(head, records, val_index, run.device)
            if run.checkpoint is not None and (due or stop.received):
                run.checkpoint.save(head, optimizer, number + 1, loss_sum)
            if ends:
                run.log(row | {"seconds": time.perf_counter() - started})
            if stop.received:
                raise run.interrupted(stop.received, number + 1)
    check_weights_finite(parameters, good)


def validation(
    head: Head, records: TrainingRows, index: Tensor, device: torch.device
) -> dict[str, float]:
    """Accuracy and NLL, or mAP, of the rows `index`; empty where there are none."""
    if not len(index):
        return {}
    if records.several:
        said = multi_label.say(head, records, index, device)
        return {"val_map": multi_label.mean_precision(said)}
    return metrics.validation_metrics(*all_logits(head, records, index, device=device))


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

    def computed(rows: Tensor) -> tuple[Tensor, Tensor]:
        batch = records.batch(rows, 0)
        return compute_logits(head, batch, device).float().cpu(), batch.label

    logits, label = zip(*BatchSize(batch_size).map(computed, index), strict=True)
    return torch.cat(logits), torch.cat(label)


def head_metrics(
    head: Head,
    records: Records,
    index: Tensor,
    *,
    device: torch.device,
    temperature: float | None = None,
    keep: list[tuple[Tensor, Tensor]] | None = None,
) -> Json:
    """Every metric over the rows `index`, each of which is counted once.

    keep: a list that gets their logits [N, K] and labels [N], which need not be computed again.
    """
    different = len(set(index.tolist()))
    if len(index) != different:
        raise ValueError(f"evaluate: {len(index)} rows, of which {different} differ")
    logits, label = all_logits(head, records, index, device=device)
    if keep is not None:
        keep.append((logits, label))
    return metrics.all_metrics(logits, label, temperature)
