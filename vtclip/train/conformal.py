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

Validation images are drawn class by class, about as many of each class, and are exchangeable with
new images only as far as these are drawn so too. Where classes of the source have unequal sizes,
each validation image has a weight w_i (`class_weights`), so that the promise is for new images with
the classes as frequent as in the source, of each class exchangeable with its validation images
(Podkopaev and Ramdas, arXiv 2103.03323). With S the sum of the weights and W the largest one, for
that of the new image, which is not known: s_(k) is then the score up to which the weights make up
the share, as the functions below say. With other frequencies nothing is promised.

Scores that are high for images that look like one of the classes, of logits z [B, K]:

    centred      max_k z_k - mean_k z_k
    max_logit    max_k z_k               Hendrycks et al., arXiv 1911.11132
    energy       logsumexp_k z_k         minus the energy of Liu et al., arXiv 2010.03759
    probability  max_k softmax(z)_k      Hendrycks and Gimpel, arXiv 1610.02136
    cosine       max_k cos(image, text_k)

A constant that is added to all logits of an image changes no probability, and heads are trained or
solved without regard to it. max_logit and energy take it for evidence, centred does not; it is the
one in use (`known_score`), chosen by benchmarks/unknown.py, see docs/unknown.md. An image is
unknown where its score is below s_(k), k = floor((n + 1) rate): on average at most `rate` of the
images of known classes are refused. Nothing is promised of how many of the others are found.

Prediction sets: all classes whose loss -log p(class | image) is at most the k-th smallest loss of
the true classes of the calibration images, k = ceil((n + 1) coverage) (Sadinle, Lei, Wasserman,
arXiv 1609.00451: the least average size for the coverage). The true class is in the set of a new
image with probability at least `coverage`, and below coverage + 1 / (n + 1) where no two losses are
equal. A set may be empty: of a model that is right more often than `coverage` some must
be, and these are the images whose every class is improbable.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from vtclip.files import Json
from vtclip.names import option

SCORE = "centred"
DIGITS = 9  # significant, of a stored score: more than float32 has


class Calibration(NamedTuple):
    """Scores of the n validation images of a run, float64 [n] each.

    loss: -log of the probability of the true class, at the run's temperature.
    known: `known_score`, which is low for images of no class.
    weight: see `class_weights`.
    """

    loss: Tensor
    known: Tensor
    weight: Tensor

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
                f"calibration must hold the score {SCORE!r} and loss, known and weight of each "
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


def unknown_threshold(scores: Tensor, rate: float, weight: Tensor | None = None) -> float:
    """The score below which an image is unknown: the floor((n + 1) rate)-th smallest of scores [n].

    With weight [n]: the largest s_(j) with W + sum_(i < j) w_(i) <= rate (W + S). A ValueError
    where rate < W / (W + S), which is 1 / (n + 1) of equal weights: then no threshold keeps the
    promise but one that refuses nothing.
    """
    share = check_share("unknown", rate)
    values, weights, largest = _ordered("unknown", scores, weight)
    total = largest + sum(weights)
    if share * total < largest:
        raise ValueError(
            f"{option('unknown')} must be at least {_least(largest, total, len(values))} "
            "validation images"
            f"{_unequal(weights)}, got {rate:g}"
        )
    below, limit, threshold = largest, share * total, values[0]
    for value, one in zip(values, weights, strict=True):
        if below > limit:
            break
        below, threshold = below + one, value
    return threshold


def coverage_threshold(losses: Tensor, coverage: float, weight: Tensor | None = None) -> float:
    """The largest loss of a class in a set: the ceil((n + 1) coverage)-th smallest of losses [n].

    With weight [n]: the smallest s_(j) with sum_(i <= j) w_(i) >= coverage (W + S). A ValueError
    where coverage > S / (W + S), which is n / (n + 1) of equal weights: then only the set of all
    classes keeps the promise.
    """
    share = check_share("coverage", coverage)
    values, weights, largest = _ordered("coverage", losses, weight)
    total = largest + sum(weights)
    reached, limit = Fraction(0), share * total
    for value, one in zip(values, weights, strict=True):
        reached += one
        if reached >= limit:
            return value
    most = f"{len(values)}/{len(values) + 1} = " if largest * len(values) == reached else ""
    raise ValueError(
        f"{option('coverage')} must be at most {most}{_down(float(reached / total))} with "
        f"{len(values)} "
        f"validation images{_unequal(weights)}, got {coverage:g}"
    )


def p_values(scores: Tensor, new: Tensor, weight: Tensor | None = None) -> Tensor:
    """Conformal p-values of new [B] among scores [n]: (1 + how many of the n are at most it)/(n+1).

    With weight [n]: (W + the weights of those) / (W + S). An image is unknown at `rate` where its
    p-value is at most the rate. float64 [B].
    """
    values, weights, largest = _ordered("p_values", scores, weight)
    at_most = torch.searchsorted(
        torch.tensor(values, dtype=torch.float64), new.double().contiguous(), right=True
    )
    sums = torch.tensor([0.0, *map(float, weights)], dtype=torch.float64).cumsum(0)
    return (float(largest) + sums[at_most]) / (float(largest) + float(sums[-1]))


def class_weights(label: Tensor, every_label: Tensor) -> Tensor:
    """How much each validation image counts for, so that classes have their share of the source.

    label [n] of the validation images, every_label [N] of the images they stand for. A class with
    n_k of n and N_k of N images has weight (N_k / N) / (n_k / n). float64 [n], 1 where classes have
    equal numbers of images.
    """
    K = int(every_label.max()) + 1
    of_val, of_all = (torch.bincount(x, minlength=K) for x in (label, every_label))
    return (of_all * len(label)).double()[label] / (of_val * len(every_label)).double()[label]


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


def _ordered(
    name: str, values: Tensor, weight: Tensor | None
) -> tuple[list[float], Sequence[Fraction | int], Fraction | int]:
    """values [n] in ascending order with their weights, and the largest weight; all exact."""
    if values.ndim != 1 or len(values) == 0:
        raise ValueError(f"{name}: there must be validation images, got {list(values.shape)}")
    if bool(values.isnan().any()):
        raise ValueError(f"{name}: scores must be numbers, got NaN")
    order = values.double().argsort(stable=True)
    ordered = values.double()[order].tolist()
    if weight is None or bool((weight == 1).all()):  # quicker, and the same
        return ordered, [1] * len(ordered), 1
    weights = [Fraction(one) for one in weight.double()[order].tolist()]
    return ordered, weights, max(weights)


def _least(largest: Fraction | int, total: Fraction | int, n: int) -> str:
    equal = f"1/{n + 1} = " if largest * (n + 1) == total else ""
    return f"{equal}{_up(float(largest / total))} with {n}"


def _unequal(weights: Sequence[Fraction | int]) -> str:
    return " of classes of unequal sizes" if len(set(weights)) > 1 else ""


def _up(value: float) -> str:
    """Four digits, rounded away from what is refused."""
    return f"{math.ceil(value * 1e4) / 1e4:g}"


def _down(value: float) -> str:
    return f"{math.floor(value * 1e4) / 1e4:g}"
