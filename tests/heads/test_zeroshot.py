# SPDX-License-Identifier: Apache-2.0
"""ZeroShot is the scaled cosine, and a head like the others."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from vtclip.heads import ZeroShot


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
