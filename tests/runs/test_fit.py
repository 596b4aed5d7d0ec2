# SPDX-License-Identifier: Apache-2.0
"""`vtclip.fit` on people's own images: classes of any size, own test and validation images, the
last fit on all images, and the counts that it leaves.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pictures import noise
from tables import animal_features
from torch.nn import functional as F

import vtclip
from vtclip.data.npz import open_npz
from vtclip.runs.adapter import load_adapter
from vtclip.runs.class_counts import class_table
from vtclip.train.rows import split_rows

QUICK: dict[str, Any] = {"device": "cpu", "threads": 1}


def animals(path: Path, sizes: tuple[int, ...] = (24, 24, 24, 24), skip: int = 0) -> Path:
    """The table of features with so many images of each class, from the `skip`-th of each."""
    data = animal_features()
    rows = [np.flatnonzero(data["label"] == k)[skip:][:n] for k, n in enumerate(sizes)]
    keep = np.concatenate(rows)
    names = np.array([f"{k}-{i}" for k, own in enumerate(rows) for i in own])
    used = [k for k, n in enumerate(sizes) if n]
    label = np.array([used.index(k) for k in data["label"][keep]])
    np.savez(
        path,
        **{
            **{key: data[key] for key in ("temperature",)},
            "image": data["image"][keep],
            "spatial": data["spatial"][keep],
            "label": label,
            "fname": names,
            "text": data["text"][used],
            "classname": data["classname"][used],
        },
    )
    return path


def counts(run: vtclip.Run, name: str) -> tuple[int, int, int]:
    row = run.result["images_per_class"][name]
    return row["train"], row["val"], row["test"]


def test_a_small_class_takes_nothing_from_the_others(tmp_path, caplog):
    source = animals(tmp_path / "uneven.npz", (24, 3, 24, 1))
    run = vtclip.fit(source, method="proker", out=tmp_path / "run", **QUICK)
    assert counts(run, "ant") == counts(run, "cat") == (10, 2, 12)
    assert (counts(run, "bee"), counts(run, "dog")) == ((1, 1, 1), (1, 0, 0))
    assert run.result["shots"] == 16
    warned = [record.getMessage() for record in caplog.records]
    assert len(warned) == 1  # few images are the normal case where no number was named
    assert warned[0].startswith("1 of 4 classes has no test image")
    assert warned[0].endswith(": dog")
    caplog.clear()
    run = vtclip.fit(source, method="proker", shots=4, out=tmp_path / "four", **QUICK)
    assert [counts(run, name)[0] for name in ("ant", "bee", "cat", "dog")] == [4, 1, 4, 1]
    assert "shots 4: 2 of 4 classes train on fewer images: bee 1, dog 1" in caplog.text
    for folder in ("run", "four"):
        assert vtclip.evaluate(tmp_path / folder)["accuracy"] is not None
        assert vtclip.repeat(tmp_path / folder)["verdict"] == "MATCH"


def test_all_shots_are_all_that_do_not_validate(tmp_path):
    source = animals(tmp_path / "uneven.npz", (24, 6, 24, 24))
    run = vtclip.fit(source, method="rada", shots="all", out=tmp_path / "run", **QUICK)
    assert (counts(run, "ant"), counts(run, "bee")) == ((10, 2, 12), (2, 1, 3))
    assert (run.result["shots"], run.result["config"]["shots"]) == ("all", "all")
    assert vtclip.evaluate(run)["accuracy"] == run.accuracy
    again = vtclip.repeat(run)
    assert again["verdict"] == "MATCH"


def test_exact_shots_are_refused_where_a_class_has_fewer(tmp_path):
    source = animals(tmp_path / "uneven.npz", (24, 3, 24, 24))
    with pytest.raises(ValueError, match="class 'bee' has 2"):
        vtclip.fit(source, shots=4, exact_shots=True, out=tmp_path / "run", **QUICK)
    with pytest.raises(ValueError, match="shots must be named with exact_shots"):
        vtclip.fit(source, exact_shots=True, out=tmp_path / "run", **QUICK)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["uneven.npz"]


@pytest.mark.parametrize("method", ["rada", "proker", "vtclip"])
def test_test_and_validation_images_come_from_their_own_sources(tmp_path, method):
    source = animals(tmp_path / "train.npz", (12, 12, 12, 12))
    test = animals(tmp_path / "test.npz", (8, 8, 0, 8), skip=12)
    val = animals(tmp_path / "val.npz", (4, 4, 4, 4), skip=20)
    run = vtclip.fit(
        source, test=test, val=val, method=method, out=tmp_path / "run",
        overrides={"epochs": 2} if method != "proker" else None, **QUICK,
    )  # fmt: skip
    assert (counts(run, "ant"), counts(run, "cat")) == ((12, 4, 8), (12, 4, 0))
    config = run.result["config"]
    assert (config["test"], config["val"]) == (str(test), str(val))
    # the test images are those of the table, under the training source's labels
    adapter = load_adapter(run.folder)
    rows = open_npz(test, need_spatial=method == "vtclip")
    batch = rows.batch(torch.arange(len(rows)))
    logits = adapter.head(batch.image, batch.spatial)[:, [0, 1, 3]]
    every = adapter.head(batch.image, batch.spatial).argmax(dim=1)
    right = (every == torch.tensor([0, 1, 3])[batch.label]).double().mean()
    assert logits.shape == (24, 3)
    assert run.accuracy == pytest.approx(float(right))
    assert vtclip.evaluate(run)["accuracy"] == run.accuracy
    assert vtclip.repeat(run)["verdict"] == "MATCH"


def test_without_a_validation_source_some_of_the_training_images_validate(tmp_path):
    source = animals(tmp_path / "train.npz", (12, 12, 12, 2))
    test = animals(tmp_path / "test.npz", (8, 8, 8, 8), skip=12)
    run = vtclip.fit(source, test=test, test_fraction=0, method="proker", out=tmp_path / "run")
    assert (counts(run, "ant"), counts(run, "dog")) == ((10, 2, 8), (1, 1, 8))
    other = tmp_path / "renamed.npz"
    data = dict(np.load(test))
    data["classname"] = np.array(["ant", "bee", "cat", "dgo"])
    np.savez(other, **data)
    with pytest.raises(ValueError, match=r"^test: class 'dgo' is none .*; did you mean 'dog'\?$"):
        vtclip.fit(source, test=other, method="proker", out=tmp_path / "other", **QUICK)
    with pytest.raises(ValueError, match="test: .* is source as well"):
        vtclip.fit(source, test=source, method="proker", out=tmp_path / "other", **QUICK)
    with pytest.raises(ValueError, match="test: no such file or folder"):
        vtclip.fit(source, test=tmp_path / "gone", method="proker", out=tmp_path / "other")
    with pytest.raises(ValueError, match="test: an .npz table goes with another alone"):
        vtclip.fit(source, test=tmp_path, method="proker", out=tmp_path / "other")
    narrow = dict(np.load(test)) | {
        name: np.load(test)[name][..., :8] for name in ("image", "text", "spatial")
    }
    np.savez(tmp_path / "narrow.npz", **narrow)
    with pytest.raises(ValueError, match="test: its features have width 8, those of the training"):
        vtclip.fit(source, test=tmp_path / "narrow.npz", method="proker", out=tmp_path / "other")
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("method", ["proker", "linear-probe", "tip-adapter-f", "rada", "auto"])
def test_the_last_fit_keeps_the_numbers_and_takes_every_image(tmp_path, method):
    source = animals(tmp_path / "animals.npz")
    options: dict[str, Any] = {"method": method, "shots": 4, **QUICK}
    plain = vtclip.fit(source, out=tmp_path / "plain", **options)
    final = vtclip.fit(source, out=tmp_path / "final", final=True, **options)
    assert final.result["final"] == {"images": 96}
    assert final.result["adapted"] == plain.result["adapted"]
    assert "final" not in plain.result
    before, after = (load_adapter(run.folder) for run in (plain, final))
    assert (before.final, after.final) == (False, True)
    assert after.temperature == before.temperature
    if method == "proker":
        assert (before.head.num_support, after.head.num_support) == (16, 96)
        for name in ("alpha", "beta", "lam"):
            assert getattr(after.head, name) == getattr(before.head, name)
    if method == "auto":
        assert after.head.weights == before.head.weights
        assert after.head.members == before.head.members
    records = open_npz(source, need_spatial=True)
    split = split_rows(records, True, 4, 1, 0.5, "up to")
    batch = records.batch(split.test)
    with torch.no_grad():
        loss = [
            float(F.cross_entropy(adapter.head(batch.image, batch.spatial), batch.label))
            for adapter in (before, after)
        ]
    assert loss[0] == pytest.approx(plain.result["adapted"]["nll"], rel=1e-4)
    assert loss[1] < loss[0]  # it has seen them
    assert vtclip.repeat(final)["verdict"] == "MATCH"


def test_the_last_fit_is_refused_where_it_means_nothing(tmp_path):
    source = animals(tmp_path / "animals.npz")
    for options, message in (
        ({"method": "zeroshot"}, "learns nothing from images: final changes nothing"),
        ({"base_to_new": True}, "final cannot be combined with base_to_new"),
        ({"pseudo_labels": True, "method": "proker"}, "final cannot be combined with pseudo"),
    ):
        with pytest.raises(ValueError, match=message):
            vtclip.fit(source, final=True, out=tmp_path / "run", **options, **QUICK)
    assert not (tmp_path / "run").exists()


def test_folders_of_test_images_are_images_like_the_others(tmp_path, caplog):
    train = noise(tmp_path / "train", ("cat", "dog"), each=11)
    test, val = tmp_path / "test", tmp_path / "val"
    for name, number in [(name, number) for name in ("cat", "dog") for number in range(6, 11)]:
        if number < 9 or name == "dog":
            place = (test if number < 9 else val) / name
            place.mkdir(parents=True, exist_ok=True)
            (train / name / f"{number}.png").rename(place / f"{number}.png")
        else:
            (train / name / f"{number}.png").unlink()
    options = {"cache_dir": tmp_path / "cache", **QUICK}
    with caplog.at_level(logging.WARNING):
        run = vtclip.fit(
            train, test=test, val=val, method="proker", out=tmp_path / "run", **options
        )
    assert (counts(run, "cat"), counts(run, "dog")) == ((6, 0, 3), (6, 2, 3))
    assert "has no images of 1 of 2 classes: cat" in caplog.text
    assert vtclip.evaluate(run, cache_dir=tmp_path / "cache")["accuracy"] == run.accuracy
    assert vtclip.repeat(run, cache_dir=tmp_path / "cache")["verdict"] == "MATCH"


def test_a_run_of_one_image_per_class_needs_test_images_of_its_own(tmp_path):
    source = animals(tmp_path / "one.npz", (1, 1, 1, 1))
    with pytest.raises(ValueError, match="leaves no test images: name some as test SOURCE"):
        vtclip.fit(source, method="proker", out=tmp_path / "run", **QUICK)
    test = animals(tmp_path / "test.npz", (8, 8, 8, 8), skip=12)
    run = vtclip.fit(source, test=test, method="proker", out=tmp_path / "run", **QUICK)
    assert counts(run, "ant") == (1, 0, 8)
    assert run.result["adapted"]["temperature"] is None


def test_the_table_of_classes_is_aligned_and_short():
    few = {
        "ant": {"train": 12, "val": 3, "test": 15},
        "a long name": {"train": 1, "val": 0, "test": 0},
    }
    lines = class_table(few).splitlines()
    assert lines[0].split() == ["2", "classes", "train", "val", "test"]
    assert lines[2].split()[-3:] == ["1", "0", "0"]
    assert len({len(line) for line in lines}) == 1
    many = {f"c{k}": {"train": 20 - k % 7, "val": 4, "test": k} for k in range(50)}
    lines = class_table(many).splitlines()
    assert [line.split()[0] for line in lines[1:4]] == ["fewest", "median", "most"]
    assert lines[1].split()[1:] == ["14", "4", "0"]
    assert [line.split()[0] for line in lines[4:]] == ["c6", "c13", "c20"]
