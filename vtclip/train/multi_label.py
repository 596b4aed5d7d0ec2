# SPDX-License-Identifier: Apache-2.0
"""What a head says of images of more than one class, and what that is worth.

Average precision is the sum over thresholds of (R_n - R_(n-1)) * P_n, precision times the step of
recall, without interpolation; equal scores share one threshold. mAP is its mean over the classes
that occur. F1 is 2 TP / (2 TP + FP + FN) at one probability for all classes, the one at which F1
over all entries of the validation images is highest.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from vtclip.data.records import Batch, Records
from vtclip.files import Json
from vtclip.heads import Head
from vtclip.train.rows import TrainingRows
from vtclip.train.sigmoid import Sigmoid, fit_sigmoid
from vtclip.train.steps import compute_logits

THRESHOLD = 0.5  # where there are no validation images


class Said(NamedTuple):
    """Logits [N, K] of N rows and their classes, targets [N, K] bool, on the CPU."""

    logits: Tensor
    targets: Tensor


@torch.no_grad()
def say(
    head: Head,
    records: TrainingRows | Records,
    index: Tensor,
    device: torch.device,
    batch_size: int = 256,
) -> Said:
    """What `head` says of the plain (never augmented) rows `index`, in that order."""
    head.eval()
    logits, targets = [], []
    for rows in torch.split(index, batch_size):
        batch = records.batch(rows, 0)
        logits.append(compute_logits(head, batch, device).float().cpu())
        targets.append(targets_of(batch, head.num_classes))
    return Said(torch.cat(logits), torch.cat(targets))


def targets_of(batch: Batch, num_classes: int) -> Tensor:
    """All classes [b, K] of a batch, of which a source with one label per image has just that."""
    if batch.targets is not None:
        return batch.targets
    return F.one_hot(batch.label, num_classes).bool()


def starting_sigmoid(
    head: Head, records: TrainingRows, index: Tensor, device: torch.device
) -> Sigmoid:
    """The scale and offsets that suit the untrained head on its training rows.

    They stay as they are in training: the head learns what is left.
    """
    return fit_sigmoid(*say(head, records, index, device))


def average_precision(score: Tensor, positive: Tensor) -> float:
    """Average precision of scores [N] of which `positive` [N] are; NaN where none is."""
    total = int(positive.sum())
    if not total:
        return math.nan
    score, order = score.double().sort(descending=True, stable=True)
    hits = positive[order].double().cumsum(0)
    last = torch.ones(len(score), dtype=torch.bool)
    last[:-1] = score[1:] != score[:-1]
    hits, count = hits[last], torch.arange(1, len(score) + 1)[last]
    steps = torch.diff(hits, prepend=hits.new_zeros(1)) / total
    return float((steps * hits / count).sum())


def mean_precision(said: Said) -> float:
    """mAP: the mean of `average_precision` over the classes that occur."""
    logits, targets = said
    values = [average_precision(logits[:, k], targets[:, k]) for k in range(targets.shape[1])]
    known = [value for value in values if not math.isnan(value)]
    return sum(known) / len(known)


def f1_counts(predicted: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """(2 TP, 2 TP + FP + FN) per class [K] of predictions and targets [N, K] bool."""
    both = 2.0 * (predicted & targets).sum(dim=0)
    return both, (predicted.sum(dim=0) + targets.sum(dim=0)).double()


def micro_f1(predicted: Tensor, targets: Tensor) -> float:
    """F1 over all entries together; 0 where nothing is predicted and nothing there."""
    both, every = f1_counts(predicted, targets)
    return float(both.sum() / every.sum().clamp_min(1))


def best_threshold(probability: Tensor, targets: Tensor) -> float:
    """The probability from which on a class counts as there, with the highest F1 over all entries.

    It lies halfway between two values that occur; of equal ones the highest counts.
    """
    value, order = probability.flatten().double().sort(descending=True, stable=True)
    hits = targets.flatten()[order].double().cumsum(0)
    count = torch.arange(1, len(value) + 1)
    f1 = 2 * hits / (count + hits[-1])
    last = torch.ones(len(value), dtype=torch.bool)
    last[:-1] = value[1:] != value[:-1]
    f1[~last] = -1.0
    best = int(f1.argmax())
    below = float(value[best + 1]) if best + 1 < len(value) else 0.0
    return (float(value[best]) + below) / 2


def threshold_of(said: Said | None, sigmoid: Sigmoid) -> float:
    """`best_threshold` of validation rows; 0.5 where there are none."""
    if said is None:
        return THRESHOLD
    return best_threshold(sigmoid(said.logits.double()).sigmoid(), said.targets)


def all_metrics(said: Said, sigmoid: Sigmoid, threshold: float) -> Json:
    """All numbers of one evaluation; "per_class": average precision, "per_class_f1": F1."""
    logits, targets = said.logits.double(), said.targets
    if not len(logits):
        raise ValueError("metrics: there are no images to count")
    broken = (~logits.isfinite()).any(dim=1)
    if bool(broken.any()):
        raise FloatingPointError(
            f"metrics: logits must be finite, {int(broken.sum())} of {len(logits)} rows are not"
        )
    z = sigmoid(logits)
    probability = z.sigmoid()
    predicted = probability >= threshold
    per_class = [average_precision(z[:, k], targets[:, k]) for k in range(targets.shape[1])]
    known = [value for value in per_class if not math.isnan(value)]
    both, every = f1_counts(predicted, targets)
    f1 = [float(b / e) if e else math.nan for b, e in zip(both, every, strict=True)]
    there = [value for value in f1 if not math.isnan(value)]
    bce = F.binary_cross_entropy_with_logits(z, targets.double(), reduction="sum") / len(z)
    return {
        "map": sum(known) / len(known),
        "micro_ap": average_precision(z.flatten(), targets.flatten()),
        "macro_f1": sum(there) / max(1, len(there)),
        "micro_f1": micro_f1(predicted, targets),
        "bce": float(bce),
        "threshold": threshold,
        "sigmoid": sigmoid.to_json(),
        "labels_per_image": float(targets.sum() / len(targets)),
        "count": len(targets),
        "per_class": per_class,
        "per_class_f1": f1,
    }
