# SPDX-License-Identifier: Apache-2.0
"""Small tables of features for benchmarks: without spatial ones, and with those of some rows."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

K, C, L = 4, 16, 6


def write_npz(path: Path, *, per_class: int = 12, seed: int = 7, spatial_rows: int = 0) -> Path:
    """Features near their class texts; spatial ones of the first `spatial_rows` rows per class."""
    generator = torch.Generator().manual_seed(seed)
    text = F.normalize(torch.randn(K, C, generator=generator), dim=-1)
    label = torch.arange(K).repeat_interleave(per_class)
    image = text[label] + 0.4 * torch.randn(len(label), C, generator=generator)
    arrays = {
        "image": image.numpy(),
        "label": label.numpy(),
        "text": text.numpy(),
        "classname": np.array(["ant", "bee", "cat", "dog"]),
        "temperature": np.float32(np.log(20.0)),
    }
    if spatial_rows:
        index = torch.arange(len(label)).reshape(K, per_class)[:, :spatial_rows].flatten()
        noise = 0.3 * torch.randn(len(index), L, C, generator=generator)
        arrays["spatial"] = (text[label[index]][:, None] + noise).numpy()
        arrays["spatial_index"] = index.numpy()
    np.savez(path, **arrays)
    return path


@pytest.fixture(scope="session")
def animals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """48 rows of 4 classes, no spatial features."""
    return write_npz(tmp_path_factory.mktemp("bench") / "animals.npz")


@pytest.fixture(scope="session")
def insects(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """64 rows of 4 classes, of which 40 have spatial features."""
    place = tmp_path_factory.mktemp("bench")
    return write_npz(place / "insects.npz", per_class=16, seed=8, spatial_rows=10)
