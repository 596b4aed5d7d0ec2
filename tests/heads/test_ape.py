# SPDX-License-Identifier: Apache-2.0
"""APE and APE-T are their equations by loops; their limit is Tip-Adapter."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from support_sets import fitted, scaled_nll, table, unit
from torch import Tensor

from vtclip.heads import APE, APET, Support, TipAdapter
from vtclip.heads import ape as module

K, C = 4, 12
LABEL = torch.tensor([0, 0, 0, 1, 1, 1, 1, 3, 3])  # class 2 has no support
SCALE = 30.0
OPTIONS = {"alpha": 3.0, "beta": 2.0, "share": 0.5, "variance_weight": 0.4, "logit_scale": SCALE}


def rows_of(text: Tensor, support: Support) -> list[tuple[int, Tensor]]:
    """Class and row of every text and every image, of length 1."""
    images = zip(support.label.tolist(), unit(support.image), strict=True)
    return [*enumerate(unit(text)), *images]


def best_channels(rows: list[tuple[int, Tensor]], text: Tensor, count: int, r: float) -> list[int]:
    """By every ordered pair of rows of different classes."""
    products = [x * y for a, x in rows for b, y in rows if a != b]
    likeness = torch.stack(products).mean(dim=0)
    t = unit(text)
    variance = (t - t.mean(dim=0)).square().mean(dim=0)
    score = (r * variance - (1 - r) * likeness).tolist()
    return sorted(sorted(range(len(score)), key=lambda c: -score[c])[:count])


def test_channels_are_those_that_tell_classes_apart():
    text, _, support = table(K, LABEL, C=C)
    wanted = best_channels(rows_of(text, support), text, 6, 0.4)
    assert fitted(APE, text, support, **OPTIONS).channels.tolist() == wanted
    texts_alone = best_channels(list(enumerate(unit(text))), text, 6, 0.4)
    assert fitted(APET, text, support, **OPTIONS).channels.tolist() == texts_alone
    assert wanted != texts_alone


def test_a_channel_that_no_class_differs_in_goes_first():
    text, _, support = table(K, LABEL, C=C)
    text, image = unit(text).clone(), unit(support.image).clone()
    text[:, 5], image[:, 5] = 2.0, 2.0
    head = fitted(APE, text, Support(image, LABEL), **{**OPTIONS, "share": 11 / 12})
    assert head.channels.tolist() == [c for c in range(C) if c != 5]


def test_ape_is_the_equation():
    text, image, support = table(K, LABEL, C=C)
    head = fitted(APE, text, support, **OPTIONS, gamma=0.7)
    chosen = head.channels
    x, s, t = (unit(unit(rows)[:, chosen]) for rows in (image, support.image, text))
    wanted = SCALE * unit(image) @ unit(text).T
    for n, y in enumerate(LABEL.tolist()):
        p = torch.softmax(t @ s[n], dim=0)[y]
        wanted[:, y] += 3.0 * torch.exp(-2.0 * (1 - x @ s[n])) * torch.exp(-0.7 * torch.log(p))
    torch.testing.assert_close(head(image), wanted, rtol=1e-10, atol=1e-10)


def trained(text: Tensor, support: Support) -> Any:
    head = fitted(APET, text, support, **OPTIONS)
    with torch.no_grad():
        head.residual += 0.3 * torch.randn_like(head.residual)
        head.vote += 0.3 * torch.randn_like(head.vote)
    return head


def test_ape_t_is_the_equation():
    text, image, support = table(K, LABEL, C=C)
    head = trained(text, support)
    R = torch.zeros(K, C).double()
    R[:, head.channels] = head.residual.detach()
    v = unit(image)
    wanted = SCALE * v @ (unit(text) + R).T
    for n, y in enumerate(LABEL.tolist()):
        near = v @ (unit(support.image)[n] + R[y])
        wanted[:, y] += 3.0 * head.vote[n].detach() * torch.exp(-2.0 * (1 - near))
    torch.testing.assert_close(head(image), wanted, rtol=1e-10, atol=1e-10)


def test_all_channels_of_equal_weight_are_tip_adapter():
    text, image, support = table(K, LABEL, C=C)
    options = {"alpha": 3.0, "beta": 2.0, "logit_scale": SCALE}
    wanted = fitted(TipAdapter, text, support, **options)(image)
    found = fitted(APE, text, support, **options, share=1.0, gamma=0.0)(image)
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)
    untrained = fitted(APET, text, support, **options)(image)
    torch.testing.assert_close(untrained, wanted, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("votes", [None, 2.5])
def test_votes_per_class_scale_the_votes_of_a_class(votes):
    text, image, support = table(K, LABEL, C=C)
    head = fitted(APE, text, support, **OPTIONS, votes_per_class=votes)
    plain = fitted(APE, text, support, **OPTIONS)
    count = torch.bincount(LABEL, minlength=K).clamp(min=1).double()
    factor = torch.ones(K).double() if votes is None else votes / count
    added = [h(image) - h.zero_shot(image) for h in (head, plain)]
    torch.testing.assert_close(added[0], factor * added[1], rtol=1e-10, atol=1e-10)


def test_ape_t_extends_without_moving_the_old_classes():
    text, image, support = table(K, LABEL, C=C)
    head = trained(text, support)
    new = Support(torch.randn(2, C).double(), torch.tensor([K, K]))
    larger = head.extend(torch.randn(1, C).double(), new)
    torch.testing.assert_close(larger(image)[:, :K], head(image), rtol=0, atol=1e-10)
    assert torch.equal(larger.channels, head.channels)
    assert larger.residual.requires_grad
    assert not bool(larger.residual[K:].any())


@pytest.mark.parametrize("kind", [APE, APET])
def test_a_head_of_every_other_class_votes_as_it_does_there(kind):
    text, image, support = table(K, LABEL, C=C)
    head = trained(text, support) if kind is APET else fitted(APE, text, support, **OPTIONS)
    thinned = head._every(2)
    if kind is APET:
        torch.testing.assert_close(thinned(image), head(image)[:, ::2], rtol=1e-10, atol=1e-10)
    assert torch.equal(thinned.channels, head.channels)


def test_search_finds_what_heads_of_each_point_would(monkeypatch):
    monkeypatch.setattr(module, "ALPHAS", (0.05, 0.2))
    monkeypatch.setattr(module, "BETAS", (1.0, 4.0))
    monkeypatch.setattr(module, "GAMMAS", (0.2, 0.8))
    one_each = torch.tensor([0, 1, 3])  # nothing is left out where classes have one image
    text, image, support = table(K, one_each, C=C)
    label = torch.tensor([0, 1, 2, 3, 1, 0])
    head = fitted(APE, text, support, **OPTIONS, gamma=0.2)
    costs = {}
    for alpha in (0.05 * SCALE, 0.2 * SCALE):
        for beta in (1.0, 4.0):
            for gamma in (0.2, 0.8):
                at = {**OPTIONS, "alpha": alpha, "beta": beta, "gamma": gamma}
                nll = scaled_nll(fitted(APE, text, support, **at)(image), label)
                ratios = alpha / 3.0, beta / 2.0, gamma / 0.2
                away = sum(math.log2(ratio) ** 2 for ratio in ratios)
                costs[alpha, beta, gamma] = nll + away / 2
    best, second = sorted(costs.values())[:2]
    assert second - best > 1e-6  # a tie would prove nothing
    head.choose(Support(image, label))
    assert costs[head.alpha, head.beta, head.gamma] == pytest.approx(best)
