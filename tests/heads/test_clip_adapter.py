# SPDX-License-Identifier: Apache-2.0
"""ClipAdapter against its equation, its limits, its edges and its errors."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from vtclip.heads import ClipAdapter, ZeroShot

EXACT = 1e-11  # float64, sums of tens of terms, logits up to 100


def written_out(head: ClipAdapter, image: Tensor) -> Tensor:
    """One image at a time, from the equation."""
    rows = []
    for v in image:
        hidden = (head.down.weight @ v).clamp(min=0)
        adapted = (head.up.weight @ hidden).clamp(min=0)
        mixed = head.ratio * adapted + (1 - head.ratio) * v
        lengths = mixed.norm() * head.text.norm(dim=1)
        rows.append(head.logit_scale * (head.text @ mixed) / lengths)
    return torch.stack(rows)


@pytest.mark.parametrize("ratio", [0.2, 0.7, 1.0])
def test_equals_the_equation(record, ratio):
    text, image, spatial = record()
    head = ClipAdapter(3 * text, ratio=ratio, reduction=2, logit_scale=30.0)
    want = written_out(head, image)
    torch.testing.assert_close(head(image), want, rtol=0, atol=EXACT)
    assert torch.equal(head(image, spatial), head(image))
    moved = (want - ZeroShot(text, logit_scale=30.0)(image)).detach()
    assert float(moved.abs().max()) > 0.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_ratio_0_is_zero_shot_to_the_last_bit(record, dtype):
    text, image, _ = record(dtype=dtype)
    assert torch.equal(ClipAdapter(text, ratio=0)(image), ZeroShot(text)(image))


def test_the_length_of_the_rows_does_not_matter(record):
    """Tables of rows of length 1 and encoders' own long rows train alike."""
    text, image, _ = record()
    head = ClipAdapter(text)
    found = []
    for scale in (1.0, 11.0, 1e-3):
        logits = head(scale * image)
        loss = torch.nn.functional.cross_entropy(logits, torch.arange(3))
        found.append((logits, *torch.autograd.grad(loss, list(head.parameters()))))
    for other in found[1:]:
        for mine, wanted in zip(other, found[0], strict=True):
            torch.testing.assert_close(mine, wanted, rtol=1e-9, atol=EXACT)
    assert all(float(grad.abs().max()) > 0 for grad in found[0][1:])


@pytest.mark.parametrize("sizes", [{"C": 1}, {"C": 3}])
def test_narrow_features(record, sizes):
    text, image, _ = record(**sizes)
    head = ClipAdapter(text)
    logits = head(image)
    torch.testing.assert_close(logits, written_out(head, image), rtol=0, atol=EXACT)


def test_a_zero_image_is_undecided(record):
    text, image, _ = record()
    image[1] = 0
    assert torch.equal(ClipAdapter(text)(image)[1], torch.zeros(7, dtype=text.dtype))
