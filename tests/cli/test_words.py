# SPDX-License-Identifier: Apache-2.0
"""What commands say: names, counts and reasons."""

from __future__ import annotations

from pathlib import Path

import pytest
from commands import call, json_of, refused
from trees import picture

from vtclip.runs.counted import sentences

ON_CPU = ["--device", "cpu", "--threads", "1"]


@pytest.fixture
def photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two classes of eight images, in the folder that commands run in."""
    root = tmp_path / "photos"
    for k, name in enumerate(("ant", "bee")):
        for number in range(8):
            picture(root / name / f"{number}.jpg", number, k)
    monkeypatch.chdir(root)
    return root


def test_a_source_typed_as_dots_is_called_like_its_folder(capsys, photos, monkeypatch):
    words = ["--method", "proker", "--shots", "2", "--cache-dir", "../cache", *ON_CPU]
    assert call("fit", ".", "--out", "../r", *words) == 0
    assert "\nproker on photos: 2 classes" in capsys.readouterr().out
    for source in (".", "ant/..", "../photos/"):
        assert json_of(capsys, "evaluate", "../r", source, *ON_CPU)["source"] == "photos"
    monkeypatch.chdir(photos / "ant")
    assert json_of(capsys, "evaluate", "../../r", "..", *ON_CPU)["source"] == "photos"
    assert json_of(capsys, "repeat", "../../r", "--cache-dir", "../../cache")["source"] == "photos"


def fill(root: Path, *names: str, data: bytes = b"hello") -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)


def test_unreadable_images_are_counted_with_their_reasons(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fill(tmp_path / "bad", "ant/0.jpg", "ant/1.jpg", "bee/0.jpg")
    fill(tmp_path / "bad", "bee/1.jpg", data=b"")
    words = ["--out", "out", "--cache-dir", "cache", *ON_CPU]
    for command in ("fit", "features"):
        assert call(command, "bad", *words[: None if command == "fit" else 2]) == 2
        line = capsys.readouterr().err
        assert "could be read: ant, bee (4 files: " in line
        assert "bee/1.jpg: the file is empty" in line
        assert "3 files, e.g. ant/0.jpg: not an image of a known format)" in line


def test_folders_without_images_say_what_lies_in_them(capsys, photos, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fill(tmp_path / "clips", "ant/0.mp4", "ant/1.mp4", "bee/0.mp4", "bee/notes.txt", "bee/.x")
    held = "they hold 3 .mp4 files, 1 .txt file, 1 hidden file"
    for words in (["fit", "clips"], ["features", "clips", "--out", "f"]):
        assert f"2 class folders hold no images: ant, bee; {held}" in refused(capsys, *words)
    fill(photos, "cow/0.mp4", "cow/README")
    line = refused(capsys, "fit", "photos")
    assert "1 class folder holds no images: cow; it holds 1 .mp4 file, 1 file without an" in line
    fill(tmp_path / "loose", "0.mp4", "1.mp4")
    assert "got no folders; it holds 2 .mp4 files" in refused(capsys, "fit", "loose")


def test_the_note_on_the_demo_model_comes_with_its_work(capsys, photos):
    refused(capsys, "fit", ".", "--shots", "0")
    refused(capsys, "features", ".", "--out", "ant")
    words = ["--out", "../f", "--spatial", "none", "--cache-dir", "../cache", *ON_CPU]
    assert call("features", ".", *words) == 0
    assert capsys.readouterr().err.startswith("note: --model demo is a small model")


def test_one_of_a_kind_is_said_in_the_singular(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for number in range(4):
        picture(tmp_path / "one" / "ant" / f"{number}.jpg", number)
    picture(tmp_path / "test" / "ant" / "9.jpg", 9)
    words = ["--method", "zeroshot", "--cache-dir", "cache", *ON_CPU]
    assert call("fit", "one", "--test", "test", "--out", "r", *words) == 0
    assert "one: 1 class, " in (out := capsys.readouterr().out)
    assert " and 1 test image, seed 1" in out
    assert call("evaluate", "r", *ON_CPU) == 0
    assert "zeroshot on test: 1 image\n" in capsys.readouterr().out


def test_sentences_on_what_is_left_out_count_in_words():
    left_out = {"repeated": 1, "other_roles": 1, "gone": 1, "tested": 8}
    assert list(sentences(0, left_out)) == [
        "2 of 2 images left out: 1 training or validation image by the source's own division, "
        "1 copy of a counted one.",
        "1 of 8 test images of the run is gone.",
    ]
    assert list(sentences(0, {"repeated": 1}))[0].startswith("1 of 1 image left out: ")
    assert "2 copies of counted ones" in "".join(sentences(3, {"repeated": 2}))
