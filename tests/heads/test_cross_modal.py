# SPDX-License-Identifier: Apache-2.0
"""CrossModal is the minimum of its objective, found by Newton's method; its limit is zero-shot."""

from __future__ import annotations

import math

import pytest
import torch
from support_sets import fitted, scaled_nll, table, unit
from torch import Tensor
from torch.nn import functional as F

from vtclip.heads import CrossModal, Support, ZeroShot
from vtclip.heads import cross_modal as module

K, C = 4, 8
LABEL = torch.tensor([0, 0, 0, 1, 1, 1, 1, 1, 2, 2, 0])  # class 3 has no support
SCALE = 10.0


def newton(text: Tensor, support: Support, l2: float, weight: Tensor) -> Tensor:
    """V [K, C] by damped Newton steps with the full Hessian of the module's objective."""
    rows, t = unit(support.image), unit(text)
    share = weight.sum() / K

    def f(flat: Tensor) -> Tensor:
        W = SCALE * t + flat.view(K, -1)
        images = F.cross_entropy(rows @ W.T, support.label, reduction="none")
        texts = F.cross_entropy(t @ W.T, torch.arange(K), reduction="sum")
        return (weight * images).sum() + share * texts + l2 / 2 * flat.square().sum()

    flat = torch.zeros(text.numel(), dtype=torch.float64)
    for _ in range(100):
        gradient = torch.func.grad(f)(flat)
        if float(gradient.abs().max()) < 1e-11:
            break
        step, size = torch.linalg.solve(torch.func.hessian(f)(flat), gradient), 1.0
        while f(flat - size * step) > f(flat) and size > 1e-9:
            size /= 2
        flat = flat - size * step
    return flat.view(K, -1)


@pytest.mark.parametrize("l2", [1.0, 0.03])
@pytest.mark.parametrize("C", [8, 40])  # more and fewer rows than columns
def test_is_the_minimum(l2, C):
    text, image, support = table(K, LABEL, C=C)
    head = fitted(CrossModal, text, support, l2=l2, logit_scale=SCALE)
    change = newton(text, support, l2, torch.ones(len(LABEL)).double())
    torch.testing.assert_close(head.change, change, rtol=0, atol=1e-4)
    wanted = unit(image) @ (SCALE * unit(text) + change).T
    torch.testing.assert_close(head(image), wanted, rtol=0, atol=1e-4)


def test_classes_count_as_their_votes_say():
    text, _, support = table(K, LABEL)
    head = fitted(CrossModal, text, support, l2=0.1, votes_per_class=2.0, logit_scale=SCALE)
    weight = (2.0 / torch.bincount(LABEL, minlength=K).double())[LABEL]
    change = newton(text, support, 0.1, weight)
    torch.testing.assert_close(head.change, change, rtol=0, atol=1e-4)


def test_a_strong_pull_and_no_support_are_zero_shot():
    text, image, support = table(K, LABEL)
    wanted = ZeroShot(text, logit_scale=SCALE)(image)
    strong = fitted(CrossModal, text, support, l2=1e9, logit_scale=SCALE)
    torch.testing.assert_close(strong(image), wanted, rtol=0, atol=1e-7)
    assert torch.equal(CrossModal(text, logit_scale=SCALE)(image), wanted)
    weak = fitted(CrossModal, text, support, l2=0.1, logit_scale=SCALE)
    assert not torch.allclose(weak(image), wanted, atol=0.1)


def test_images_twice_are_half_the_pull():
    text, image, support = table(K, LABEL)
    twice = Support(support.image.repeat(2, 1), support.label.repeat(2))
    one = fitted(CrossModal, text, support, l2=0.1, logit_scale=SCALE)
    two = fitted(CrossModal, text, twice, l2=0.2, logit_scale=SCALE)
    torch.testing.assert_close(one(image), two(image), rtol=0, atol=1e-4)


def test_other_names_for_the_classes_change_no_logits():
    text, image, support = table(K, LABEL)
    order = torch.tensor([2, 0, 3, 1])
    head = fitted(CrossModal, text, support, l2=0.1, logit_scale=SCALE)
    renamed = Support(support.image, order.argsort()[support.label])
    other = fitted(CrossModal, text[order], renamed, l2=0.1, logit_scale=SCALE)
    torch.testing.assert_close(other(image), head(image)[:, order], rtol=0, atol=1e-4)


def test_search_finds_what_heads_of_each_point_would(monkeypatch):
    monkeypatch.setattr(module, "STRENGTHS", (0.3, 0.03, 0.003))
    text, image, support = table(K, LABEL)
    label = torch.tensor([0, 1, 2, 3, 1, 0])
    head = fitted(CrossModal, text, support, logit_scale=SCALE)
    costs = {}
    for l2 in module.STRENGTHS:
        one = fitted(CrossModal, text, support, l2=l2, logit_scale=SCALE)
        costs[l2] = scaled_nll(one(image), label) + math.log2(l2 / head.l2) ** 2 / 2
    best, second = sorted(costs.values())[:2]
    assert second - best > 1e-2  # solves of fewer steps could not tell a closer one
    head.choose(Support(image, label))
    assert costs[head.l2] == best
    again = fitted(CrossModal, text, support, l2=head.l2, logit_scale=SCALE)
    torch.testing.assert_close(head(image), again(image), rtol=0, atol=1e-5)
