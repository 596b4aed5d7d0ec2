# SPDX-License-Identifier: Apache-2.0
"""`on_metrics` of `vtclip.fit`: the rows of a training's log, for a callback.

A row is a dict of plain numbers and texts, one per epoch: epoch, from 0 on; step, from 1 on; lr;
loss, the mean over the epoch; seconds since the training began; and, every `checkpoint_every`
epochs, val_accuracy and val_nll (of several labels per image val_map). "candidate" names the member
of method auto that is trained, "stage" ("refit", "final") a fit after the evaluated one. A method
without training has no rows. Of several processes the first one calls.

    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter("logs")

    def show(row):
        for name, value in row.items():
            if isinstance(value, float):
                writer.add_scalar(name, value, row["step"])

    vtclip.fit("my_images", method="rada", on_metrics=show)

With Weights & Biases, after `wandb.init()`, it is `on_metrics=wandb.log`; with MLflow

    def show(row):
        numbers = {name: value for name, value in row.items() if isinstance(value, float)}
        mlflow.log_metrics(numbers, step=row["step"])

A callback sees a copy of the row, and random numbers that it draws by torch change no result.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import partial

import torch

from vtclip.files import Json, to_json

Log = Callable[[Mapping[str, object]], None]


def told(log: Log, on_metrics: Callable[[Json], None] | None, device: torch.device) -> Log:
    """`log`, after which each row goes to `on_metrics`, where there is one."""
    return log if on_metrics is None else partial(_log_and_tell, log, on_metrics, device)


def _log_and_tell(
    log: Log, on_metrics: Callable[[Json], None], device: torch.device, row: Mapping[str, object]
) -> None:
    log(row)
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        on_metrics(json.loads(to_json(dict(row))))
