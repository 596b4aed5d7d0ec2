# SPDX-License-Identifier: Apache-2.0
"""Conformal prediction: an answer "unknown" and sets of classes, with a stated error rate.

A score s is computed for n calibration images and for a new one. If the n + 1 images are
exchangeable (any order of them is as likely as any other, as of independent draws from one source)
and the function that gives the score was made without them, the rank of the new score among all
n + 1 is uniform, whatever its distribution is and however good the model is. So

    P(s_new < s_(k))  <= k / (n + 1)     s_(k): the k-th smallest of the n
    P(s_new <= s_(k)) >= k / (n + 1)

with equality in both where no two scores are equal (Vovk, Gammerman, Shafer, "Algorithmic Learning
in a Random World", 2005; Angelopoulos and Bates, arXiv 2107.07511). The probability is over the
calibration images and the new image together: for one fixed calibration set the rate is itself
random, distributed as Beta(k, n + 1 - k) where there are no ties.

Scores that are high for images that look like one of the classes, of logits z [B, K]:

    centred      max_k z_k - mean_k z_k
    max_logit    max_k z_k               Hendrycks et al., arXiv 1911.11132
    energy       logsumexp_k z_k         minus the energy of Liu et al., arXiv 2010.03759
    probability  max_k softmax(z)_k      Hendrycks and Gimpel, arXiv 1610.02136
    cosine       max_k cos(image, text_k)

A constant that is added to all logits of an image changes no probability, and heads are trained or
solved without regard to it. max_logit and energy take it for evidence, centred does not; it is the
one in use (`known_score`), chosen by benchmarks/unknown.py, see docs/unknown.md. An image is
unknown where its score is below s_(k), k = floor((n + 1) rate): at most `rate` of the images of
known classes are refused. Nothing is promised of how many of the others are found.

Prediction sets: all classes whose loss -log p(class | image) is at most the k-th smallest loss of
the true classes of the calibration images, k = ceil((n + 1) coverage) (Sadinle, Lei, Wasserman,
arXiv 1609.00451: the least average size for the coverage). The true class is in the set of a new
image with probability at least `coverage`, and below coverage + 1 / (n + 1) where no two losses are
equal. A set may be empty: of a model that is right more often than `coverage` some must
be, and these are the images whose every class is improbable.
"""

from __future__ import annotations

import math
from fractions import Fraction
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from vtclip.files import Json

SCORE = "centred"
DIGITS = 9  # significant, of a stored score: more than float32 has


class Calibration(NamedTuple):
    """Scores of the n validation images of a run, float64 [n] each.

    loss: -log of the probability of the true class, at the run's temperature.
    known: `known_score`, which is low for images of no class.
    """

    loss: Tensor
    known: Tensor

    def to_json(self) -> Json:
        """As adapter_config.json holds it."""
        rows = {
            name: [float(f"{value:.{DIGITS}g}") for value in column.tolist()]
            for name, column in self._asdict().items()
        }
        return {"score": SCORE, "images": len(self.loss), **rows}

    @classmethod
    def from_json(cls, value: Json) -> Calibration:
        """Of what `to_json` returned; a ValueError where it is something else."""
        columns = [value.get(name) for name in cls._fields]
        right = value.get("score") == SCORE
        for column in columns:
            right &= isinstance(column, list) and len(column) == value.get("images") != 0
        if not right:
            raise ValueError(
                f"calibration must hold the score {SCORE!r} and one loss and one score for each "
                f"validation image, got score {value.get('score')!r} and {value.get('images')!r} "
                "images"
            )
        return cls(*(torch.tensor(column, dtype=torch.float64) for column in columns))


def check_share(name: str, value: float) -> Fraction:
    """`value` as the decimal number it is written as, which must lie strictly between 0 and 1."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    if not (math.isfinite(value) and 0 < value < 1):
        raise ValueError(f"{name} must lie between 0 and 1, got {value:g}")
    return Fraction(repr(float(value)))  # 0.29 * 100 is below 29 in floating point


def unknown_threshold(scores: Tensor, rate: float) -> float:
    """The score below which an image is unknown: the floor((n + 1) rate)-th smallest of scores [n].

    A ValueError where rate < 1 / (n + 1): then no threshold keeps the promise but one that refuses
    nothing.
    """
    share, n = check_share("unknown", rate), _count("unknown", scores)
    k = math.floor(share * (n + 1))
    if k < 1:
        raise ValueError(
            f"unknown must be at least 1/{n + 1} = {_up(1 / (n + 1))} with {n} validation images, "
            f"got {rate:g}"
        )
    return float(scores.double().sort().values[k - 1])


def coverage_threshold(losses: Tensor, coverage: float) -> float:
    """The largest loss of a class in a set: the ceil((n + 1) coverage)-th smallest of losses [n].

    A ValueError where coverage > n / (n + 1): then only the set of all classes keeps the promise.
    """
    share, n = check_share("coverage", coverage), _count("coverage", losses)
    k = math.ceil(share * (n + 1))
    if k > n:
        raise ValueError(
            f"coverage must be at most {n}/{n + 1} = {_down(n / (n + 1))} with {n} validation "
            f"images, got {coverage:g}"
        )
    return float(losses.double().sort().values[k - 1])


def p_values(scores: Tensor, new: Tensor) -> Tensor:
    """Conformal p-values of new [B] among scores [n]: (1 + how many of the n are at most it)/(n+1).

    An image is unknown at `rate` where its p-value is at most the rate. float64 [B].
    """
    _count("p_values", scores)
    ordered = scores.double().sort().values
    at_most = torch.searchsorted(ordered, new.double().contiguous(), right=True)
    return (1 + at_most).double() / (len(scores) + 1)


def class_losses(logits: Tensor, temperature: float | None = None) -> Tensor:
    """-log softmax(logits / temperature), float64 [B, K].

    The logarithm keeps apart what rounds to a probability of 1.
    """
    return -(logits.double() / (temperature or 1.0)).log_softmax(dim=1)


def true_losses(losses: Tensor, label: Tensor) -> Tensor:
    """The loss of each row's own class: losses [B, K], label [B] -> [B]."""
    return losses.gather(1, label[:, None].to(losses.device))[:, 0]


def prediction_sets(losses: Tensor, threshold: float) -> Tensor:
    """Which classes are in the set of each image: losses [B, K] -> bool [B, K]."""
    return losses <= threshold


def known_score(z: Tensor) -> Tensor:
    """The score in use: the largest logit above the mean of all, [B, K] -> float64 [B]."""
    return z.double().amax(dim=1) - z.double().mean(dim=1)


def energy(z: Tensor) -> Tensor:
    """logsumexp over the classes, [B, K] -> float64 [B]: minus the energy at temperature 1."""
    return z.double().logsumexp(dim=1)


def max_logit(z: Tensor) -> Tensor:
    """The largest logit, [B, K] -> float64 [B]."""
    return z.double().amax(dim=1)


def max_log_probability(z: Tensor) -> Tensor:
    """The logarithm of the largest probability, [B, K] -> float64 [B]."""
    return z.double().log_softmax(dim=1).amax(dim=1)


def max_cosine(image: Tensor, text: Tensor) -> Tensor:
    """The largest cosine of image [B, C] with the class texts [K, C], float64 [B]."""
    cosine = F.normalize(image.double(), dim=1) @ F.normalize(text.double(), dim=1).mT
    return cosine.amax(dim=1)


def _count(name: str, values: Tensor) -> int:
    if values.ndim != 1 or len(values) == 0:
        raise ValueError(f"{name}: there must be validation images, got {list(values.shape)}")
    if bool(values.isnan().any()):
        raise ValueError(f"{name}: scores must be numbers, got NaN")
    return len(values)


def _up(value: float) -> str:
    """Four digits, rounded away from what is refused."""
    return f"{math.ceil(value * 1e4) / 1e4:g}"


def _down(value: float) -> str:
    return f"{math.floor(value * 1e4) / 1e4:g}"
