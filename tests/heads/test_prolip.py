# SPDX-License-Identifier: Apache-2.0
"""ProLIP is a minimum of its objective, written as one equation of the matrix."""

from __future__ import annotations

import math

import pytest
import support_sets
import torch
from support_sets import fitted, scaled_nll, unit
from torch import Tensor

from vtclip.heads import ProLIP, Support, ZeroShot
from vtclip.heads import prolip as module

K, C = 4, 8
LABEL = torch.tensor([0, 0, 0, 1, 1, 1, 1, 1, 2, 2, 0])  # class 3 has no support
SCALE = 10.0


def table(K: int, label: Tensor, C: int = 8) -> tuple[Tensor, Tensor, Support]:
    """Images around the texts of their classes; of labels at random A could only send some to 0."""
    text, image, _ = support_sets.table(K, label, C=C)
    return text, image, Support(text[label] + torch.randn(len(label), C), label)


def objective(text: Tensor, support: Support, lam: float, weight: Tensor, A: Tensor) -> Tensor:
    """The module's equation of the whole matrix A [C, C], as it is written."""
    rows, t = unit(support.image), unit(text)
    pull = lam * len(support.label.unique()) / weight.sum()
    moved = rows @ A.T
    logits = SCALE * (moved @ t.T) / moved.norm(dim=1, keepdim=True)
    nll = logits.logsumexp(dim=1) - logits.gather(1, support.label[:, None])[:, 0]
    return (weight * nll).sum() / weight.sum() + pull * (A - torch.eye(len(A))).square().sum()


def check_minimum(text: Tensor, support: Support, lam: float, weight: Tensor, D: Tensor) -> None:
    """No slope at A = I + D, the loss curves upwards in every direction, and is below that of I."""

    def f(A: Tensor) -> Tensor:
        return objective(text, support, lam, weight, A)

    eye = torch.eye(len(D), dtype=torch.float64)
    assert float(torch.func.grad(f)(eye + D).norm()) < 1e-5 < float(torch.func.grad(f)(eye).norm())
    hessian = torch.func.hessian(f)(eye + D).reshape(D.numel(), D.numel())
    assert float(torch.linalg.eigvalsh(hessian)[0]) > 0
    assert f(eye + D) < f(eye)


@pytest.mark.parametrize("lam", [1.0, 0.1])
@pytest.mark.parametrize("C", [8, 12])  # more and fewer rows than columns
def test_is_a_minimum(lam, C):
    text, image, support = table(K, LABEL, C=C)
    head = fitted(ProLIP, text, support, lam=lam, logit_scale=SCALE)
    check_minimum(text, support, lam, torch.ones(len(LABEL)).double(), head.change)
    moved = image + image @ head.change.T
    wanted = SCALE * (moved @ unit(text).T) / moved.norm(dim=1, keepdim=True)
    torch.testing.assert_close(head(image), wanted, rtol=0, atol=1e-10)


def test_classes_count_as_their_votes_say():
    text, _, support = table(K, LABEL)
    head = fitted(ProLIP, text, support, lam=0.1, votes_per_class=2.0, logit_scale=SCALE)
    weight = (2.0 / torch.bincount(LABEL, minlength=K).double())[LABEL]
    check_minimum(text, support, 0.1, weight, head.change)


def test_a_strong_pull_and_no_support_are_zero_shot():
    text, image, support = table(K, LABEL)
    wanted = ZeroShot(text, logit_scale=SCALE)(image)
    strong = fitted(ProLIP, text, support, lam=1e9, logit_scale=SCALE)
    torch.testing.assert_close(strong(image), wanted, rtol=0, atol=1e-7)
    assert torch.equal(ProLIP(text, logit_scale=SCALE)(image), wanted)
    weak = fitted(ProLIP, text, support, lam=0.1, logit_scale=SCALE)
    assert not torch.allclose(weak(image), wanted, atol=0.1)


def test_images_twice_are_half_the_pull():
    text, image, support = table(K, LABEL)
    twice = Support(support.image.repeat(2, 1), support.label.repeat(2))
    one = fitted(ProLIP, text, support, lam=0.1, logit_scale=SCALE)
    two = fitted(ProLIP, text, twice, lam=0.2, logit_scale=SCALE)
    torch.testing.assert_close(one(image), two(image), rtol=0, atol=1e-4)


def test_length_of_an_image_and_what_lies_outside_the_support_do_not_matter():
    text, image, support = table(K, LABEL, C=40)
    head = fitted(ProLIP, text, support, lam=0.1, logit_scale=SCALE)
    torch.testing.assert_close(head(3 * image), head(image), rtol=1e-12, atol=1e-12)
    outside = torch.linalg.qr(unit(support.image).T, mode="complete").Q[:, len(LABEL) :]
    assert float((head.change @ outside).abs().max()) < 1e-9 < float(head.change.abs().max())


def test_gradcheck():
    text, _, support = table(K, LABEL, C=5)
    rows, inside = unit(support.image), unit(support.image)[:, :3]
    share = torch.rand(len(LABEL), dtype=torch.float64)
    D = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    texts = unit(text)
    assert torch.autograd.gradcheck(
        lambda D: module.objective(rows, inside, texts, LABEL, share, D, 0.3), (D,)
    )


def test_search_finds_what_heads_of_each_point_would(monkeypatch):
    monkeypatch.setattr(module, "STRENGTHS", (1.0, 0.1, 0.01))
    text, image, support = table(K, LABEL)
    label = torch.tensor([0, 1, 2, 3, 1, 0])
    head = fitted(ProLIP, text, support, logit_scale=SCALE)
    costs = {}
    for lam in module.STRENGTHS:
        one = fitted(ProLIP, text, support, lam=lam, logit_scale=SCALE)
        costs[lam] = scaled_nll(one(image), label) + math.log10(lam / head.lam) ** 2 / 2
    best, second = sorted(costs.values())[:2]
    assert second - best > 1e-2  # solves of fewer steps could not tell a closer one
    head.choose(Support(image, label))
    assert costs[head.lam] == best
    again = fitted(ProLIP, text, support, lam=head.lam, logit_scale=SCALE)
    torch.testing.assert_close(head(image), again(image), rtol=0, atol=1e-5)


def test_another_support_is_solved_anew():
    text, image, support = table(K, LABEL)
    head = fitted(ProLIP, text, support, lam=0.1, logit_scale=SCALE)
    before = head(image)
    head.fit_support(Support(support.image.flip(1), support.label))
    fresh = fitted(
        ProLIP, text, Support(support.image.flip(1), support.label), lam=0.1, logit_scale=SCALE
    )
    assert torch.equal(head(image), fresh(image))
    assert not torch.allclose(head(image), before, atol=0.1)
