# SPDX-License-Identifier: Apache-2.0
"""`--method auto`: what it fits, what it keeps, what it prints, and what it never looks at."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from vtclip import api, auto
from vtclip.adapter import load_adapter
from vtclip.auto import choose_members, folds
from vtclip.cli import main
from vtclip.data.records import Records
from vtclip.data.splits import Split, few_shot_split


def logits_of(label: torch.Tensor, strength: float, seed: int) -> torch.Tensor:
    """Noise, plus `strength` on the true class."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(len(label), 4, generator=generator) + strength * F.one_hot(label, 4)


def test_the_best_single_method_is_kept_where_no_pair_is_better():
    label = torch.arange(200) % 4
    good = logits_of(label, 6.0, 1)
    chosen = choose_members({"poor": torch.zeros(200, 4), "good": good}, label)
    assert chosen == {"good": 1.0}


def test_two_independent_methods_are_averaged():
    label = torch.arange(400) % 4
    parts = {name: logits_of(label, 2.0, seed) for seed, name in enumerate("ab")}
    assert choose_members({**parts, "poor": torch.zeros(400, 4)}, label) == {"a": 0.5, "b": 0.5}


def test_the_temperature_decides_not_the_scale_of_the_logits():
    label = torch.arange(400) % 4
    parts = {name: logits_of(label, 2.0, seed) for seed, name in enumerate("ab")}
    scaled = {"a": 50 * parts["a"], "b": parts["b"] / 50}
    assert choose_members(scaled, label) == {"a": 0.5, "b": 0.5}


def test_folds_use_every_training_row_once_and_no_other(records: Records):
    split = few_shot_split(records.label, records.names, shots=3, seed=1)
    found = folds(records, split)
    assert len(found) == 3
    assert sorted(torch.cat([part.val for part in found]).tolist()) == split.train.tolist()
    for part in found:
        assert sorted([*part.train.tolist(), *part.val.tolist()]) == split.train.tolist()
        assert len(records.label[part.train].unique()) == 4


def test_one_shot_has_no_folds(records: Records):
    split = few_shot_split(records.label, records.names, shots=1, seed=1)
    assert folds(records, split) == []


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Candidates that fit in a moment."""
    monkeypatch.setattr(auto, "CANDIDATES", ("zeroshot", "rada"))
    monkeypatch.setattr(auto, "BLIND", ("zeroshot", "rada"))


def fitted(records: Records, split: Split) -> tuple[auto.Auto, list[dict[str, object]]]:
    return auto.fit_auto(
        records, split, 2, device=torch.device("cpu"), seed=1, log=lambda row: None
    )


def test_without_validation_images_the_shots_are_cross_validated(records: Records, quick: None):
    split = few_shot_split(records.label, records.names, shots=2, seed=1)
    none = Split(split.train, split.val[:0], split.test, split.digest)
    _, rows = fitted(records, none)
    assert [row["count"] for row in rows] == [len(split.train)] * 2


def test_without_anything_to_choose_by_both_are_averaged(records: Records, quick: None):
    split = few_shot_split(records.label, records.names, shots=1, seed=1)
    none = Split(split.train, split.val[:0], split.test, split.digest)
    kept, rows = fitted(records, none)
    assert kept.members == ["zeroshot", "rada"]
    assert "accuracy" not in rows[0]


def test_command_prints_the_comparison_and_keeps_an_adapter(
    npz: Path, tmp_path: Path, quick: None, capsys: pytest.CaptureFixture[str]
):
    out = tmp_path / "run"
    assert main(["fit", str(npz), "--method", "auto", "--shots", "2", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "8 validation images" in printed
    assert "kept, weight" in printed
    result = json.loads((out / "result.json").read_text())
    assert [row["method"] for row in result["candidates"]] == ["zeroshot", "rada"]
    weights = [row["weight"] for row in result["candidates"]]
    assert sum(weights) == pytest.approx(1)
    kept = [row["method"] for row in result["candidates"] if row["weight"]]
    assert load_adapter(out).head.members == kept
    assert api.evaluate(out)["accuracy"] == result["accuracy"]


def test_test_images_decide_nothing(npz: Path, tmp_path: Path, quick: None):
    """Other labels for the test images: the same adapter, byte for byte."""
    before = api.fit(npz, method="auto", shots=2, out=tmp_path / "before").folder
    with np.load(npz) as arrays:
        changed = dict(arrays)
    label = torch.from_numpy(changed["label"].copy())
    test = few_shot_split(label, [str(i) for i in range(len(label))], shots=2, seed=1).test
    changed["image"][test] = np.roll(changed["image"][test], 7, axis=0)
    (tmp_path / "other").mkdir()
    np.savez(tmp_path / "other" / npz.name, **changed)
    run = api.fit(tmp_path / "other" / npz.name, method="auto", shots=2, out=tmp_path / "after")
    name = "adapter.safetensors"
    assert (before / name).read_bytes() == (run.folder / name).read_bytes()
    assert (
        run.result["adapted"]["nll"]
        != json.loads((before / "result.json").read_text())["adapted"]["nll"]
    )
