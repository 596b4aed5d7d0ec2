# SPDX-License-Identifier: Apache-2.0
"""Where extend finds new classes: splits of one class, links, ids and their names."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pictures
import pytest
from commands import json_of, refused

import vtclip
from vtclip.runs.new_classes import NewSource, new_classes
from vtclip.runs.seen import Seen


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three classes and a run on them."""
    root = tmp_path_factory.mktemp("scenes")
    pictures.scenes_of(root / "old", (0, 4, 8))
    vtclip.fit(root / "old", method="proker", shots=2, out=root / "run", device="cpu",
            cache_dir=root / "cache")  # fmt: skip
    return root


@pytest.mark.parametrize(
    "layout",
    [
        "{part}/{name}",
        "{part}/deeper/{name}",
        "images/{part}/{name}",
        "kind/{part}/{name}",
        "my_{part}_images/images/kind/{name}",
    ],
)
def test_the_split_of_a_folder_that_is_one_class_is_kept(layout, scenes, tmp_path, caplog):
    options: dict[str, Any] = {"cache_dir": scenes / "cache", "device": "cpu"}
    parts = ["train"] * 3 + ["val"] * 2 + ["test"] * 5
    drawn = sorted(pictures.scenes(tmp_path / "drawn", 12, len(parts)).glob("*.png"))
    for file, part in zip(drawn, parts, strict=True):
        place = tmp_path / "more" / layout.format(part=part, name=file.name)
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, place)
    source = tmp_path / "more"
    larger = vtclip.extend(
        scenes / "run", source, name="gray moon", out=tmp_path / "larger", **options
    )
    assert "3 training images (2 kept), 2 validation images (kept, as the" in caplog.text
    assert larger.result["sources"][1]["images_per_class"] == {
        "gray moon": {"train": 4, "val": 0, "test": 5}
    }
    seen = Seen.read(larger.folder, larger.result["seen"])
    roles = {Path(name).name: role
             for name, label, role in zip(seen.names, seen.labels, seen.roles, strict=True)
             if label == "gray moon"}  # fmt: skip
    assert [roles[file.name] for file in drawn[3:]] == ["train"] * 2 + ["test"] * 5
    again = vtclip.evaluate(larger, **options)
    assert (again["accuracy"], again["left_out"]["gone"]) == (larger.accuracy, 0)


def test_splits_of_one_class_that_are_unclear_are_refused(scenes, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("VTCLIP_CACHE", str(scenes / "cache"))
    for part in ("train", "test"):
        pictures.scenes(tmp_path / "flat" / part, 12, 4)
        pictures.scenes(tmp_path / "mixed" / part, 12, 4)
    pictures.scenes(tmp_path / "mixed" / "garden", 12, 4)
    line = refused(capsys, "extend", str(scenes / "run"), "flat", "--out", "new")
    assert "--name makes all of them one class and keeps their split" in line
    words = [str(scenes / "run"), "mixed", "--out", "new", "--name", "moon"]
    line = refused(capsys, "extend", *words)
    assert "holds train/, test/ beside garden/" in line or "holds test/ beside garden/" in line
    assert not (tmp_path / "new").exists()


def test_a_folder_of_one_class_without_a_split_is_drawn_as_a_whole(tmp_path):
    for name in ("train/0.png", "station/1.png", "2.png"):  # pictures of trains
        pictures.save(np.zeros((8, 8, 3)), tmp_path / "trains" / name)
    files = new_classes(NewSource(tmp_path / "trains", "train"))
    assert (files.roles, sorted(files.names)) == (
        None, ["trains/2.png", "trains/station/1.png", "trains/train/0.png"]
    )  # fmt: skip


def ids_of(root: Path, ids: dict[str, int], count: int = 8) -> Path:
    """Folders called by ids, each with scenes of one label."""
    for id_, label in ids.items():
        pictures.scenes(root / id_, label, count)
    return root


def test_links_and_class_names_of_an_extension_last(scenes, tmp_path, capsys):
    cache = ["--cache-dir", scenes / "cache", "--device", "cpu"]
    ids_of(tmp_path / "away", {"n12": 12, "n16": 16})
    (tmp_path / "new").mkdir()
    for id_ in ("n12", "n16"):
        (tmp_path / "new" / id_).symlink_to(tmp_path / "away" / id_)
    (tmp_path / "ids.csv").write_text("n12,gray moon\nn16,night sky\nn99,of no folder\n")
    words = ["extend", scenes / "run", tmp_path / "new", "--out", tmp_path / "wide", *cache]
    assert "--follow-links allows it" in refused(capsys, *words)
    words += ["--follow-links", "--class-names", tmp_path / "ids.csv"]
    result = json_of(capsys, *words)
    assert result["classes"][3:] == ["gray moon", "night sky"]
    entry = result["sources"][1]
    assert entry["class_names"]["n16"] == "night sky"
    assert entry["follow_links"] is True
    (tmp_path / "ids.csv").unlink()
    for source in ([], [tmp_path / "away"]):
        again = json_of(capsys, "evaluate", tmp_path / "wide", *source, *cache)
        assert again["left_out"]["gone"] == again["left_out"]["other_classes"] == 0
    assert again["test"]["images"] == 8
    again = json_of(capsys, "evaluate", tmp_path / "wide", *cache)
    assert again["accuracy"] == result["adapted"]["accuracy"]
    # an extension of the extension lists them, too
    pictures.scenes(tmp_path / "dotted heart", 19, 8)
    more = json_of(capsys, "extend", tmp_path / "wide", tmp_path / "dotted heart", "--out",
                   tmp_path / "wider", *cache)  # fmt: skip
    assert more["test"]["images"] == result["test"]["images"] + 4
    assert more["left_out"]["gone"] == 0


def test_one_class_is_named_by_its_id(scenes, tmp_path):
    pictures.scenes(tmp_path / "n12", 12, 8)
    larger = vtclip.extend(scenes / "run", tmp_path / "n12", class_names={"n12": "gray moon"},
                           out=tmp_path / "wide", cache_dir=scenes / "cache")  # fmt: skip
    assert larger.result["classes"][3:] == ["gray moon"]
    again = vtclip.evaluate(larger, cache_dir=scenes / "cache")
    assert again["accuracy"] == larger.accuracy


def test_names_in_the_order_of_the_run_s_classes_are_not_those_of_new_ones(tmp_path):
    """A list has no ids: as many new classes as the run has would take over its names."""
    root = ids_of(tmp_path / "old", {"n1": 0, "n2": 4})
    (tmp_path / "names.json").write_text('["red moon", "blue sun"]')
    run = vtclip.fit(root, method="proker", shots=2, class_names=tmp_path / "names.json",
                     out=tmp_path / "run", cache_dir=tmp_path / "cache")  # fmt: skip
    new = ids_of(tmp_path / "new", {"dotted heart": 12, "night sky": 16})
    larger = vtclip.extend(run, new, out=tmp_path / "wide", cache_dir=tmp_path / "cache")
    assert larger.result["classes"] == ["red moon", "blue sun", "dotted heart", "night sky"]
    again = vtclip.evaluate(larger, cache_dir=tmp_path / "cache")
    assert again["accuracy"] == larger.accuracy


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--name", "x", "--class-names", "ids.csv"], "--name cannot be combined with --class-n"),
        (["--class-names", "gone.csv"], "--class-names gone.csv does not exist"),
        (["--class-names", "ids.csv"], "--class-names: 1 of 2 classes of "),
    ],
)
def test_bad_names_are_one_line_and_write_nothing(
    scenes, tmp_path, monkeypatch, capsys, words, message
):
    monkeypatch.chdir(tmp_path)
    ids_of(tmp_path / "new", {"n12": 12, "n16": 16}, 4)
    (tmp_path / "ids.csv").write_text("n12,gray moon\n")
    line = refused(capsys, "extend", scenes / "run", "new", "--out", "wide", *words)
    assert message in line
    assert not (tmp_path / "wide").exists()
