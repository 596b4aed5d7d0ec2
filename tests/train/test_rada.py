# SPDX-License-Identifier: Apache-2.0
"""RAda in the loop: its loss, its recipe, its options on the way from `fit` to the adapter file."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
import torch
from commands import json_of
from torch import Tensor
from torch.nn import functional as F

import vtclip
from vtclip.cli import main
from vtclip.data.records import Records
from vtclip.data.splits import Split, few_shot_split
from vtclip.heads import HEADS, RAda
from vtclip.heads.config import FitConfig
from vtclip.runs.adapter import load_adapter
from vtclip.train import engine, metrics
from vtclip.train.methods import recipe_config
from vtclip.train.steps import TrainingRun, training_loss

CPU = torch.device("cpu")
CONFIG = FitConfig(epochs=12, optimizer="adamw", lr=0.01, batch_size=16, warmup="linear")


def new_head(records: Records, **options: Any) -> RAda:
    """RAda with a mask that is not 1."""
    torch.manual_seed(3)
    head = RAda(records.text, logit_scale=20.0, num_heads=4, **options)
    with torch.no_grad():
        head.out.bias.add_(0.3 * torch.randn_like(head.out.bias))
    return head


def trained(records: Records, config: FitConfig, **options: Any) -> tuple[RAda, Split]:
    torch.manual_seed(1)
    head = RAda(records.text, logit_scale=20.0, num_heads=4, **options)
    split = few_shot_split(records.label, records.names, shots=8, seed=1)
    rows = engine.TrainingRows(records, split.train, split.val)
    engine.train_head(head, rows, split.train, split.val, config, TrainingRun(CPU, 1))
    return head, split


def penalty_of(head: RAda, records: Records, index: Tensor) -> float:
    with torch.no_grad():
        return float(head.forward_with_penalty(records.batch(index).image).penalty.mean())


def test_the_loss_is_smoothed_cross_entropy_plus_the_weighted_mean_penalty(records):
    head, batch = new_head(records), records.batch(torch.arange(0, 96, 7))
    config = dataclasses.replace(CONFIG, penalty_weight=3.0, label_smoothing=0.2)
    with torch.no_grad():
        logits, penalty = head.forward_with_penalty(batch.image)
        K = logits.shape[1]
        target = 0.8 * F.one_hot(batch.label, K) + 0.2 / K
        wanted = -(target * logits.log_softmax(dim=1)).sum(dim=1).mean() + 3.0 * penalty.mean()
        found = training_loss(head, batch, config, CPU)
        plain = training_loss(head, batch, CONFIG, CPU)
    assert float(penalty.mean()) > 0.01
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(plain, F.cross_entropy(logits, batch.label))


def test_without_a_weight_the_penalty_is_not_computed(records, monkeypatch):
    calls = []
    real = RAda.forward_with_penalty

    def spied(self: RAda, *args: Any) -> Any:
        calls.append(self.penalty)
        return real(self, *args)

    monkeypatch.setattr(RAda, "forward_with_penalty", spied)
    head = new_head(records, penalty="none")
    monkeypatch.setattr(RAda, "forward", lambda self, image: image @ self.text.T)
    training_loss(head, records.batch(torch.arange(4)), CONFIG, CPU)
    assert calls == []
    weighted = dataclasses.replace(CONFIG, penalty_weight=1.0)
    training_loss(head, records.batch(torch.arange(4)), weighted, CPU)
    assert calls == ["none"]


def test_rada_learns_what_zero_shot_does_not_know(records):
    head, split = trained(records, dataclasses.replace(CONFIG, penalty_weight=0.1))
    logits, label = engine.all_logits(head, records, split.test, device=CPU)
    before = engine.all_logits(
        RAda(records.text, logit_scale=20.0), records, split.test, device=CPU
    )[0]
    assert metrics.nll(logits, label) < 0.5 * metrics.nll(before, label)
    assert metrics.accuracy(logits, label) >= metrics.accuracy(before, label)


@pytest.mark.parametrize("kind", ["l1", "mse", "linf"])
def test_a_heavier_penalty_keeps_the_mask_nearer_to_one(records, kind):
    far = {}
    for weight in (0.0, 1.0, 100.0):
        config = dataclasses.replace(CONFIG, penalty_weight=weight)
        head, split = trained(records, config, penalty=kind)
        far[weight] = penalty_of(head, records, split.train)
    assert far[0.0] > 2 * far[1.0] > 4 * far[100.0] > 0, far


def test_the_recipe_is_the_one_the_command_takes():
    for shots in (1, 2, 3, 4, 8, 16, 100):
        config = HEADS["rada"].recipe(shots)
        assert config == recipe_config("rada", shots, None)
        assert config.penalty_weight > 0
    assert RAda.recipe(1) == RAda.recipe(3)
    assert RAda.recipe(4) == RAda.recipe(100)


def test_overrides_add_to_the_recipe():
    given = {"epochs": 3, "lr": None, "label_smoothing": 0.1, "head": {"temperature": 0.5}}
    config = recipe_config("rada", 4, given)
    wanted = dataclasses.replace(
        RAda.recipe(4),
        epochs=3,
        enough_pairs=0,  # epochs that are asked for are trained
        label_smoothing=0.1,
        head={"temperature": 0.5},
    )
    assert config == wanted
    assert recipe_config("rada", 4, {"head": {"penalty": "none"}}).penalty_weight == 0
    # options of the recipe stay beside those that are given
    more = recipe_config("vtclip", 4, {"head": {"num_layers": 2}})
    assert more.head == {**HEADS["vtclip"].recipe(4).head, "num_layers": 2}


@pytest.mark.parametrize(
    ("method", "overrides", "message"),
    [
        ("vtclip", {"penalty_weight": 1.0}, "method vtclip has no penalty, so penalty_weight"),
        ("vtclip", {"head": {"temperature": 1.0}}, "method vtclip has no option temperature"),
        ("vtclip", {"head": {"queries": ["text"]}}, "method vtclip has no option queries"),
        ("zeroshot", {"head": {"adapters": True}}, "zeroshot has no training, so adapters"),
        ("zeroshot", {"label_smoothing": 0.1}, "zeroshot has no training, so label_smoothing"),
        ("rada", {"head": {"text": 1}}, "method rada has no option text"),
        ("rada", {"head": {"penalty": "none"}, "penalty_weight": 2.0}, "must be 0 .* got 2"),
        ("rada", {"penalty_weight": -1.0}, r"penalty_weight must be in 0\.\.1e\+06, got -1.0"),
        ("rada", {"penalty_weight": float("nan")}, "penalty_weight must be in"),
        ("rada", {"label_smoothing": 1.0}, "label_smoothing must be at least 0 and below 1"),
        ("rada", {"penalty_wieght": 1.0}, "did you mean 'penalty_weight'"),
    ],
)
def test_settings_a_method_does_not_have_are_refused_by_name(method, overrides, message):
    with pytest.raises(ValueError, match=message):
        recipe_config(method, 4, overrides)


@pytest.mark.parametrize(
    ("head", "message"),
    [
        ({"temperature": 0.0}, "temperature must be finite and above 0, got 0"),
        ({"queries": ["images"]}, "queries must be some of image, text, pair"),
        ({"penalty": "l2"}, "penalty must be one of none, l1, mse, linf, got 'l2'"),
        ({"num_heads": 3}, "num_heads must divide D = 16, got 3"),
    ],
)
def test_bad_head_options_leave_no_folder(npz, tmp_path, head, message):
    out = tmp_path / "a" / "run"
    with pytest.raises(ValueError, match=message):
        vtclip.fit(npz, method="rada", shots=4, overrides={"head": head}, out=out)
    assert not list(tmp_path.iterdir())


def test_options_reach_the_adapter_and_come_back(npz, tmp_path, capsys):
    words = ["fit", str(npz), "--method", "rada", "--shots", "4", "--epochs", "2"]
    words += ["--temperature", "0.5", "--queries", "image,pair", "--penalty", "linf"]
    words += ["--penalty-weight", "0.5", "--label-smoothing", "0.1", "--adapters"]
    assert main([*words, "--device", "cpu", "--out", str(tmp_path / "run")]) == 0
    out = capsys.readouterr().out
    assert "\nrada " in out
    assert "ECE at T" in out
    adapter = load_adapter(tmp_path / "run")
    options = adapter.head.options()
    wanted = {"temperature": 0.5, "queries": ["image", "pair"], "penalty": "linf", "adapters": True}
    assert {name: options[name] for name in wanted} == wanted
    assert not any(name.startswith("text_query") for name in adapter.head.state_dict())
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    fitted = result["config"]["fit"]
    assert (fitted["penalty_weight"], fitted["label_smoothing"]) == (0.5, 0.1)
    for name in ("zero_shot", "adapted"):
        assert result[name]["temperature"] > 0
        assert 0 <= result[name]["ece_scaled"] <= 1
    values = json_of(capsys, "evaluate", tmp_path / "run")
    assert {name: values[name] for name in result["adapted"]} == result["adapted"]


def test_the_same_seed_gives_the_same_adapter_and_resuming_refuses_other_settings(npz, tmp_path):
    def fit(name: str, **options: Any) -> bytes:
        overrides = {"epochs": 3, **options.pop("overrides", {})}
        vtclip.fit(npz, method="rada", shots=4, overrides=overrides, out=tmp_path / name, **options)
        return (tmp_path / name / "adapter.safetensors").read_bytes()

    assert fit("one") == fit("two")
    assert fit("one", resume=True) == fit("two", resume=True)
    with pytest.raises(ValueError, match="finished run with another fit"):
        fit("one", resume=True, overrides={"penalty_weight": 7.0})
