# SPDX-License-Identifier: Apache-2.0
"""A run and its classifier in Python and in a notebook: prediction, rows, a frame, HTML, score."""

from __future__ import annotations

import base64
import builtins
import dataclasses
import io
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pictures import scenes_of
from PIL import Image

import vtclip
from vtclip.runs.notebook import classifier_html, run_html

CLASSES = (0, 1, 2, 12, 13)
VOID = {"br", "img", "hr", "meta", "link"}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> vtclip.Run:
    place = tmp_path_factory.mktemp("notebook")
    images = scenes_of(place / "images", CLASSES)
    return vtclip.fit(
        images, method="zeroshot", shots=2, out=place / "run", cache_dir=place / "c", device="cpu"
    )


@pytest.fixture(scope="module")
def paths(run: vtclip.Run) -> list[Path]:
    return sorted((run.folder.parent / "images").glob("*/*.png"))


class Tags(HTMLParser):
    """The tags of a page, refusing one that is closed where it was not open."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: set[str] = set()
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.add(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += f" {data}"


def parsed(page: str) -> Tags:
    tags = Tags()
    tags.feed(page)
    tags.close()
    assert tags.open == []
    assert not tags.seen & {"script", "link", "iframe", "style", "a"}
    assert not re.search(r"https?:|url\(|href=", page)
    assert {name for name, _ in tags.attributes} <= {"style", "alt", "src"}
    sources = [value or "" for name, value in tags.attributes if name == "src"]
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    return tags


def test_reprs_are_one_short_line(run):
    for value in (run, run.classifier):
        assert len(repr(value)) < 300
        assert "\n" not in repr(value)
    assert repr(run).startswith("Run(")


def test_a_run_shows_its_accuracy_first_then_confusions_and_wrong_images(run):
    tags = parsed(run._repr_html_())
    accuracy = f"{100 * run.accuracy:.2f} %"
    assert tags.text.index("accuracy") < tags.text.index(accuracy) < tags.text.index("true \\")
    for name in run.result["classes"]:
        assert name in tags.text
    for count in run.confusion().flatten().tolist():
        assert f" {count}" in tags.text
    wrong = [row for row in run.rows if row["role"] == "test" and row["label"] != row["predicted"]]
    assert wrong
    assert max(wrong, key=lambda row: row["probability"])["file"] in tags.text


def embedded(page: str) -> dict[str, Image.Image]:
    attributes = parsed(page).attributes
    names = [value or "" for name, value in attributes if name == "alt"]
    data = [(value or "").partition(",")[2] for name, value in attributes if name == "src"]
    return {
        name: Image.open(io.BytesIO(base64.b64decode(one)))
        for name, one in zip(names, data, strict=True)
    }


def test_wrong_images_are_shown_while_their_files_are_those_of_the_fit(run, tmp_path):
    wrong = [row for row in run.rows if row["role"] == "test" and row["label"] != row["predicted"]]
    wrong = sorted(wrong, key=lambda row: -row["probability"])[:8]
    shown = embedded(run._repr_html_())
    assert list(shown) == [row["file"] for row in wrong]
    source = run.folder.parent / "images"
    for name, picture in shown.items():
        small = Image.open(source / name).convert("RGB")
        small.thumbnail((72, 72))
        assert np.array_equal(np.asarray(picture), np.asarray(small))
    changed = source / wrong[0]["file"]
    data = changed.read_bytes()
    try:
        Image.new("RGB", (8, 8)).save(changed)
        assert list(embedded(run._repr_html_())) == [row["file"] for row in wrong[1:]]
    finally:
        changed.write_bytes(data)
    assert embedded(run_html(run.folder, {**run.result, "seen": None})) == {}


def test_names_are_escaped(run, tmp_path):
    bad = "<script>alert(1)</script>&\u202e"
    result: dict[str, Any] = {**run.result, "method": bad}
    result["confusion"] = {"classes": [bad, "b", "c"], "matrix": [[1, 2, 0], [0, 1, 0], [0, 0, 1]]}
    page = run_html(run.folder, result)
    assert "script" not in parsed(page).seen
    assert "\u202e" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;&amp;" in page
    assert "script" not in parsed(classifier_html([("method", bad)], [bad])).seen


def test_many_classes_are_shown_as_pairs(run):
    names = [f"class {k}" for k in range(30)]
    result = {**run.result, "confusion": {"classes": names, "cells": [[3, 7, 12], [1, 1, 4]]}}
    text = parsed(run_html(run.folder, result)).text
    assert re.search(r"class 3\s+class 7\s+12", text)
    assert "class 9" not in text


def test_a_classifier_shows_its_model_and_classes(run):
    text = parsed(run.classifier._repr_html_()).text
    assert run.classifier.clip.name in text
    assert all(name in text for name in run.classifier.class_names)
    many = parsed(classifier_html([], [f"n{k}" for k in range(50)])).text
    assert "and 30 more" in many
    assert "50 classes" in many


def test_a_run_without_tables_still_shows_its_numbers(run, tmp_path):
    result = {name: run.result[name] for name in run.result if name != "confusion"}
    text = parsed(run_html(tmp_path, result)).text  # predictions.csv is not there
    assert f"{100 * run.accuracy:.2f} %" in text
    alone = vtclip.Run(tmp_path, run.result)
    with pytest.raises(ValueError, match=r"holds no predictions\.csv"):
        _ = alone.rows


def test_every_kind_of_input_is_predicted_alike_by_a_run(run, paths):
    path = paths[0]
    with Image.open(path) as opened:
        picture = opened.convert("RGB")
    pixels = run.classifier.clip.preprocess(picture)
    expected = run.predict(path, topk=3)
    assert expected == run.classifier.predict(path, topk=3)
    with open(path, "rb") as file:
        inputs = [str(path), path.read_bytes(), file, picture, np.asarray(picture), pixels]
        for one in inputs:
            assert run.predict(one, topk=3) == expected, type(one)
    several = [paths[0], paths[1].read_bytes(), np.asarray(Image.open(paths[2]).convert("RGB"))]
    assert run.predict(several) == run.predict(paths[:3])
    assert torch.equal(run.predict_proba(several), run.predict_proba(paths[:3]))
    assert run.predict_proba(paths[0]).shape == (1, len(CLASSES))


def test_rows_say_what_the_run_said_of_its_images(run):
    rows = run.rows
    assert {row["role"] for row in rows} <= {"val", "test"}
    test = [row for row in rows if row["role"] == "test"]
    right = sum(row["label"] == row["predicted"] for row in test)
    assert right / len(test) == pytest.approx(run.accuracy)
    for row in rows:
        assert row["top"][0] == (row["predicted"], row["probability"])
        assert sum(share for _, share in row["top"]) == pytest.approx(1, abs=1e-4)


def test_predictions_are_a_frame_where_pandas_is(run):
    pandas = pytest.importorskip("pandas", reason="needs the extra tables")
    frame = run.predictions
    assert isinstance(frame, pandas.DataFrame)
    assert list(frame.columns) == ["file", "label", "predicted", "role", "probability", "top"]
    assert frame.to_dict("records") == run.rows


def test_without_pandas_one_line_says_what_to_install(run, monkeypatch):
    imported = builtins.__import__

    def without(name: str, *rest: Any, **options: Any) -> Any:
        if name == "pandas":
            raise ImportError(name)
        return imported(name, *rest, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r'pip install "vtclip\[tables\]"') as caught:
        _ = run.predictions
    assert "\n" not in str(caught.value)


def test_a_damaged_table_is_named(run, tmp_path):
    alone = dataclasses.replace(run, folder=tmp_path)
    table = (run.folder / "predictions.csv").read_text(encoding="utf-8").splitlines()
    (tmp_path / "predictions.csv").write_text("\n".join([*table[:2], "x,y"]), encoding="utf-8")
    with pytest.raises(ValueError, match=r"predictions\.csv is damaged at its row 3"):
        _ = alone.rows


def test_score_is_the_share_of_right_answers(run, paths):
    classifier = run.classifier
    names = [path.parent.name for path in paths]
    first = [one[0].label for one in classifier.predict(paths, topk=1)]
    share = sum(a == b for a, b in zip(first, names, strict=True)) / len(paths)
    places = [classifier.class_names.index(name) for name in names]
    assert 0 < share <= 1
    for labels in (names, places, np.array(places), iter(names), torch.tensor(places)):
        assert classifier.score(paths, labels) == share
    assert classifier.score(paths[0], first[0]) == 1.0
    assert classifier.score(paths[0], classifier.class_names.index(first[0])) == 1.0


@pytest.mark.parametrize(
    ("labels", "error", "message"),
    [
        (["no such class"], ValueError, "unknown class 'no such class'"),
        ([5], ValueError, r"a label must be in 0\.\.4, got 5"),
        ([0, 1], ValueError, "as many, and at least 1, got 1 and 2"),
        ([], ValueError, "got 1 and 0"),
        ([0.5], TypeError, "a label must be a class name or an int, got float"),
    ],
)
def test_labels_that_do_not_fit_are_refused(run, paths, labels, error, message):
    with pytest.raises(error, match=message):
        run.classifier.score(paths[:1], labels)
