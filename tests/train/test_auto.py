# SPDX-License-Identifier: Apache-2.0
"""`--method auto`: what it fits, what it keeps, what it prints, and what it never looks at."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import vtclip
from vtclip.cli import main
from vtclip.data.records import Records
from vtclip.data.splits import Split, few_shot_split
from vtclip.heads import Head, Support
from vtclip.runs.adapter import load_adapter
from vtclip.train import auto, engine
from vtclip.train.auto import choose_weights, folds
from vtclip.train.rows import support_of
from vtclip.train.steps import TrainingRun


def logits_of(label: torch.Tensor, strength: float, seed: int) -> torch.Tensor:
    """Noise, plus `strength` on the true class."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(len(label), 4, generator=generator) + strength * F.one_hot(label, 4)


def test_a_method_that_knows_outweighs_the_prior():
    label = torch.arange(400) % 4
    parts = {"proker": torch.zeros(400, 4), "zeroshot": logits_of(label, 6.0, 1)}
    weights = choose_weights(parts, label)
    assert weights["zeroshot"] > 0.9
    assert sum(weights.values()) == pytest.approx(1)


def test_few_images_leave_the_prior_nearly_alone():
    label = torch.arange(4)
    parts = {"proker": torch.zeros(4, 4), "rada": logits_of(label, 6.0, 1)}
    assert 0.5 < choose_weights(parts, label)["rada"] < 0.65
    assert choose_weights({name: rows[:0] for name, rows in parts.items()}, label[:0]) == {
        "proker": pytest.approx(0.5),
        "rada": pytest.approx(0.5),
    }


def test_two_independent_methods_share_the_weight():
    label = torch.arange(400) % 4
    parts = {name: logits_of(label, 2.0, seed) for seed, name in enumerate(("rada", "vtclip"))}
    weights = choose_weights({**parts, "proker": torch.zeros(400, 4)}, label)
    assert weights["rada"] == pytest.approx(weights["vtclip"], abs=0.15)
    assert weights["proker"] < 0.1


def test_the_temperature_decides_not_the_scale_of_the_logits():
    label = torch.arange(400) % 4
    parts = {name: logits_of(label, 2.0, seed) for seed, name in enumerate(("rada", "vtclip"))}
    scaled = {"rada": 50 * parts["rada"], "vtclip": parts["vtclip"] / 50}
    plain = choose_weights(parts, label)
    assert choose_weights(scaled, label) == {
        name: pytest.approx(w, abs=0.02) for name, w in plain.items()
    }


def test_at_most_four_are_kept():
    label = torch.arange(40) % 4
    parts = {name: logits_of(label, 2.0, 5) for name in auto.CANDIDATES}
    weights = choose_weights(parts, label)
    assert len(weights) == 4
    assert set(weights) > {"proker", "rada", "vtclip"}


def test_hyper_parameters_are_judged_by_images_that_did_not_choose_them(records):
    """A head that learns its validation rows by heart gains nothing from them here."""

    class ByHeart(Head):
        def choose(self, val: Support) -> None:
            self.seen = val

        def forward(self, image: torch.Tensor) -> torch.Tensor:
            near = F.normalize(image, dim=-1) @ self.seen.image.T
            best = near.max(dim=1)
            known = F.one_hot(self.seen.label[best.indices], 4).float()
            return known * (best.values > 0.99999).float()[:, None]

    head, val, cpu = ByHeart(records.text), torch.arange(0, 96, 5), torch.device("cpu")
    head.choose(support_of(records, val, cpu))
    plain = engine.all_logits(head, records, val, device=cpu)
    assert bool((plain[0].argmax(dim=1) == plain[1]).all())
    logits, label = auto.unseen_logits(head, records, val, cpu)
    assert torch.equal(label, plain[1])
    assert not bool(logits.any())


def test_folds_use_every_training_row_once_and_no_other(records):
    split = few_shot_split(records.label, records.names, shots=3, seed=1)
    found = folds(records, split)
    assert len(found) == 3
    assert sorted(torch.cat([part.val for part in found]).tolist()) == split.train.tolist()
    for part in found:
        assert sorted([*part.train.tolist(), *part.val.tolist()]) == split.train.tolist()
        assert len(records.label[part.train].unique()) == 4


def test_one_shot_has_no_folds(records):
    split = few_shot_split(records.label, records.names, shots=1, seed=1)
    assert folds(records, split) == []


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Candidates that fit in a moment."""
    monkeypatch.setattr(auto, "CANDIDATES", ("zeroshot", "rada"))


def fitted(records: Records, split: Split) -> tuple[auto.Auto, list[dict[str, object]]]:
    return auto.fit_auto(records, split, 2, TrainingRun(torch.device("cpu"), 1))[:2]


def test_without_validation_images_the_shots_are_cross_validated(records, quick):
    split = few_shot_split(records.label, records.names, shots=2, seed=1)
    none = Split(split.train, split.val[:0], split.test, split.digest)
    _, rows = fitted(records, none)
    assert [row["count"] for row in rows] == [len(split.train)] * 2


def test_without_anything_to_choose_by_the_prior_stands(records, quick):
    split = few_shot_split(records.label, records.names, shots=1, seed=1)
    none = Split(split.train, split.val[:0], split.test, split.digest)
    kept, rows = fitted(records, none)
    assert kept.members == ["rada", "zeroshot"]
    assert kept.weights == pytest.approx([1 / 1.5, 0.5 / 1.5])
    assert "accuracy" not in rows[0]


def test_command_prints_the_comparison_and_keeps_an_adapter(npz, tmp_path, quick, capsys):
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
    assert sorted(load_adapter(out).head.members) == sorted(kept)
    assert vtclip.evaluate(out)["accuracy"] == result["accuracy"]


def test_test_images_decide_nothing(npz, tmp_path, quick):
    """Other labels for the test images: the same adapter, byte for byte."""
    before = vtclip.fit(npz, method="auto", shots=2, out=tmp_path / "before").folder
    with np.load(npz) as arrays:
        changed = dict(arrays)
    label = torch.from_numpy(changed["label"].copy())
    test = few_shot_split(label, [str(i) for i in range(len(label))], shots=2, seed=1).test
    changed["image"][test] = np.roll(changed["image"][test], 7, axis=0)
    (tmp_path / "other").mkdir()
    np.savez(tmp_path / "other" / npz.name, **changed)
    run = vtclip.fit(tmp_path / "other" / npz.name, method="auto", shots=2, out=tmp_path / "after")
    name = "adapter.safetensors"
    assert (before / name).read_bytes() == (run.folder / name).read_bytes()
    assert (
        run.result["adapted"]["nll"]
        != json.loads((before / "result.json").read_text())["adapted"]["nll"]
    )
