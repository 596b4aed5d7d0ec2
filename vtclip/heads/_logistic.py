# SPDX-License-Identifier: Apache-2.0
"""Logistic regression with offsets on a fixed basis: a convex problem, by L-BFGS.

    W = argmin  sum_i w_i CE(offset_i + R_i W, y_i) + lam / 2 |W|^2

Each step costs two products with R [M, r], whatever its length: along a direction D the logits are
those of W plus t R D, so that the line search needs no product of its own.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

MEMORY = 12  # pairs of steps and changes of the gradient that a direction is made of
SEARCH_STEPS = 30


class Problem(NamedTuple):
    """R [M, r], offset [M, K], label [M] and the rows' weights w [M]; all but label in one dtype."""

    basis: Tensor
    offset: Tensor
    label: Tensor
    weight: Tensor

    def to(self, dtype: torch.dtype) -> Problem:
        basis, offset, weight = (x.to(dtype) for x in (self.basis, self.offset, self.weight))
        return Problem(basis, offset, self.label, weight)


def objective(problem: Problem, W: Tensor, lam: float) -> Tensor:
    """What is minimised, at W [r, K]; a scalar."""
    logits = problem.offset + problem.basis @ W
    losses = F.cross_entropy(logits, problem.label, reduction="none")
    return (problem.weight * losses).sum() + lam / 2 * W.square().sum()


def gradient(problem: Problem, W: Tensor, lam: float) -> Tensor:
    """Its derivative [r, K] at W, in closed form."""
    return _gradient(problem, W, _share(problem, problem.offset + problem.basis @ W), lam)


def minimise(
    problem: Problem, start: Tensor, lam: float, *, closeness: float, max_steps: int
) -> Tensor:
    """W [r, K] from `start`, such that |gradient| <= closeness * lam, or after `max_steps`.

    The objective curves by lam or more in every direction, so that no logit of a row R_i of length
    1 or less is then further than `closeness` from that of the minimum. It ends earlier where
    rounding leaves nothing to gain: no step along the direction lowers the slope.
    """
    W = start.clone()
    logits = problem.offset + problem.basis @ W
    share = _share(problem, logits)
    slope = _gradient(problem, W, share, lam)
    scale = _curvature(problem, share, lam).reciprocal_()
    pairs: list[tuple[Tensor, Tensor, float]] = []
    for _ in range(max_steps):
        if float(slope.norm()) <= closeness * lam:
            break
        direction = _direction(slope, scale, pairs)
        along = problem.basis @ direction
        t = _line_search(problem, logits, along, W, direction, lam)
        if t == 0:
            break
        logits = logits.add_(along, alpha=t)
        step = direction.mul_(t)
        W += step
        share = _share(problem, logits)
        new = _gradient(problem, W, share, lam)
        change = new - slope
        curve = float((step * change).sum())
        if curve > 0:
            pairs = [*pairs[-(MEMORY - 1) :], (step, change, 1 / curve)]
        slope = new
    return W


def _share(problem: Problem, logits: Tensor) -> Tensor:
    """softmax of the logits [M, K]."""
    return logits.softmax(dim=1)


def _gradient(problem: Problem, W: Tensor, share: Tensor, lam: float) -> Tensor:
    rows = torch.arange(len(share), device=share.device)
    residual = share.clone()
    residual[rows, problem.label] -= 1
    residual *= problem.weight[:, None]
    return torch.addmm(W, problem.basis.mT, residual, beta=lam)


def _curvature(problem: Problem, share: Tensor, lam: float) -> Tensor:
    """The diagonal of the second derivative, [r, K]."""
    spread = share * (1 - share) * problem.weight[:, None]
    return torch.addmm(torch.full_like(spread[:1], lam), problem.basis.square().mT, spread)


def _direction(slope: Tensor, scale: Tensor, pairs: list[tuple[Tensor, Tensor, float]]) -> Tensor:
    """-H^-1 slope by the two loops of L-BFGS (Nocedal 1980), from the diagonal H = 1 / scale."""
    q = slope.clone()
    parts = []
    for step, change, inverse in reversed(pairs):
        part = inverse * float((step * q).sum())
        q.add_(change, alpha=-part)
        parts.append(part)
    q *= scale
    for (step, change, inverse), part in zip(pairs, reversed(parts), strict=True):
        q.add_(step, alpha=part - inverse * float((change * q).sum()))
    return q.neg_()


def _line_search(
    problem: Problem, logits: Tensor, along: Tensor, W: Tensor, direction: Tensor, lam: float
) -> float:
    """t > 0 at which the slope along `direction` is a tenth of that at 0 or less; 0 if there is none.

    By Newton steps within a bracket: the objective is convex along the direction, too.
    """
    true = along.gather(1, problem.label[:, None])[:, 0]
    linear = lam * float((W * direction).sum()) - float((problem.weight * true).sum())
    square = lam * float(direction.square().sum())

    def slope(t: float) -> tuple[float, float]:
        share = torch.add(logits, along, alpha=t).softmax(dim=1)
        mean = (share * along).sum(dim=1)
        second = (share * along.square()).sum(dim=1) - mean.square()
        first = float((problem.weight * mean).sum()) + linear + t * square
        return first, float((problem.weight * second).sum()) + square

    start, _ = slope(0.0)
    if not start < 0:
        return 0.0
    low, high, t = 0.0, float("inf"), 1.0
    for _ in range(SEARCH_STEPS):
        first, second = slope(t)
        if abs(first) <= 0.1 * -start:
            return t
        low, high = (t, high) if first < 0 else (low, t)
        t = t - first / second
        if not low < t < high:
            t = (low + high) / 2 if high < float("inf") else 2 * low
    return low
