# SPDX-License-Identifier: Apache-2.0
"""ZeroShot is the scaled cosine, and a head like the others."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from vtclip.heads import HEADS, ZeroShot


def test_is_the_cosine(record):
    text, image, spatial = record()
    head = ZeroShot(3.0 * text, logit_scale=18.0)
    want = 18.0 * F.normalize(image, dim=-1) @ text.T
    # float64, 32 terms, logits up to 18
    torch.testing.assert_close(head(image), want, rtol=0, atol=1e-12)
    assert torch.equal(head(image, spatial, None), head(image))


def test_zero_image_is_undecided(record):
    text, image, _ = record()
    image[1] = 0
    assert torch.equal(ZeroShot(text)(image)[1], torch.zeros(7, dtype=text.dtype))


def test_rebuilds(record):
    text, image, _ = record()
    head = ZeroShot(text, logit_scale=7.0)
    again = HEADS["zeroshot"](torch.ones_like(text), **head.options())
    again.load_state_dict(head.state_dict())
    assert torch.equal(again(image), head(image))
    assert not list(head.parameters())
    assert head.num_classes == 7
    assert not head.needs_spatial


def test_bad_features(record):
    text, image, _ = record()
    with pytest.raises(ValueError, match=r"^ZeroShot: image must be \[B, 32\], got \[3, 31\]$"):
        ZeroShot(text)(image[:, 1:])
    with pytest.raises(TypeError, match=r"^ZeroShot: image must be torch.float64 like the head"):
        ZeroShot(text)(image.float())
