# SPDX-License-Identifier: Apache-2.0
"""Tip-Adapter is its equation, attention over the support, and zero-shot where nothing votes."""

from __future__ import annotations

import math

import pytest
import torch
from support_sets import fitted, scaled_nll, table
from torch import Tensor
from torch.nn import functional as F

from vtclip import ops
from vtclip.heads import Support, TipAdapter, TipAdapterF, ZeroShot

K, C, B = 5, 8, 6
COUNTS = (3, 1, 4, 2, 0)  # support images of each class
LABEL = torch.arange(K).repeat_interleave(torch.tensor(COUNTS))


def votes(image: Tensor, support: Support, beta: float) -> Tensor:
    """The cache term, one image and one support row at a time, [B, K]."""
    found = torch.zeros(len(image), K, dtype=torch.float64)
    for b, v in enumerate(image):
        for s, k in zip(support.image, support.label.tolist(), strict=True):
            cosine = float(v @ s / (v.norm() * s.norm()))
            found[b, k] += math.exp(-beta * (1 - cosine))
    return found


@pytest.mark.parametrize("kind", [TipAdapter, TipAdapterF])
@pytest.mark.parametrize(("alpha", "beta"), [(1.0, 5.5), (20.0, 0.5)])
def test_is_the_equation(kind, alpha, beta):
    text, image, support = table(K, LABEL)
    head = fitted(kind, text, support, alpha=alpha, beta=beta, logit_scale=30.0)
    cosine = F.normalize(image, dim=-1) @ F.normalize(text, dim=-1).T
    wanted = 30.0 * cosine + alpha * votes(image, support, beta)
    torch.testing.assert_close(head(image).detach(), wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", [TipAdapter, TipAdapterF])
def test_alpha_0_and_no_support_are_zero_shot(kind):
    text, image, support = table(K, LABEL)
    wanted = ZeroShot(text, logit_scale=30.0)(image)
    silent = kind(text, alpha=0.0, logit_scale=30.0)
    silent.fit_support(support)
    assert torch.equal(silent(image).detach(), wanted)
    assert torch.equal(kind(text, logit_scale=30.0)(image).detach(), wanted)
    head = fitted(kind, text, support, logit_scale=30.0)
    assert not torch.allclose(head(image), wanted)


def test_is_attention_over_the_support():
    """exp(-beta (1 - v S^T)) Y = exp(lse - beta) * softmax(beta v S^T) Y."""
    text, image, support = table(K, LABEL)
    head = fitted(TipAdapter, text, support, alpha=2.0, beta=3.0)
    query = F.normalize(image, dim=-1)[None, None]  # [1, 1, B, C]
    key = F.normalize(support.image, dim=-1)[None, None]  # [1, 1, N, C]
    value = F.pad(F.one_hot(support.label, K).double(), (0, C - K))[None, None]
    out, lse = ops.cross_attn_lse(query, key, value, scale=3.0)
    cache = ((lse[..., None] - 3.0).exp() * out)[0, 0, :, :K]
    wanted = ZeroShot(text)(image) + 2.0 * cache
    torch.testing.assert_close(head(image), wanted, rtol=0, atol=1e-11)


def test_left_out_votes_are_those_of_the_other_images():
    text, image, support = table(K, LABEL)
    head = fitted(TipAdapter, text, support, beta=3.0)
    z, label, votes_of = head.evidence(image, torch.zeros(B, dtype=torch.long))
    affinity = [head.affinity(head.similarity(rows), 3.0) for rows in (image, head.keys)]
    found = votes_of(*affinity)
    asked = [i for i, k in enumerate(support.label.tolist()) if COUNTS[k] > 1]
    assert label.tolist() == [0] * B + support.label[asked].tolist()
    assert len(z) == len(found) == B + len(asked) < B + len(support.label)
    torch.testing.assert_close(found[:B], votes(image, support, 3.0), rtol=0, atol=1e-12)
    for row, i in enumerate(asked):
        others = torch.arange(len(support.label)) != i
        rest = Support(support.image[others], support.label[others])
        wanted = votes(support.image[i : i + 1], rest, 3.0)[0]
        k = int(support.label[i])
        wanted[k] *= COUNTS[k] / (COUNTS[k] - 1)
        torch.testing.assert_close(found[B + row], wanted, rtol=0, atol=1e-12)


def test_trained_keys_are_not_asked_about_their_own_images():
    text, image, support = table(K, LABEL)
    head = fitted(TipAdapterF, text, support)
    z, label, votes_of = head.evidence(image, torch.zeros(B, dtype=torch.long))
    found = votes_of(head.similarity(image), head.similarity(head.keys))
    assert len(z) == len(label) == len(found) == B


def test_search_finds_what_heads_of_each_point_would():
    text, image, support = table(K, LABEL)
    label = torch.tensor([0, 1, 2, 3, 4, 0])
    head = fitted(TipAdapterF, text, support, alpha=3.0, beta=4.0)
    with torch.no_grad():
        found = head.search(F.normalize(image, dim=-1), label)
    for name, factor in (("alpha", 2.0), ("alpha", 0.5), ("beta", 2**0.5), ("beta", 0.5**0.5)):
        assert cost(head, image, label, found) <= cost(
            head, image, label, {**found, name: found[name] * factor}
        )


def cost(head: TipAdapterF, image: Tensor, label: Tensor, point: dict[str, float]) -> float:
    """`most_likely`'s cost of one point, about the head's alpha and beta."""
    other = TipAdapterF(head.text, num_support=len(head.keys), **point)
    other.load_state_dict(head.state_dict())
    away = sum((math.log(value / getattr(head, name)) / math.log(2)) ** 2
               for name, value in point.items())  # fmt: skip
    return scaled_nll(other(image).detach(), label) + away / 2


def test_only_the_keys_of_f_are_trained_and_they_may_grow():
    text, image, support = table(K, LABEL)
    head = fitted(TipAdapterF, text, support, alpha=2.0)
    assert [name for name, _ in head.named_parameters()] == ["keys"]
    assert not list(TipAdapter(text).parameters())
    label = torch.tensor([0, 1, 2, 3, 2, 0])
    before = F.cross_entropy(head(image), label)
    before.backward()
    with torch.no_grad():
        head.keys -= 5e-2 * head.keys.grad / head.keys.grad.norm()
    assert F.cross_entropy(head(image), label) < before
    # S is used as it is: twice as long keys have twice the product
    with torch.no_grad():
        head.keys *= 2
    similar = F.normalize(image, dim=-1) @ head.keys.T
    torch.testing.assert_close(head.similarity(image), similar)
    assert float(head.keys.detach().norm(dim=-1).min()) > 1.5
