# SPDX-License-Identifier: Apache-2.0
"""Features of random images and classes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F


@pytest.fixture
def record():
    """A function from sizes to (text, image, spatial)."""

    def make(B=3, K=7, C=32, L=5, spatial_dim=None, dtype=torch.float64):
        text = F.normalize(torch.randn(K, C, dtype=dtype), dim=-1)
        return (
            text,
            torch.randn(B, C, dtype=dtype),
            torch.randn(B, L, spatial_dim or C, dtype=dtype),
        )

    return make
