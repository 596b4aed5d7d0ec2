# SPDX-License-Identifier: Apache-2.0
"""What a listing, names and options say is wrong is refused before an image is decoded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from commands import refused
from pictures import noise

import vtclip.data.extract as extraction


@pytest.fixture(autouse=True)
def _no_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hashing the images is the first of the work; here it is an error of its own kind."""

    def worked(*_: Any, **__: Any) -> None:
        raise AssertionError("an image was read")

    monkeypatch.setattr(extraction, "hash_all", worked)
    monkeypatch.setenv("VTCLIP_CACHE", str(tmp_path / "cache"))
    noise(tmp_path / "pics", ("cat", "dog"), each=6)
    noise(tmp_path / "other", ("cat", "dgo"), each=2)
    (tmp_path / "file").write_text("x")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("x")
    monkeypatch.chdir(tmp_path)


LONG = "a very long name of a thing that nobody would ever use for a class of pictures but some do"
REFUSED = [
    ("fit pics --out pics/run", "--out pics/run lies inside the source pics"),
    ("fit pics --out file", "--out file exists and is not a folder"),
    ("fit pics --out file/run", "--out file/run: "),
    ("fit pics --out mine", "--out mine exists and is not a run (it holds 'notes.txt')"),
    ("fit pics --cache-dir pics/cache", "--cache-dir pics/cache lies inside the source pics"),
    ("fit pics --test gone", "--test 'gone' does not exist"),
    ("fit pics --val gone", "--val 'gone' does not exist"),
    ("fit pics --test other", "--test: class 'dgo' is none of the training source's; did you mean"),
    ("fit pics --val other", "--val: class 'dgo' is none of the training source's; did you mean"),
    ("fit pics --test pics", "--test: pics is SOURCE as well"),
    ("fit pics --test file", "--test: must be"),
    ("fit pics --test other --out other/run", "lies inside the source of --test other"),
    ("fit pics --test-fraction 0", "--test-fraction 0 leaves no test images: name some as --test"),
    ("fit pics --test-fraction 0.1", "--test-fraction 0.1 leaves no test images"),
    ("fit pics --test-fraction 1", "--shots 16: no training images besides the test share of 1"),
    ("fit pics --shots 0", "--shots must be at least 1"),
    ("fit pics --method zeroshot --final", "--final changes nothing"),
    ("fit pics --base-to-new --final", "--final cannot be combined with --base-to-new"),
    ("fit pics --method calip --refit", "learns nothing from images: --refit changes nothing"),
    ("fit pics --base-to-new --refit", "--refit cannot be combined with --base-to-new"),
    ("fit pics --train-encoders --refit", "--refit cannot be combined with --train-encoders"),
    ("fit pics --pseudo-labels --method proker --refit", "--refit cannot be combined with"),
    ("fit pics --refit --test-fraction 0.9", "--refit: pics gives no validation image, and there"),
    ("fit pics --pseudo-labels --method proker --shots all", "--shots must be a number with"),
    ("fit pics --templates gone.txt", "gone.txt"),
    ("fit pics --method coop --context-length 99", "--context-length can be at most "),
    ("fit pics --method rada --queries image --temperature 0", "--temperature: must be above 0"),
    ("fit pics --model nope", "nope"),
    ("fit pics --spatial nope", "nope"),
    ("fit pics --method vtclip --lr 0.1 --penalty l1", "no option --penalty"),
    ("fit pics --device gpu", "--device must be"),
    ("fit pics --overwrite --resume", "--overwrite and --resume exclude each other"),
    ("bench pics --shots 1 --out pics/bench", "pics/bench"),
    ("bench pics --shots 1 --out mine", "mine"),
    ("features pics --out pics/features", "pics/features"),
    ("features pics --out file", "file"),
    ("features pics --out mine", "mine"),
    ("features pics --out new --model nope", "nope"),
    ("features pics --out new --spatial nope", "nope"),
]


@pytest.mark.parametrize(("words", "message"), REFUSED)
def test_it_is_refused_in_one_line_and_nothing_is_written(words, message, capsys, tmp_path):
    before = sorted(tmp_path.rglob("*"))
    line = refused(capsys, *words.split())
    assert message in line
    assert sorted(tmp_path.rglob("*")) == before


def test_a_class_name_without_room_for_context_is_refused(capsys, tmp_path):
    (tmp_path / "pics" / "dog").rename(tmp_path / "pics" / LONG)
    line = refused(capsys, "fit", "pics", "--method", "coop")
    assert "leaves 0 of the text encoder's 20 places for context vectors; at least 1" in line
    assert "--class-names" in line
    assert not (tmp_path / "cache").exists()


def test_the_default_out_inside_of_the_source_names_the_option(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path / "pics")
    line = refused(capsys, "fit", ".", "--method", "proker")
    assert "--out runs/pics-proker-16shot-seed1 lies inside the source ." in line
    assert "name a folder outside of it as --out" in line
    assert not (tmp_path / "cache").exists()


def test_a_folder_that_cannot_be_written_is_refused(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr("vtclip.runs.folder.os.access", lambda *_: False)
    assert "cannot be written to" in refused(capsys, "fit", "pics", "--out", "run")
