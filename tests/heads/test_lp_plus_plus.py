# SPDX-License-Identifier: Apache-2.0
"""LPPlusPlus is gradient descent as autograd and torch's SGD do it, by its own sizes of steps."""

from __future__ import annotations

import math

import pytest
import torch
from support_sets import fitted, scaled_nll, table, unit
from torch import Tensor
from torch.nn import functional as F

from vtclip.heads import LPPlusPlus, Support, ZeroShot
from vtclip.heads import lp_plus_plus as module

K, C = 4, 8
LABEL = torch.tensor([0, 0, 0, 1, 1, 1, 1, 3, 3, 2, 2])


def descended(text: Tensor, support: Support, num_steps: int) -> tuple[Tensor, Tensor, Tensor]:
    """w, b and alpha by torch.optim, step sizes from the singular values of the images."""
    x, y = unit(support.image), support.label
    to_text = x @ unit(text).T
    N = len(x)
    w = torch.stack([x[y == k].sum(dim=0) for k in range(K)]).requires_grad_()
    b = torch.zeros(K).double().requires_grad_()
    own = torch.stack([to_text[y == k, k].mean() for k in y.unique().tolist()])
    alpha = (250 * own.mean()).repeat(K).requires_grad_()
    rate = 4 * N / float(torch.linalg.svdvals(x)[0]) ** 2
    optimizer = torch.optim.SGD([w, b], lr=rate, momentum=0.9)
    alpha_rate = N / (4 * float((to_text**2).sum(dim=0).max()))

    def loss() -> Tensor:
        return F.cross_entropy(x @ w.T + b + alpha * to_text, y)

    for number in range(1, num_steps + 1):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
        if number % 10 == 0:
            (gradient,) = torch.autograd.grad(loss(), alpha)
            alpha.data -= alpha_rate * gradient
    return w.detach(), b.detach(), alpha.detach()


@pytest.mark.parametrize("num_steps", [1, 25])
@pytest.mark.parametrize("C", [8, 20])  # more and fewer images than columns
def test_is_the_descent(num_steps, C):
    text, image, support = table(K, LABEL, C=C)
    head = fitted(LPPlusPlus, text, support, num_steps=num_steps)
    w, b, alpha = descended(text, support, num_steps)
    for one, other in ((head.weight, w), (head.bias, b), (head.blend, alpha)):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)
    wanted = unit(image) @ (w + alpha[:, None] * unit(text)).T + b
    torch.testing.assert_close(head(image), wanted, rtol=1e-9, atol=1e-9)


def test_no_support_is_zero_shot():
    text, image, support = table(K, LABEL)
    torch.testing.assert_close(LPPlusPlus(text)(image), ZeroShot(text)(image))
    empty = Support(support.image[:0], support.label[:0])
    torch.testing.assert_close(fitted(LPPlusPlus, text, empty)(image), ZeroShot(text)(image))


def test_steps_lower_the_loss():
    text, _, support = table(K, LABEL)
    losses = [
        float(F.cross_entropy(fitted(LPPlusPlus, text, support, num_steps=n)(support.image), LABEL))
        for n in (1, 20, 160)
    ]
    assert losses[0] > losses[1] > losses[2]


def test_other_names_for_the_classes_change_no_logits():
    text, image, support = table(K, LABEL)
    order = torch.tensor([2, 0, 3, 1])
    head = fitted(LPPlusPlus, text, support)
    other = fitted(LPPlusPlus, text[order], Support(support.image, order.argsort()[LABEL]))
    torch.testing.assert_close(other(image), head(image)[:, order], rtol=0, atol=1e-9)


def test_search_finds_what_heads_of_each_point_would():
    text, image, support = table(K, LABEL)
    label = torch.tensor([0, 1, 2, 3, 1, 0])
    head = fitted(LPPlusPlus, text, support)
    costs = {}
    for count in module.NUM_STEPS:
        one = fitted(LPPlusPlus, text, support, num_steps=count)
        costs[count] = scaled_nll(one(image), label) + math.log2(count / head.num_steps) ** 2 / 2
    best, second = sorted(costs.values())[:2]
    assert second - best > 1e-6  # a tie would prove nothing
    head.choose(Support(image, label))
    assert costs[head.num_steps] == pytest.approx(best, rel=1e-9)
