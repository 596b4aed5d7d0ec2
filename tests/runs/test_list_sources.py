# SPDX-License-Identifier: Apache-2.0
"""Every command that takes a folder of images takes a list of them, and gives the same."""

from __future__ import annotations

import json
import os

import numpy as np
import pytest
from commands import call, json_of, refused
from pictures import DOTS, dots, save
from PIL import Image

import vtclip
from vtclip.data.image_files import InMemory
from vtclip.data.sets import as_source
from vtclip.runs.folder import run_folder
from vtclip.runs.new_classes import NewSource, new_classes
from vtclip.runs.request import FitRequest


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """24 pictures of three classes, in a folder of class folders and in lists next to it."""
    root = tmp_path_factory.mktemp("lists")
    dots(root / "photos")
    files = sorted((root / "photos").glob("*/*.png"))
    lines = [f"photos/{file.parent.name}/{file.name},{file.parent.name}\n" for file in files]
    (root / "photos.csv").write_text("path,label\n" + "".join(lines))
    entries = [{"path": os.fspath(file), "label": file.parent.name} for file in files]
    (root / "photos.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return root


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def run(photos, cache, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "run"
    source = photos / "photos.csv"
    return vtclip.fit(source, method="proker", shots=2, out=out, cache_dir=cache)


def test_a_list_gives_the_features_of_the_folder(photos, cache):
    options = {"cache_dir": cache, "progress": False}
    folder = vtclip.open_source(photos / "photos", **options)
    lists = [vtclip.open_source(photos / f"photos.{end}", **options) for end in ("csv", "jsonl")]
    assert lists[0].names == [f"photos/{name}" for name in folder.names]
    assert lists[1].names == lists[0].names
    for records in lists:
        assert records.class_names == sorted(folder.class_names)
        rows = [folder.names.index(name.removeprefix("photos/")) for name in records.names]
        image = records.store.image(records._row, 0)
        assert (image == folder.store.image(folder._row[rows], 0)).all()


def test_the_splits_of_a_list_are_roles_of_its_rows(photos, cache):
    parts = ["train", "val", "test"]
    files = sorted((photos / "photos").glob("*/*.png"))
    lines = [f"{file},{file.parent.name},{parts[n % 3]}\n" for n, file in enumerate(files)]
    (photos / "parts.csv").write_text("path,label,split\n" + "".join(lines))
    records = vtclip.open_source(photos / "parts.csv", cache_dir=cache, progress=False)
    assert records.roles.tolist() == [n % 3 for n in range(24)]
    same = "".join(line.replace(",val", ",train") for line in lines)
    (photos / "parts.csv").write_text("path,label,split\n" + same)
    records = vtclip.open_source(photos / "parts.csv", cache_dir=cache, progress=False)
    assert records.roles.tolist() == [[0, 0, 2][n % 3] for n in range(24)]


def test_a_run_on_a_list_is_evaluated_and_repeated(run, photos, cache, capsys):
    assert run.result["source"] == "photos.csv"
    assert run.result["config"]["source"] == str((photos / "photos.csv").resolve())
    again = json_of(capsys, "evaluate", run.folder, "--cache-dir", cache)
    assert again["accuracy"] == run.accuracy
    for source in (photos / "photos.csv", photos / "photos.jsonl"):
        values = json_of(capsys, "evaluate", run.folder, source, "--cache-dir", cache)
        assert values["source"] == source.name
    assert call("repeat", run.folder, "--cache-dir", cache) == 0
    capsys.readouterr()


def test_test_time_training_reads_a_list(run, photos, cache, tmp_path, capsys):
    source, out = photos / "photos.csv", tmp_path / "run"
    trained = vtclip.fit(
        source, method="clip-adapter", shots=1, out=out, cache_dir=cache, overrides={"epochs": 1}
    )
    words = ["--ttt", "--views", 2, "--keep", 1, "--cache-dir", cache]
    values = json_of(capsys, "evaluate", trained.folder, source, *words)
    assert values["ttt"]["adapted"]["count"] == 12


def test_other_commands_take_a_list(run, photos, cache, tmp_path, capsys):
    source = photos / "photos.csv"
    assert call("features", source, "--out", tmp_path / "features", "--spatial", "none") == 0
    assert len(vtclip.open_source(tmp_path / "features")) == 24
    words = ["--methods", "zeroshot", "--shots", 1, "--seeds", 1, "--cache-dir", cache]
    assert call("bench", source, *words, "--out", tmp_path / "bench") == 0
    assert call("export", run.folder, "--out", tmp_path / "model.pt2") == 0
    save(np.zeros((8, 8, 3)), tmp_path / "new" / "0.png")
    Image.new("RGB", (8, 8), "white").save(tmp_path / "new" / "1.png")
    (tmp_path / "new.csv").write_text("path,label\nnew/0.png,night\nnew/1.png,snow\n")
    assert new_classes(NewSource(tmp_path / "new.csv")).class_names == ["night", "snow"]
    with pytest.raises(ValueError, match="name is for a folder of images"):
        new_classes(NewSource(tmp_path / "new.csv", "weather"))
    capsys.readouterr()


def test_what_a_list_says_is_said_once(photos, cache, tmp_path, caplog):
    text = (photos / "photos.csv").read_text()
    (photos / "twice.csv").write_text(text + text.splitlines()[-1] + "\n")
    options = {"method": "zeroshot", "shots": 1, "cache_dir": cache}
    vtclip.fit(photos / "twice.csv", out=tmp_path / "run", **options)
    said = [line for line in caplog.messages if "listed more than once" in line]
    assert len(said) == 1
    assert said[0].startswith("twice.csv: images listed more than once")


def test_the_run_of_a_list_is_called_after_it(photos, tmp_path):
    request = FitRequest(source=photos / "photos.csv", method="proker", shots=2)
    assert run_folder(request).name == "photos-proker-2shot-seed1"


def test_trained_encoders_read_a_list(photos, cache, tmp_path):
    run = vtclip.fit(
        photos / "photos.csv",
        train_encoders=True,
        shots=2,
        overrides={"epochs": 1, "batch_size": 3},
        out=tmp_path / "run",
        cache_dir=cache,
    )
    assert run.result["images"]["train"] == 6


def test_a_pair_of_paths_and_labels_is_a_source(photos, cache, tmp_path):
    files = sorted((photos / "photos").glob("*/*.png"))
    pair = (files, [file.parent.name for file in files])
    run = vtclip.fit(pair, method="proker", shots=2, out=tmp_path / "run", cache_dir=cache)
    assert run.result["config"]["source"] == "in memory: 24 images of a pair"
    values = vtclip.evaluate(run, pair, cache_dir=cache)
    assert values["source"] == "pair"
    wish = r"run was fitted on images in memory: 24 images of a pair, .* takes them as source"
    with pytest.raises(ValueError, match=wish):
        vtclip.evaluate(run, cache_dir=cache)
    request = FitRequest(source=as_source(pair, None), method="proker", shots=2)
    assert isinstance(request.source, InMemory)
    assert run_folder(request).name == "pair-proker-2shot-seed1"


@pytest.mark.parametrize("role", ["val", "test"])
def test_a_message_names_the_source_that_was_in_memory(photos, cache, tmp_path, capsys, role):
    """A run on a folder whose validation or test images were in memory is not one in memory."""
    new = [f"{name}/{n}.png" for name in DOTS for n in range(8)]
    other = dots(tmp_path / "other", spoiled=new)
    files = sorted(other.glob("*/*.png"))
    pair = (files, [file.parent.name for file in files])
    run = vtclip.fit(photos / "photos", method="proker", shots=2, out=tmp_path / "run",
                     cache_dir=cache, **{role: pair})  # fmt: skip
    words = {"val": "with validation", "test": "with test"}[role]
    wish = f"was fitted {words} images in memory: 24 images of a pair, which cannot be listed again"
    line = refused(capsys, "repeat", run.folder, "--cache-dir", cache)
    assert f"{wish}; fit again with them" in line
    if role == "val":  # the test images are among those of the folder
        assert vtclip.evaluate(run, cache_dir=cache)["accuracy"] == run.accuracy
        return
    line = refused(capsys, "evaluate", run.folder, "--cache-dir", cache)
    assert f"{wish}; evaluate takes them as SOURCE" in line
    values = vtclip.evaluate(run, pair, cache_dir=cache)
    assert (values["accuracy"], values["test"]["images"]) == (run.accuracy, 24)
    more = dots(tmp_path / "new") / "red dot"
    line = refused(capsys, "extend", run.folder, more, "--name", "moon", "--out", tmp_path / "wide",
                   "--cache-dir", cache)  # fmt: skip
    assert f"{wish}; evaluate takes them as SOURCE, and extend needs a run on files" in line


def test_bad_lists_end_in_one_line_and_write_nothing(photos, cache, tmp_path, capsys):
    (photos / "bad.csv").write_text("path,label\nphotos/red dot/0.png,a\nphotos/gone.png,b\n")
    out = tmp_path / "run"
    text = refused(capsys, "bench", photos / "bad.csv", "--out", out)
    assert "bad.csv: 1 of 2 listed images cannot be read" in text
    assert not out.exists()
    (photos / "list.txt").write_text("photos/red dot/0.png red\n")
    text = refused(capsys, "fit", photos / "list.txt", "--out", out)
    assert "must be a folder of class folders, a list (.csv" in text
    with pytest.raises(TypeError, match="source: must be a folder of class folders.*got int"):
        vtclip.fit(3, out=out)
    assert not out.exists()
