# SPDX-License-Identifier: Apache-2.0
"""AutoCLIP against its equations, one image at a time, and its limits."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from vtclip.heads import AutoCLIP, ZeroShot, autoclip
from vtclip.heads.autoclip import entropy_softmax

EXACT = 1e-9  # float64, logits up to 100; the step length is found to about 1e-16 of itself


def entropy(w: Tensor) -> float:
    return -sum(float(p) * math.log(float(p)) for p in w if p > 0)


def written_out(
    image: Tensor, views: Tensor, share: float, inner: float, s: float
) -> tuple[Tensor, Tensor]:
    """Logits and weights: gradient of logsumexp by autograd, its step by plain bisection."""
    K, M, _ = views.shape
    t = views / views.norm(dim=-1, keepdim=True)
    logits, weights = [], []
    for row in image:
        e = torch.einsum("kmc,c->km", t, row / row.norm())
        mean = torch.full((M,), 1 / M, dtype=e.dtype, requires_grad=True)
        (g,) = torch.autograd.grad(torch.logsumexp(inner * (e @ mean), dim=0), mean)
        low, high = 0.0, 1.0
        while entropy((high * g).softmax(dim=0)) > share * math.log(M):
            high *= 2
        for _ in range(200):
            middle = (low + high) / 2
            if entropy((middle * g).softmax(dim=0)) > share * math.log(M):
                low = middle
            else:
                high = middle
        weights.append((low * g).softmax(dim=0))
        logits.append(s * e @ weights[-1])
    return torch.stack(logits), torch.stack(weights)


def make(record, M=5, **options):
    text, image, spatial = record()
    views = text[:, None] + 0.3 * torch.randn(7, M, 32, dtype=torch.float64)
    head = AutoCLIP(text, **options)
    head.set_text_views(views)
    return head, views, image, spatial


@pytest.mark.parametrize("inner", [1.0, 20.0])
@pytest.mark.parametrize("share", [0.3, 0.85])
@pytest.mark.parametrize("M", [2, 5, 40])
def test_equals_the_equations(record, M, share, inner):
    head, views, image, spatial = make(
        record, M, entropy=share, inner_scale=inner, logit_scale=30.0
    )
    want, weights = written_out(image, views, share, inner, 30.0)
    torch.testing.assert_close(head(image), want, rtol=0, atol=EXACT)
    assert torch.equal(head(image, spatial), head(image))
    for row in weights:  # the reference itself reached what was asked
        assert entropy(row) == pytest.approx(share * math.log(M), rel=1e-9)


def test_one_template_changes_nothing(record):
    text, image, _ = record(dtype=torch.float32)
    want = ZeroShot(text)(image)
    head = AutoCLIP(text)
    assert torch.equal(head(image), want)
    head.set_text_views(text[:, None])
    assert torch.equal(head(image), want)


def test_equal_templates_change_nothing(record):
    text, image, _ = record()
    head = AutoCLIP(text)
    head.set_text_views(text[:, None].repeat(1, 6, 1))
    torch.testing.assert_close(head(image), ZeroShot(text)(image), rtol=0, atol=EXACT)


def test_full_entropy_is_the_mean_of_all_templates(record):
    head, views, image, _ = make(record, entropy=1.0)
    e = torch.einsum("bc,kmc->bkm", F.normalize(image, dim=-1), F.normalize(views, dim=-1))
    torch.testing.assert_close(head(image), 100 * e.mean(dim=2), rtol=0, atol=1e-6)


@pytest.mark.parametrize("share", [0.0, 0.2, 0.5, 0.85, 0.99])
def test_weights_have_the_entropy_that_was_asked(share):
    g = torch.randn(9, 12, dtype=torch.float64) * torch.logspace(-7, 3, 9)[:, None]
    w = entropy_softmax(g, share)
    torch.testing.assert_close(w.sum(dim=1), torch.ones(9, dtype=torch.float64))
    for row in w:
        assert entropy(row) == pytest.approx(share * math.log(12), abs=1e-6)
    assert torch.equal(w.argmax(dim=1), g.argmax(dim=1))


def test_entropy_out_of_reach_ends_at_the_largest_entries():
    g = torch.tensor([[0.5, 1.0, 1.0, 0.0], [2.0, 2.0, 2.0, 2.0]], dtype=torch.float64)
    want = torch.tensor([[0.0, 0.5, 0.5, 0.0], [0.25, 0.25, 0.25, 0.25]], dtype=torch.float64)
    torch.testing.assert_close(entropy_softmax(g, 0.1), want, rtol=0, atol=1e-9)


@pytest.mark.parametrize("budget", [1, 600, 10_000])
def test_chunks_change_nothing(record, monkeypatch, budget):
    head, _, image, _ = make(record)
    whole = head(image)
    monkeypatch.setattr(autoclip, "TEMPLATE_BYTES", budget)
    torch.testing.assert_close(head(image), whole, rtol=0, atol=EXACT)


def test_views_of_another_dtype_take_that_of_the_head(record):
    text, image, _ = record()
    head = AutoCLIP(text)
    head.set_text_views(torch.randn(len(text), 3, 32))
    logits = head(image)
    assert logits.shape == (len(image), len(text))
    assert logits.dtype == torch.float64
    assert bool(logits.isfinite().all())


@pytest.mark.parametrize("shape", [(7, 32), (6, 2, 32), (7, 2, 31), (7, 0, 32)])
def test_bad_views(record, shape):
    head = AutoCLIP(record()[0])
    with pytest.raises(ValueError, match=r"^AutoCLIP: views must be \[7, M, 32\], got \["):
        head.set_text_views(torch.ones(shape))
    assert head.views.shape == (7, 1, 32)
