# SPDX-License-Identifier: Apache-2.0
"""docs/run_files.md names every file and every key that runs of all kinds leave behind."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pictures import noise

import vtclip

PAGE = (Path(__file__).parents[2] / "docs" / "run_files.md").read_text(encoding="utf-8")
BY_NAME = {  # keys whose values are named by classes, stages, libraries or tensors
    *(
        "per_class",
        "images_per_class",
        "seconds",
        "memory_mb",
        "versions",
        "digests",
        "environment",
    ),
    *("extension", "extended_from", "head", "features", "tensors", "calibration", "options"),
}
QUICK = {"method": "proker", "shots": 2, "device": "cpu"}


def section(title: str) -> set[str]:
    """Every word in backticks below a heading."""
    (text,) = re.findall(rf"^#+ {re.escape(title)}\n(.*?)(?=^#|\Z)", PAGE, re.M | re.S)
    return set(re.findall(r"`([\w.]+)`", text))


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, vtclip.Run]:
    """One run of each kind, of drawn pictures."""
    folder = tmp_path_factory.mktemp("runs")
    photos = noise(folder / "photos", ("ant", "bee", "cat", "dog", "eel"), 8)
    more = (photos / "eel").rename(folder / "eel")
    common = {**QUICK, "source": photos}

    def fit(name: str, **settings: Any) -> vtclip.Run:
        return vtclip.fit(**{**common, **settings, "out": folder / name})

    made = {
        "auto": fit("auto", method="auto"),
        "final": fit("final", final=True),
        "together": fit("together", unlabelled="test"),
        "halves": fit("halves", base_to_new=True, method="rada", overrides={"epochs": 1}),
        "trained": fit("trained", method="clip-adapter", overrides={"epochs": 1}),
    }
    made["extended"] = vtclip.extend(made["together"], more, out=folder / "extended")
    return made


def keys(value: Any, inside: str = "") -> Iterator[tuple[str, str]]:
    """(the key above, key) of all dictionaries that are not by name."""
    if isinstance(value, dict) and inside not in BY_NAME:
        for key, below in value.items():
            yield inside, key
            yield from keys(below, key)
    elif isinstance(value, list):
        for below in value:
            yield from keys(below, inside)


def test_every_key_of_every_kind_of_run_is_documented(runs):
    known = section("result.json") | section("Metrics") | section("config")
    known |= {"zero_shot", "adapted"}
    missing = set()
    for run in runs.values():
        written = json.loads((run.folder / "result.json").read_text())
        missing |= {f"{above}.{key}" for above, key in keys(written) if key not in known}
    assert not missing


def test_every_key_of_an_adapter_is_documented(runs):
    known = section("adapter_config.json")
    for run in runs.values():
        assert set(json.loads((run.folder / "adapter_config.json").read_text())) <= known


def test_every_file_and_column_is_documented(runs):
    text = section("Results and files of a run")
    for run in runs.values():
        assert {path.name for path in run.folder.iterdir()} <= text
    with (runs["trained"].folder / "images.csv").open(newline="") as file:
        assert (
            {"file", "label", "role"}
            <= set(next(csv.reader(file)))
            <= text | {*("digest", "pixels", "perceptual")}
        )
    lines = (runs["auto"].folder / "log.jsonl").read_text().splitlines()
    assert lines
    for line in lines:
        assert set(json.loads(line)) <= text
