# SPDX-License-Identifier: Apache-2.0
"""From rows to an adapted head, in the order of `heads._head.Head`, and its temperature."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from vtclip.data.records import Records
from vtclip.data.splits import Split
from vtclip.heads import Head
from vtclip.heads._support import SupportHead
from vtclip.heads.config import FitConfig
from vtclip.train import engine, metrics
from vtclip.train.methods import VOTES, balanced_votes, build_head, text_encoder
from vtclip.train.rows import TrainingRows, support_of
from vtclip.train.steps import TrainingRun


def fit_head(
    method: str,
    records: Records,
    split: Split,
    config: FitConfig,
    run: TrainingRun,
    *,
    choose: bool = True,
    solve: bool = True,
) -> Head:
    """The head of `method`, fitted to the rows split.train and chosen by split.val.

    choose=False leaves it with its hyper-parameters as they were, for `choose_by`. solve=False
    says that `choose_by` or `chosen_without` comes before any logits, for which no solve is needed
    that these do again.
    """
    torch.manual_seed(run.seed)
    if run.balanced:
        config = balanced_votes(method, config, records.label[split.train])
    head = build_head(method, records, config, run.device)
    if head.needs_text_encoder:
        head.set_text_encoder(text_encoder(records, run.device), records.class_names)
    rows = TrainingRows(records, split.train, split.val)
    if head.takes_support:
        support = support_of(rows, split.train, run.device)
        if isinstance(head, SupportHead) and (not solve or (choose and len(split.val))):
            head.keep_support(support)
        else:
            head.fit_support(support)
    if config.epochs:
        engine.train_head(head, rows, split.train, split.val, config, run)
    if choose:
        choose_by(head, records, split.val, run.device)
    return head.eval()


def refit_head(
    head: Head, records: Records, index: Tensor, config: FitConfig, run: TrainingRun
) -> Head:
    """A head of the hyper-parameters of `head`, fitted to the rows `index`; nothing is chosen.

    config: of the fit of `head`. As there a head that is trained has its recipe's values in
    training, and those that validation chose afterwards.
    """
    torch.manual_seed(run.seed)
    if VOTES in head.options():  # alpha and the temperature were chosen for votes of this size
        config = replace(config, head={**config.head, VOTES: votes_of(head)})
    fresh = build_head(head.method, records, config, run.device)
    if fresh.needs_text_encoder:
        fresh.set_text_encoder(text_encoder(records, run.device), records.class_names)
    if not config.epochs:
        _take_chosen(fresh, head)
    rows = TrainingRows(records, index)
    if fresh.takes_support:
        fresh.fit_support(support_of(rows, index, run.device))
    if config.epochs:
        engine.train_head(fresh, rows, index, index[:0], config, run)
        _take_chosen(fresh, head)
    return fresh.eval()


def votes_of(head: Head) -> float | None:
    """As how many images each class counts in a fitted head; see `heads._support`.

    Where every image counts once it is the mean number of them.
    """
    votes: float | None = head.options()[VOTES]
    if votes is None and isinstance(head, SupportHead) and head.num_support:
        return head.num_support / len(set(head.label.tolist()))
    return votes


def refit_rows(split: Split) -> Tensor:
    """The training and validation rows of a split [n], ascending."""
    return torch.cat([split.train, split.val]).sort().values


def _take_chosen(fresh: Head, head: Head) -> None:
    """Give `fresh` the numbers that validation chose for `head`."""
    if not head.chooses:
        return
    for name, value in head.options().items():
        if isinstance(value, float):
            setattr(fresh, name, value)


def choose_by(head: Head, records: Records, val: Tensor, device: torch.device) -> None:
    """Let the head choose by the rows `val`, where it has a choice and there are any."""
    if head.chooses and len(val):
        rows = TrainingRows(records, val)
        head.choose(support_of(rows, val, device, spatial=head.needs_spatial))


def fifths(count: int) -> Sequence[Tensor]:
    """The numbers below `count` in five parts, or fewer where there are fewer, always the same."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(0)).chunk(5)


def chosen_without(
    head: Head, records: Records, val: Tensor, parts: Sequence[Tensor], device: torch.device
) -> Iterator[Head]:
    """For each of `parts` of the rows `val`, a copy of the head that chose by the others.

    parts: numbers of rows among `val`; of an empty part the copy chose by all rows.
    """
    support = support_of(TrainingRows(records, val), val, device, spatial=head.needs_spatial)
    every = torch.arange(len(val))
    others = [every[~torch.isin(every, part)].to(device) for part in parts]
    return head.chosen_by(support, others)


def calibrate(head: Head, records: Records, val: Tensor, device: torch.device) -> float | None:
    """The temperature fitted on the validation images; None where there are none."""
    if len(val) == 0:
        return None
    rows = TrainingRows(records, val)
    return metrics.fit_temperature(*engine.all_logits(head, rows, val, device=device))
