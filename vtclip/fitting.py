# SPDX-License-Identifier: Apache-2.0
"""From rows to an adapted head: what it keeps of the shots, its training, what validation chooses.

Beside `forward`, a head may have
    set_text_views(views)  class texts [K, M, C] of M templates, before anything else
    set_text_encoder(clip, class_names)  where its `needs_text_encoder` is true: the model that made
                           the class texts
    fit_support(support)   takes in the training images; of a head without training, all there is
    choose(val)            sets what validation images decide, after training; without any such
                           images its defaults stay
Each gets what its name says and nothing of the test images.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from vtclip.heads.config import FitConfig
from vtclip.methods import build_head, text_encoder

from . import engine, metrics
from .checkpoint import Checkpoint
from .data.records import Records
from .data.splits import Split
from .support import support_of


def fit_head(
    method: str,
    records: Records,
    split: Split,
    config: FitConfig,
    *,
    device: torch.device,
    seed: int,
    log: Callable[[dict[str, Any]], None],
    checkpoint: Checkpoint | None = None,
    resume: bool = False,
    progress: bool = False,
    choose: bool = True,
) -> nn.Module:
    """The head of `method`, fitted to the rows split.train and chosen by split.val.

    choose=False leaves it with its hyper-parameters as they were, for `choose_by`.
    """
    torch.manual_seed(seed)
    head: Any = build_head(method, records, config, device)
    if getattr(head, "needs_text_encoder", False):
        head.set_text_encoder(text_encoder(records, device), records.class_names)
    rows = engine.TrainingRows(records, split.train, split.val)
    if hasattr(head, "fit_support"):
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
    answer: nn.Module = head.eval()
    return answer


def choose_by(head: Any, records: Records, val: Tensor, device: torch.device) -> None:
    """Let the head choose by the rows `val`, where it has a choice and there are any."""
    if hasattr(head, "choose") and len(val):
        rows = engine.TrainingRows(records, val)
        head.choose(support_of(rows, val, device, spatial=bool(head.needs_spatial)))


def calibrate(
    head: nn.Module, rows: engine.TrainingRows, val: Tensor, device: torch.device
) -> float | None:
    """The temperature fitted on the validation images; None where there are none."""
    if len(val) == 0:
        return None
    return metrics.fit_temperature(*engine.all_logits(head, rows, val, device=device))
