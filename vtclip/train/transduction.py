# SPDX-License-Identifier: Apache-2.0
"""Classes of unlabelled images decided together: what each looks like, and what its neighbours are.

    z_i  ∝ p_i exp(l_i / SPREAD + sum_j (w_ij + w_ji) z_j / (2 m))         row i of z sums to 1
    l_ik = -1/2 sum_c (x_ic - mu_kc)^2 / sigma_c
    mu_k = sum_i z_ik x_i / sum_i z_ik,      sigma_c = sum_ik z_ik (x_ic - mu_kc)^2 / N

p [N, K]: what a fitted head says of each image by itself. x [N, C]: image features of length 1.
w_ij: the cosine of x_i and x_j if it is above 0 and j is one of the m nearest neighbours of i.
A Gaussian mixture with one diagonal covariance and a graph over the images, pulled to p: TransCLIP
(Zanella, Gérin, Ben Ayed, arXiv 2406.01837) without its term for labelled images, with the head's
decision in place of zero-shot's. z comes from INNER updates of all images at once, then mu and
sigma from z, OUTER times. No label is an input: labelled images enter through p alone.

What is decided in the end is a mixture, `mixed`:

    (1 - v g) p + v g softmax(log z / T),       g = (N / K)^2 / ((N / K)^2 + ENOUGH^2)

T and v are fitted to validation images, v near 1/2 by a prior that weighs as much as STRENGTH
images. g says how far so many images can be relied on: few images per class describe it badly, and
then z lost up to 1.2 points of accuracy where g was 1 (benchmarks/choose_together.py, by images
that are no test images). The images of one call are all its evidence: other images beside it
change what is said of it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from vtclip.train import metrics
from vtclip.train.neighbours import NEIGHBOURS, neighbours_of

SPREAD = 50.0  # divides the log-likelihood of 512 or so correlated channels
SURE = 8  # images by which a class begins
OUTER, INNER = 10, 5
STRENGTH = 5.0
ENOUGH = 12.0  # images per class at which z counts by half of v


@torch.no_grad()
def transduce(log_p: Tensor, image: Tensor, neighbours: int = NEIGHBOURS) -> Tensor:
    """log z [N, K] in float64, of log p [N, K] and image [N, C]; see the module.

    Both on one device; image rows are brought to length 1. ValueError where shapes do not fit or a
    number is not finite.
    """
    if log_p.ndim != 2 or image.ndim != 2 or len(log_p) != len(image):
        shapes = f"{list(log_p.shape)} and {list(image.shape)}"
        raise ValueError(f"transduce: log_p and image must be [N, K] and [N, C], got {shapes}")
    if not bool(log_p.isfinite().all()) or not bool(image.isfinite().all()):
        raise ValueError("transduce: log_p and image must be finite")
    given = log_p.double().log_softmax(dim=1)
    if len(image) == 0:
        return given
    x = F.normalize(image.double(), dim=-1)
    graph = neighbours_of(x, neighbours)
    log_z = given
    surest = given.topk(min(SURE, len(x)), dim=0).indices  # [SURE, K]
    mean = x[surest].mean(dim=0)
    variance = torch.full_like(x[0], 1 / x.shape[1])
    for _ in range(OUTER):
        fit = log_likelihood(x, mean, variance) / SPREAD
        for _ in range(INNER):
            pull = graph.both_ways(log_z.exp()) / (2 * max(neighbours, 1))
            log_z = (given + fit + pull).log_softmax(dim=1)
        mean, variance = moments(x, log_z.exp(), mean)
    return log_z


def log_likelihood(x: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
    """l [N, K] of x [N, C] up to a number per image: its square cancels in the softmax."""
    precision = variance.reciprocal()
    return x @ (mean * precision).mT - (mean.square() @ precision) / 2


def moments(x: Tensor, z: Tensor, before: Tensor) -> tuple[Tensor, Tensor]:
    """Means [K, C], those `before` of a class without images, and the common variances [C]."""
    mass = z.sum(dim=0)[:, None]
    mean = torch.where(mass > 1e-12, (z.mT @ x) / mass.clamp(min=1e-12), before)
    square = x.square().mean(dim=0) + (mass * mean.square() - 2 * mean * (z.mT @ x)).sum(0) / len(x)
    return mean, square.clamp(min=1e-6 / x.shape[1])


class Weights(NamedTuple):
    """The share v and the temperature T of what is decided together."""

    share: float = 0.5
    temperature: float = 1.0


class Blend(NamedTuple):
    """log-probabilities [N, K], the share v of what was decided together, and its temperature."""

    log_p: Tensor
    share: float
    temperature: float


def blended(log_p: Tensor, image: Tensor, val: Tensor, label: Tensor) -> Blend:
    """The decision of the module for all N images, of which `val` have the classes `label`.

    log_p [N, K], image [N, C], val [n] row numbers, label [n]. The labels choose T and v, nothing
    else. Without any v is 1/2 and T is 1.
    """
    together = transduce(log_p, image)
    weights = fitted_weights(log_p[val], together[val], label)
    return Blend(mixed(log_p, together, weights), *weights)


def fitted_weights(log_p: Tensor, log_z: Tensor, label: Tensor) -> Weights:
    """v and T by n images of the classes label [n], of which log p and log z are [n, K]."""
    if not len(label):
        return Weights()
    given = log_p.double().log_softmax(dim=1)
    temperature = metrics.fit_temperature(log_z, label)
    together = (log_z / temperature).log_softmax(dim=1)
    rows = torch.stack([given, together])
    share = likeliest_share(rows[:, torch.arange(len(label)), label.long()].exp())
    return Weights(share, temperature)


def mixed(log_p: Tensor, log_z: Tensor, weights: Weights) -> Tensor:
    """log((1 - v g) p + v g softmax(log z / T)), [N, K] in float64; of one image p itself."""
    given = log_p.double().log_softmax(dim=1)
    if len(given) < 2:
        return given
    share = weights.share * reliance(*given.shape)
    together = (log_z / weights.temperature).log_softmax(dim=1)
    logs = given.new_tensor([1 - share, share]).log()
    return torch.stack([given + logs[0], together + logs[1]]).logsumexp(dim=0)


def reliance(images: int, classes: int) -> float:
    """g of `images` that are decided together, in 0..1."""
    each = images / classes
    return each**2 / (each**2 + ENOUGH**2)


def likeliest_share(true: Tensor) -> float:
    """v of max sum_n log((1 - v) a_n + v b_n) + STRENGTH (log(1 - v) + log v) / 2, true [a, b]."""
    share = torch.tensor(0.5, dtype=torch.float64)
    a, b = true.double().clamp(min=1e-30)
    for _ in range(200):
        mine = (share * b / (share * b + (1 - share) * a)).sum()
        share = (mine + STRENGTH / 2) / (len(a) + STRENGTH)
    return float(share)
