# SPDX-License-Identifier: Apache-2.0
"""CALIP against its equations, one image at a time, and its limits."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from vtclip.heads import CALIP, Support, ZeroShot, calip

EXACT = 1e-10  # float64, sums of tens of terms, logits up to a few hundred


def written_out(
    image: Tensor, spatial: list[Tensor], text: Tensor, beta2: float, beta3: float, s: float
) -> Tensor:
    """spatial: the visible positions [L_b, C] of each image."""
    t = text / text.norm(dim=1, keepdim=True)
    rows = []
    for v, tokens in zip(image, spatial, strict=True):
        v = v / v.norm()
        logits = t @ v
        if len(tokens):
            p = tokens / tokens.norm(dim=1, keepdim=True)
            a = 2 * p @ t.T  # [L, K]
            by_position = a.exp() / a.exp().sum(dim=0)
            by_class = a.exp() / a.exp().sum(dim=1, keepdim=True)
            seen_texts = by_position.T @ p  # [K, C]
            seen_positions = by_class @ t  # [L, C]
            seen_image = seen_positions.mean(dim=0) + seen_positions.max(dim=0)[0]
            logits = logits + beta2 * seen_texts @ v + beta3 * t @ seen_image
        rows.append(s * logits)
    return torch.stack(rows)


@pytest.mark.parametrize("betas", [(1.3, 0.4), (2.0, 0.0), (0.0, 0.1)])
def test_equals_the_equations(record, betas):
    text, image, spatial = record()
    head = CALIP(3 * text, beta2=betas[0], beta3=betas[1], logit_scale=30.0)
    want = written_out(image, list(spatial), text, *betas, 30.0)
    torch.testing.assert_close(head(image, spatial), want, rtol=0, atol=EXACT)
    long = head(image, 94 * spatial)  # only directions count
    torch.testing.assert_close(long, want, rtol=0, atol=EXACT)


@pytest.mark.parametrize("fill", [0.0, 1e6, float("nan"), float("inf")])
def test_masked_positions_do_not_exist(record, fill):
    text, image, spatial = record(B=4, L=6)
    mask = torch.tensor([[1] * 6, [1, 0, 1, 0, 0, 1], [0, 0, 0, 1, 0, 0], [0] * 6]).bool()
    head = CALIP(text, beta2=1.0, beta3=0.3)
    visible = [tokens[keep] for tokens, keep in zip(spatial, mask, strict=True)]
    want = written_out(image, visible, text, 1.0, 0.3, 100.0)
    found = head(image, spatial.masked_fill(~mask[:, :, None], fill), mask)
    torch.testing.assert_close(found, want, rtol=0, atol=EXACT)
    torch.testing.assert_close(found[3], ZeroShot(text)(image)[3], rtol=0, atol=EXACT)


def test_betas_0_are_zero_shot_to_the_last_bit(record):
    text, image, spatial = record(dtype=torch.float32)
    head = CALIP(text, beta2=0, beta3=0)
    assert torch.equal(head(image, spatial), ZeroShot(text)(image))


@pytest.mark.parametrize("budget", [1, 5000, 9000])
@pytest.mark.parametrize("masked", [False, True])
def test_chunks_change_nothing(record, monkeypatch, budget, masked):
    text, image, spatial = record(B=5)
    head = CALIP(text, beta2=1.0)
    mask = torch.rand(5, 5) < 0.6 if masked else None
    whole = head(image, spatial, mask)
    monkeypatch.setattr(calip, "ATTENTION_BYTES", budget)
    torch.testing.assert_close(head(image, spatial, mask), whole, rtol=0, atol=EXACT)


def test_one_position(record):
    text, image, spatial = record(L=1)
    logits = CALIP(text, beta2=1.0)(image, spatial)
    assert logits.shape == (len(image), len(text))
    assert bool(logits.isfinite().all())


def labelled(record, informative: str):
    """Images whose class only the global feature, or only one of the positions, tells."""
    text, _, _ = record(K=5)
    label = torch.arange(5).repeat(8)
    noise, tokens = torch.randn(40, 32), 0.1 * torch.randn(40, 6, 32)
    image = noise.double() + (8 * text[label] if informative == "image" else 0)
    spatial = tokens.double() + torch.randn(32, dtype=torch.float64)
    if informative == "positions":
        spatial = spatial + 3 * text[label][:, None]
        image = text[label] + 0.6 * noise.double()
    return text, Support(F.normalize(image, dim=-1), label, spatial)


def test_validation_images_choose_the_weights(record):
    text, val = labelled(record, "positions")
    head = CALIP(text, logit_scale=10.0)
    start = CALIP(text, beta2=0, beta3=0, logit_scale=10.0)
    head.choose(val)
    assert head.beta2 > 0 or head.beta3 > 0
    assert 0 <= head.beta2 <= 2
    assert 0 <= head.beta3 <= 0.1
    assert val.spatial is not None
    hits = [(one(val.image, val.spatial).argmax(1) == val.label).sum() for one in (head, start)]
    assert hits[0] >= hits[1]


def test_positions_that_tell_nothing_are_not_chosen(record):
    text, val = labelled(record, "image")
    head = CALIP(text, beta2=1.0, logit_scale=10.0)
    head.choose(val)
    assert head.beta2 == 0.0


def test_choose_needs_spatial_features(record):
    text, image, _ = record()
    with pytest.raises(ValueError, match="^CALIP: validation images must have spatial features$"):
        CALIP(text).choose(Support(image, torch.arange(3)))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda i, s: (i, s[..., 1:]), ValueError, r"spatial must be \[B, L, 32\], got"),
        (
            lambda i, s: (i[:2], s),
            ValueError,
            "image and spatial must have the same B, got 2 and 3",
        ),
        (lambda i, s: (i, s.half()), TypeError, "spatial must be torch.float64 like the head"),
        (lambda i, s: (i, s, torch.ones(3, 5)), TypeError, "spatial_mask must be bool"),
    ],
)
def test_bad_features(record, change, error, message):
    text, image, spatial = record()
    with pytest.raises(error, match=message):
        CALIP(text)(*change(image, spatial))
