# SPDX-License-Identifier: Apache-2.0
"""Classes with unequal numbers of images count alike where `votes_per_class` is set."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from support_sets import fitted, table
from torch.nn import functional as F

from vtclip.heads import TAKL, ProKeR, Support, TipAdapter, TipAdapterF, TipX, ZeroShot, _support
from vtclip.heads._support import kernel

K = 4
LABEL = torch.tensor([0, 0, 0, 1, 1, 2, 2, 2, 2, 3])
EQUAL = torch.arange(K).repeat_interleave(3)
VOTERS = (TipAdapter, TipAdapterF, TipX)
HEADS = (*VOTERS, ProKeR, TAKL)
RANGE: dict[Any, dict[str, float]] = {TipX: {"slope": 0.5, "offset": 0.6}}


def head_of(kind: Any, support: Support, text: Any, m: float | None) -> Any:
    return fitted(kind, text, support, votes_per_class=m, logit_scale=30.0, **RANGE.get(kind, {}))


@pytest.mark.parametrize("kind", VOTERS)
def test_is_m_times_the_mean_over_the_images_of_a_class(kind):
    text, image, support = table(K, LABEL)
    head = head_of(kind, support, text, 2.5)
    with torch.no_grad():
        wanted = ZeroShot(text, logit_scale=30.0)(image)
        for k in range(K):
            own = support.image[k == LABEL]
            one = head_of(kind, Support(own, torch.full((len(own),), k)), text, None)
            votes = one(image) - ZeroShot(text, logit_scale=30.0)(image)
            wanted = wanted + 2.5 * votes / len(own)
        torch.testing.assert_close(head(image), wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", HEADS)
def test_equal_numbers_leave_every_bit(kind, dtype):
    text, image, support = table(K, EQUAL)
    text, image = text.to(dtype), image.to(dtype)
    support = Support(support.image.to(dtype), support.label)
    val = Support(torch.randn(20, text.shape[1]).to(dtype), torch.arange(20) % K)
    plain, balanced = (head_of(kind, support, text, m) for m in (None, 3.0))
    assert torch.equal(plain(image), balanced(image))
    plain.choose(val)
    balanced.choose(val)
    assert {**plain.options(), "votes_per_class": 3.0} == balanced.options()
    assert torch.equal(plain(image), balanced(image))


@pytest.mark.parametrize("kind", HEADS)
def test_copies_of_the_images_of_a_class_change_nothing(kind):
    text, image, support = table(K, LABEL)
    own = support.image[LABEL == 1]
    more = Support(
        torch.cat([support.image, own.repeat(6, 1)]),
        torch.cat([LABEL, torch.ones(6 * len(own), dtype=torch.long)]),
    )
    once, often = (head_of(kind, rows, text, 2.5)(image) for rows in (support, more))
    torch.testing.assert_close(once, often, rtol=1e-10, atol=1e-10)
    unweighted = [head_of(kind, rows, text, None)(image) for rows in (support, more)]
    assert not torch.allclose(*unweighted, rtol=1e-3)


@pytest.mark.parametrize("kind", HEADS)
def test_order_does_not_matter(kind):
    text, image, support = table(K, LABEL)
    order = torch.randperm(len(LABEL))
    shuffled = Support(support.image[order], LABEL[order])
    one, two = (head_of(kind, rows, text, 2.5) for rows in (support, shuffled))
    torch.testing.assert_close(one(image), two(image), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", HEADS)
def test_new_classes_of_another_number_count_as_much_and_move_no_other(kind):
    text, image, support = table(K, LABEL)
    head = head_of(kind, support, text, 2.5)
    text_new, rows = torch.randn(1, text.shape[1]).double(), torch.randn(2, 8).double()
    new = Support(rows, torch.full((2,), K))
    larger = head.extend(text_new, new)
    if kind in (TipAdapter, TipAdapterF):  # the others compare the classes with each other
        torch.testing.assert_close(larger(image)[:, :K], head(image), rtol=0, atol=1e-12)
    options = {**larger.options(), "num_support": 0}
    whole = type(head)(torch.cat([text, text_new]), **options)
    both = torch.cat([support.image, rows]), torch.cat([LABEL, new.label])
    whole.fit_support(Support(*both))
    torch.testing.assert_close(larger(image), whole(image), rtol=1e-10, atol=1e-10)
    twice = head.extend(text_new, Support(rows.repeat(4, 1), torch.full((8,), K)))
    torch.testing.assert_close(twice(image), larger(image), rtol=1e-10, atol=1e-10)


def test_the_ridge_is_weighted_least_squares():
    """No small change of the coefficients lowers sum w_i (f(s_i) - y_i)^2 + lam |f - z|^2."""
    text, _, support = table(K, LABEL)
    head = fitted(ProKeR, text, support, votes_per_class=2.5, alpha=7.0, lam=0.3, logit_scale=30.0)
    gram = kernel(head.keys, head.keys, head.beta)
    count = torch.tensor([3.0, 2.0, 4.0, 1.0]).double()
    w = 2.5 / count[LABEL]
    Y = F.one_hot(LABEL, K).double()
    z = 30.0 * F.normalize(support.image, dim=-1) @ F.normalize(text, dim=-1).T
    Y, z = (x - x.mean(dim=1, keepdim=True) for x in (Y, z))
    c = head.coefficients.clone().requires_grad_()
    error = z + gram @ c - 7.0 * Y
    cost = (w[:, None] * error.square()).sum() + 0.3 * (c * (gram @ c)).sum()
    (slope,) = torch.autograd.grad(cost, c)
    torch.testing.assert_close(slope, torch.zeros_like(slope), rtol=0, atol=1e-9)


def test_the_search_of_the_ridge_sees_the_logits_of_each_point(monkeypatch):
    text, image, support = table(K, LABEL)
    head = fitted(ProKeR, text, support, votes_per_class=2.5, logit_scale=30.0)
    seen: list[Any] = []

    def most_likely(grid: Any, centre: Any, logits_of: Any, *_: Any) -> dict[str, float]:
        for beta, lam in ((0.25, 0.03), (4.0, 3.0)):
            point = {"alpha": 6.0, "beta": beta, "lam": lam}
            seen.append((point, logits_of(point)))
        return dict(centre)

    monkeypatch.setattr(_support, "most_likely", most_likely)
    head.search(F.normalize(image, dim=-1), torch.zeros(6, dtype=torch.long))
    assert len(seen) == 2
    for point, logits in seen:
        one = fitted(ProKeR, text, support, votes_per_class=2.5, logit_scale=30.0, **point)
        torch.testing.assert_close(logits, one(image), rtol=1e-10, atol=1e-10)


def test_an_image_left_out_of_its_own_votes_leaves_their_size():
    text, image, support = table(K, LABEL)
    head = head_of(TipAdapter, support, text, 2.5)
    _, _, votes_of = head.evidence(F.normalize(image, dim=-1), torch.zeros(6, dtype=torch.long))
    N = len(LABEL)
    found = votes_of(torch.ones(6, N).double(), torch.ones(N, N).double())
    # the class of one image has no other to be asked about
    torch.testing.assert_close(found, torch.full((6 + N - 1, K), 2.5).double())


def test_a_thinned_search_sees_votes_of_the_same_size():
    text, image, support = table(K, LABEL)
    head = head_of(TipAdapter, support, text, 2.5)
    thinned = head._every(2)
    votes = [h(image) - h.zero_shot(image) for h in (head, thinned)]
    torch.testing.assert_close(votes[0][:, ::2], votes[1], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("value", [0.0, -1.0, math.nan])
def test_refuses_a_number_that_is_not_positive(value):
    with pytest.raises(ValueError, match="TipAdapter: votes_per_class"):
        TipAdapter(torch.randn(K, 8), votes_per_class=value)


def test_an_adapter_from_before_votes_as_it_did():
    assert TipX(torch.randn(K, 8), alpha=1.0).votes_per_class is None
