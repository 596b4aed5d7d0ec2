# SPDX-License-Identifier: Apache-2.0
"""Names for classes whose folders are called by ids: how they are read, applied and refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pictures
import pytest
from commands import call, json_of, refused
from tables import animal_features

import vtclip
from vtclip.data.class_names import as_class_names, read_class_names, with_class_names
from vtclip.data.listed import list_images
from vtclip.runs.result import Run

IDS = ("n01440764", "n01443537", "n01484850")
NAMES = ("red dot", "green dot", "blue dot")
BY_ID = dict(zip(IDS, NAMES, strict=True))
MODEL = ("--model", "none:x")  # which is looked for later
FIT = ("--method", "proker", "--shots", "2", "--device", "cpu", "--threads", "1")


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with `ids`, classes under ids, and `named`, the same images under names."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("VTCLIP_CACHE", str(tmp_path / "cache"))
    pictures.dots(tmp_path / "named")
    for id_, name in BY_ID.items():
        shutil.copytree(tmp_path / "named" / name, tmp_path / "ids" / id_)
    return tmp_path


FILES = {
    "object.json": json.dumps(BY_ID),
    "bom.json": "\ufeff" + json.dumps(BY_ID),
    "index.json": json.dumps({str(k): [i, n] for k, (i, n) in enumerate(BY_ID.items())}),
    "list.json": json.dumps(NAMES),
    "space.txt": "".join(f"{i} {n}\n" for i, n in BY_ID.items()),
    "tab.txt": "".join(f"{i}\t{n}\n" for i, n in BY_ID.items()),
    "tab.tsv": "".join(f"{i}\t{n}\r\n" for i, n in BY_ID.items()),
    "comma.txt": "".join(f"{i},{n}\n" for i, n in BY_ID.items()),
    "comma.csv": "id,name\n" + "".join(f'"{i}", "{n}"\n\n' for i, n in BY_ID.items()),
    "semicolon.csv": "".join(f"{i};{n}\n" for i, n in BY_ID.items()),
    "others.txt": "n00000001 something else\n" + "".join(f"{i} {n}\n" for i, n in BY_ID.items()),
}


@pytest.mark.parametrize("name", FILES)
def test_every_format_gives_the_names_in_the_order_of_the_ids(place, name):
    Path(name).write_text(FILES[name], encoding="utf-8")
    files = list_images("ids", class_names=read_class_names(name))
    assert files.class_names == list(NAMES)
    assert files.label == list_images("ids").label
    assert files.names[0].startswith(IDS[0])


def test_synonyms_belong_to_the_name(tmp_path):
    path = tmp_path / "synset_words.txt"
    path.write_text("n01440764 tench, Tinca tinca\nn01443537 goldfish, Carassius auratus\n")
    assert read_class_names(path)["n01440764"] == "tench, Tinca tinca"
    path = tmp_path / "names.csv"
    path.write_text('red dot,crimson dot\nn2,"tench, Tinca tinca"\n')
    assert read_class_names(path) == {"red dot": "crimson dot", "n2": "tench, Tinca tinca"}


def test_imagenets_index_serves_folders_of_numbers_too(tmp_path):
    path = tmp_path / "index.json"
    path.write_text(FILES["index.json"])
    pictures.noise(tmp_path / "numbers", ("0", "1", "2"), 1)
    files = list_images(tmp_path / "numbers", class_names=read_class_names(path))
    assert files.class_names == list(NAMES)


def test_classes_that_have_their_names_keep_them(place):
    names = {**BY_ID, "n9": "white dot"}
    assert list_images("named", class_names=names).class_names == sorted(NAMES)


def test_a_run_is_the_one_on_named_folders(capsys, place):
    """And it needs the file no longer."""
    Path("names.txt").write_text(FILES["space.txt"] + "n0001 white dot\n")
    named = json_of(capsys, "fit", "named", *FIT, "--out", "a")
    by_id = json_of(capsys, "fit", "ids", "--class-names", "names.txt", *FIT, "--out", "b")
    assert by_id["classes"] == list(NAMES)
    assert sorted(named["classes"]) == sorted(by_id["classes"])
    assert Run.load("b").result["config"]["class_names"] == {**BY_ID, "n0001": "white dot"}
    Path("names.txt").write_text("")
    pictures.noise(place / "more", ["n0001"], 8)
    assert call("extend", "b", "more/n0001", "--out", "b2") == 0
    assert Run.load("b2").result["classes"] == [*NAMES, "white dot"]
    assert call("evaluate", "b2") == 0
    Path("names.txt").unlink()
    assert call("evaluate", "b") == 0
    assert call("repeat", "b", "--out", "again") == 0
    best = json_of(capsys, "predict", "b", f"ids/{IDS[0]}/0.png")["images"][0]["predictions"]
    assert {row["label"] for row in best} == set(NAMES)
    assert call("features", "ids", "--class-names", "gone.txt", "--out", "f") == 2
    Path("names.txt").write_text(FILES["space.txt"])
    assert call("features", "ids", "--class-names", "names.txt", "--out", "f") == 0
    assert json_of(capsys, "fit", "f", *FIT, "--out", "c")["classes"] == list(NAMES)
    run = vtclip.fit("ids", class_names=BY_ID, method="zeroshot", device="cpu", out="d")
    assert run.result["classes"] == list(NAMES)


BAD = {
    "empty.txt": ("", "is empty"),
    "word.txt": ("n01440764\n", "line 1: must hold an id and a name, got 'n01440764'"),
    "twice.txt": ("n1 a\nn2 b\nn1 c\n", "line 3: id 'n1' comes twice: 'a', 'c'"),
    "twice.json": ('{"n1": "a", "n1": "c"}', "id 'n1' comes twice"),
    "nameless.txt": ("n1\ta\nn2\t \n", "must hold an id and a name"),
    "nameless.json": ('{"n1": "a", "n2": " "}', "id 'n2': the name is empty"),
    "nameless.csv": ("n1,a\nn2,\n", "line 2: the name is empty"),
    "number.json": ('{"n1": 3}', "the name must be a string, got a int"),
    "null.json": ("null", "must hold a JSON object of id to name"),
    "cut.json": ('{"n1": ', "is not valid JSON"),
    "same.json": (json.dumps({IDS[0]: "cat", IDS[1]: "Cat_", IDS[2]: "dog"}), "same name"),
    "few.json": (json.dumps({IDS[0]: "cat"}), "2 of 3 classes of ids have no name in it: n014435"),
    "other.json": (json.dumps({"n1": "cat"}), "no class of ids is among its ids"),
    "turned.json": (json.dumps({n: i for i, n in BY_ID.items()}), "it gives ids to names"),
    "short.json": (json.dumps(NAMES[:2]), "a list of 2 names is for as many classes, got 3"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_meant_is_one_line_before_the_work(capsys, place, name):
    text, message = BAD[name]
    Path(name).write_text(text)
    line = refused(capsys, "fit", "ids", "--class-names", name, *MODEL, "--out", "r")
    assert "--class-names" in line
    assert message in line
    assert not Path("r").exists()
    assert not Path("cache").exists()


def test_a_file_that_is_none_is_named(capsys, place):
    Path("bytes.txt").write_bytes(b"\xff\xfe\x00")
    for name, message in (
        ("gone.txt", "does not exist"), ("ids", "is not a file"), ("bytes.txt", "is not UTF-8"),
    ):  # fmt: skip
        line = refused(capsys, "fit", "ids", "--class-names", name, *MODEL, "--out", "r")
        assert "--class-names" in line
        assert message in line


def test_a_list_is_refused_where_the_order_is_ambiguous(tmp_path):
    pictures.noise(tmp_path / "ids", ("class_2", "class_10"), 1)
    with pytest.raises(ValueError, match="one order by number and another by letter"):
        list_images(tmp_path / "ids", class_names={"0": "a", "1": "b"})


def test_other_classes_are_kept_where_that_is_asked_for(place):
    files = list_images("ids")
    part = {IDS[0]: "red dot"}
    kept = with_class_names(files, part, keep_others=True)
    assert kept.class_names == ["red dot", *IDS[1:]]


def test_mappings_are_checked_as_files_are():
    assert as_class_names(None) is None
    with pytest.raises(ValueError, match="class_names, id 'n1': the name is empty"):
        as_class_names({"n1": ""})


@pytest.mark.parametrize("kind", ["npz", "features"])
def test_sources_with_texts_of_their_own_take_no_names(capsys, place, kind):
    Path("names.txt").write_text(FILES["space.txt"])
    np.savez("animals.npz", **animal_features())
    assert call("features", "named", "--out", "made", "--spatial", "none") == 0
    source = "animals.npz" if kind == "npz" else "made"
    line = refused(capsys, "fit", source, "--class-names", "names.txt", *FIT, "--out", "r")
    assert "--class-names" in line
    assert "has names of its classes already" in line
