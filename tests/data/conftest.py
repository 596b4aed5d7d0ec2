# SPDX-License-Identifier: Apache-2.0
"""A folder of small pictures and an encoder that costs nothing, so that tests are about files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from fake_clip import FakeClip
from pictures import noise

from vtclip.data.extract import cached_features
from vtclip.data.options import FeatureOptions


@pytest.fixture
def fake_clip() -> type[FakeClip]:
    return FakeClip


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """15 pictures of 3 classes."""
    return noise(tmp_path / "pictures")


@pytest.fixture
def cached(pictures: Path, tmp_path: Path, fake_clip: Any) -> Any:
    """`cached_features` of the pictures, with a FakeClip and a cache of its own."""

    def found(source: Path = pictures, **options: Any) -> Any:
        given = {"model": fake_clip(), "cache_dir": tmp_path / "cache", **options}
        return cached_features(source, FeatureOptions(**given))

    return found
