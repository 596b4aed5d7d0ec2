# SPDX-License-Identifier: Apache-2.0
"""Runs on several labels per image, from the list to the numbers, and what refuses them."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
from commands import call, json_of, refused
from pictures import save

import vtclip
from vtclip.heads import HEADS
from vtclip.names import METHODS
from vtclip.runs.classifier import Classifier

NAMES = ("red dot", "green dot", "blue dot")
ABLE = "zeroshot, clip-adapter, coop, mm-adapter, vtclip, rada"


@pytest.fixture(scope="module")
def dots(tmp_path_factory):
    """48 pictures of one, two or three coloured bars, and lists of them."""
    root = tmp_path_factory.mktemp("dots")
    draw = np.random.default_rng(0)
    lines, cells = [], ["path,labels"]
    for number in range(48):
        there = draw.random(3) < 0.5
        there[number % 3] = True
        pixels = draw.integers(0, 90, (16, 16, 3))
        for k in range(3):
            if there[k]:
                pixels[:, 5 * k : 5 * k + 5, k] = 255
        save(pixels, root / "images" / f"{number}.png")
        first = NAMES[number % 3]
        labels = [first, *(name for k, name in enumerate(NAMES) if there[k] and name != first)]
        lines.append(json.dumps({"path": f"images/{number}.png", "label": labels}) + "\n")
        cells.append(f"images/{number}.png,{'|'.join(labels)}")
    (root / "dots.jsonl").write_text("".join(lines))
    (root / "dots.csv").write_text("\n".join(cells) + "\n")
    (root / "one.csv").write_text("path,label\n" + f"images/0.png,{NAMES[0]}\n" * 2)
    return root


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def run(dots, cache, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "run"
    options = {"shots": 4, "out": out, "cache_dir": cache}
    return vtclip.fit(
        dots / "dots.jsonl", method="clip-adapter", overrides={"epochs": 20}, **options
    )


def test_the_result_has_map_and_f1_and_no_accuracy(run):
    result = run.result
    assert result["multi_label"] is True
    assert "accuracy" not in result
    assert result["map"] == result["adapted"]["map"]
    for row in (result["zero_shot"], result["adapted"]):
        assert set(row["per_class"]) == set(row["per_class_f1"]) == set(NAMES)
        assert 0 < row["map"] <= 1
        assert 0 < row["threshold"] < 1
        assert row["count"] == 24
        assert row["calibrated_on"] == result["images"]["val"] == 12
    with pytest.raises(ValueError, match="several labels per image and no accuracy"):
        assert run.accuracy
    assert "mAP" in run.table()
    assert "accuracy" not in run.table()
    assert not (run.folder / "predictions.csv").exists()


def test_it_is_evaluated_from_its_folder_and_on_other_lists(run, dots, cache, capsys):
    own = json_of(capsys, "evaluate", run.folder, "--cache-dir", cache)
    for name in ("map", "micro_ap", "macro_f1", "micro_f1", "bce", "per_class"):
        assert own[name] == pytest.approx(run.result["adapted"][name])
    other = json_of(capsys, "evaluate", run.folder, dots / "dots.csv", "--cache-dir", cache)
    assert other["test"]["images"] > 0
    assert other["multi_label"] is True
    assert call("evaluate", run.folder, "--cache-dir", cache) == 0
    assert "mAP" in capsys.readouterr().out
    assert call("repeat", run.folder, "--cache-dir", cache) == 0
    assert "MATCH" in capsys.readouterr().out


def test_predictions_are_a_sigmoid_per_class(run, dots, capsys):
    names = [dots / "images" / f"{number}.png" for number in range(6)]
    probability = Classifier.load(run.folder).predict_proba(names)
    assert probability.shape == (6, 3)
    assert (probability.sum(dim=1) - 1).abs().max() > 0.05
    assert ((probability > 0) & (probability < 1)).all()
    assert call("predict", run.folder, names[0]) == 0
    capsys.readouterr()


@pytest.mark.parametrize("method", ["zeroshot", "coop", "vtclip", "rada", "mm-adapter"])
def test_every_method_that_can_is_fitted(method, dots, cache, tmp_path):
    overrides = {} if method == "zeroshot" else {"epochs": 1}
    result = vtclip.fit(
        dots / "dots.csv", method=method, shots=2, overrides=overrides,
        out=tmp_path / "run", cache_dir=cache,
    ).result  # fmt: skip
    assert result["multi_label"] is True


def test_a_features_folder_keeps_the_labels(dots, cache, tmp_path, capsys):
    place = tmp_path / "features"
    assert call("features", dots / "dots.csv", "--out", place, "--spatial", "none") == 0
    records = vtclip.open_source(place)
    assert records.targets.sum() > len(records)
    assert records.targets[range(48), records.label].all()
    with pytest.raises(ValueError, match="method proker takes one label per image"):
        vtclip.fit(place, method="proker", out=tmp_path / "run")
    result = vtclip.fit(place, method="zeroshot", shots=4, out=tmp_path / "run").result
    assert result["map"] > 0
    capsys.readouterr()


def test_answers_of_one_label_are_refused(run, dots, capsys):
    picture = dots / "images" / "0.png"
    for words in (["--unknown", 0.1], ["--coverage", 0.9]):
        refused(capsys, "predict", run.folder, picture, *words)


@pytest.mark.parametrize("method", sorted(set(METHODS) - set(ABLE.split(", "))))
def test_the_other_methods_refuse_before_the_work(method, dots, tmp_path):
    assert not HEADS[method].multi_label
    with pytest.raises(ValueError, match=f"method {re.escape(method)} takes one label .*: {ABLE}"):
        vtclip.fit(dots / "dots.csv", method=method, out=tmp_path / "run", cache_dir=tmp_path / "c")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({}, "method auto takes one label per image"),
        ({"base_to_new": True}, "base_to_new: .* several labels per image"),
        ({"pseudo_labels": True, "method": "clip-adapter"}, "pseudo_labels: .* several labels"),
        ({"train_encoders": True}, "train_encoders: .* several labels"),
        ({"method": "rada", "overrides": {"loss": "gce"}}, "loss gce: .* several labels"),
        ({"method": "rada", "overrides": {"label_smoothing": 0.1}}, "label_smoothing 0.1: "),
    ],
)
def test_what_takes_one_label_refuses_before_the_work(options, match, dots, tmp_path):
    with pytest.raises(ValueError, match=match) as caught:
        vtclip.fit(dots / "dots.csv", out=tmp_path / "run", cache_dir=tmp_path / "c", **options)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_other_commands_refuse(run, dots, cache, tmp_path, capsys):
    several = "several labels per image"
    assert several in refused(capsys, "bench", dots / "dots.csv", "--out", tmp_path / "b")
    new = tmp_path / "new"
    save(np.zeros((8, 8, 3)), new / "0.png")
    text = refused(capsys, "extend", run.folder, new, "--out", tmp_path / "e")
    assert several in text
    text = refused(capsys, "evaluate", run.folder, "--ttt", "--cache-dir", cache)
    assert several in text
    assert several in refused(capsys, "export", run.folder, "--out", tmp_path / "m.pt2")
    single = vtclip.fit(
        dots / "single.csv" if (dots / "single.csv").exists() else _single(dots),
        method="zeroshot", shots=1, out=tmp_path / "run", cache_dir=cache,
    )  # fmt: skip
    with pytest.raises(ValueError, match="the source has several labels per image"):
        vtclip.evaluate(single, dots / "dots.csv", cache_dir=cache)
    values = vtclip.evaluate(run, dots / "single.csv", cache_dir=cache)
    assert values["labels_per_image"] == 1


def _single(root):
    lines = [f"images/{number}.png,{NAMES[number % 3]}\n" for number in range(48)]
    (root / "single.csv").write_text("path,label\n" + "".join(lines))
    return root / "single.csv"
