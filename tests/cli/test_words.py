# SPDX-License-Identifier: Apache-2.0
"""What commands say: names, counts and reasons."""

from __future__ import annotations

from pathlib import Path

import pytest
from commands import call, json_of
from trees import picture

ON_CPU = ["--device", "cpu", "--threads", "1"]


@pytest.fixture
def photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two classes of eight images, in the folder that commands run in."""
    root = tmp_path / "photos"
    for k, name in enumerate(("ant", "bee")):
        for number in range(8):
            picture(root / name / f"{number}.jpg", number, k)
    monkeypatch.chdir(root)
    return root


def test_a_source_typed_as_dots_is_called_like_its_folder(capsys, photos, monkeypatch):
    words = ["--method", "proker", "--shots", "2", "--cache-dir", "../cache", *ON_CPU]
    assert call("fit", ".", "--out", "../r", *words) == 0
    assert capsys.readouterr().out.startswith("proker on photos: 2 classes")
    for source in (".", "ant/..", "../photos/"):
        assert json_of(capsys, "evaluate", "../r", source, *ON_CPU)["source"] == "photos"
    monkeypatch.chdir(photos / "ant")
    assert json_of(capsys, "evaluate", "../../r", "..", *ON_CPU)["source"] == "photos"
    assert json_of(capsys, "repeat", "../../r", "--cache-dir", "../../cache")["source"] == "photos"
