# SPDX-License-Identifier: Apache-2.0
"""CLIP-Adapter, linear probe, Multi-Modal Adapter, AutoCLIP and CALIP through `vtclip.fit`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import vtclip
from vtclip.data.records import Records
from vtclip.data.splits import Split, few_shot_split
from vtclip.heads import CALIP, HEADS, AutoCLIP, LinearProbe, ZeroShot
from vtclip.runs.adapter import load_adapter
from vtclip.train import engine
from vtclip.train.fit_head import fit_head
from vtclip.train.steps import TrainingRun

LEARN = ["clip-adapter", "linear-probe", "mm-adapter"]
METHODS = [*LEARN, "autoclip", "calip"]
CPU = torch.device("cpu")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shots", [1, 8])
def test_fit_evaluate_and_load(npz: Path, tmp_path: Path, method: str, shots: int) -> None:
    run = vtclip.fit(npz, method=method, shots=shots, seed=1, out=tmp_path / "run", device="cpu")
    adapted, zero_shot = run.result["adapted"], run.result["zero_shot"]
    assert adapted["count"] == 48
    if shots == 8 and method in LEARN:
        assert adapted["accuracy"] > zero_shot["accuracy"]
    if method == "autoclip":  # one template
        assert adapted["per_class"] == zero_shot["per_class"]
        assert run.result["images"]["train"] == 4 * shots
    again = vtclip.evaluate(run.folder, device="cpu")
    assert again["accuracy"] == adapted["accuracy"]
    assert again["nll"] == pytest.approx(adapted["nll"], rel=1e-6)
    assert load_adapter(run.folder).head.method == method


def split_of(records: Records, shots: int) -> Split:
    return few_shot_split(records.label, records.names, shots=shots, seed=1)


def fitted(records: Records, method: str, split: Split) -> Any:
    config = HEADS[method].recipe(4)
    return fit_head(method, records, split, config, TrainingRun(CPU, 1))


@pytest.mark.parametrize("method", LEARN)
def test_the_same_seed_gives_the_same_head(records: Records, method: str) -> None:
    one, two = (fitted(records, method, split_of(records, 4)) for _ in range(2))
    for name, value in one.state_dict().items():
        assert torch.equal(value, two.state_dict()[name]), name
    assert one.options() == two.options()


def without_val(split: Split) -> Split:
    none = torch.tensor([], dtype=torch.long)
    return Split(split.train, none, split.test, split.digest)


def test_without_validation_images_the_defaults_stay(records: Records) -> None:
    split = without_val(split_of(records, 4))
    probe = fitted(records, "linear-probe", split)
    assert probe.l2 == LinearProbe(records.text).l2
    assert bool(probe.weight.any())
    head = fitted(records, "calip", split)
    assert (head.beta2, head.beta3) == (CALIP(records.text).beta2, CALIP(records.text).beta3)


def test_validation_images_choose_calips_weights(records: Records) -> None:
    """One of the nine tokens tells the class, which the image alone leaves open."""
    split = split_of(records, 4)
    head = fitted(records, "calip", split)
    assert head.beta2 > 0
    logits, label = engine.all_logits(head, records, split.test, device=CPU)
    plain, _ = engine.all_logits(
        ZeroShot(records.text, logit_scale=20.0), records, split.test, device=CPU
    )
    hits, before = ((x.argmax(dim=1) == label).sum() for x in (logits, plain))
    assert hits >= before


def test_calip_refuses_spatial_features_of_another_width(npz: Path, tmp_path: Path) -> None:
    with np.load(npz) as arrays:
        np.savez(tmp_path / "wide.npz", **{**arrays, "spatial": arrays["spatial"][:, :, :5]})
    with pytest.raises(ValueError, match="^CALIP: spatial features must lie in the space of the"):
        vtclip.fit(
            tmp_path / "wide.npz", method="calip", shots=1, out=tmp_path / "run", device="cpu"
        )
    assert not (tmp_path / "run").exists()


def test_autoclip_gets_the_texts_of_every_template(npz: Path, tmp_path: Path) -> None:
    with np.load(npz) as arrays:
        draws = np.random.default_rng(0).standard_normal((3, 4, 16)).astype(np.float32)
        text = arrays["text"][None] + 0.2 * draws
        np.savez(tmp_path / "three.npz", **{**arrays, "text": text})
    options = {"shots": 0, "test_fraction": 1.0, "out": tmp_path / "run", "device": "cpu"}
    run = vtclip.fit(tmp_path / "three.npz", method="autoclip", **options)
    head = load_adapter(run.folder).head
    assert isinstance(head, AutoCLIP)
    unit = text / np.linalg.norm(text, axis=-1, keepdims=True)
    want = torch.from_numpy(unit).transpose(0, 1)
    torch.testing.assert_close(head.views, want, rtol=0, atol=1e-6)
    assert run.result["adapted"]["count"] == 96
    assert run.result["adapted"]["nll"] != run.result["zero_shot"]["nll"]


@pytest.mark.parametrize("method", METHODS)
def test_bad_options_leave_nothing_behind(npz: Path, tmp_path: Path, method: str) -> None:
    options = {"shots": 1, "overrides": {"head": {"rank": 3}}, "device": "cpu"}
    with pytest.raises(ValueError, match=f"method {method} has no option rank|has no training"):
        vtclip.fit(npz, method=method, out=tmp_path / "run", **options)
    assert not (tmp_path / "run").exists()
