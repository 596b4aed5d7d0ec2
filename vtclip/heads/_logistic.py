# SPDX-License-Identifier: Apache-2.0
"""Logistic regression with offsets on a fixed basis: a convex problem, by L-BFGS.

    W = argmin  sum_i w_i CE(offset_i + R_i W, y_i) + lam / 2 |W|^2

A step costs two products with R [M, r], however often its length is corrected: along a direction D
the logits are those of W plus t R D.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

MEMORY = 12  # pairs of steps and changes of the gradient that a direction is made of
RENEWED = 10  # steps after which the curvature that directions start from is computed again
LENGTHS = 40  # tried per direction; the first, 1, is nearly always taken
ROUNDING = 10  # of a sum over rows, in units of the last places of its terms


class Problem(NamedTuple):
    """R [M, r], offset [M, K] and the rows' weights w [M] in one dtype; label [M]."""

    basis: Tensor
    offset: Tensor
    weight: Tensor
    label: Tensor

    def to(self, dtype: torch.dtype) -> Problem:
        basis, offset, weight = (x.to(dtype) for x in self[:3])
        return Problem(basis, offset, weight, self.label)

    def at(self, logits: Tensor) -> tuple[Tensor, float]:
        """Of logits [M, K] the probabilities, and the objective without its penalty."""
        log_share = logits.log_softmax(dim=1)
        true = log_share.gather(1, self.label[:, None])[:, 0]
        return log_share.exp_(), -float((self.weight * true).sum())


class _Step(NamedTuple):
    """A point along a direction: its length, the probabilities there and the objective."""

    length: float
    share: Tensor
    value: float


def objective(problem: Problem, W: Tensor, lam: float) -> Tensor:
    """What is minimised, at W [r, K]; a scalar, differentiable."""
    log_share = torch.addmm(problem.offset, problem.basis, W).log_softmax(dim=1)
    losses = -log_share.gather(1, problem.label[:, None])[:, 0]
    return (problem.weight * losses).sum() + lam / 2 * W.square().sum()


def gradient(problem: Problem, W: Tensor, lam: float) -> Tensor:
    """The derivative [r, K] of `objective` at W, in closed form."""
    logits = torch.addmm(problem.offset, problem.basis, W)
    return _gradient(problem, W, logits.softmax(dim=1), lam)


def excess(problem: Problem, W: Tensor, lam: float) -> float:
    """About how far `objective` at W [r, K] lies above its minimum, as a share of it there.

    What a step of Newton's method would win if no two entries of W had to do with each other. Two
    products with R more than a gradient.
    """
    logits = torch.addmm(problem.offset, problem.basis, W)
    share, loss = problem.at(logits)
    slope = _gradient(problem, W, share, lam)
    won = slope.square_().div_(_curvature(problem, share, lam)).sum() / 2
    return float(won) / (loss + lam / 2 * float(W.square().sum()))


def minimise(
    problem: Problem, start: Tensor, lam: float, *, closeness: float, max_steps: int
) -> Tensor:
    """W [r, K] from `start` until |gradient| <= closeness * lam, or for `max_steps`.

    The objective curves by lam or more in every direction: no logit of a row of R of length 1 or
    less is then further than `closeness` from the minimum's. It ends before where rounding leaves
    nothing to gain along a direction. No step raises the objective by more than its rounding error.
    """
    W = start.clone()
    logits = torch.addmm(problem.offset, problem.basis, W)
    share, loss = problem.at(logits)
    at = _Step(0.0, share, loss + lam / 2 * float(W.square().sum()))
    slope = _gradient(problem, W, share, lam)
    terms = at.value + float((problem.weight * logits.abs().amax(dim=1)).sum())
    rounding = ROUNDING * torch.finfo(logits.dtype).eps * terms
    pairs: list[tuple[Tensor, Tensor, float]] = []
    for number in range(max_steps):
        if float(slope.norm()) <= closeness * lam:
            break
        if number % RENEWED == 0:
            scale = _curvature(problem, at.share, lam).reciprocal_()
        direction = _direction(slope, scale, pairs)
        along = problem.basis @ direction
        found = _line_search(problem, logits, along, W, direction, slope, at.value, rounding, lam)
        if found is None:
            break
        at = found
        logits = logits.add_(along, alpha=at.length)
        step = direction.mul_(at.length)
        W += step
        new = _gradient(problem, W, at.share, lam)
        change = new - slope
        curve = float((step * change).sum())
        if curve > 0:  # but for rounding it is
            pairs = [*pairs[-(MEMORY - 1) :], (step, change, 1 / curve)]
        slope = new
    return W


def _gradient(problem: Problem, W: Tensor, share: Tensor, lam: float) -> Tensor:
    residual = share * problem.weight[:, None]
    residual.scatter_add_(1, problem.label[:, None], -problem.weight[:, None])
    return torch.addmm(W, problem.basis.mT, residual, beta=lam)


def _curvature(problem: Problem, share: Tensor, lam: float) -> Tensor:
    """The diagonal [r, K] of the second derivative."""
    spread = share * (1 - share) * problem.weight[:, None]
    return (problem.basis.square().mT @ spread).add_(lam)


def _direction(slope: Tensor, scale: Tensor, pairs: list[tuple[Tensor, Tensor, float]]) -> Tensor:
    """-H^-1 slope by the two loops of L-BFGS (Nocedal 1980), starting at H = 1 / scale."""
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
    problem: Problem,
    logits: Tensor,
    along: Tensor,
    W: Tensor,
    direction: Tensor,
    slope: Tensor,
    value: float,
    rounding: float,
    lam: float,
) -> _Step | None:
    """A step that halves the slope along `direction` and does not raise the objective, `value`.

    None where there is no such step but for rounding. By Newton's method within a bracket, the
    objective being convex along the direction, too.
    """
    start = float((slope * direction).sum())
    if not start < 0:
        return None
    highest = value + rounding
    true = along.gather(1, problem.label[:, None])[:, 0]
    inner, square = lam * float((W * direction).sum()), lam * float(direction.square().sum())
    constant, penalty = inner - float((problem.weight * true).sum()), lam / 2 * W.square().sum()
    low, high, t = 0.0, float("inf"), 1.0
    for _ in range(LENGTHS):
        share, loss = problem.at(torch.add(logits, along, alpha=t))
        here = loss + float(penalty) + t * inner + t * t / 2 * square
        mean = (share * along).sum(dim=1)
        first = float((problem.weight * mean).sum()) + constant + t * square
        if abs(first) <= -start / 2 and here <= highest:
            return _Step(t, share, here)
        low, high = (t, high) if first < 0 else (low, t)
        spread = (share * along.square()).sum(dim=1) - mean.square()
        t -= first / (float((problem.weight * spread).sum()) + square)
        if not low < t < high:
            t = (low + high) / 2 if high < float("inf") else 2 * low
    return None
