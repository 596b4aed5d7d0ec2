# SPDX-License-Identifier: Apache-2.0
"""The weights of a log-linear pool of methods, by validation images near a prior.

    w, t = argmin  - sum_n log softmax(t sum_m w_m log p_m(x_n))[y_n]
                   - STRENGTH sum_m prior_m log w_m + log(t)^2 / 2,      sum_m w_m = 1

p_m: probabilities of method m at its own temperature. The first term is the loss of a logistic
regression whose features are the log-probabilities, convex in t w (logarithmic opinion pool, Heskes
1997). The second is a Dirichlet prior on w that as many images as STRENGTH outweigh: few validation
images rank methods badly. The third is the prior of a temperature (`metrics.fit_temperature`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from vtclip.train import metrics

STRENGTH = 20.0  # images that the prior weighs as much as
STEPS = 200


class PoolWeights(NamedTuple):
    """Weights with a sum of 1, in the order of the methods, and t."""

    weights: list[float]
    sharpness: float


def log_probabilities(logits: Mapping[str, Tensor], label: Tensor) -> Tensor:
    """Logits [N, K] of M methods -> log p [M, N, K] in float64, each at its own temperature."""
    rows = [
        (table.double() / metrics.fit_temperature(table, label)).log_softmax(dim=1)
        for table in logits.values()
    ]
    return torch.stack(rows)


def pool_weights(
    log_p: Tensor, label: Tensor, prior: Sequence[float], strength: float = STRENGTH
) -> PoolWeights:
    """The minimum of the module's loss, by L-BFGS in float64 from w = prior and t = 1.

    log_p: [M, N, K], label: [N], prior: [M] above 0, brought to a sum of 1. Without images (N = 0)
    the prior stands, with t = 1.
    """
    start = torch.tensor(prior, dtype=torch.float64)
    if log_p.ndim != 3 or len(log_p) != len(prior) or log_p.shape[1] != len(label):
        shapes = f"{list(log_p.shape)}, {len(prior)} and {len(label)}"
        raise ValueError(
            f"pool_weights: log_p must be [M, N, K] of M priors, N labels; got {shapes}"
        )
    if not bool((start.isfinite() & (start > 0)).all()):
        raise ValueError(f"pool_weights: prior must be finite and above 0, got {list(prior)}")
    start = start / start.sum()
    if len(label) == 0:
        return PoolWeights(start.tolist(), 1.0)
    point = torch.cat(
        [start.log(), start.new_zeros(1)]
    ).requires_grad_()  # log w up to a sum; log t
    optimizer = torch.optim.LBFGS(
        [point],
        max_iter=STEPS,
        tolerance_grad=1e-10,
        tolerance_change=1e-14,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = pool_loss(point, log_p, label, start, strength)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach()

    with torch.enable_grad():
        optimizer.step(closure)  # type: ignore[no-untyped-call]
    found = point.detach()
    return PoolWeights(found[:-1].softmax(dim=0).tolist(), math.exp(float(found[-1])))


def pool_loss(
    point: Tensor, log_p: Tensor, label: Tensor, prior: Tensor, strength: float
) -> Tensor:
    """The module's loss at point = (u [M], log t), w = softmax(u), over max(1, N)."""
    log_w, log_t = point[:-1].log_softmax(dim=0), point[-1]
    scale = (log_w + log_t).exp()
    pooled = torch.einsum("m,mnk->nk", scale, log_p).log_softmax(dim=1)
    fit = -pooled.gather(1, label[:, None]).sum()
    total = fit - strength * (prior * log_w).sum() + log_t.square() / 2
    return total / max(1, len(label))
