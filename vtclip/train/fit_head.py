# SPDX-License-Identifier: Apache-2.0
"""From rows to an adapted head, in the order of `heads._head.Head`, and its temperature."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from vtclip.data.records import Records
from vtclip.data.splits import Split
from vtclip.heads import Head
from vtclip.heads.config import FitConfig
from vtclip.train import engine, metrics
from vtclip.train.checkpoint import Checkpoint
from vtclip.train.methods import build_head, text_encoder
from vtclip.train.rows import support_of


def fit_head(
    method: str,
    records: Records,
    split: Split,
    config: FitConfig,
    *,
    device: torch.device,
    seed: int,
    log: Callable[[dict[str, object]], None],
    checkpoint: Checkpoint | None = None,
    resume: bool = False,
    progress: bool = False,
    choose: bool = True,
) -> Head:
    """The head of `method`, fitted to the rows split.train and chosen by split.val.

    choose=False leaves it with its hyper-parameters as they were, for `choose_by`.
    """
    torch.manual_seed(seed)
    head = build_head(method, records, config, device)
    if head.needs_text_encoder:
        head.set_text_encoder(text_encoder(records, device), records.class_names)
    rows = engine.TrainingRows(records, split.train, split.val)
    if head.takes_support:
        head.fit_support(support_of(rows, split.train, device))
    if config.epochs:
        engine.fit(
            head,
            rows,
            split.train,
            split.val,
            config,
            device=device,
            seed=seed,
            log=log,
            checkpoint=checkpoint,
            resume=resume,
            progress=progress,
        )
    if choose:
        choose_by(head, records, split.val, device)
    return head.eval()


def choose_by(head: Head, records: Records, val: Tensor, device: torch.device) -> None:
    """Let the head choose by the rows `val`, where it has a choice and there are any."""
    if head.chooses and len(val):
        rows = engine.TrainingRows(records, val)
        head.choose(support_of(rows, val, device, spatial=head.needs_spatial))


def calibrate(
    head: Head, rows: engine.TrainingRows, val: Tensor, device: torch.device
) -> float | None:
    """The temperature fitted on the validation images; None where there are none."""
    if len(val) == 0:
        return None
    return metrics.fit_temperature(*engine.all_logits(head, rows, val, device=device))
