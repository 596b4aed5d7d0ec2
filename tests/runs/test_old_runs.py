# SPDX-License-Identifier: Apache-2.0
"""Runs that an earlier version wrote: they load, predict, evaluate and repeat as they did then.

make_old_runs.py of this folder made them; old/recorded.json holds what that version computed.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import json_of, refused

import vtclip
from vtclip.runs.adapter import load_adapter

OLD = Path(__file__).with_name("old")
RECORDED: dict[str, Any] = json.loads((OLD / "recorded.json").read_text("ascii"))
TABLES = [name for name in RECORDED if name != "tip-adapter-f-pictures"]
# probabilities and metrics of other kernels, instruction sets and torch versions in float32
TOLERANCE = 2e-5


@pytest.fixture(scope="module")
def copied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(shutil.copytree(OLD, tmp_path_factory.mktemp("runs") / "old"))


@pytest.fixture
def old(copied: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that the runs' sources are relative to, as the working directory."""
    monkeypatch.chdir(copied)
    return copied


def close(now: Any, then: Any) -> None:
    """The same keys and lists; numbers within the tolerance."""
    if isinstance(then, dict):
        assert then.keys() <= now.keys()
        for name, value in then.items():
            close(now[name], value)
    elif isinstance(then, list):
        assert len(now) == len(then)
        for one, value in zip(now, then, strict=True):
            close(one, value)
    elif isinstance(then, float):
        assert now == pytest.approx(then, abs=TOLERANCE)
    else:
        assert now == then


@pytest.mark.parametrize("name", TABLES)
def test_adapters_load_with_the_probabilities_of_then(name, old):
    adapter = load_adapter(name)
    records = vtclip.open_source("features.npz")
    batch = records.batch(torch.arange(len(records)))
    inputs = (batch.image, batch.spatial) if adapter.head.needs_spatial else (batch.image,)
    with torch.no_grad():
        logits = adapter.head(*inputs).double()
    now = (logits / (adapter.temperature or 1.0)).softmax(1)
    then = torch.tensor(RECORDED[name]["probabilities"], dtype=torch.float64)
    torch.testing.assert_close(now, then, atol=TOLERANCE, rtol=0)


def test_a_classifier_predicts_the_pictures_as_then(old):
    classifier = vtclip.Classifier.load("tip-adapter-f-pictures", device="cpu")
    paths = sorted(Path("pictures").glob("*/*.png"))
    then = RECORDED["tip-adapter-f-pictures"]["probabilities"]
    assert len(paths) == len(then) == 18
    for best, row in zip(classifier.predict(paths, topk=3), then, strict=True):
        now = {found.label: found.probability for found in best}
        close([now[label] for label in classifier.class_names], row)


def test_a_run_without_scores_says_so(old):
    """Thresholds for unknown images need what those versions did not keep."""
    classifier = vtclip.Classifier.load("tip-adapter-f-pictures", device="cpu")
    with pytest.raises(ValueError, match="the run holds none: .* written by an earlier version"):
        classifier.predict(sorted(Path("pictures").glob("*/*.png")), unknown=0.5)


@pytest.mark.parametrize("name", RECORDED)
def test_runs_are_evaluated_as_then(name, old, tmp_path, capsys):
    assert vtclip.Run.load(name).accuracy == RECORDED[name]["accuracy"]
    words = ["evaluate", name, "--device", "cpu", "--threads", "1", "--cache-dir", tmp_path]
    close(json_of(capsys, *words), RECORDED[name]["evaluate"])


@pytest.mark.parametrize("name", [name for name in RECORDED if name != "auto"])
def test_runs_are_repeated_as_then(name, old, tmp_path, capsys):
    """MATCH with the versions and processor of then; elsewhere the accuracies are close."""
    found = json_of(capsys, "repeat", name, "--cache-dir", tmp_path)
    assert found["verdict"] in ("MATCH", "CLOSE")


def test_a_run_of_another_rule_of_auto_is_not_repeated(old, tmp_path, capsys):
    line = refused(capsys, "repeat", "auto", "--out", tmp_path / "again")
    assert "method auto must pool by log-linear to be fitted again" in line
    assert "fitted this run by a mean of probabilities; predict and evaluate work with it" in line
    assert not (tmp_path / "again").exists()
