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
from torch import Tensor, nn
from tqdm import tqdm

from vtclip.heads import Head
from vtclip.heads.config import FitConfig, check_seed

from . import metrics
from .checkpoint import Checkpoint, Interrupted, StopSignal
from .steps import TrainingRows, compute_logits, make_optimizer, put_back, shuffled, training_loss

if TYPE_CHECKING:
    from .data.records import Records

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
    log: Callable[[dict[str, object]], None],
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
            batch = records.batch(rows, augment_pass)
            loss = training_loss(head, batch, config, device)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
            value = loss.item()
            if not math.isfinite(value + norm.item()):
                if not math.isfinite(value):  # the step before this one broke the weights
                    put_back(parameters, good)
                raise FloatingPointError(
                    f"fit: {'gradient' if math.isfinite(value) else 'loss'} is not finite at step "
                    f"{number} (epoch {epoch}, lr {lr:g}, rows {rows[:4].tolist()}...), last "
                    f"finite loss {value if math.isfinite(value) else last_loss:.6g}"
                )
            for kept, parameter in zip(good, parameters, strict=True):
                kept.copy_(parameter.detach())
            optimizer.step()
            loss_sum, last_loss = loss_sum + value, value

            if step + 1 == steps:
                row: dict[str, object] = {"epoch": epoch, "step": number + 1, "lr": lr}
                row["loss"] = loss_sum / steps
                loss_sum, last_epoch = 0.0, epoch + 1 == epochs
                if last_epoch or (epoch + 1) % config.checkpoint_every == 0:
                    if len(val_index):
                        seen = metrics.report(*all_logits(head, records, val_index, device=device))
                        row |= {"val_accuracy": seen["accuracy"], "val_nll": seen["nll"]}
                    if checkpoint is not None:
                        checkpoint.save(head, optimizer, number + 1, loss_sum)
                log(row | {"seconds": time.perf_counter() - started})
            if stop.received:
                if checkpoint is not None:
                    checkpoint.save(head, optimizer, number + 1, loss_sum)
                saved_in = None if checkpoint is None else checkpoint.path
                raise Interrupted(stop.received, number + 1, saved_in)
    if not all(bool(parameter.isfinite().all()) for parameter in parameters):
        put_back(parameters, good)
        raise FloatingPointError("fit: the last step left weights that are not finite")


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
