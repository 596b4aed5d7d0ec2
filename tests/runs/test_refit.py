# SPDX-License-Identifier: Apache-2.0
"""Runs whose head is fitted once more, on training and validation images: what changes, what not.

tests/runs/test_audit.py shows that nothing of a test image reaches such an adapter.
"""

from __future__ import annotations

import json
import shutil
import signal
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commands import call, json_of, refused
from pictures import dots, noise
from sealing import as_older, opened
from tables import animal_features

import vtclip
from vtclip.bench.jobs import path_sources
from vtclip.bench.run import run_bench
from vtclip.data.npz import open_npz
from vtclip.distributed import Interrupted
from vtclip.heads import HEADS
from vtclip.runs import fit as fit_module
from vtclip.runs.adapter import load_adapter
from vtclip.runs.predictions import read_predictions
from vtclip.runs.repeat import request_of
from vtclip.runs.result import RESULT, Run
from vtclip.runs.seen import Seen
from vtclip.train.fit_head import refit_head, refit_rows
from vtclip.train.rows import split_rows
from vtclip.train.steps import TrainingRun

CPU = torch.device("cpu")
# of 8 pictures of each of 3 classes 4 test; of the other 4, 2 train and 2 validate
SHOTS, IMAGES = 2, 12


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures, and a run on them with each of the two choices: "first" and "again"."""
    root = tmp_path_factory.mktemp("refit")
    dots(root / "dots")
    for name, refit in ("first", False), ("again", None):
        vtclip.fit(root / "dots", refit=refit, out=root / name, **options(root))
    return root


def options(root: Path, **more: Any) -> dict[str, Any]:
    usual = {"method": "proker", "shots": SHOTS, "cache_dir": root / "cache", "device": "cpu"}
    return {**usual, **more}


def config_of(folder: Path) -> Any:
    return json.loads((folder / "adapter_config.json").read_text())


def lines_of(folder: Path, role: str) -> list[dict[str, str]]:
    return [row for row in read_predictions(folder / "predictions.csv") if row["role"] == role]


def table(path: Path, **more: Any) -> Path:
    np.savez(path, **{**animal_features(lean=1.0), **more})
    return path


def test_a_folder_is_refit_and_only_test_numbers_and_the_head_change(place):
    first, again = (Run.load(place / name).result for name in ("first", "again"))
    assert (first["config"]["refit"], again["config"]["refit"]) == (False, True)
    assert "refit" not in first
    assert again["refit"] == {"images": IMAGES}
    assert again["seconds"]["refit"] >= 0
    for name in ("images", "split", "zero_shot", "images_per_class"):
        assert again[name] == first[name]
    assert again["adapted"]["temperature"] == first["adapted"]["temperature"]
    assert again["adapted"]["nll"] != first["adapted"]["nll"]
    before, after = (config_of(place / name) for name in ("first", "again"))
    assert before["calibration"] == after["calibration"] is not None
    assert before["temperature"] == after["temperature"]
    assert {**before["options"], "num_support": IMAGES} == after["options"]
    assert lines_of(place / "first", "val") == lines_of(place / "again", "val") != []
    assert lines_of(place / "first", "test") != lines_of(place / "again", "test")


def test_the_numbers_are_those_of_the_saved_head(place):
    found = vtclip.evaluate(place / "again", cache_dir=place / "cache", device="cpu")
    result = Run.load(place / "again").result
    for name in ("accuracy", "nll", "nll_scaled", "temperature", "per_class"):
        assert found[name] == result["adapted"][name]
    assert vtclip.repeat(place / "again", cache_dir=place / "cache")["verdict"] == "MATCH"
    assert vtclip.repeat(place / "first", cache_dir=place / "cache")["verdict"] == "MATCH"


def test_its_validation_images_have_trained_and_never_count(place, capsys):
    run = Run.load(place / "again")
    seen = Seen.read(run.folder, run.result["seen"])
    assert seen.counts() == {"train": IMAGES, "val": 0, "test": 12, "unused": 0}
    assert run.result["seen"]["images"] == seen.counts()
    first = Run.load(place / "first").result["seen"]["images"]
    assert first == {"train": 6, "val": 6, "test": 12, "unused": 0}
    words = ["evaluate", place / "again", place / "dots", "--cache-dir", place / "cache"]
    values = json_of(capsys, *words)
    assert values["test"]["images"] == 12
    assert (values["left_out"]["trained"], values["left_out"]["validated"]) == (IMAGES, 0)


def test_it_is_said_once_with_its_images(place, tmp_path, capsys):
    words = ["fit", place / "dots", "--method", "proker", "--shots", SHOTS, "--device", "cpu"]
    words += ["--cache-dir", place / "cache"]
    assert call(*words, "--out", tmp_path / "run") == 0
    said = "refit on 2 shots + 2 validation images per class (12 images) with the chosen settings"
    assert capsys.readouterr().out.count(f"{said}; --no-refit keeps the first fit\n") == 1
    assert call(*words, "--no-refit", "--out", tmp_path / "first") == 0
    assert "refit" not in capsys.readouterr().out
    source = table(tmp_path / "t.npz")
    words = ["fit", source, "--method", "proker", "--shots", 4, "--device", "cpu"]
    assert call(*words, "--refit", "--out", tmp_path / "table") == 0
    said = "refit on 4 shots + 4 validation images per class (32 images, more than the 4 shots that"
    assert said in capsys.readouterr().out


@pytest.mark.parametrize("method", ["proker", "takl", "tip-adapter-f", "rada"])
def test_it_is_the_head_of_the_same_settings_on_both_kinds_of_images(method, tmp_path):
    source = table(tmp_path / "t.npz")
    quick = {"epochs": 3} if HEADS[method].recipe(4).epochs else None
    made: dict[str, Any] = {"method": method, "shots": 4, "overrides": quick, "device": "cpu"}
    first = vtclip.fit(source, out=tmp_path / "first", **made)
    assert first.result["config"]["refit"] is False  # k shots of a table are k shots
    again = vtclip.fit(source, refit=True, out=tmp_path / "again", **made)
    records = open_npz(source, need_spatial=HEADS[method].needs_spatial)
    rows = refit_rows(split_rows(records, True, 4, 1, 0.5, "up to"))
    chosen = load_adapter(first.folder).head
    config = request_of(first.result).settings(4)
    expected = refit_head(chosen, records, rows, config, TrainingRun(CPU, 1, balanced=True))
    saved = load_adapter(again.folder).head
    assert saved.options() == expected.options()
    for name, value in expected.state_dict().items():
        assert torch.equal(saved.state_dict()[name], value)
    assert vtclip.repeat(again)["verdict"] == "MATCH"


def test_a_pool_keeps_members_weights_and_temperatures(tmp_path, monkeypatch):
    monkeypatch.setattr("vtclip.train.auto.CANDIDATES", ("zeroshot", "proker", "takl"))
    source = table(tmp_path / "t.npz")
    heads: list[Any] = []
    for name, refit in ("first", False), ("again", True):
        run = vtclip.fit(source, shots=4, refit=refit, out=tmp_path / name, device="cpu")
        heads.append(load_adapter(run.folder).head)
    first, again = heads
    assert first.members == again.members
    assert (first.weights, first.temperatures) == (again.weights, again.temperatures)
    assert (first.pool, first.sharpness) == (again.pool, again.sharpness)
    sizes = [[member.num_support for member in head.member_heads if hasattr(member, "num_support")]
             for head in heads]  # fmt: skip
    assert sizes[0]
    assert [2 * size for size in sizes[0]] == sizes[1]
    assert (
        config_of(tmp_path / "first")["calibration"] == config_of(tmp_path / "again")["calibration"]
    )


@pytest.mark.parametrize(
    ("more", "refit"),
    [
        ({}, True),
        ({"shots": "all"}, True),
        ({"method": "zeroshot"}, False),
        ({"exact_shots": True}, False),
        ({"exact_shots": True, "refit": True}, True),
        ({"pseudo_labels": True}, False),
        ({"base_to_new": True, "method": "clip-adapter", "overrides": {"epochs": 1}}, False),
        ({"test_fraction": 0.8, "shots": 1}, True),
        ({"test_fraction": 0.9}, False),  # one image beside the test, which trains
    ],
)
def test_where_it_is_on_by_itself(place, more, refit, tmp_path):
    run = vtclip.fit(place / "dots", out=tmp_path / "run", **options(place, **more))
    assert run.result["config"]["refit"] is refit
    assert ("refit" in run.result) is refit
    if refit:
        counts = run.result["images"]
        assert run.result["refit"]["images"] == counts["train"] + counts["val"]


def test_features_folders_are_images_of_ones_own_and_data_sets_are_not(place, tmp_path, trees):
    assert call("features", place / "dots", "--out", tmp_path / "features",
                "--cache-dir", place / "cache") == 0  # fmt: skip
    run = vtclip.fit(tmp_path / "features", out=tmp_path / "run", **options(place))
    assert run.result["refit"] == {"images": IMAGES}
    root = trees.make_split(tmp_path / "root", "caltech101")
    usual = {**options(tmp_path, shots=1), "data": root}
    for refit in None, True:
        run = vtclip.fit("caltech101", refit=refit, out=tmp_path / str(refit), **usual)
        assert ("refit" in run.result) is bool(refit)


def test_more_validation_than_training_images_are_left_out_and_that_is_said(
    place, tmp_path, caplog
):
    files = [{"path": str(path), "label": path.parent.name, "split": "val" if k % 8 > 2 else "test"}
             for k, path in enumerate(sorted((place / "dots").glob("*/*.png")))]  # fmt: skip
    for row, k in zip(files, range(len(files)), strict=True):
        row["split"] = "train" if k % 8 == 0 else row["split"]
    (tmp_path / "list.jsonl").write_text("".join(json.dumps(row) + "\n" for row in files))
    run = vtclip.fit(tmp_path / "list.jsonl", out=tmp_path / "run", **options(place))
    assert run.result["images"] == {"train": 3, "val": 15, "test": 6}
    assert "refit" not in run.result
    said = [line for line in caplog.messages if "whose number, 15, is above the 3 training" in line]
    assert len(said) == 1
    more = options(place, refit=True)
    run = vtclip.fit(tmp_path / "list.jsonl", out=tmp_path / "more", **more)
    assert run.result["refit"] == {"images": 18}


def test_it_is_refused_where_it_has_no_meaning(place, tmp_path, capsys):
    both = {"path": str(place / "dots" / "red dot" / "0.png"), "label": ["red dot", "blue dot"]}
    rows = [{**both, "path": str(path)} for path in (place / "dots").glob("*/*.png")]
    (tmp_path / "two.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["fit", tmp_path / "two.jsonl", "--method", "clip-adapter", "--out", tmp_path / "run"]
    assert "--refit: " in (line := refused(capsys, *words, "--refit"))
    assert "has several labels per image, and it takes one only" in line
    source = table(tmp_path / "t.npz")
    words = ["fit", source, "--method", "proker", "--shots", 1, "--test-fraction", 0.99]
    line = refused(capsys, *words, "--refit", "--out", tmp_path / "run")
    assert f"--refit: {source} gives no validation image" in line
    assert not (tmp_path / "run").exists()


def test_a_benchmark_never_does_it(place, tmp_path):
    assert call("features", place / "dots", "--out", tmp_path / "features",
                "--cache-dir", place / "cache") == 0  # fmt: skip
    for source in (tmp_path / "features", place / "dots"):
        out = tmp_path / f"bench of {source.name}"
        from vtclip.bench.jobs import Settings

        sources = path_sources([source], Settings())
        done = run_bench(sources, out, methods=["proker"], shots=[2], seeds=[1],
                         cache_dir=place / "cache", device="cpu")  # fmt: skip
        assert done.finished == 1
        (run,) = (out / "runs").iterdir()
        result = Run.load(run).result
        assert result["config"]["refit"] is False
        assert "refit" not in result
        head: Any = load_adapter(run).head
        assert head.num_support == 2 * 3


def test_the_last_fit_builds_on_the_same_choice(place, tmp_path):
    """The adapter is the same; the numbers are those of the head before it, which is the refit."""
    runs = {}
    for name, refit in ("first", False), ("again", True):
        more = options(place, final=True, refit=refit)
        runs[name] = vtclip.fit(place / "dots", out=tmp_path / name, **more)
    digests = [run.result["digests"]["adapter"] for run in runs.values()]
    assert digests[0] == digests[1]
    for name, run in runs.items():
        plain = Run.load(place / name).result
        assert run.result["adapted"] == plain["adapted"]
        assert config_of(run.folder)["calibration"] is None
        assert run.result["seen"]["images"]["train"] == 24
    assert runs["again"].result["refit"] == {"images": IMAGES}


@pytest.mark.parametrize("method", ["proker", "rada"])
def test_a_run_that_is_killed_in_between_is_finished_by_resume(
    method, place, tmp_path, monkeypatch
):
    quick = {"epochs": 3} if method == "rada" else None
    more = options(place, method=method, overrides=quick)
    whole = vtclip.fit(place / "dots", out=tmp_path / "whole", **more)

    def stopped(*_: Any, **__: Any) -> None:
        raise Interrupted(signal.SIGTERM, 1, None)

    left = "state saved in .*checkpoint.safetensors" if method == "rada" else "nothing was saved"
    with monkeypatch.context() as patch:
        patch.setattr(fit_module, "refit_head", stopped)
        with pytest.raises(Interrupted, match=f"^stopped by SIGTERM after step 1; {left}$"):
            vtclip.fit(place / "dots", out=tmp_path / "run", **more)
    assert not (tmp_path / "run" / RESULT).exists()
    run = vtclip.fit(place / "dots", out=tmp_path / "run", resume=True, **more)
    assert run.result["digests"] == whole.result["digests"]
    assert run.result["adapted"] == whole.result["adapted"]
    if method == "rada":
        for folder in (tmp_path / "whole", tmp_path / "run"):
            rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
            assert Counter(row.get("stage") for row in rows) == {None: 3, "refit": 3}
    # a finished run is returned, whichever way it went, unless another way is asked for
    assert (
        vtclip.fit(place / "dots", out=tmp_path / "run", resume=True, **more).result == run.result
    )
    with pytest.raises(ValueError, match="holds a finished run with another refit"):
        vtclip.fit(place / "dots", out=tmp_path / "run", resume=True, refit=False, **more)


def test_a_run_from_before_it_is_repeated_without_it(place, tmp_path):
    folder = Path(shutil.copytree(place / "first", tmp_path / "old"))
    as_older(folder / RESULT, lambda result: result["config"].pop("refit"))
    result = opened(folder / RESULT)
    assert request_of(result).refit is False
    assert vtclip.repeat(folder, cache_dir=place / "cache")["verdict"] == "MATCH"
    assert vtclip.fit(place / "dots", out=folder, resume=True, **options(place)).result == result


def test_new_classes_keep_their_validation_images_too(place, tmp_path):
    noise(tmp_path / "new", ["eel"], 8)
    kept = {}
    for name in ("first", "again"):
        run = vtclip.extend(place / name, tmp_path / "new", out=tmp_path / name,
                            cache_dir=place / "cache", device="cpu")  # fmt: skip
        head: Any = load_adapter(run.folder).head
        kept[name] = torch.bincount(head.label).tolist()
        assert run.result["seen"]["images"]["test"] == 12 + 4
    assert kept == {"first": [2, 2, 2, 2], "again": [4, 4, 4, 4]}
