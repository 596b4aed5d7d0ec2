# SPDX-License-Identifier: Apache-2.0
"""Folder scanning: classes, order, links, formats and layouts; no file is lost without a word."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from vtclip.data.extract import extract_features
from vtclip.data.folder_tree import BROKEN, OUTSIDE, REPEATED
from vtclip.data.folders import natural_key, scan_folder, walk_images
from vtclip.files import printable


def put(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 4), "red").save(path, "PNG")


def test_natural_order_of_classes_and_files(tmp_path: Path) -> None:
    for name in ("class_10", "class_2", "Apple", "banana", "class_1"):
        for number in (10, 9, 1):
            put(tmp_path / name / f"{number}.png")
    folder = scan_folder(tmp_path)
    assert folder.class_names == ["Apple", "banana", "class_1", "class_2", "class_10"]
    assert folder.names[:3] == ["Apple/1.png", "Apple/9.png", "Apple/10.png"]
    assert folder.label == sorted(folder.label)
    mixed = ["a10", "a", "10", "a2b", "2", "a02"]
    assert sorted(mixed, key=natural_key) == ["2", "10", "a", "a02", "a2b", "a10"]


def test_hidden_and_other_files_are_passed_over(tmp_path: Path) -> None:
    for name in ("a.JPG", "b.Png", "deep/er/c.webp"):
        put(tmp_path / "cat" / name)
    for name in (".hidden.jpg", "Thumbs.db", ".DS_Store", "notes.txt", "__MACOSX/x.jpg"):
        put(tmp_path / "cat" / name)
    put(tmp_path / ".git" / "x.jpg")
    put(tmp_path / "__MACOSX" / "cat" / "x.jpg")
    folder = scan_folder(tmp_path)
    assert folder.class_names == ["cat"]
    assert folder.names == ["cat/a.JPG", "cat/b.Png", "cat/deep/er/c.webp"]


def test_empty_classes_are_listed(tmp_path: Path) -> None:
    put(tmp_path / "cat" / "x.png")
    (tmp_path / "dog").mkdir()
    (tmp_path / "eel").mkdir()
    (tmp_path / "eel" / "notes.txt").write_text("x")
    with pytest.raises(ValueError, match="2 class folders hold no images: dog, eel"):
        scan_folder(tmp_path)


def test_class_names_that_differ_in_spelling_only(tmp_path: Path) -> None:
    for name in ("caf\u00e9", "cafe\u0301"):
        put(tmp_path / name / "x.png")
    with pytest.raises(ValueError, match="are the same name"):
        scan_folder(tmp_path)


def test_roots_that_are_no_class_folders(tmp_path: Path) -> None:
    put(tmp_path / "x.png")
    with pytest.raises(ValueError, match="got no folders, only 1 images without a class"):
        scan_folder(tmp_path)
    put(tmp_path / "cat" / "x.png")
    folder = scan_folder(tmp_path)
    assert folder.class_names == ["cat"]
    assert folder.remarks == [f"1 image lies directly in {tmp_path}, in no class, and is ignored"]
    with pytest.raises(ValueError, match="must be a folder"):
        scan_folder(tmp_path / "x.png")


def test_links_to_files_are_followed_wherever_they_lead(tmp_path: Path) -> None:
    root, outside = tmp_path / "root", tmp_path / "outside"
    put(outside / "o.png")
    put(root / "dog" / "x.png")
    (root / "cat").mkdir()
    (root / "cat" / "out.png").symlink_to(outside / "o.png")
    (root / "cat" / "in.png").symlink_to(root / "dog" / "x.png")
    (root / "cat" / "gone.png").symlink_to(outside / "nothing")
    (root / "cat" / "self.png").symlink_to(root / "cat" / "self.png")
    folder = scan_folder(root)
    assert folder.names == ["cat/in.png", "cat/out.png", "dog/x.png"]
    assert folder.skipped == [("cat/gone.png", BROKEN), ("cat/self.png", BROKEN)]


def test_links_to_folders_outside_need_the_option(tmp_path: Path) -> None:
    root, outside = tmp_path / "root", tmp_path / "outside"
    put(outside / "o.png")
    put(root / "cat" / "x.png")
    (root / "cat" / "away").symlink_to(outside)
    folder = scan_folder(root)
    assert folder.names == ["cat/x.png"]
    assert folder.skipped == [("cat/away", OUTSIDE)]
    assert folder.remarks == [
        f"1 linked folder leads out of {root} and is not entered; --follow-links enters them"
    ]
    assert scan_folder(root, follow_links=True).names == ["cat/x.png", "cat/away/o.png"]
    assert walk_images(root)[1] == [(f"{root}/cat/away", OUTSIDE)]
    assert len(walk_images(root, follow_links=True)[0]) == 2
    (root / "dog").symlink_to(outside)
    with pytest.raises(ValueError, match="1 class folder links out of .*: dog; --follow-links"):
        scan_folder(root)


def test_a_folder_is_read_once_and_cycles_end(tmp_path: Path) -> None:
    root = tmp_path / "root"
    put(root / "cat" / "x.png")
    put(root / "dog" / "y.png")
    put(root / "dog" / "deep" / "z.png")
    (root / "cat" / "self").symlink_to(root / "cat")
    (root / "cat" / "up").symlink_to(root)
    (root / "cat" / "other").symlink_to(root / "dog")
    (root / "dog" / "deep" / "again").symlink_to(root / "dog" / "deep")
    for follow in (False, True):
        folder = scan_folder(root, follow_links=follow)
        assert folder.names == ["cat/x.png", "dog/y.png", "dog/deep/z.png"]
        assert (folder.skipped, folder.passed[REPEATED]) == ([], 4)
    (root / "kitten").symlink_to(root / "cat")
    with pytest.raises(ValueError, match="cat and kitten are the same folder, by a link"):
        scan_folder(root)
    (root / "kitten").unlink()
    (root / "all").symlink_to(root)
    with pytest.raises(ValueError, match="the source itself and all are the same folder"):
        scan_folder(root)


def test_one_folder_under_two_splits_is_refused(tmp_path: Path) -> None:
    put(tmp_path / "train" / "cat" / "x.png")
    (tmp_path / "test").symlink_to(tmp_path / "train")
    with pytest.raises(ValueError, match="train/cat and test/cat are the same folder, by a link"):
        scan_folder(tmp_path)


def test_odd_file_names_work_and_print_on_one_line(tmp_path: Path, fake_clip: Any) -> None:
    names = ["a\nb.png", "\U0001f408.png", "x\u202ey.png", "sp ace.png", "% {}.png"]
    for name in names:
        put(tmp_path / "pictures" / "cat" / name)
    raw = os.fsencode(tmp_path / "pictures" / "cat") + b"/\xff.png"
    with open(raw, "wb") as file:
        file.write(b"no image")
    features, report = extract_features(tmp_path / "pictures", tmp_path / "out", model=fake_clip())
    assert sorted(features.records().names) == sorted(f"cat/{name}" for name in names)
    assert report.rows == 5
    assert len(report.duplicates) == 4
    assert [name for name, _ in report.skipped] == ["cat/\udcff.png"]
    lines = "\n".join(report.lines())
    lines.encode()
    assert r"\udcff" in lines
    assert r"a\nb.png" in lines
    assert printable("x\u202ey") == r"x\u202ey"


def test_many_names_sort_quickly() -> None:
    names = [f"img_{n}.jpg" for n in range(20_000, 0, -1)]
    assert sorted(names, key=natural_key)[8:10] == ["img_9.jpg", "img_10.jpg"]


def tree(root: Path, *names: str) -> Path:
    """Images at `names`; a name that ends in / is an empty folder."""
    for name in names:
        if name.endswith("/"):
            (root / name).mkdir(parents=True, exist_ok=True)
        else:
            put(root / name)
    return root


ROLES = {"train": 0, "val": 1, "test": 2}
LAYOUTS = {
    "plain": (("train", "val", "test"), "{part}/{name}"),
    "cased": (("Train", "VALIDATION", "Testing"), "{part}/{name}"),
    "short": (("training", "valid", "eval"), "{part}/{name}"),
    "seg": (("seg_train", "seg_dev", "seg_test"), "{part}/{part}/{name}"),
    "images": (("train_images", "val-images", "testImages"), "{part}/{name}"),
    "numbers": (("0_train", "1_val", "2_test"), "{part}/{name}"),
    "years": (("train2017", "val2017", "test2017"), "{part}/{name}"),
    "named": (("flowers_train", "flowers_val", "flowers_test"), "{part}/{name}"),
    "wrapped": (("train", "val", "hold-out"), "images/{part}/{name}"),
    "wraps": (("train", "val", "holdout"), "{part}/images/{name}"),
    "inner": (("train", "validation", "TEST"), "{class_name}/{part}/{file}"),
}


@pytest.mark.parametrize("kind", LAYOUTS)
def test_split_folders_are_roles_and_no_classes(tmp_path: Path, kind: str) -> None:
    parts, pattern = LAYOUTS[kind]
    wanted = []
    for role, part in enumerate(parts):
        for class_name in ("apple", "pear_10", "pear_9"):
            for number in range(3 - role):
                file = f"{number}.png"
                name = f"{class_name}/{file}"
                at = pattern.format(part=part, name=name, class_name=class_name, file=file)
                put(tmp_path / at)
                wanted.append((at, class_name, role))
    folder = scan_folder(tmp_path)
    assert folder.class_names == ["apple", "pear_9", "pear_10"]
    rows = zip(folder.names, folder.label, folder.roles or [], strict=True)
    assert sorted((n, folder.class_names[k], r) for n, k, r in rows) == sorted(wanted)
    assert folder.label == sorted(folder.label)
    used = f"{parts[0]}/ (9 images) trains, {parts[1]}/ (6) validates, {parts[2]}/ (3) tests"
    assert folder.remarks[-1] == f"{tmp_path}: 3 split folders are used: {used}"


PLAIN = [
    ("test tube/a.png", "pregnancy_test/b.png", "dog/c.png"),
    ("train station/a.png", "airport/b.png"),
    ("train/a.png", "car/b.png", "bus/c.png"),
    ("train/steam/a.png", "car/b.png"),
    ("images/a.png", "images/deep/b.png"),
    ("cat/indoor/a.png", "cat/x.png", "dog/indoor/b.png"),
    ("pred/a.png", "prey/b.png"),
    ("constrained/a.png", "contested/b.png", "valley/c.png"),
]


@pytest.mark.parametrize("names", PLAIN)
def test_classes_with_words_of_splits_stay_classes(tmp_path: Path, names: tuple[str, ...]) -> None:
    folder = scan_folder(tree(tmp_path, *names))
    assert set(folder.class_names) == {name.split("/")[0] for name in names}
    assert sorted(folder.names) == sorted(names)
    assert folder.roles is None
    said = [line for line in folder.remarks if "train is taken for a class" in line]
    assert len(said) == any(name.startswith("train/") for name in names)


REFUSED = [
    (("train/apple/a.png", "test/apple/b.png", "apple/c.png"),
     r"split folders train/, test/ beside class folders \(apple\); give .*/train with --test"),
    (("train/cat/a.png", "cat/b.png"), r"split folders train/ beside class folders \(cat\)"),
    (("cat/a.png", "dog/b.png", "test/c.png"), "named like splits, test/ beside class folders"),
    (("cat/a.png", "dog/b.png", "val/c.png"), "move one kind away, and rename what is a class"),
    (("train/a.png", "test/b.png"), "train/, test/ with images directly in them"),
    (("train/a.png", "test/cat/b.png"), "train/ with images directly in it"),
    (("train/images/a.png", "val/images/b.png"), "one folder per class"),
    (("cat/a.png", "cat/test/b.png", "dog/c.png"), "class folder cat holds test/ beside images"),
    (("cat/train/a.png", "cat/test/b.png", "dog/c.png"), "dog holds images; every class needs"),
    (("cat/train/a.png", "cat/test/b.png", "cat/masks/c.png"), "cat holds test/ beside masks/"),
    (("train/cat/a.png", "train/cat/test/b.png"), "train/cat holds test/, which looks like a"),
    (("train/cat/a.png", "test/cat/b.png", "test/eel/c.png"), "1 class has no training image: eel"),
    (("train/cat/a.png", "train/Cat/b.png", "test/cat/a.png"), "are the same name"),
    (("train/cat/a.png", "train/dog/", "test/cat/b.png"), "1 class folder holds no images: dog"),
    (("fold1/a/1.png", "fold1/b/2.png", "fold2/a/3.png", "fold2/b/4.png"), "are splits and not"),
]  # fmt: skip


@pytest.mark.parametrize(("names", "reason"), REFUSED)
def test_what_can_be_read_in_two_ways_is_refused(
    tmp_path: Path, names: tuple[str, ...], reason: str
) -> None:
    with pytest.raises(ValueError, match=reason) as caught:
        scan_folder(tree(tmp_path, *names))
    assert "\n" not in str(caught.value)


def test_scans_for_evaluation_say_what_others_refuse(tmp_path: Path) -> None:
    tree(tmp_path, "train/cat/a.png", "test/cat/b.png", "test/eel/c.png", "train/fox/")
    folder = scan_folder(tmp_path, empty_classes=True)
    assert (folder.class_names, folder.roles) == (["cat", "eel", "fox"], [0, 2, 2])
    text = "\n".join(folder.remarks)
    assert "1 class folder holds no images: fox" in text
    assert "1 class has no training image: eel" in text


def test_folders_beside_a_layout_are_said_and_counted(tmp_path: Path) -> None:
    tree(tmp_path, "train/cat/a.png", "train/dog/b.png", "train/x.png", "test/y.png", "test/z.png",
         "val/cat/c.png", "annotations/", "predictions/cat/p.png")  # fmt: skip
    (tmp_path / "annotations" / "a.json").write_text("{}")
    folder = scan_folder(tmp_path)
    assert folder.names == ["train/cat/a.png", "val/cat/c.png", "train/dog/b.png"]
    assert folder.roles == [0, 1, 0]
    assert folder.passed[".json"] == 1
    assert folder.remarks == [
        f"{tmp_path}: 2 images below test/ have no label and are not used",
        f"{tmp_path}: 1 image below predictions/ has no label and is not used",
        f"1 image lies directly in {tmp_path}/train, in no class, and is ignored",
        f"{tmp_path}: 2 split folders are used: train/ (2 images) trains, val/ (1) validates",
        f"{tmp_path}: 1 class has no validation image: dog",
    ]


def test_a_single_split_folder_fixes_no_roles(tmp_path: Path) -> None:
    folder = scan_folder(tree(tmp_path, "train/cat/a.png", "train/dog/b.png"))
    assert (folder.class_names, folder.roles) == (["cat", "dog"], None)
    assert folder.remarks == [f"{tmp_path}: 1 split folder is used: train/ (2 images) trains"]


def test_folders_that_repeat_each_other_are_said(tmp_path: Path) -> None:
    folder = scan_folder(tree(tmp_path, "day/cat/a.png", "day/dog/b.png", "night/cat/c.png",
                              "night/dog/d.png"))  # fmt: skip
    assert folder.class_names == ["day", "night"]
    assert "each hold the folders cat, dog; they are taken for classes" in folder.remarks[0]


FILES = st.sampled_from(["a.png", "b.JPG", "c.txt", "d.heifx", "e", ".f", "g.cr2", "Thumbs.db"])
PLACES = st.sampled_from(
    ["", "cat", "dog", "train", "test", "val", "data", "train/cat", "test/cat", "test/dog", "cat/x",
     "cat/test", "cat/train", "dog/test", "dog/train", "train/cat/deep", "images/train/cat", ".h"]
)  # fmt: skip
LINKS = st.sampled_from(["", "cat", "train/cat", "cat/a.png", "nothing", "../out", "../out/o.png"])
TREES = st.lists(st.tuples(PLACES, FILES), min_size=1, max_size=12, unique=True)
LINKED = st.lists(st.tuples(PLACES, st.sampled_from(["l", "m.png"]), LINKS), max_size=4)


@settings(max_examples=200, deadline=None)
@given(files=TREES, links=LINKED, follow=st.booleans(), empty=st.booleans())
def test_no_file_is_lost_without_a_word(
    tmp_path_factory: pytest.TempPathFactory,
    files: list[tuple[str, str]],
    links: list[tuple[str, str, str]],
    follow: bool,
    empty: bool,
) -> None:
    base = tmp_path_factory.mktemp("scan")
    root = base / "root"
    put(base / "out" / "o.png")
    for place, name in files:
        (root / place).mkdir(parents=True, exist_ok=True)
        if name.lower().endswith(("png", "jpg")):
            put(root / place / name)
        else:
            (root / place / name).write_text("x")
    for place, name, target in links:
        if (root / place).is_dir() and not os.path.lexists(root / place / name):
            (root / place / name).symlink_to(root / target)
    try:
        folder = scan_folder(root, follow_links=follow, empty_classes=empty)
    except ValueError:  # refused in one line, as the tests above hold
        return
    assert len(set(folder.names)) == len(folder.names) == len(folder.label)
    listed = {os.path.realpath(folder.path(name)) for name in folder.names}
    skipped = {name for name, _ in folder.skipped}
    assert not skipped & set(folder.names)
    real = hidden = 0
    for place, folders, names in os.walk(root):
        hidden += sum(name.startswith(".") for name in folders)
        folders[:] = [name for name in folders if not name.startswith(".")]
        real += len(names) + sum(os.path.islink(os.path.join(place, name)) for name in folders)
    # what links to folders out of the root add, and links that were entered as folders
    outside = sum(str(base / "out") in path for path in listed)
    counted = len(folder.names) + len(skipped) + sum(folder.passed.values()) - hidden
    entered = len({(place, name) for place, name, _ in links})
    assert real - entered <= counted <= real + outside
    if not links:
        assert counted == real
