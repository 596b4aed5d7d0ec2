# SPDX-License-Identifier: Apache-2.0
"""`vtclip data check`, and fit and evaluate with --data, from the command line to result.json."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from commands import call, json_of

from vtclip.data.sets import SETS

QUICK = ["--method", "vtclip", "--epochs", "2", "--threads", "1", "--device", "cpu"]


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs and the cache land in separate folders."""
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setenv("VTCLIP_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def root(tmp_path: Path, trees: ModuleType) -> Path:
    made: Path = trees.make_split(tmp_path / "root", "caltech101")
    return made


def refused(capsys: pytest.CaptureFixture[str], *words: Any) -> str:
    assert call(*words) == 2
    return capsys.readouterr().err.splitlines()[-1]


def result_of(folder: str) -> dict[str, Any]:
    read: dict[str, Any] = json.loads(Path(folder, "result.json").read_text())
    return read


def lock(root: Path) -> None:
    for path in [root, *root.rglob("*")]:
        path.chmod(0o555 if path.is_dir() else 0o444)


def test_fit_and_evaluate_leave_a_read_only_root_as_it_is(root, trees, capsys):
    lock(root)
    before = trees.fingerprint(root)
    assert call("data", "check", root) == 0
    assert call("fit", "Caltech101", "--data", root, "--shots", "4", "--seed", "2", *QUICK) == 0
    out = capsys.readouterr().out
    assert "vtclip on caltech101: 3 classes, 12 training, 9 validation and 12 test images" in out
    run = "runs/caltech101-vtclip-4shot-seed2"
    result = result_of(run)
    assert result["source"] == "caltech101"
    assert result["config"]["source"] == "caltech101"
    assert result["config"]["data"] == str(root.resolve())
    assert result["images"] == {"train": 12, "val": 9, "test": 12}
    assert result["classes"] == ["face", "airplane", "anchor"]
    assert len(result["digests"]["lists"]) == 64
    for words in ([run], [run, "caltech101", "--data", root]):
        again = json_of(capsys, "evaluate", *words, "--threads", "1", "--device", "cpu")
        assert again["accuracy"] == result["accuracy"]
        assert again["per_class"] == result["adapted"]["per_class"]
        assert again["test"]["images"] == 12
    assert call("fit", "caltech101", "--data", root, "--shots", "4", "--seed", "2", "--resume",
                *QUICK) == 0  # fmt: skip
    assert trees.fingerprint(root) == before


def test_a_run_moves_with_its_root(root, tmp_path, capsys):
    assert call("fit", "caltech101", "--data", root, "--shots", "1", "--out", "r", *QUICK) == 0
    shutil.move(root, tmp_path / "other")
    assert "root of the data sets must be a folder" in refused(capsys, "evaluate", "r")
    other = ["caltech101", "--data", tmp_path / "other"]
    assert json_of(capsys, "evaluate", "r", *other)["accuracy"] == result_of("r")["accuracy"]


@pytest.mark.parametrize("method", ["zeroshot", "rada"])
def test_imagenet_and_a_test_set_over_some_of_its_classes(method, tmp_path, trees, capsys):
    root = trees.make_imagenet(tmp_path / "root")
    trees.make_variant(root, "imagenet_a", (0, 2))
    before = trees.fingerprint(root)
    quick = QUICK[2:] if method == "rada" else QUICK[4:]
    words = ["--data", root, "--method", method, "--shots", "2", "--out", "r"]
    assert call("fit", "imagenet", *words, *quick) == 0
    result = result_of("r")
    assert result["images"] == {"train": 8, "val": 8, "test": 12}
    assert result["classes"][1:3] == ["missile (n03773504)", "missile (n04008634)"]
    for _ in range(2):
        evaluation = json_of(capsys, "evaluate", "r", "imagenet_a", "--data", root)
    assert list(evaluation["per_class"]) == ["tench", "missile (n04008634)"]
    assert evaluation["test"]["images"] == 4
    message = refused(capsys, "fit", "imagenet_a", "--data", root, "--shots", "1")
    assert "a test set without training images; fit imagenet" in message
    assert trees.fingerprint(root) == before


def test_zero_shot_on_a_test_set(tmp_path, trees, capsys):
    root = trees.make_set(tmp_path / "root", "imagenetv2")
    assert call("fit", "imagenetv2", "--data", root, "--method", "zeroshot", "--out", "r") == 0
    result = result_of("r")
    assert result["images"] == {"train": 0, "val": 0, "test": 8}
    assert result["shots"] == 0


def test_base_to_new_on_a_data_set(tmp_path, trees, capsys):
    root = trees.make_imagenet(tmp_path / "root")
    words = ["--method", "rada", "--base-to-new", "--shots", "2", "--out", "r", *QUICK[2:]]
    assert call("fit", "imagenet", "--data", root, *words) == 0
    result = result_of("r")
    assert result["images"] == {"train": 4, "val": 4, "test": 6}
    assert result["new"]["classes"] == ["missile (n04008634)", "sunglasses"]
    mean = json_of(capsys, "evaluate", "r")["harmonic_mean"]
    assert mean == result["harmonic_mean"]["adapted"]


def test_what_is_refused(root, tmp_path, trees, capsys):
    before = trees.fingerprint(root)
    fit = ["fit", "caltech101", "--data", root]
    assert "did you mean 'caltech101'" in refused(capsys, "fit", "caltech11", "--data", root)
    assert "did you mean 'eurosat'" in refused(capsys, "data", "check", root, "eurosta")
    assert "data set caltech101 needs --data ROOT" in refused(capsys, "fit", "caltech101")
    assert "--data 'none' does not exist" in refused(capsys, "fit", "dtd", "--data", "none")
    assert "ROOT 'none' does not exist" in refused(capsys, "data", "check", "none")
    assert "unknown name 'chekc'; did you mean 'check'" in refused(capsys, "data", "chekc", root)
    assert "lies inside the source" in refused(capsys, *fit, "--out", root / "runs", *QUICK)
    assert "nothing is written below the data root" in refused(
        capsys, *fit, "--cache-dir", root / "cache", "--shots", "1", *QUICK
    )
    assert "--test-fraction must be left out" in refused(capsys, *fit, "--test-fraction", "0.3")
    assert "--train-encoders must be left out" in refused(
        capsys, *fit, "--method", "rada", "--train-encoders"
    )
    assert "the smallest has 6" in refused(capsys, *fit, *QUICK)  # 16 shots where none are named
    assert "shots must be at least 1" in refused(capsys, *fit, "--shots", "0", *QUICK)
    message = refused(capsys, "fit", "dtd", "--data", root, *QUICK)
    assert re.search(r"dtd: the folder .*root/dtd is missing; images: https://", message)
    lost = trees.split_file(root, "caltech101")
    lost.rename(tmp_path / lost.name)
    message = refused(capsys, *fit, *QUICK)
    assert f"{lost} is missing; official copy: https://" in message
    assert "no other split is made up" in message
    shutil.move(tmp_path / lost.name, lost)
    assert call("fit", "caltech101", "--data", root, "--shots", "1", "--out", "r", *QUICK) == 0
    assert "--ttt: SOURCE must be a folder of images" in refused(capsys, "evaluate", "r", "--ttt")
    rows = trees.read_rows(root, "caltech101")
    (SETS["caltech101"].image_root(root) / rows["test"][0][0]).unlink()
    message = refused(capsys, "evaluate", "r")
    assert "1 listed images are not there, first anchor/image_0028.jpg (no such file)" in message
    rows["test"].pop(0)
    trees.write_split(root, "caltech101", rows)
    assert "images have changed since the run was fitted" in refused(capsys, "evaluate", "r")
    again = json_of(capsys, "evaluate", "r", "caltech101", "--data", root)
    assert again["test"]["images"] == 11
    assert trees.fingerprint(root) != before


def test_data_check_says_what_a_run_would_meet(root, trees, capsys):
    assert call("data", "check", root) == 0
    lines = capsys.readouterr().out.splitlines()
    counts = "train 18, val 9, test 12; 3 classes; lists"
    assert re.fullmatch(rf"caltech101 +usable +{counts} [0-9a-f]{{12}} \(not official\)", lines[0])
    assert "train 18, not 4128" in lines[1]
    assert any(re.match(r" +sun397 +sun397: https://", line) for line in lines)
    report = json_of(capsys, "data", "check", root, "caltech101", "dtd", status=1)
    assert report["usable"] is False
    usable = {name: row["usable"] for name, row in report["sets"].items()}
    assert usable == {"caltech101": True, "dtd": False}
    row = report["sets"]["caltech101"]
    assert row["expected"] == {"train": 4128, "val": 1649, "test": 2465, "classes": 100}
    assert row["listed"] == {"train": 18, "val": 9, "test": 12, "classes": 3}
    assert row["lists"]["official"] is False
    assert len(row["lists"]["digest"]) == len(row["lists"]["official_digest"]) == 64
    rows = trees.read_rows(root, "caltech101")
    (SETS["caltech101"].image_root(root) / rows["val"][0][0]).unlink()
    assert call("data", "check", root) == 1
    assert "val 8 of 9" in capsys.readouterr().out


def test_data_check_of_an_empty_root(tmp_path, capsys):
    assert call("data", "check", tmp_path) == 1
    out = capsys.readouterr().out
    assert "there is no data set in" in out
    assert all(spec.folder in out for spec in SETS.values())
