# SPDX-License-Identifier: Apache-2.0
"""`--method auto`: what it fits, what it keeps, what it prints, and what it never looks at."""

from __future__ import annotations

import json

import pytest
import torch
from commands import json_of, refused
from torch.nn import functional as F

import vtclip
from vtclip.cli import main
from vtclip.data.records import Records
from vtclip.data.splits import Split, few_shot_split
from vtclip.heads import HEADS, Head, Support
from vtclip.runs.adapter import load_adapter
from vtclip.train import auto, cost, engine
from vtclip.train.auto import candidates, folds
from vtclip.train.fit_head import fit_head
from vtclip.train.pool import log_probabilities, pool_weights
from vtclip.train.rows import support_of
from vtclip.train.steps import TrainingRun


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
    chosen, logits, label = auto.chosen_and_unseen(head, records, val, cpu)
    assert torch.equal(label, plain[1])
    assert not bool(logits.any())
    assert torch.equal(engine.all_logits(chosen, records, val, device=cpu)[0], plain[0])


@pytest.mark.parametrize("method", ["proker", "takl", "tip-adapter-f"])
def test_one_search_chooses_as_the_methods_own_fit_does(method, records):
    split = few_shot_split(records.label, records.names, shots=2, seed=1)
    run = TrainingRun(torch.device("cpu"), 1)
    recipe = HEADS[method].recipe(2)
    alone = fit_head(method, records, split, recipe, run)
    found = auto.judged_candidate(method, records, split, 2, run).head
    assert found.options() == alone.options()
    assert all(
        torch.equal(a, b)
        for a, b in zip(found.state_dict().values(), alone.state_dict().values(), strict=True)
    )


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
    monkeypatch.setattr(auto, "CANDIDATES", ("zeroshot", "proker"))


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
    assert kept.members == ["zeroshot", "proker"]
    assert kept.weights == pytest.approx([0.5 / 1.5, 1 / 1.5])
    assert kept.sharpness == 1
    assert "accuracy" not in rows[0]


def test_the_pool_is_that_of_its_members_by_validation_images(records, quick):
    """t sum_m w_m log softmax(f_m / T_m), with w and t of unseen decisions."""
    split = few_shot_split(records.label, records.names, shots=2, seed=1)
    run = TrainingRun(torch.device("cpu"), 1)
    pool, rows, unseen = auto.fit_auto(records, split, 2, run)
    every = {name: auto.judged_candidate(name, records, split, 2, run) for name in pool.members}
    label = next(iter(every.values())).label
    assert torch.equal(label, records.label[split.val])
    log_p = log_probabilities({name: judged.logits for name, judged in every.items()}, label)
    wanted = pool_weights(log_p, label, [0.5, 1.0])
    assert pool.weights == pytest.approx(wanted.weights)
    assert pool.sharpness == pytest.approx(wanted.sharpness)
    image = records.batch(split.test).image
    with torch.no_grad():
        parts = [
            wanted.sharpness * weight * (judged.head(image) / row["temperature"]).log_softmax(1)
            for judged, row, weight in zip(every.values(), rows, wanted.weights, strict=True)
        ]
        torch.testing.assert_close(pool(image), sum(parts))
    pooled = torch.einsum("m,mnk->nk", torch.tensor(wanted.weights).double(), log_p)
    assert unseen is not None
    kept = unseen.logits.double()
    torch.testing.assert_close(kept, wanted.sharpness * pooled, rtol=1e-4, atol=1e-4)


def test_test_labels_decide_nothing(records, quick):
    split = few_shot_split(records.label, records.names, shots=2, seed=1)
    other = records.label.clone()
    other[split.test] = other[split.test].flip(0)
    image = records.batch(torch.arange(len(records))).image
    tables = [
        Records.from_tensors(image, label, records.text, records.class_names)
        for label in (records.label, other)
    ]
    weights = [fitted(table, split)[0].weights for table in tables]
    assert weights[0] == weights[1]


def test_a_budget_takes_methods_in_order_while_they_fit(records):
    split = few_shot_split(records.label, records.names, shots=2, seed=1)
    usual = [*auto.CANDIDATES[1:], *auto.BUDGET_CANDIDATES]
    seconds = {name: cost.expected_seconds(name, records, split, 2) for name in usual}
    assert all(value > 0 for value in seconds.values())
    assert candidates(records, split, 2) == (list(auto.CANDIDATES), {})
    everything = candidates(records, split, 2, sum(seconds.values()) * 1.001)
    assert everything == (["zeroshot", *seconds], {})
    little = candidates(records, split, 2, (seconds["proker"] + seconds["takl"]) * 1.001)
    assert little.fitted == ["zeroshot", "proker", "takl"]
    assert little.left_out == {name: seconds[name] for name in usual[2:]}
    assert candidates(records, split, 2, 1e-9).fitted == ["zeroshot"]


def test_methods_for_spatial_features_need_some(records):
    split = few_shot_split(records.label, records.names, shots=2, seed=1)
    plain = Records.from_tensors(
        records.batch(torch.arange(len(records))).image,
        *(records.label, records.text, records.class_names),
    )
    assert "vtclip" in candidates(records, split, 2).fitted
    found = candidates(plain, split, 2, 1e9)
    assert "vtclip" not in (*found.fitted, *found.left_out)


def test_cross_validation_costs_its_fits(records):
    split = few_shot_split(records.label, records.names, shots=3, seed=1)
    none = Split(split.train, split.val[:0], split.test, split.digest)
    once = candidates(records, split, 3, 1e-9).left_out
    all_folds = candidates(records, none, 3, 1e-9).left_out
    assert all(2 < all_folds[name] / once[name] <= 4 for name in once)


def test_expected_seconds_grow_with_every_size():
    def expected(name: str, images: int, classes: int, width: int) -> float:
        draw = torch.Generator().manual_seed(0)
        text = torch.randn(classes, width, generator=draw)
        image = torch.randn(images, width, generator=draw)
        names = [f"class {k}" for k in range(classes)]
        table = Records.from_tensors(image, torch.arange(images) % classes, text, names)
        rows, none = torch.arange(images), torch.arange(0)
        return cost.expected_seconds(name, table, Split(rows, none, none, ""), 4)

    for name in ("takl", "rada"):
        small = expected(name, 64, 8, 16)
        for bigger in ((256, 8, 16), (64, 64, 16), (64, 8, 256)):
            assert expected(name, *bigger) > small, (name, bigger)
    with pytest.raises(KeyError):
        expected("gda", 64, 8, 16)


def test_command_prints_the_comparison_and_keeps_an_adapter(npz, tmp_path, quick, capsys):
    out = tmp_path / "run"
    assert main(["fit", str(npz), "--method", "auto", "--shots", "2", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "8 validation images" in printed
    assert printed.count("  weight 0.") == 2
    result = json.loads((out / "result.json").read_text())
    assert [row["method"] for row in result["candidates"]] == ["zeroshot", "proker"]
    weights = [row["weight"] for row in result["candidates"]]
    assert sum(weights) == pytest.approx(1)
    assert load_adapter(out).head.members == ["zeroshot", "proker"]
    assert vtclip.evaluate(out)["accuracy"] == result["accuracy"]
    assert (result["config"]["pool"], result["config"]["budget"]) == ("log-linear", None)


def test_command_says_what_the_budget_left_out(npz, tmp_path, capsys):
    out = tmp_path / "run"
    words = ["fit", str(npz), "--shots", "2", "--budget", "0.01", "--out", str(out)]
    assert main(words) == 0
    printed = capsys.readouterr().out
    for name in ("proker", "takl", "clip-adapter", "tip-adapter-f", "rada"):
        assert f"{name:<24} left out for --budget: about " in printed
    assert json.loads((out / "result.json").read_text())["config"]["budget"] == 0.01
    assert json_of(capsys, "repeat", out)["verdict"] == "MATCH"


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--budget", "0"], "--budget"),
        (["--budget", "nan"], "--budget"),
        (["--budget", "9", "--method", "proker"], "--budget is for --method auto, got 'proker'"),
    ],
)
def test_budgets_that_mean_nothing_are_refused(words, line, npz, tmp_path, capsys):
    out = tmp_path / "run"
    assert line in refused(capsys, "fit", npz, *words, "--out", out)
    assert not out.exists()
