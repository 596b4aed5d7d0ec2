# SPDX-License-Identifier: Apache-2.0
"""Sentences per class in place of templates, and the warnings of texts that say little."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pictures
import pytest
import torch
from commands import call, json_of, refused

import vtclip
from vtclip.clip import load_clip, resolve_templates
from vtclip.clip.texts import by_class_name, read_templates, templates_of
from vtclip.data.class_names import look_like_ids
from vtclip.data.extract import cached_features
from vtclip.data.options import FeatureOptions
from vtclip.data.text_checks import same_texts
from vtclip.runs.result import Run

NAMES = ["checked circle", "dotted square", "striped star"]
SENTENCES = {
    "Checked_Circle": ["a checked circle on a plain ground.", "a photo of a {}."],
    "dotted square": ["a square of dots.", "a dotted square."],
    "striped star": ["a star with stripes.", "a striped star."],
    "tench": ["a fish."],
}
FIT = ("--method", "proker", "--shots", "2", "--device", "cpu", "--threads", "1")


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("VTCLIP_CACHE", str(tmp_path / "cache"))
    pictures.noise(tmp_path / "pics", NAMES, 8)
    Path("prompts.json").write_text(json.dumps(SENTENCES))
    return tmp_path


def test_each_class_has_the_mean_of_its_own_sentences():
    clip = load_clip("demo")
    views = clip.encode_text_views(NAMES, SENTENCES)
    assert views.shape == (3, 2, clip.width)
    alone = clip.encode_text_views(["checked circle"], ["a photo of a {}."])
    torch.testing.assert_close(views[0, 1], alone[0, 0])
    uneven = {**SENTENCES, "dotted square": ["a square of dots."]}
    means = clip.encode_text_views(NAMES, uneven)
    assert means.shape == (3, 1, clip.width)
    torch.testing.assert_close(means[1, 0], views[1, 0])
    torch.testing.assert_close(means[2, 0], clip.encode_text(NAMES, SENTENCES)[2])


def test_an_object_a_file_and_their_lists_are_the_same(place):
    resolved = resolve_templates("prompts.json")
    assert resolved == resolve_templates(SENTENCES) == resolve_templates([SENTENCES])
    assert resolve_templates(["prompts.json"]) == read_templates(["prompts.json"]) == resolved
    assert resolve_templates(resolved) == resolved
    assert list(templates_of(resolved, NAMES)[0]) == NAMES
    Path("list.json").write_text('["a {}.", "the {}."]')
    assert resolve_templates("list.json") == ["a {}.", "the {}."]
    Path("lines.txt").write_text("a {}.\n\nthe {}.\n")
    assert read_templates("lines.txt") == ["a {}.", "the {}."]
    assert read_templates("imagenet7") == ["imagenet7"]
    assert read_templates(None) is None
    assert by_class_name([{"n1": ["a"], "b": ["b"]}], {"n1": "x", "n2": "b"}) == [
        {"b": ["b"], "x": ["a"]}
    ]


def test_a_run_keeps_the_sentences_and_needs_the_file_no_longer(capsys, place):
    assert call("fit", "pics", *FIT, "--templates", "prompts.json", "--out", "r") == 0
    kept = {name: SENTENCES.get(name, SENTENCES["Checked_Circle"]) for name in NAMES}
    assert Run.load("r").result["config"]["templates"] == [SENTENCES]
    assert json.loads(Path("r/adapter_config.json").read_bytes())["features"]["templates"] == [kept]
    Path("prompts.json").write_text("{}")
    assert call("evaluate", "r") == 0
    assert call("repeat", "r", "--out", "again") == 0
    assert json_of(capsys, "predict", "r", "pics/dotted square/0.png")
    pictures.noise(place / "new", ["plain ring"], 8)
    line = refused(capsys, "extend", "r", "new/plain ring", "--out", "r2")
    assert "there are none for 'plain ring'" in line


def test_other_sentences_are_other_features(place):
    def key(sentences: Any) -> str:
        options = FeatureOptions(templates=[sentences], progress=False)
        return str(cached_features("pics", options)[0].key)

    first = key(SENTENCES)
    assert key({**SENTENCES, "tench": ["another fish."]}) == first  # of no class here
    assert key({**SENTENCES, "dotted square": ["a square of dots."]}) != first
    found = cached_features("pics", FeatureOptions(templates=[SENTENCES], progress=False))[0]
    found.require(templates=[SENTENCES])
    with pytest.raises(ValueError, match="was made with sentences per class, not those asked"):
        found.require(templates=["a {}."])


def test_ids_may_be_keys(capsys, place):
    Path("names.json").write_text(json.dumps({f"n{k}": name for k, name in enumerate(NAMES)}))
    Path("by_id.json").write_text(json.dumps({f"n{k}": [f"a {n}."] for k, n in enumerate(NAMES)}))
    for k, name in enumerate(NAMES):
        Path("pics", name).rename(Path("pics", f"n{k}"))
    words = ("--class-names", "names.json", "--templates", "by_id.json")
    assert json_of(capsys, "fit", "pics", *FIT, *words, "--out", "r")["classes"] == NAMES


BAD = {
    "few.json": ('{"dotted square": ["a"]}', "2 of 3 classes have no sentences: checked circle"),
    "none.json": ('{"dotted square": []}', "class 'dotted square' must have sentences"),
    "empty.json": ('{"dotted square": ["a", " "]}', "and no empty one"),
    "number.json": ('{"dotted square": 3}', "must be a list, got a int"),
    "twice.json": ('{"a b": ["a"], "A_b": ["b"]}', "class 'A_b' comes twice"),
    "same.json": ('{"a": ["a"], "a": ["b"]}', "class 'a' comes twice"),
    "cut.json": ('{"a": ', "is not valid JSON"),
    "nothing.json": ("{}", "must hold an object of class name to sentences, or a list"),
    "plain.json": ('["a photo"]', "'a photo' must hold exactly one '{}'"),
    "three.json": ("[3]", "each template must be a string, got 3"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_meant_is_one_line_before_the_work(capsys, place, name):
    text, message = BAD[name]
    Path(name).write_text(text)
    words = ("fit", "pics", *FIT, "--templates", name, "--model", "none:x", "--out", "r")
    line = refused(capsys, *words)
    assert "--templates" in line
    assert message in line
    assert not Path("r").exists()
    line = refused(capsys, "fit", "pics", "--templates", "gone.json", "--model", "none:x")
    assert "--templates: no such file: gone.json" in line


def test_trained_encoders_need_templates(capsys, place):
    words = ("fit", "pics", "--train-encoders", "--templates", "prompts.json", "--model", "none:x")
    line = refused(capsys, *words, "--out", "r")
    assert "--train-encoders: --templates must hold {} for the class name" in line


@pytest.mark.parametrize(
    ("names", "ids"),
    [
        (["n01440764", "n01443537"], True),
        (["0001", "0002", "0003"], True),
        (["class_1", "class_12"], True),
        (["4f3a9c01", "beefcafe1"], True),
        (["123e4567-e89b-12d3-a456-426614174000"], True),
        (["cat", "dog", "n01440764"], False),
        (["Boeing 747", "A300B4", "737-800"], False),
        (["001.Black_footed_Albatross", "002.Laysan_Albatross"], False),
        (["deadbeef", "facade", "cafe"], False),
        (["2 euro coin", "mp3 player"], False),
    ],
)
def test_names_that_look_like_ids(names, ids):
    assert look_like_ids(names) == ids


def warnings_of(caplog: pytest.LogCaptureFixture, source: str, **more: Any) -> list[str]:
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        vtclip.fit(source, method="zeroshot", device="cpu", overwrite=True, out="r", **more)
    return [record.getMessage() for record in caplog.records]


def test_ids_equal_texts_and_cut_names_are_said_with_and_without_a_cache(place, caplog):
    pictures.noise(place / "ids", ["n0144", "n0145", "n0146"], 4)
    long = "a very long name of a class " * 6
    pictures.noise(place / "long", [long.strip(), "dotted square", "striped star"], 4)
    for _ in range(2):
        said = warnings_of(caplog, "ids")
        assert sum("most of the 3 class names look like ids (n0144, n0145" in s for s in said) == 1
        said = warnings_of(caplog, "long")
        cut = [line for line in said if "were cut" in line]
        assert len(cut) == 1
        assert "1 of 3 prompts are longer than the context of" in cut[0]
        assert "of 1 class: 'a very long name" in cut[0]
        assert not any("ids" in line for line in said)
        said = warnings_of(caplog, "pics")
        assert not any("same text" in line or "ids" in line for line in said)
        same = [{name: ["a thing."] for name in NAMES}]
        said = warnings_of(caplog, "pics", templates=same)
        assert any("3 pairs of classes have the same text features" in line for line in said)


def test_equal_directions_are_found_in_pairs():
    text = torch.nn.functional.normalize(torch.randn(5, 8), dim=1)
    text[3] = text[1]
    assert same_texts(text) == [(1, 3)]
