# SPDX-License-Identifier: Apache-2.0
"""GDA is zero-shot plus log-likelihoods of Gaussians; edges: one image, none, equal ones."""

from __future__ import annotations

import math

import pytest
import torch
from support_sets import fitted, scaled_nll, table, unit
from torch import Tensor

from vtclip.heads import GDA, Support, ZeroShot
from vtclip.heads import gda as module

K, C = 4, 8
LABEL = torch.tensor([0, 0, 0, 1, 1, 1, 1, 3, 3, 2, 2])
SCALE = 30.0


def centred(logits: Tensor) -> Tensor:
    """Without what all classes of an image share, which no softmax sees."""
    return logits - logits.mean(dim=1, keepdim=True)


def log_likelihoods(image: Tensor, support: Support, about: Tensor | None = None) -> Tensor:
    """-(v - mu_k)^T P (v - mu_k) / 2 [B, K], by loops; about: what S is about, if not the means."""
    rows, x = unit(support.image), unit(image)
    means = torch.stack([rows[support.label == k].mean(dim=0) for k in range(K)])
    N = len(rows)
    S = torch.zeros(C, C).double()
    for row, k in zip(rows, support.label.tolist(), strict=True):
        d = row - (means[k] if about is None else about)
        S += torch.outer(d, d) / (N - 1)
    P = C * torch.linalg.inv((N - 1) * S + S.trace() * torch.eye(C).double())
    return torch.stack([torch.stack([-(v - mu) @ P @ (v - mu) / 2 for mu in means]) for v in x])


@pytest.mark.parametrize("alpha", [0.01, 0.5])
def test_is_zero_shot_and_the_likelihood_of_gaussians(alpha):
    text, image, support = table(K, LABEL)
    head = fitted(GDA, text, support, alpha=alpha, logit_scale=SCALE)
    wanted = SCALE * unit(image) @ unit(text).T + alpha * log_likelihoods(image, support)
    torch.testing.assert_close(centred(head(image)), centred(wanted), rtol=1e-9, atol=1e-9)


def test_one_image_a_class_spreads_about_the_mean_of_all():
    text, image, support = table(K, torch.arange(K))
    head = fitted(GDA, text, support, alpha=0.1, logit_scale=SCALE)
    about = unit(support.image).mean(dim=0)
    wanted = SCALE * unit(image) @ unit(text).T + 0.1 * log_likelihoods(image, support, about)
    torch.testing.assert_close(centred(head(image)), centred(wanted), rtol=1e-9, atol=1e-9)


def test_no_weight_and_no_support_are_zero_shot():
    text, image, support = table(K, LABEL)
    wanted = ZeroShot(text)(image)
    torch.testing.assert_close(fitted(GDA, text, support, alpha=0.0)(image), wanted)
    torch.testing.assert_close(GDA(text)(image), wanted)


def test_a_rotation_of_all_features_changes_nothing():
    text, image, support = table(K, LABEL)
    turn = torch.linalg.qr(torch.randn(C, C).double())[0]
    turned = fitted(GDA, text @ turn, Support(support.image @ turn, LABEL))
    plain = fitted(GDA, text, support)
    torch.testing.assert_close(turned(image @ turn), plain(image), rtol=1e-9, atol=1e-9)


def test_a_class_without_images_has_the_mean_of_all():
    text, _, support = table(K, torch.tensor([0, 0, 1, 1, 3, 3]))
    head = fitted(GDA, text, support)
    rows = unit(support.image)
    said = head.discriminants(rows.mean(dim=0)[None] / rows.mean(dim=0).norm())
    at_mean = rows.mean(dim=0) @ head.weight.T + head.bias
    assert int(at_mean.argmax()) == 2  # nothing is nearer to a point than itself
    assert bool(said.isfinite().all())


def test_an_image_of_a_class_with_several_decides_the_spread():
    text, _, support = table(K, torch.tensor([0, 0, 0, 1, 1, 2, 3]))
    alone = Support(support.image[:5], support.label[:5])
    x = unit(torch.randn(2, C).double())
    both, few = (fitted(GDA, text, rows) for rows in (support, alone))
    # between classes of several images only their own mean differences and S matter
    one, two = (head.discriminants(x)[:, 0] - head.discriminants(x)[:, 1] for head in (both, few))
    torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("rows", [1, 5])
def test_images_without_a_spread_are_finite(rows):
    text, image, support = table(K, torch.zeros(rows, dtype=torch.long))
    same = Support(support.image[:1].repeat(rows, 1), support.label)
    assert bool(fitted(GDA, text, same)(image).isfinite().all())


def test_float32_solves_in_float64():
    text, image, support = table(K, LABEL)
    narrow = fitted(GDA, text.float(), Support(support.image.float(), LABEL))
    wide = fitted(GDA, text, support)
    assert narrow.weight.dtype == torch.float32
    torch.testing.assert_close(narrow(image.float()).double(), wide(image), rtol=1e-4, atol=1e-4)


def test_search_finds_what_heads_of_each_point_would(monkeypatch):
    monkeypatch.setattr(module, "ALPHAS", (2.0**-13, 2.0**-8, 2.0**-3))
    text, image, support = table(K, LABEL)
    label = torch.tensor([0, 1, 2, 3, 1, 0])
    head = fitted(GDA, text, support, logit_scale=SCALE)
    costs = {}
    for alpha in (SCALE * value for value in module.ALPHAS):
        one = fitted(GDA, text, support, alpha=alpha, logit_scale=SCALE)
        costs[alpha] = scaled_nll(one(image), label) + math.log2(alpha / head.alpha) ** 2 / 2
    best, second = sorted(costs.values())[:2]
    assert second - best > 1e-6  # a tie would prove nothing
    head.choose(Support(image, label))
    assert costs[head.alpha] == best


def test_alphas_that_are_tried():
    assert tuple(2.0**power for power in range(-16, 1)) == module.ALPHAS
