# SPDX-License-Identifier: Apache-2.0
"""Options and kinds of sources together: lists, layouts, ids, sentences per class, extensions."""

from __future__ import annotations

import json
import os
import shutil
from contextlib import nullcontext
from pathlib import Path

import pytest
from commands import call, json_of, refused
from pictures import DOTS, dots, noise

import vtclip

IDS = {f"n{k}": name for k, name in enumerate(DOTS)}
SENTENCES = {name: [f"a photo of a {name}.", f"one {name}, close"] for name in DOTS}


def listed(path: Path, folder: Path, split: str = "") -> Path:
    """A list of the pictures in the class folders of `folder`, with an optional split for all."""
    files = sorted(folder.glob("*/*.png"))
    more = f",{split}" if split else ""
    lines = [f"{os.path.relpath(f, path.parent)},{f.parent.name}{more}\n" for f in files]
    path.write_text("path,label" + (",split" if split else "") + "\n" + "".join(lines))
    return path


@pytest.fixture
def photos(tmp_path):
    """Folders of ids that train and test, a list of the latter, ids.json and sentences.json."""
    names = {name: id_ for id_, name in IDS.items()}
    dots(tmp_path / "test", spoiled=[f"{name}/{n}.png" for name in DOTS for n in range(8)])
    dots(tmp_path / "train")
    for place in ("train", "test"):
        for name, id_ in names.items():
            (tmp_path / place / name).rename(tmp_path / place / id_)
    listed(tmp_path / "test.csv", tmp_path / "test")
    (tmp_path / "ids.json").write_text(json.dumps(IDS))
    (tmp_path / "sentences.json").write_text(json.dumps(SENTENCES))
    return tmp_path


@pytest.fixture
def words(photos):
    """The options of a fit with sentences per class, ids and a list of test images."""
    return ["--test", photos / "test.csv", "--class-names", photos / "ids.json",
            "--templates", photos / "sentences.json", "--method", "proker", "--shots", 4,
            "--cache-dir", photos / "cache"]  # fmt: skip


def fit(photos, words, capsys, out="run"):
    return json_of(capsys, "fit", photos / "train", *words, "--out", photos / out)


def test_sentences_per_class_of_a_run_last(photos, words, capsys):
    result = fit(photos, words, capsys)
    assert result["config"]["templates"] == [SENTENCES]
    (photos / "sentences.json").unlink()
    again = json_of(capsys, "evaluate", photos / "run", "--cache-dir", photos / "cache")
    assert again["accuracy"] == result["accuracy"]
    assert call("repeat", photos / "run", "--cache-dir", photos / "cache") == 0
    capsys.readouterr()


def test_an_extension_takes_sentences_that_the_fit_was_given(photos, words, capsys):
    fit(photos, words, capsys, "short")
    (photos / "sentences.json").write_text(json.dumps({**SENTENCES, "eel": ["an eel"]}))
    fit(photos, words, capsys, "long")
    noise(photos / "new", ["eel"], 8)
    target = [photos / "new", "--out", photos / "wide", "--cache-dir", photos / "cache"]
    line = refused(capsys, "extend", photos / "short", *target)
    assert "vtclip extend: the run was fitted with sentences per class, and there are " in line
    assert "none for 'eel'; fit again with --templates that has them" in line
    assert not (photos / "wide").exists()
    values = json_of(capsys, "extend", photos / "long", *target)
    assert values["classes"] == [*DOTS, "eel"]
    assert values["test"]["images"] == 24 + 4
    again = json_of(capsys, "evaluate", photos / "wide", "--cache-dir", photos / "cache")
    assert again["accuracy"] == values["accuracy"]


def test_sentences_without_a_class_are_refused_before_the_work(photos, words, capsys):
    (photos / "sentences.json").write_text(json.dumps({DOTS[0]: ["a"], DOTS[1]: ["b"]}))
    line = refused(capsys, "fit", photos / "train", *words, "--out", photos / "run")
    assert "--templates: 1 of 3 classes have no sentences: blue dot" in line
    assert not (photos / "run").exists()
    assert not (photos / "cache").exists()


@pytest.mark.parametrize("option", ["--test", "--val"])
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("path,kind\ntest/n0/0.png,n0\n", "bad.csv has no column of the labels"),
        ("path,label\nnone.png,n0\n", "bad.csv: 1 of 1 listed images cannot be read"),
        ("path,label,split\ntest/n0/0.png,n0,often\n", "bad.csv line 2, column split: must be"),
        (None, "bad.csv"),
    ],
)
def test_a_bad_list_is_refused_by_the_option_that_names_it(option, text, message, photos, capsys):
    if text is not None:
        (photos / "bad.csv").write_text(text)
    words = [option, photos / "bad.csv", "--method", "proker", "--cache-dir", photos / "cache"]
    line = refused(capsys, "fit", photos / "train", *words, "--out", photos / "run")
    assert line.startswith(f"vtclip fit: {option}")
    assert message in line
    assert not (photos / "run").exists()
    assert not (photos / "cache").exists()


@pytest.mark.parametrize("own", [True, False])
def test_a_run_on_a_list_counts_those_images_that_are_still_there(own, photos, words, capsys):
    fit(photos, words, capsys)
    shutil.move(photos / "test" / "n1" / "3.png", photos / "3.png")
    cache = ["--cache-dir", photos / "cache"]
    if own:
        values = json_of(capsys, "evaluate", photos / "run", *cache)
        assert values["count"] == 23
        assert values["left_out"]["gone"] == 1
        assert values["left_out"]["tested"] == 24
    else:  # a list that is named now must be right
        line = refused(capsys, "evaluate", photos / "run", photos / "test.csv", *cache)
        assert "1 of 24 listed images cannot be read, first 'test/n1/3.png'" in line


def test_what_the_files_are_like_is_said_once_by_a_fit_of_encoders(tmp_path, caplog):
    dots(tmp_path / "photos" / "train")
    shutil.copytree(tmp_path / "photos" / "train", tmp_path / "photos" / "test")
    with pytest.raises(ValueError, match="no test image is left"):
        vtclip.fit(tmp_path / "photos", train_encoders=True, shots="all", out=tmp_path / "run",
                   cache_dir=tmp_path / "cache")  # fmt: skip
    dots(tmp_path / "photos" / "test", spoiled=[f"{n}/{k}.png" for n in DOTS for k in range(7)])
    caplog.clear()
    vtclip.fit(tmp_path / "photos", train_encoders=True, shots=2, out=tmp_path / "run",
               overrides={"epochs": 1}, cache_dir=tmp_path / "cache")  # fmt: skip
    said = [message for message in caplog.messages if "split folders" in message]
    copies = [message for message in caplog.messages if "as another one" in message]
    assert len(said) == 1
    assert len(copies) == 1
    assert copies[0].startswith("3 images have the same content as another one, e.g. ")


def test_refusals_name_the_command_once_and_options_as_typed(tmp_path, capsys, monkeypatch):
    # equal images are found while the work goes on, after the note on the bundled model
    monkeypatch.setattr("vtclip.cli.fit.demo_model_noted", lambda _: nullcontext())
    dots(tmp_path / "photos")
    words = ["fit", tmp_path / "photos", "--out", tmp_path / "run", "--cache-dir", tmp_path / "c"]
    line = refused(capsys, *words, "--method", "proker", "--base-to-new")
    assert line.startswith("vtclip fit: --base-to-new: --method must be one of ")
    shutil.copytree(tmp_path / "photos", tmp_path / "test")
    line = refused(capsys, *words, "--method", "proker", "--strict", "--test", tmp_path / "test")
    assert line.rstrip().endswith("; --strict refuses such a source")
    assert call(*words, "--method", "zeroshot") == 0
    capsys.readouterr()
    (tmp_path / "empty").mkdir()
    line = refused(capsys, "extend", tmp_path / "run", tmp_path / "empty", "--out", tmp_path / "x")
    assert line.count("extend") == 1
