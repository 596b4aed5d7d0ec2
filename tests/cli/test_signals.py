# SPDX-License-Identifier: Apache-2.0
"""A signal in any stage of a command outside of training: its status, and nothing half done."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest
from commands import call
from pictures import dots

from vtclip.clip.model import Clip
from vtclip.data import extract
from vtclip.runs import folder
from vtclip.train import metrics

STAGES: dict[str, tuple[Any, str]] = {
    "reading": (extract, "hash_all"),
    "encoding": (Clip, "encode_image"),
    "evaluating": (metrics, "all_metrics"),
    "writing": (folder, "write_decisions"),
}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return dots(tmp_path_factory.mktemp("source") / "dots")


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("stage", STAGES)
def test_nothing_is_half_done_and_the_same_command_goes_on(
    source, tmp_path, monkeypatch, capsys, stage, signum
):
    words = ["fit", source, "--method", "proker", "--shots", "2", "--device", "cpu"]
    words += ["--threads", "1", "--out", tmp_path / "run", "--cache-dir", tmp_path / "cache"]
    owner, name = STAGES[stage]
    real = getattr(owner, name)

    def stopped(*args: Any, **options: Any) -> Any:
        signal.raise_signal(signum)
        return real(*args, **options)

    before = signal.getsignal(signum)
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, stopped)
        assert call(*words) == 128 + signum
    assert signal.getsignal(signum) == before
    said = capsys.readouterr()
    assert said.out == ""
    assert "Traceback" not in said.err
    last = "interrupted" if signum == signal.SIGINT else "terminated"
    assert said.err.splitlines()[-1:] == [last]
    left = {path.name for path in (tmp_path / "run").glob("*")}
    assert not left & {"result.json", "adapter.safetensors", "adapter_config.json"}
    assert call(*words) == 0
    assert (tmp_path / "run" / "result.json").is_file()
