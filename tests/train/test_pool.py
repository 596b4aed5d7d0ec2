# SPDX-License-Identifier: Apache-2.0
"""Weights of a log-linear pool: the optimum of their loss, its limits, its refusals."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from vtclip.train.pool import log_probabilities, pool_loss, pool_weights

K = 4


def table(label: torch.Tensor, strength: float, seed: int) -> torch.Tensor:
    """Logits: noise, plus `strength` on the true class."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(len(label), K, generator=generator) + strength * F.one_hot(label, K)


def drawn(count: int, *strengths: float) -> tuple[torch.Tensor, torch.Tensor]:
    label = torch.arange(count) % K
    rows = {str(i): table(label, strength, i) for i, strength in enumerate(strengths)}
    return log_probabilities(rows, label), label


def at(weights: list[float], sharpness: float) -> torch.Tensor:
    logs = [math.log(value) for value in (*weights, sharpness)]
    return torch.tensor(logs, dtype=torch.float64, requires_grad=True)


def test_the_loss_is_the_written_one():
    log_p, label = drawn(11, 1.0, 2.0)
    prior = torch.tensor([0.25, 0.75], dtype=torch.float64)
    w, t = [0.6, 0.4], 1.7
    wanted = -20.0 * sum(p * math.log(v) for p, v in zip((0.25, 0.75), w, strict=True))
    wanted += math.log(t) ** 2 / 2
    for n, y in enumerate(label.tolist()):
        scores = [t * sum(w[m] * float(log_p[m, n, k]) for m in (0, 1)) for k in range(K)]
        wanted += math.log(sum(map(math.exp, scores))) - scores[y]
    found = pool_loss(at(w, t).detach(), log_p, label, prior, 20.0)
    assert float(found) == pytest.approx(wanted / 11)


def test_gradient_of_the_loss():
    log_p, label = drawn(7, 1.0, 2.0, 0.5)
    prior = torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64)
    point = at([0.3, 0.3, 0.4], 0.8)
    assert torch.autograd.gradcheck(lambda x: pool_loss(x, log_p, label, prior, 20.0), (point,))


@pytest.mark.parametrize("count", [1, 3, 60, 400])
def test_the_gradient_at_the_optimum_is_zero_and_other_points_are_worse(count):
    log_p, label = drawn(count, 1.0, 2.0, 0.1)
    prior = torch.full((3,), 1 / 3, dtype=torch.float64)
    weights, sharpness = pool_weights(log_p, label, [1.0, 1.0, 1.0])
    assert sum(weights) == pytest.approx(1)
    point = at(weights, sharpness)
    best = pool_loss(point, log_p, label, prior, 20.0)
    best.backward()
    best = best.detach()
    assert float(point.grad.abs().max()) < 1e-7
    generator = torch.Generator().manual_seed(3)
    for _ in range(20):
        other = point.detach() + 0.5 * torch.randn(4, dtype=torch.float64, generator=generator)
        assert float(pool_loss(other, log_p, label, prior, 20.0)) > float(best)


def test_without_images_the_prior_stands():
    found = pool_weights(torch.zeros(2, 0, K), torch.zeros(0, dtype=torch.long), [3.0, 1.0])
    assert (found.weights, found.sharpness) == ([0.75, 0.25], 1.0)


def test_few_images_leave_the_prior_nearly_alone():
    few = pool_weights(*drawn(4, 0.0, 6.0), [1.0, 1.0])
    assert 0.5 < few.weights[1] < 0.65


def test_a_method_that_knows_nothing_costs_nothing():
    """At its own temperature it is flat, whatever its weight; t makes up for the share it takes."""
    log_p, label = drawn(2000, 0.0, 2.0)
    weights, sharpness = pool_weights(log_p, label, [1.0, 1.0])
    pooled = sharpness * (weights[0] * log_p[0] + weights[1] * log_p[1])
    alone = float(F.cross_entropy(log_p[1], label))
    assert float(F.cross_entropy(pooled, label)) == pytest.approx(alone, rel=2e-3)


def test_independent_methods_add_their_evidence_and_copies_do_not():
    log_p, label = drawn(2000, 1.0, 1.0)
    apart = pool_weights(log_p, label, [1.0, 1.0])
    twice = pool_weights(log_p[:1].expand(2, -1, -1), label, [1.0, 1.0])
    assert apart.weights == pytest.approx([0.5, 0.5], abs=0.05)
    assert apart.sharpness == pytest.approx(2.0, rel=0.15)  # sums of logits of independent noise
    assert twice.weights == pytest.approx([0.5, 0.5], abs=1e-6)
    assert twice.sharpness == pytest.approx(1.0, rel=0.01)


def test_the_order_of_methods_and_of_images_does_not_matter():
    log_p, label = drawn(40, 1.0, 2.0, 0.5)
    weights, sharpness = pool_weights(log_p, label, [1.0, 2.0, 3.0])
    order = torch.randperm(40, generator=torch.Generator().manual_seed(1))
    turned = pool_weights(log_p.flip(0)[:, order], label[order], [3.0, 2.0, 1.0])
    assert turned.weights == pytest.approx(weights[::-1], abs=1e-6)
    assert turned.sharpness == pytest.approx(sharpness, rel=1e-6)


def test_it_is_the_same_every_time_to_the_last_bit():
    log_p, label = drawn(40, 1.0, 2.0, 0.5)
    assert pool_weights(log_p, label, [1.0] * 3) == pool_weights(log_p, label, [1.0] * 3)


def test_certain_and_wrong_methods_stay_finite():
    label = torch.arange(40) % K
    rows = {"sure": 1e4 * F.one_hot((label + 1) % K, K).float(), "right": table(label, 3.0, 1)}
    weights, sharpness = pool_weights(log_probabilities(rows, label), label, [1.0, 1.0])
    assert all(0 < weight < 1 for weight in weights)
    assert math.isfinite(sharpness)
    assert weights[1] > weights[0]


@pytest.mark.parametrize(
    ("prior", "words"),
    [([1.0], "got \\[2, 4, 4\\], 1 and 4"), ([1.0, 0.0], "above 0"), ([1.0, math.inf], "finite")],
)
def test_refusals(prior, words):
    log_p, label = drawn(4, 1.0, 2.0)
    with pytest.raises(ValueError, match=words):
        pool_weights(log_p, label, prior)
