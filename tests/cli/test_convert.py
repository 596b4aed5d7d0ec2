# SPDX-License-Identifier: Apache-2.0
"""`vtclip convert`: what it prints, writes and refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import call, json_of, refused

from vtclip.clip import build_clip

CONFIG: dict[str, Any] = {
    "embed_dim": 48,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 64, "patch_size": 8},
    "text_cfg": {
        "context_length": 16, "vocab_size": 49408, "width": 64, "heads": 1, "layers": 1
    },
}  # fmt: skip


@pytest.fixture
def weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A state dict as OpenAI's archives have it, in an empty working directory."""
    monkeypatch.chdir(tmp_path)
    state = build_clip(CONFIG).half().state_dict()
    torch.save({**state, "input_resolution": torch.tensor(32)}, "w.pt")
    return tmp_path / "w.pt"


def test_it_says_what_was_written_and_how_to_use_it(
    capsys: pytest.CaptureFixture[str], weights: Path
) -> None:
    assert call("convert", "w.pt") == 0
    out = capsys.readouterr().out
    assert "w.safetensors: a model of no known architecture, QuickGELU" in out
    assert "--model w.safetensors" in out
    found = json_of(capsys, "convert", "w.pt", "--out", "again.safetensors")
    assert found["out"] == "again.safetensors"
    assert found["model_cfg"]["quick_gelu"] is True
    assert json.dumps(found["source"]) == '"w.pt"'


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "required: FILE"),
        (["missing.pt"], "FILE 'missing.pt' does not exist"),
        (["w.pt", "--out", "w.bin"], "--out w.bin must end in .safetensors"),
        (["w.pt", "--out", "no/w.safetensors"], "--out: no folder no"),
        (["w.pt", "--model", "ViT-B-33"], "did you mean 'ViT-B-32'"),
        (["w.pt", "--model", "RN50"], "does not fit its architecture"),
        (["."], "must be a file, or a folder with config.json of transformers"),
        (["w.pt", "--mdoel", "x"], "did you mean '--model'"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(
    capsys: pytest.CaptureFixture[str], weights: Path, words: list[str], message: str
) -> None:
    assert message in refused(capsys, "convert", *words)
    assert [path.name for path in weights.parent.iterdir()] == ["w.pt"]


def test_a_file_that_is_there_stays(capsys: pytest.CaptureFixture[str], weights: Path) -> None:
    out = weights.with_suffix(".safetensors")
    out.write_text("mine")
    assert "exists already; add --overwrite" in refused(capsys, "convert", "w.pt")
    assert out.read_text() == "mine"
    assert call("convert", "w.pt", "--overwrite") == 0
    assert out.stat().st_size > 1000
