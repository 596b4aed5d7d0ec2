# SPDX-License-Identifier: Apache-2.0
"""What a table of logits is worth: accuracy, macro-F1, likelihood, calibration, and an interval.

Everything here takes logits [N, K] and labels [N], works in float64 on the CPU and counts each row
once. Logits that are not finite are an error: the largest of K NaNs is class 0, so a broken model
would otherwise be given a plausible accuracy.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from vtclip.files import Json

NUM_BINS = 15


def check_logits(logits: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
    """Both on the CPU, logits in float64; refuses wrong shapes and labels, NaN and inf."""
    if logits.ndim != 2 or label.ndim != 1 or len(logits) != len(label):
        shapes = f"{list(logits.shape)} and {list(label.shape)}"
        raise ValueError(f"metrics: logits and label must be [N, K] and [N], got {shapes}")
    if len(label) == 0:
        raise ValueError("metrics: there are no images to count")
    logits, label = logits.detach().to("cpu", torch.float64), label.detach().cpu()
    if int(label.min()) < 0 or int(label.max()) >= logits.shape[1]:
        lowest, highest = int(label.min()), int(label.max())
        raise ValueError(
            f"metrics: label must lie in 0..{logits.shape[1] - 1}, got {lowest}..{highest}"
        )
    broken = (~logits.isfinite()).any(dim=1)
    if bool(broken.any()):
        first = int(broken.nonzero()[0])
        raise FloatingPointError(
            f"metrics: logits must be finite, {int(broken.sum())} of {len(label)} rows are not "
            f"(first: row {first})"
        )
    return logits, label


def accuracy(logits: Tensor, label: Tensor) -> float:
    """Share of rows whose largest logit is the label's."""
    logits, label = check_logits(logits, label)
    return int((logits.argmax(dim=1) == label).sum()) / len(label)


def confusion(logits: Tensor, label: Tensor) -> Tensor:
    """Counts [K, K]: row = label, column = prediction."""
    logits, label = check_logits(logits, label)
    K = logits.shape[1]
    return torch.bincount(label * K + logits.argmax(dim=1), minlength=K * K).reshape(K, K)


def per_class_accuracy(logits: Tensor, label: Tensor) -> list[float]:
    """Accuracy over the rows of each class; NaN for a class without rows."""
    counts = confusion(logits, label)
    return (counts.diagonal().double() / counts.sum(dim=1).double()).tolist()


def macro_f1(logits: Tensor, label: Tensor) -> float:
    """Mean over classes of 2 TP / (2 TP + FP + FN), over classes that occur."""
    counts = confusion(logits, label)
    total = counts.sum(dim=0) + counts.sum(dim=1)  # 2 TP + FP + FN
    occurs = total > 0
    return float((2.0 * counts.diagonal()[occurs] / total[occurs]).mean())


def nll(logits: Tensor, label: Tensor) -> float:
    """Mean negative log-likelihood, in nats."""
    logits, label = check_logits(logits, label)
    return float(F.cross_entropy(logits, label))


def reliability(
    logits: Tensor, label: Tensor, num_bins: int = NUM_BINS
) -> list[tuple[float | None, float | None, int]]:
    """Mean confidence, accuracy and count of each of `num_bins` equal-width bins of confidence.

    Bin i holds confidences in [i, i + 1) / num_bins; a confidence of exactly 1 is in the last bin.
    A bin without rows is (None, None, 0).
    """
    logits, label = check_logits(logits, label)
    confidence, predicted = logits.softmax(dim=1).max(dim=1)
    bins = (confidence * num_bins).long().clamp(max=num_bins - 1)
    zeros = torch.zeros(num_bins, dtype=torch.float64)
    sums = zeros.index_add(0, bins, confidence).tolist()
    hits = zeros.index_add(0, bins, (predicted == label).double()).tolist()
    counts = torch.bincount(bins, minlength=num_bins).tolist()
    return [
        (total / count, hit / count, count) if count else (None, None, 0)
        for total, hit, count in zip(sums, hits, counts, strict=True)
    ]


def ece(logits: Tensor, label: Tensor, num_bins: int = NUM_BINS) -> float:
    """Expected calibration error: sum over equal-width bins of n_bin / N * |accuracy - confidence|.

    The bins are those of `reliability`.
    """
    return ece_of(reliability(logits, label, num_bins))


def ece_of(bins: Sequence[tuple[float | None, float | None, int]]) -> float:
    """The expected calibration error of the bins that `reliability` returns."""
    gaps = [
        count * abs(hit - confidence)
        for confidence, hit, count in bins
        if confidence is not None and hit is not None
    ]
    return sum(gaps) / sum(count for _, _, count in bins)


def wilson_interval(share: float, count: int) -> tuple[float, float]:
    """95 % Wilson score interval of a share of `count` independent trials."""
    z = 1.959963984540054
    middle = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(share * (1 - share) / count + (z / (2 * count)) ** 2)
    return max(0.0, middle - half), min(1.0, middle + half)


def fit_temperature(logits: Tensor, label: Tensor) -> float:
    """The T that makes softmax(logits / T) most likely, by LBFGS over log T.

    log T has a standard normal prior, which weighs as much as one image: without it a validation
    set that is classified without error has its optimum at T = 0.
    """
    logits, label = check_logits(logits, label)
    log_t = torch.zeros((), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([log_t], max_iter=100, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(logits * (-log_t).exp(), label, reduction="sum") + log_t**2 / 2
        (loss / len(label)).backward()  # type: ignore[no-untyped-call]
        return (loss / len(label)).detach()

    with torch.enable_grad():
        optimizer.step(closure)  # type: ignore[no-untyped-call]
    return math.exp(float(log_t.detach()))


def validation_metrics(logits: Tensor, label: Tensor) -> dict[str, float]:
    """What a training logs of the validation images."""
    return {"val_accuracy": accuracy(logits, label), "val_nll": nll(logits, label)}


def all_metrics(logits: Tensor, label: Tensor, temperature: float | None = None) -> Json:
    """All numbers of one evaluation; `*_scaled` are those of logits / temperature, if given.

    "reliability" holds the bins behind "ece" ("raw") and "ece_scaled" ("scaled", else None).
    """
    logits, label = check_logits(logits, label)
    top1 = accuracy(logits, label)
    scaled = None if temperature is None else logits / temperature
    bins = reliability(logits, label)
    scaled_bins = None if scaled is None else reliability(scaled, label)
    return {
        "accuracy": top1,
        "interval95": list(wilson_interval(top1, len(label))),
        "macro_f1": macro_f1(logits, label),
        "nll": nll(logits, label),
        "ece": ece_of(bins),
        "nll_scaled": None if scaled is None else nll(scaled, label),
        "ece_scaled": None if scaled_bins is None else ece_of(scaled_bins),
        "temperature": temperature,
        "count": len(label),
        "per_class": per_class_accuracy(logits, label),
        "reliability": {
            "raw": [list(row) for row in bins],
            "scaled": None if scaled_bins is None else [list(row) for row in scaled_bins],
        },
    }
