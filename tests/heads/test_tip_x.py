# SPDX-License-Identifier: Apache-2.0
"""TIP-X is its equation, Tip-Adapter where gamma is 0, and no image's logits need another's."""

from __future__ import annotations

import math

import pytest
import torch
from support_sets import fitted, scaled_nll, table
from torch import Tensor
from torch.nn import functional as F

from vtclip.heads import Support, TipAdapter, TipX

K, B, N = 4, 6, 9
LABEL = torch.tensor([0, 0, 0, 1, 1, 2, 2, 2, 2])


def divergence(x: Tensor, s: Tensor, text: Tensor) -> float:
    """KL(P(x) || P(s)) of two images [C], term by term."""
    p, q = (
        F.softmax(torch.stack([F.cosine_similarity(row, t, dim=0) for t in text]) / 0.5, dim=0)
        for row in (x, s)
    )
    return sum(float(a * (a / b).log()) for a, b in zip(p, q, strict=True))


def test_is_the_equation():
    text, image, support = table(K, LABEL)
    options = {"alpha": 2.0, "beta": 3.0, "logit_scale": 30.0}
    head = fitted(TipX, text, support, gamma=4.0, slope=5.0, offset=0.25, **options)
    tip = fitted(TipAdapter, text, support, **options)
    wanted = tip(image)
    for b, x in enumerate(image):
        for s, k in zip(support.image, support.label.tolist(), strict=True):
            wanted[b, k] += 4.0 * (0.25 - 5.0 * divergence(x, s, text))
    torch.testing.assert_close(head(image), wanted, rtol=0, atol=1e-11)


def test_gamma_0_is_tip_adapter():
    text, image, support = table(K, LABEL)
    tip = fitted(TipAdapter, text, support, alpha=2.0, beta=3.0)
    head = fitted(TipX, text, support, alpha=2.0, beta=3.0, gamma=0.0)
    torch.testing.assert_close(head(image), tip(image), rtol=0, atol=1e-12)
    assert not torch.allclose(fitted(TipX, text, support, alpha=2.0, beta=3.0)(image), tip(image))


def test_both_votes_have_the_same_range_over_support_pairs():
    text, _, support = table(K, LABEL)
    head = fitted(TipX, text, support)
    pairs = ~torch.eye(N, dtype=torch.bool)
    similar = head.similarity(support.image)[pairs]
    alike = head.likeness(support.image)[pairs]
    assert float(alike.min()) == pytest.approx(float(similar.min()), abs=1e-12)
    assert float(alike.max()) == pytest.approx(float(similar.max()), abs=1e-12)
    given = fitted(TipX, text, support, slope=3.0, offset=0.5)
    assert (given.slope, given.offset) == (3.0, 0.5)


def test_ranges_of_nothing_leave_the_divergence_as_it_is():
    text, image, support = table(K, LABEL)
    one = Support(support.image[:1], support.label[:1])
    same = Support(support.image[:1].repeat(3, 1), torch.tensor([0, 1, 2]))
    for few in (one, same):
        head = fitted(TipX, text, few)
        assert (head.slope, head.offset) == (1.0, 0.0)
        assert bool(head(image).isfinite().all())
    one_class = fitted(TipX, text[:1], Support(support.image, torch.zeros(N, dtype=torch.long)))
    assert (one_class.slope, one_class.offset) == (1.0, 0.0)
    assert one_class(image).shape == (B, 1)


def test_search_keeps_the_range_and_beats_other_gammas():
    text, image, support = table(K, LABEL)
    head = fitted(TipX, text, support, logit_scale=30.0)
    label = torch.tensor([0, 1, 2, 3, 1, 0])
    slope, offset = head.slope, head.offset
    start = dict(head.centre())
    found = head.search(F.normalize(image, dim=-1), label)
    assert set(found) == {"alpha", "beta", "gamma"}
    assert (head.slope, head.offset) == (slope, offset)
    z, labels, votes_of = head.evidence(F.normalize(image, dim=-1), label)

    def cost(gamma: float) -> float:
        rows = head.similarity(image), head.similarity(head.keys)
        tip = votes_of(*(head.affinity(each, found["beta"]) for each in rows))
        logits = z + found["alpha"] * tip
        logits = logits + gamma * votes_of(head.likeness(image), head.likeness(head.keys))
        nll = scaled_nll(logits, labels)
        return nll + (math.log(gamma / start["gamma"]) / math.log(2)) ** 2 / 2

    least = 0.01 * 30.0
    tried = [least * 2**step for step in range(7)]
    assert min(tried, key=cost) == pytest.approx(found["gamma"])
