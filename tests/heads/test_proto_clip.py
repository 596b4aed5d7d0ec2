# SPDX-License-Identifier: Apache-2.0
"""Proto-CLIP is its equation over distances; without image prototypes it ranks as zero-shot."""

from __future__ import annotations

import math

import pytest
import torch
from support_sets import fitted, scaled_nll, table, unit

from vtclip.heads import ProtoCLIP, Support, ZeroShot

K, C, B = 4, 8, 6
LABEL = torch.tensor([0, 0, 0, 1, 2, 2])  # class 3 has no support


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_is_the_equation(alpha):
    text, image, support = table(K, LABEL)
    head = fitted(ProtoCLIP, text, support, alpha=alpha, beta=4.0)
    means = [unit(unit(support.image[k == LABEL]).mean(dim=0)) for k in range(3)]
    centres = torch.stack([*means, unit(text)[3]])
    p = torch.zeros(B, K, dtype=torch.float64)
    for share, prototypes in ((alpha, centres), (1 - alpha, unit(text))):
        distance = (unit(image)[:, None] - prototypes[None]).square().sum(dim=-1)
        p += share * torch.softmax(-4.0 * distance, dim=1)
    torch.testing.assert_close(head(image).exp(), p, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(head(image).softmax(dim=1), p, rtol=1e-10, atol=1e-12)


def test_alpha_0_ranks_as_zero_shot_and_so_do_texts_for_prototypes():
    text, image, support = table(K, LABEL)
    wanted = ZeroShot(text)(image).argsort(dim=1)
    assert torch.equal(fitted(ProtoCLIP, text, support, alpha=0.0)(image).argsort(dim=1), wanted)
    for alpha in (0.3, 1.0):
        assert torch.equal(ProtoCLIP(text, alpha=alpha)(image).argsort(dim=1), wanted)
    assert not torch.equal(
        fitted(ProtoCLIP, text, support, alpha=1.0)(image).argsort(dim=1), wanted
    )


def test_alpha_1_is_the_nearest_mean():
    text, image, support = table(K, LABEL)
    full = Support(torch.cat([support.image, image[:1]]), torch.cat([LABEL, torch.tensor([3])]))
    head = fitted(ProtoCLIP, text, full, alpha=1.0)
    means = torch.stack([unit(full.image)[full.label == k].mean(dim=0) for k in range(K)])
    nearest = torch.cdist(unit(image), unit(means)).argmin(dim=1)
    assert torch.equal(head(image).argmax(dim=1), nearest)
    assert nearest[0] == 3


def test_logits_stay_finite_where_probabilities_vanish():
    text, image, support = table(K, LABEL)
    for alpha in (0.0, 0.5, 1.0):
        head = fitted(
            ProtoCLIP, text.float(), Support(support.image.float(), LABEL), alpha=alpha, beta=1e4
        )
        assert bool(head(image.float()).isfinite().all())


def test_images_that_cancel_leave_the_class_undecided():
    text, image, _ = table(K, LABEL)
    opposite = Support(torch.cat([image[:1], -image[:1]]), torch.tensor([0, 0]))
    head = fitted(ProtoCLIP, text, opposite)
    assert bool(head(image).isfinite().all())


def test_choose_takes_the_likeliest_point():
    text, image, support = table(K, LABEL)
    label = torch.tensor([0, 1, 2, 3, 1, 0])
    head = fitted(ProtoCLIP, text, support, logit_scale=30.0)
    start = {"odds": 0.3 / 0.7, "beta": head.beta}

    def cost(odds: float, beta: float) -> float:
        logits = fitted(ProtoCLIP, text, support, alpha=odds / (1 + odds), beta=beta)(image)
        nll = scaled_nll(logits, label)
        away = math.log(odds / start["odds"]) ** 2 + math.log(beta / start["beta"]) ** 2
        return nll + away / (2 * math.log(2) ** 2)

    costs = {
        (2.0**i / 16, 0.3 * 2 ** (j / 2)): cost(2.0**i / 16, 0.3 * 2 ** (j / 2))
        for i in range(9)
        for j in range(15)
    }
    odds, beta = min(costs, key=lambda point: costs[point])
    head.choose(Support(image, label))
    assert head.alpha == pytest.approx(odds / (1 + odds))
    assert head.beta == pytest.approx(beta)
