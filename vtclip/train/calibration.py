# SPDX-License-Identifier: Apache-2.0
"""What a head says of rows, and what of the validation rows is kept for `vtclip.train.conformal`.

The kept scores are those of a head that chose nothing by the row itself. A head with
hyper-parameters from validation images (ProKeR, Tip-Adapter, ...) chooses them for each fifth of
these images by the other four, and scores that fifth. One number is still common to all, the
temperature; benchmarks/unknown.py measures what is left.

A head that is then fitted once more, on training and validation rows, is judged by the scores of
the head before. benchmarks/unknown.py --refit measures what that does to the promised rates, see
docs/unknown.md.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from vtclip.data.records import Records
from vtclip.heads import Head
from vtclip.heads.auto import Auto
from vtclip.machine import BatchSize
from vtclip.train import conformal
from vtclip.train.conformal import Calibration
from vtclip.train.fit_head import chosen_without, fifths
from vtclip.train.rows import TrainingRows


class Decisions(NamedTuple):
    """What a head says of N rows, on the CPU.

    logits [N, K] float32; evidence [N, K]: the logits, but of an average of heads
    (vtclip.heads.auto) the weighted mean of theirs; label [N].
    """

    logits: Tensor
    evidence: Tensor
    label: Tensor


class Judged(NamedTuple):
    """What a fitted head says of the validation and of the test rows of its split.

    val: of the head before a last fit on the validation rows, where there is one.
    Of test rows the logits stand for the evidence too, which nothing asks for.
    """

    val: Decisions | None
    test: Decisions


def forward_both(
    head: Head, image: Tensor, spatial: Tensor | None = None, spatial_mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Logits and evidence [B, K] of one batch on the head's device; see `Decisions`."""
    if isinstance(head, Auto):
        members = head.member_logits(image, spatial, spatial_mask)
        return head.averaged(members), head.evidence(members)
    logits = head(image, spatial, spatial_mask) if head.needs_spatial else head(image)
    return logits, logits


@torch.no_grad()
def decide(
    head: Head,
    records: TrainingRows | Records,
    index: Tensor,
    device: torch.device,
    batch_size: int = 256,
) -> Decisions:
    """What `head` says of the plain (never augmented) rows `index`, in that order."""
    head.eval()

    def computed(rows: Tensor) -> Decisions:
        batch = records.batch(rows, 0)
        image, spatial, mask = batch.image.to(device), None, None
        if head.needs_spatial:
            spatial = None if batch.spatial is None else batch.spatial.to(device)
            mask = None if batch.spatial_mask is None else batch.spatial_mask.to(device)
        logits, evidence = forward_both(head, image, spatial, mask)
        kept = logits.float().cpu()
        same = evidence is logits
        return Decisions(kept, kept if same else evidence.float().cpu(), batch.label)

    return joined(BatchSize(batch_size).map(computed, index))


def joined(parts: Iterable[Decisions]) -> Decisions:
    """One after the other; evidence stays the logits themselves where it is in every part."""
    parts = list(parts)
    logits, label = (
        torch.cat([getattr(part, name) for part in parts]) for name in ("logits", "label")
    )
    if all(part.evidence is part.logits for part in parts):
        return Decisions(logits, logits, label)
    return Decisions(logits, torch.cat([part.evidence for part in parts]), label)


def unseen(head: Head, records: Records, val: Tensor, device: torch.device) -> Decisions | None:
    """What `head`, which has not chosen yet and does not here, would say of the rows `val`.

    Each part of them is judged by a copy that chose by the other parts. None of a head that chooses
    nothing, whose decisions are the same before and after, and of fewer than two rows.
    """
    if not head.chooses or len(val) < 2:
        return None
    rows = TrainingRows(records, val)
    parts = fifths(len(val))
    copies = chosen_without(head, records, val, parts, device)
    every = joined(
        decide(copied, rows, val[part], device) for copied, part in zip(copies, parts, strict=True)
    )
    back = torch.cat(list(parts)).argsort()
    logits = every.logits[back]
    same = every.evidence is every.logits
    return Decisions(logits, logits if same else every.evidence[back], every.label[back])


def calibration_of(
    val: Decisions | None, temperature: float | None, label: Tensor, test: Tensor
) -> Calibration | None:
    """What is kept of the validation images, which are `unseen`; None where there are none.

    val: of the first fit; a head that trained on these images says nothing of new ones.

    label [N]: the classes of all images of the source. Those that are not in the rows `test` say
    how frequent each class is; nothing of a test image is kept, not even its label.
    """
    if val is None or not len(val.label):
        return None
    losses = conformal.class_losses(val.logits, temperature)
    known = conformal.known_score(val.evidence)
    pool = torch.ones(len(label), dtype=torch.bool)
    pool[test] = False
    weight = conformal.class_weights(val.label, label[pool])
    return Calibration(conformal.true_losses(losses, val.label), known, weight)
