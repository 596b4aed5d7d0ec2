# SPDX-License-Identifier: Apache-2.0
"""Data sets in their layout: official lists, readers, links, faults that are named."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from vtclip.clip import resolve_templates
from vtclip.data.sets import SETS, SetError, absent_images, as_source, find_set, open_listing
from vtclip.data.sets.check import check_lines, check_sets
from vtclip.data.sets.features import drawn

SPLIT_SETS = [name for name, spec in SETS.items() if spec.files[0].startswith("split_zhou")]
OFFICIAL = [name for name in SPLIT_SETS if SETS[name].list_digest is not None]
# all images of each set, as its own page counts them (Caltech101 without two folders)
WHOLE = {
    "caltech101": 9145 - 435 - 468,
    "oxford_pets": 7349,
    "stanford_cars": 16_185,
    "oxford_flowers": 8189,
    "food101": 101_000,
    "fgvc_aircraft": 10_000,
    "sun397": 100 * 397,
    "dtd": 5640,
    "eurosat": 27_000,
    "ucf101": 13_320,
    "imagenet": 1_281_167 + 50_000,
}
TEST_ONLY = [name for name, spec in SETS.items() if spec.test_only]


def with_official_file(root: Path, shared_data: Path, name: str) -> Path:
    """A root with the official split file and an image folder without images."""
    spec = SETS[name]
    spec.image_root(root).mkdir(parents=True)
    shutil.copy(shared_data / "splits" / spec.files[0], spec.place(root))
    return root


@pytest.mark.parametrize("name", OFFICIAL)
def test_official_files_have_the_counts_digests_and_names_of_the_table(name, tmp_path, shared_data):
    spec = SETS[name]
    listing = open_listing(spec, with_official_file(tmp_path, shared_data, name))
    assert tuple(len(images) for _, images in listing.image_lists()) == spec.counts
    assert len(listing.class_names) == spec.classes
    assert listing.list_sha256 == spec.list_sha256
    assert listing.digest() == spec.list_digest
    assert listing.official() is True
    assert listing.other_names() == []
    for seed in (1, 2, 3):
        train, val = drawn(listing, shots=16, seed=seed)
        assert len(train) == 16 * spec.classes
        assert len(val) == 4 * spec.classes
        assert not set(train.names + val.names) & set(listing.test.names)


def test_the_digest_depends_on_order_and_labels_and_not_on_spacing(tmp_path, trees):
    root, spec = trees.make_split(tmp_path, "dtd"), SETS["dtd"]
    rows, first = trees.read_rows(root, "dtd"), open_listing(spec, tmp_path)
    trees.split_file(root, "dtd").write_text(json.dumps(rows, indent=3))
    again = open_listing(spec, root)
    assert again.digest() == first.digest()
    assert again.list_sha256 != first.list_sha256
    rows["train"][0], rows["train"][1] = rows["train"][1], rows["train"][0]
    trees.write_split(root, "dtd", rows)
    assert open_listing(spec, root).digest() != first.digest()
    assert first.official() is False


def test_the_table():
    assert len(SETS) == 15
    assert len(TEST_ONLY) == 4
    assert len(OFFICIAL) == 6
    assert all(resolve_templates(spec.template) == [spec.template] for spec in SETS.values())
    assert SETS["oxford_pets"].template == "a photo of a {}, a type of pet."
    assert SETS["food101"].template == "a photo of {}, a type of food."
    whole = {name: sum(count or 0 for count in spec.counts) for name, spec in SETS.items()}
    assert {name: whole[name] for name in WHOLE} == WHOLE


@pytest.mark.parametrize(
    ("asked", "name"),
    [
        ("Caltech101", "caltech101"),
        ("caltech-101", "caltech101"),
        ("OxfordPets", "oxford_pets"),
        ("flowers102", "oxford_flowers"),
        ("ImageNet-A", "imagenet_a"),
        ("imagenet-adversarial", "imagenet_a"),
        ("ImageNetV2", "imagenetv2"),
        ("DTD", "dtd"),
    ],
)
def test_usual_names_are_known(asked, name):
    assert find_set(asked).name == name


def test_an_unknown_name_gets_the_nearest_and_a_wrong_root_is_named(tmp_path):
    with pytest.raises(ValueError, match="unknown data set 'eurosatt'; did you mean 'eurosat'"):
        find_set("eurosatt")
    with pytest.raises(ValueError, match="must be a folder, got"):
        as_source("dtd", tmp_path / "none")
    assert as_source("some/folder", None) == Path("some/folder")


@pytest.mark.parametrize("name", SETS)
def test_every_set_is_read_from_its_layout_and_left_as_it_was(name, tmp_path, trees):
    root = trees.make_set(tmp_path / "root", name)
    before = trees.fingerprint(root)
    listing = open_listing(SETS[name], root)
    report = check_sets(root)
    assert trees.fingerprint(root) == before
    assert report["usable"], check_lines(report)
    assert list(report["sets"]) == [name]
    row = report["sets"][name]
    assert row["found"] == {role: len(images) for role, images in listing.image_lists()}
    assert not row["lists"]["official"]
    assert "counts differ from the official ones" in row["notes"][0]
    assert len(row["notes"]) == 1
    assert not absent_images(listing.image_root, [name for _, name, _ in listing.rows()])


def test_class_names_follow_the_lists(tmp_path, trees):
    for name in (*trees.NAMES, "fgvc_aircraft"):
        trees.make_set(tmp_path, name)
    for name, classes in trees.NAMES.items():
        listing = open_listing(SETS[name], tmp_path)
        assert listing.class_names == listing.prompts == [words for _, words in classes]
        assert list(dict.fromkeys(listing.train.label)) == [2, 1, 0]
    aircraft = open_listing(SETS["fgvc_aircraft"], tmp_path)
    assert aircraft.class_names == ["707-320", "A300B4", "F-16A/B"]
    assert aircraft.train.label[:3] == [1, 0, 2]
    assert aircraft.train.names[0] == "0034001.jpg"


def test_classes_of_other_names_are_reported(tmp_path, trees):
    trees.make_split(tmp_path, "eurosat")
    rows = trees.read_rows(tmp_path, "eurosat")
    for role in rows:
        rows[role] = [[path, k, "Crops" if k == 0 else name] for path, k, name in rows[role]]
    trees.write_split(tmp_path, "eurosat", rows)
    report = check_sets(tmp_path)
    assert report["usable"]
    wanted = "1 class names are not those of the protocol, first 'Crops' for 'Annual Crop Land'"
    assert wanted in report["sets"]["eurosat"]["notes"]


def first(role: str, index: int, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(rows: dict[str, Any]) -> None:
        rows[role][0][index] = value

    return change


def renamed(old: str, new: str) -> Callable[[dict[str, Any]], None]:
    def change(rows: dict[str, Any]) -> None:
        for part in rows.values():
            for row in part:
                row[2] = new if row[2] == old else row[2]

    return change


def gap(rows: dict[str, Any]) -> None:
    for part in rows.values():
        for row in part:
            row[1] = {0: 1, 1: 2, 2: 4}[row[1]]


def repeated(rows: dict[str, Any]) -> None:
    rows["test"].append(rows["train"][0])


def no_test_class(rows: dict[str, Any]) -> None:
    rows["test"] = [row for row in rows["test"] if row[1] != 1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (first("train", 0, "../../etc/passwd"), "inside the image folder, got '../../etc/passwd'"),
        (first("train", 0, "/etc/passwd"), "inside the image folder, got '/etc/passwd'"),
        (first("train", 0, "C:/x.jpg"), "inside the image folder, got 'C:/x.jpg'"),
        (first("val", 0, ""), "inside the image folder, got ''"),
        (first("val", 0, "a\0b.jpg"), "inside the image folder"),
        (first("train", 0, 7), r"train\[0\] must be \[path, label, class name\], got \[7, 2"),
        (first("test", 1, "2"), r"test\[0\] must be \[path, label, class name\]"),
        (first("test", 1, True), r"test\[0\] must be \[path, label, class name\]"),
        (first("train", 2, "wovenn"), "label 2 is 'wovenn' and, for woven/image_0002.jpg, 'woven'"),
        (renamed("woven", "Banded"), "'banded' and 'Banded' are the same name"),
        (renamed("woven", " "), "name 2 is empty"),
        (renamed("woven", "banded "), "'banded' and 'banded ' are the same name"),
        (gap, r"3 labels must be 0\.\.2, got 1\.\.4, first one missing: 0"),
        (repeated, "woven/image_0001.jpg is listed in train and again in test"),
        (no_test_class, "the test list has no image of 1 classes: dotted"),
        (lambda rows: rows.pop("val"), "must hold the lists train, val and test"),
        (lambda rows: rows["test"].clear(), "the test list is empty"),
    ],
)
def test_faults_of_a_split_file_are_one_named_line(change, message, tmp_path, trees):
    trees.make_split(tmp_path, "dtd")
    rows = trees.read_rows(tmp_path, "dtd")
    change(rows)
    trees.write_split(tmp_path, "dtd", rows)
    with pytest.raises(SetError, match=message) as caught:
        open_listing(SETS["dtd"], tmp_path)
    assert str(caught.value).startswith("data: dtd: ")
    assert "\n" not in str(caught.value)
    report = check_sets(tmp_path)
    assert not report["usable"]
    assert len(report["sets"]["dtd"]["problems"]) == 1


@pytest.mark.parametrize("name", ["dtd", "oxford_pets"])
def test_a_label_that_disagrees_with_its_folder_is_named(name, tmp_path, trees):
    trees.make_split(tmp_path, name)
    rows = trees.read_rows(tmp_path, name)
    other = rows["train"][-1]
    rows["train"][0][1:] = other[1:]
    trees.write_split(tmp_path, name, rows)
    with pytest.raises(SetError, match=r"is labelled .* the others of its folder .*\(1 such"):
        open_listing(SETS[name], tmp_path)


@pytest.mark.parametrize("text", ["", "[]", "{", "\xff\xfe", "null", "[" * 100_000])
def test_a_file_that_is_no_split_is_named(text, tmp_path, trees):
    trees.make_split(tmp_path, "dtd")
    trees.split_file(tmp_path, "dtd").write_bytes(text.encode("latin-1"))
    with pytest.raises(SetError, match=r"split_zhou_DescribableTextures.json"):
        open_listing(SETS["dtd"], tmp_path)


def test_unicode_names_stay_as_they_are(tmp_path, trees):
    trees.make_split(tmp_path, "stanford_cars")
    rows = trees.read_rows(tmp_path, "stanford_cars")
    renamed("1993 Volvo 240", "Citro\u00ebn 2CV \u732b {} %")(rows)
    trees.write_split(tmp_path, "stanford_cars", rows)
    assert open_listing(SETS["stanford_cars"], tmp_path).class_names[2].startswith("Citro\u00ebn")


@pytest.mark.parametrize("name", SETS)
def test_a_missing_list_is_refused_with_its_name_and_its_home(name, tmp_path, trees):
    spec = SETS[name]
    with pytest.raises(SetError, match="the folder .* is missing; images: "):
        open_listing(spec, tmp_path)
    trees.make_set(tmp_path, name)
    lost = spec.files[-1]
    (spec.place(tmp_path) / lost).unlink()
    with pytest.raises(SetError) as caught:
        open_listing(spec, tmp_path)
    message = str(caught.value)
    assert f"{spec.place(tmp_path) / lost} is missing" in message
    assert spec.lists in message
    assert "no other split is made up" in message
    report = check_sets(tmp_path)
    assert not report["usable"]
    assert not list(tmp_path.rglob("*.json.new"))


def test_a_root_one_level_too_deep_gets_a_hint(tmp_path, trees):
    trees.make_split(tmp_path, "caltech101")
    with pytest.raises(SetError, match="the folder above"):
        open_listing(SETS["caltech101"], tmp_path / "caltech-101")


def test_absent_images_are_counted_and_named(tmp_path, trees):
    root = trees.make_split(tmp_path, "dtd")
    images = SETS["dtd"].image_root(root)
    rows = trees.read_rows(root, "dtd")
    lost = [rows["train"][0][0], rows["val"][0][0], rows["test"][0][0], rows["test"][1][0]]
    (images / lost[0]).unlink()
    (images / lost[1]).write_bytes(b"")
    (images / lost[2]).unlink()
    (images / lost[2]).symlink_to("nowhere.jpg")
    (images / lost[3]).unlink()
    (images / lost[3]).mkdir()
    row = check_sets(root)["sets"]["dtd"]
    assert row["usable"] is False
    assert row["found"] == {"train": 17, "val": 8, "test": 10}
    assert row["absent"]["count"] == 4
    assert row["absent"]["first"] == [
        (lost[0], "no such file"),
        (lost[1], "the file is empty"),
        (lost[2], "a link to nothing"),
        (lost[3], "not a regular file"),
    ]
    assert "4 listed images are not below" in row["problems"][0]
    assert any("train 17 of 18" in line for line in check_lines(check_sets(root)))


def test_links_to_images_elsewhere_are_followed(tmp_path, trees):
    trees.make_split(tmp_path / "disk", "eurosat")
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "eurosat").symlink_to(tmp_path / "disk" / "eurosat")
    assert check_sets(tmp_path / "root")["usable"]
    (tmp_path / "root" / "dtd").symlink_to(tmp_path / "gone")
    report = check_sets(tmp_path / "root", ["dtd"])
    assert "a link to nothing" in report["sets"]["dtd"]["problems"][0]


def test_imagenet_tells_equal_names_apart_and_keeps_their_prompts(tmp_path, trees):
    root = trees.make_imagenet(tmp_path)
    listing = open_listing(SETS["imagenet"], root)
    names = ["tench", "missile (n03773504)", "missile (n04008634)", "sunglasses"]
    assert listing.class_names == names
    assert listing.prompts == ["tench", "missile", "missile", "sunglasses"]
    assert listing.val is None
    assert (len(listing.train), len(listing.test)) == (32, 12)
    train, val = drawn(listing, shots=2, seed=1)
    assert (len(train), len(val)) == (8, 8)
    assert not set(train.names) & set(val.names)
    assert all(name.startswith("train/") for name in train.names + val.names)
    trees.make_variant(root, "imagenet_r", (0, 2))
    some = open_listing(SETS["imagenet_r"], root)  # by the classnames.txt of ImageNet
    assert some.class_names == [names[0], names[2]]
    assert some.test.label == [0, 0, 1, 1]
    trees.make_variant(root, "imagenetv2")
    numbered = open_listing(SETS["imagenetv2"], root)
    assert numbered.class_names == names
    assert numbered.test.names[-1] == "3/1.jpg"


def broken_imagenet(root: Path, trees: ModuleType, fault: str) -> None:
    images = SETS["imagenet"].image_root(root)
    if fault == "flat":
        shutil.rmtree(images / "val")
        (images / "val").mkdir()
        for number in range(3):
            trees.picture(images / "val" / f"ILSVRC2012_val_{number:08d}.JPEG", number)
    elif fault == "unknown":
        for part in ("train", "val"):
            os.rename(images / part / trees.SYNSETS[0], images / part / "n99999999")
    elif fault == "uneven":
        shutil.rmtree(images / "val" / trees.SYNSETS[1])
    elif fault == "no train":
        shutil.rmtree(images / "train")
    elif fault == "empty class":
        for path in (images / "val" / trees.SYNSETS[3]).iterdir():
            path.unlink()
    elif fault == "twice":
        path = SETS["imagenet"].place(root) / "classnames.txt"
        path.write_text(path.read_text() + "n01440764 tench again\n")
    elif fault == "nameless":
        path = SETS["imagenet"].place(root) / "classnames.txt"
        path.write_text("n01440764\n" + path.read_text())


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("flat", "images/val must hold one folder per class, got 3 loose images"),
        ("unknown", "1 folders are not in classnames.txt, first 'n99999999'"),
        ("uneven", "images/val lacks 1 of 4 classes, first n03773504"),
        ("no train", "the folder images/train is missing"),
        ("empty class", "the test list has no image of 1 classes: sunglasses"),
        ("twice", "classnames.txt, line 5: n01440764 is there twice"),
        ("nameless", "classnames.txt, line 1: n01440764 has no name"),
    ],
)
def test_faults_of_imagenet_are_named(fault, message, tmp_path, trees):
    broken_imagenet(trees.make_imagenet(tmp_path), trees, fault)
    with pytest.raises(SetError, match=message):
        open_listing(SETS["imagenet"], tmp_path)


def test_faults_of_aircraft_and_imagenetv2_are_named(tmp_path, trees):
    place = SETS["fgvc_aircraft"].place(trees.make_aircraft(tmp_path))
    (place / "images_variant_val.txt").write_text("0034019 Concorde\n")
    with pytest.raises(SetError, match="'0034019 Concorde' names no variant of variants.txt"):
        open_listing(SETS["fgvc_aircraft"], tmp_path)
    trees.make_set(tmp_path, "imagenetv2")
    shutil.rmtree(SETS["imagenetv2"].image_root(tmp_path) / "2")
    with pytest.raises(SetError, match="one per line of classnames.txt; it has no folder 2"):
        open_listing(SETS["imagenetv2"], tmp_path)
    for name, file in (("fgvc_aircraft", "variants.txt"), ("imagenetv2", "classnames.txt")):
        (SETS[name].place(tmp_path) / file).write_bytes(b"a b\n\xff\n")
        with pytest.raises(
            SetError, match=rf"{file} is not UTF-8 \(invalid start byte at byte 4\)"
        ):
            open_listing(SETS[name], tmp_path)
