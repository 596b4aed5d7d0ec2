# SPDX-License-Identifier: Apache-2.0
"""The callback of a fit: what it is told, what it cannot change, and what its error leaves."""

from __future__ import annotations

import json
import traceback
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tables
import torch
from safetensors.torch import load_file

import vtclip
from vtclip.runs.folder import CHECKPOINT, LOG
from vtclip.runs.result import RESULT

OPTIONS: dict[str, Any] = {
    "method": "clip-adapter",
    "shots": 4,
    "device": "cpu",
    "refit": True,
    "overrides": {"epochs": 4, "checkpoint_every": 1},
}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("table") / "animals.npz"
    features = tables.animal_features()
    np.savez(path, **{name: features[name] for name in features if name != "spatial"})
    return path


@pytest.fixture(scope="module")
def plain(source: Path, tmp_path_factory: pytest.TempPathFactory) -> vtclip.Run:
    return vtclip.fit(source, out=tmp_path_factory.mktemp("plain") / "run", **OPTIONS)


def numbers(run: vtclip.Run) -> tuple[Any, ...]:
    tensors = load_file(run.folder / "adapter.safetensors")
    same = ("zero_shot", "adapted", "split", "digests", "confusion", "predictions")
    return {name: value.tolist() for name, value in tensors.items()}, [run.result[n] for n in same]


def test_it_is_told_each_row_of_the_log_and_changes_nothing(source, plain, tmp_path):
    rows: list[dict[str, Any]] = []

    def told(row: dict[str, Any]) -> None:
        rows.append(dict(row))
        torch.rand(1000)  # would move the draws of what is trained after it
        torch.manual_seed(5)
        row.clear()

    run = vtclip.fit(source, out=tmp_path / "run", on_metrics=told, **OPTIONS)
    assert numbers(run) == numbers(plain)
    logged = [json.loads(line) for line in (run.folder / LOG).read_text().splitlines()]
    assert [{name: row[name] for name in row if name != "time"} for row in logged] == rows
    first = [row for row in rows if "stage" not in row]
    assert [row["epoch"] for row in first] == [0, 1, 2, 3]
    assert {"step", "lr", "loss", "seconds", "val_accuracy", "val_nll"} <= set(first[0])
    assert {type(value) for value in first[0].values()} <= {int, float}
    assert [row["epoch"] for row in rows if row.get("stage") == "refit"] == [0, 1, 2, 3]


def test_its_error_stops_the_run_as_a_kill_would_and_resume_goes_on(source, plain, tmp_path):
    class Mine(Exception):
        pass

    def stops(row: dict[str, Any]) -> None:
        if row["epoch"] == 1:
            raise Mine("enough")

    with pytest.raises(Mine, match="enough") as caught:
        vtclip.fit(source, out=tmp_path / "run", on_metrics=stops, **OPTIONS)
    assert "stops" in [frame.name for frame in traceback.extract_tb(caught.tb)]
    left = {path.name for path in (tmp_path / "run").iterdir()}
    assert {CHECKPOINT, LOG} <= left
    assert RESULT not in left
    seen: list[int] = []
    run = vtclip.fit(
        source,
        out=tmp_path / "run",
        resume=True,
        on_metrics=lambda row: seen.append(row["epoch"]),
        **OPTIONS,
    )
    assert seen[:2] == [2, 3]
    assert numbers(run) == numbers(plain)


def test_members_of_auto_are_named(source, tmp_path):
    names = set()
    vtclip.fit(
        source,
        method="auto",
        shots=2,
        out=tmp_path / "run",
        on_metrics=lambda row: names.add(row["candidate"]),
    )
    assert "clip-adapter" in names


def test_what_cannot_be_called_is_refused_before_the_work(source, tmp_path):
    with pytest.raises(TypeError, match="on_metrics must be callable, got int"):
        vtclip.fit(source, out=tmp_path / "run", on_metrics=3, **OPTIONS)
    assert not (tmp_path / "run").exists()
