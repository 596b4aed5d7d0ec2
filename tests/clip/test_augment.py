# SPDX-License-Identifier: Apache-2.0
"""Random crops: sizes and ratios of the drawn boxes."""

from __future__ import annotations

import torch

from vtclip.clip.augment import crop_box


def test_crops_have_the_promised_sizes() -> None:
    generator = torch.Generator().manual_seed(0)
    areas, ratios = [], []
    for _ in range(400):
        top, left, height, width = crop_box(200, 200, generator)
        assert min(top, left) >= 0
        assert max(top + height, left + width) <= 200
        areas.append(height * width / 200**2)
        ratios.append(width / height)
    assert 0.07 < min(areas) < 0.15
    assert 0.8 < max(areas) <= 1
    assert 0.73 < min(ratios) < 0.8
    assert 1.25 < max(ratios) < 1.36
    for width, height in ((1, 1), (1, 90), (90, 1)):
        top, left, h, w = crop_box(width, height, generator)
        assert 1 <= h <= height
        assert 1 <= w <= width
