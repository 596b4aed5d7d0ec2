# SPDX-License-Identifier: Apache-2.0
"""Features of random images and classes; what needs more than torch is skipped without it."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

# file -> packages beside torch that its imports or its first fixture ask for
NEEDS = {
    "test_coop.py": ("open_clip", "numpy", "PIL", "safetensors", "tqdm"),
    "test_support_heads.py": ("numpy", "PIL", "safetensors", "tqdm"),
    "test_training.py": ("numpy",),
}


class _Without(pytest.Module):
    missing = ""

    def collect(self) -> Iterator[pytest.Item]:
        pytest.skip(f"not installed: {self.missing}", allow_module_level=True)


def pytest_pycollect_makemodule(
    module_path: Path, parent: pytest.Collector
) -> pytest.Module | None:
    """A file whose packages are not all there is skipped before it is imported."""
    needed = NEEDS.get(module_path.name, ())
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if not missing:
        return None
    module: _Without = _Without.from_parent(parent, path=module_path)
    module.missing = ", ".join(missing)
    return module


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
