# SPDX-License-Identifier: Apache-2.0
"""Lists of image files: columns, paths, labels, splits, and what is refused by line and column."""

from __future__ import annotations

import json
import shutil

import pytest
from pictures import noise

from vtclip.data.image_files import ImageFiles
from vtclip.data.list_rows import role_of
from vtclip.data.listed import list_images
from vtclip.data.lists import read_list
from vtclip.data.sources import source_kind

ROWS = [("a/0.png", "cat"), ("a/1.png", "cat"), ("b/0.png", "dog")]
PARQUET = "needs pyarrow, which the extra tables brings"


@pytest.fixture
def images(tmp_path):
    """Six pictures in two folders whose names are no class names."""
    return noise(tmp_path / "images", ("a", "b"), each=3)


def csv_of(folder, text, name="list.csv", **how):
    path = folder / name
    path.write_bytes(text.encode(how.get("encoding", "utf-8")))
    return path


def refusal(path, match):
    with pytest.raises(ValueError, match=match) as caught:
        list_images(path)
    text = str(caught.value)
    assert "\n" not in text
    assert path.name in text
    return text


def lines(rows, header="path,label", between="\n"):
    return between.join([header, *(",".join(row) for row in rows)]) + between


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("l.csv", lines(ROWS)),
        ("l.CSV", lines(ROWS, "Path, Label")),
        ("l.csv", lines(ROWS, "\ufeffpath,label", "\r\n")),
        ("l.csv", lines(ROWS, "Filename,Class")),
        ("l.csv", lines(ROWS).replace(",", ";")),
        ("l.tsv", lines(ROWS).replace(",", "\t")),
        ("l.csv", lines(ROWS).replace(",", "\t")),
        ("l.csv", lines(ROWS).replace("a/1.png", '"a/1.png"').replace("a/0", "./b/../a/0")),
        ("l.csv", lines(ROWS).replace("/", "\\")),
        ("l.csv", lines(ROWS).split("\n", 1)[1]),
        ("l.csv", lines(ROWS).replace("/", "\\").split("\n", 1)[1]),
        ("l.csv", "\n" + lines(ROWS).replace("cat\n", " cat \n\n")),
        ("l.jsonl", "".join(json.dumps({"image": p, "category": c}) + "\n" for p, c in ROWS)),
        ("l.ndjson", "\ufeff" + "\r\n".join(json.dumps({"path": p, "label": c}) for p, c in ROWS)),
        ("l.json", json.dumps([{"file_name": p, "target": c} for p, c in ROWS], indent=1)),
    ],
)
def test_every_way_to_write_a_list_gives_the_same_images(images, name, text):
    found = list_images(csv_of(images, text, name))
    assert found.root == images
    assert found.class_names == ["cat", "dog"]
    assert found.names == [path for path, _ in ROWS]
    assert found.label == [0, 0, 1]
    assert found.roles is None
    assert found.labels is None
    assert source_kind(images / name) == "folder"
    assert found.read("a/0.png") == (images / "a" / "0.png").read_bytes()


def test_a_list_in_utf16(images):
    found = list_images(csv_of(images, lines([("a/0.png", "Käse")]), encoding="utf-16"))
    assert found.class_names == ["Käse"]


def test_parquet_gives_the_same_images(images):
    pytest.importorskip("pyarrow", reason=PARQUET)
    import pyarrow as pa
    from pyarrow import parquet

    table = {"Path": [p for p, _ in ROWS], "label": [7, 7, 10], "other": [1, 2, 3]}
    parquet.write_table(pa.table(table), images / "l.parquet")
    found = list_images(images / "l.parquet")
    assert found.class_names == ["7", "10"]
    assert found.label == [0, 0, 1]
    (images / "l.parquet").write_bytes(b"PAR1")
    refusal(images / "l.parquet", "not a readable parquet file")
    pair = pa.table({"image": [{"bytes": b"x", "path": None}], "label": [0]})
    parquet.write_table(pair, images / "l.parquet")
    refusal(images / "l.parquet", "column image holds images and not paths")
    parquet.write_table(pa.table({"path": ["a/0.png"], "label": [float("nan")]}),
                        images / "l.parquet")  # fmt: skip
    refusal(images / "l.parquet", "row 1, column label: the label is empty")


def test_paths_relative_and_absolute_and_outside_are_mixed(images, tmp_path):
    rows = [
        (str(images / "a" / "0.png"), "x"),
        ("a/1.png", "x"),
        ("../more.png", "y"),
        (str(tmp_path / "last.png"), "y"),
    ]
    shutil.copy(images / "b" / "0.png", tmp_path / "more.png")
    shutil.copy(images / "b" / "1.png", tmp_path / "last.png")
    found = list_images(csv_of(images, lines(rows)))
    assert found.names == ["a/0.png", "a/1.png", "../more.png", str(tmp_path / "last.png")]
    for name in found.names:
        assert found.path(name).is_file()
        assert found.read(name)


def test_classes_are_in_natural_order_and_numbers_are_words(images):
    rows = [("a/0.png", "10"), ("a/1.png", "2"), ("b/0.png", "1")]
    assert list_images(csv_of(images, lines(rows))).class_names == ["1", "2", "10"]
    entries = [{"path": p, "label": float(k)} for p, k in rows]
    found = list_images(csv_of(images, json.dumps(entries), "l.json"))
    assert found.class_names == ["1", "2", "10"]
    named = list_images(
        images / "l.json", class_names={"1": "one", "2": "two", "10": "ten", "3": ""}
    )
    assert named.class_names == ["one", "two", "ten"]


def test_a_label_without_a_class_name_is_named_with_its_line(images):
    path = csv_of(images, lines(ROWS))
    with pytest.raises(ValueError, match=r"1 of 2 classes.*dog \(list.csv line 4\)"):
        list_images(path, class_names={"cat": "a cat"})
    with pytest.raises(ValueError, match="same name"):
        list_images(path, class_names={"cat": "pet", "dog": "Pet"})


def test_splits_are_roles(images):
    rows = [("a/0.png", "x", "Train"), ("a/1.png", "x", "validation"), ("b/0.png", "x", "TEST")]
    found = list_images(csv_of(images, lines(rows, "path,label,split")))
    assert found.roles == [0, 1, 2]
    assert [role_of(name) for name in ("training", " dev ", "testing", "unsupervised")] == [
        *(0, 1, 2), None,
    ]  # fmt: skip


def test_a_file_listed_twice_counts_once_and_is_said(images, caplog):
    rows = [*ROWS, ("./a/0.png", "cat"), (str(images / "b" / "0.png"), "dog")]
    found = list_images(csv_of(images, lines(rows)))
    assert found.names == [path for path, _ in ROWS]
    assert "images listed more than once in the same way and counted once: 2, e.g." in caplog.text


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("", "is empty"),
        ("path,label\n", "lists no images"),
        ("file,colour\na/0.png,red\n", "no column of the labels .*only file, colour"),
        ("name,label\na/0.png,red\n", "no column of the paths"),
        ("path,path,label\na/0.png,a,red\n", "two columns called 'path'"),
        ("path,label\na/0.png\n", "line 2 has 1 cells"),
        ("path,label\na/0.png,red, dark\n", "line 2 has 3 cells.*quotes"),
        ("path,label\na/0.png,\n", "line 2, column label: the label is empty"),
        ("path,label\n\na/0.png,NaN\n", "line 3, column label: the label is empty"),
        ("path,label\n,red\n", "line 2, column path: the path is empty"),
        ("path,label\na/0.png,red\na/9.png,red\n", "1 of 2 .*'a/9.png' .line 3.: no such file"),
        ("path,label\na,red\n", "'a' .line 2.: not a regular file"),
        ("path,label\na/0.png,red\na/0.png,blue\n", r"line 3.*another label.*line 2 \(red, now bl"),
        ("path,label,split\na/0.png,red,train\na/0.png,red,test\n", "line 3.*another split"),
        ("path,label,split\na/0.png,red,extra\n", "line 2, column split: must be train.*'extra'"),
        ("path,label,split\na/0.png,red,\n", "line 2, column split: .* got nothing"),
        ("path,label\na/0.png,Red\na/1.png,red\n", "same name.*line 2.*line 3"),
        ('path,label\na/0.png,"red\n', "line 2: unexpected end"),
    ],
)
def test_bad_lists_are_refused_in_one_line(images, text, match):
    refusal(csv_of(images, text), match)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("{", "line 1 is not JSON"),
        ('\n{"path": "a/0.png", "label": "x"}\n[1]\n', "line 3 must be an object"),
        ('{"path": "a/0.png"}\n', "no column of the labels"),
        ('{"path": "a/0.png", "label": "x"}\n{"path": "a/1.png"}\n', "line 2, column label: the l"),
        ('{"path": 3, "label": "x"}\n', "line 1, column path: must be a path, got 3"),
        ('{"path": "a/0.png", "label": true}\n', "must be text or a whole number, got True"),
        ('{"path": "a/0.png", "label": 1.5}\n', "must be text or a whole number, got 1.5"),
        ('{"path": "a/0.png", "label": {"a": 1}}\n', "must be text or a whole number"),
        ('{"path": "a/0.png", "label": []}\n', "line 1, column label: the image has no label"),
        ('{"path": "\\ud800", "label": "x"}\n', "cannot be read, first"),
        ('{"path": "a\\u0000", "label": "x"}\n', "cannot be read, first"),
    ],
)
def test_bad_json_lines_are_refused_in_one_line(images, text, match):
    refusal(csv_of(images, text, "l.jsonl"), match)


def test_lists_of_another_kind_are_refused(images):
    refusal(csv_of(images, '{"path": []}', "l.json"), "must hold an array of objects, got dict")
    refusal(csv_of(images, "path,label\na/0.png,\xe9\n", encoding="latin-1"), "line 2 is not UTF-8")
    (images / "l.txt").write_text("a/0.png cat\n")
    refusal(images / "l.txt", "must end in .csv")
    with pytest.raises(ValueError, match=r"source: must be a folder.*\.parquet.*got .*l.txt"):
        source_kind(images / "l.txt")


def test_other_columns_of_the_same_kind_are_said(images, caplog):
    found = list_images(csv_of(images, "image,filename,label\nx,a/0.png,cat\n"))
    assert found.names == ["a/0.png"]
    assert "column filename holds the paths, image is not used" in caplog.text


def test_several_labels_are_a_list_or_stand_in_a_column_labels(images):
    entries = [{"path": "a/0.png", "label": ["x", "y"]}, {"path": "a/1.png", "label": "y"}]
    found = list_images(csv_of(images, json.dumps(entries), "l.json"))
    assert found.labels == [[0, 1], [1]]
    assert found.label == [0, 1]
    found = list_images(csv_of(images, "path,labels\na/0.png,y|x\na/1.png,x\n"))
    assert found.class_names == ["x", "y"]
    assert found.labels == [[1, 0], [0]]
    single = list_images(csv_of(images, "path,label\na/0.png,y|x\n"))
    assert single.class_names == ["y|x"]
    assert single.labels is None


def test_listed_files_stay_as_they_are(tmp_path):
    files = ImageFiles(tmp_path, ["a"], ["x.png"], [0])
    assert list_images(files, class_names={"b": "c"}) is files


def test_read_list_expands_the_home_folder(images, monkeypatch):
    monkeypatch.setenv("HOME", str(images))
    csv_of(images, lines(ROWS))
    assert len(read_list("~/list.csv").names) == 3


def test_a_listed_path_may_start_at_the_home_folder(images, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(images))
    monkeypatch.setenv("USERPROFILE", str(images))
    (tmp_path / "lists").mkdir()
    rows = [(f"~/{path}", label) for path, label in ROWS]
    for text in (lines(rows), lines(rows).split("\n", 1)[1]):
        found = list_images(csv_of(tmp_path / "lists", text))
        assert [found.path(name) for name in found.names] == [images / path for path, _ in ROWS]
    kept = noise(tmp_path / "lists" / "~", ("a", "b"), each=3)  # a folder that is called so
    found = list_images(csv_of(tmp_path / "lists", lines(rows)))
    assert [found.path(name) for name in found.names] == [kept / path for path, _ in ROWS]
