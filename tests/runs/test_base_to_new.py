# SPDX-License-Identifier: Apache-2.0
"""Base-to-new: what is trained on, what is tested on, and among which classes."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commands import json_of, refused
from pictures import dots
from PIL import Image

import vtclip
from vtclip.cli import main
from vtclip.data.records import Records
from vtclip.data.splits import few_shot_split
from vtclip.heads import HEADS
from vtclip.runs.adapter import load_adapter
from vtclip.runs.base_to_new import base_and_new, harmonic_mean
from vtclip.runs.seen import Seen
from vtclip.train import engine, metrics

METHODS = ("rada", "vtclip", "zeroshot")
NAMES = ("ant", "bee", "cat", "dog", "eel")
PER_CLASS = 20


def arrays() -> dict[str, np.ndarray]:
    """Five classes; every image leans towards the next class, in the same way for all of them."""
    draw = np.random.default_rng(5)
    text = draw.standard_normal((5, 16)).astype(np.float32)
    text /= np.linalg.norm(text, axis=1, keepdims=True)
    label = np.repeat(np.arange(5), PER_CLASS)
    # rows of all classes mixed, so that a row number does not tell its class
    label = label[draw.permutation(len(label))]
    noise = 0.15 * draw.standard_normal((len(label), 16)).astype(np.float32)
    spatial = 0.2 * draw.standard_normal((len(label), 4, 16)).astype(np.float32)
    spatial[:, 0] += text[label]
    return {
        "image": text[label] + 0.9 * text[(label + 1) % 5] + noise,
        "label": label,
        "text": text,
        "spatial": spatial,
        "classname": np.array(NAMES),
        "temperature": np.float32(3.0),
    }


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("source") / "animals.npz"
    np.savez(path, **arrays())
    return path


@pytest.fixture(scope="module")
def run(source: Path, tmp_path_factory: pytest.TempPathFactory) -> vtclip.Run:
    """RAda on the base classes."""
    out = tmp_path_factory.mktemp("runs") / "run"
    return vtclip.fit(source, method="rada", shots=4, base_to_new=True, out=out, device="cpu")


def rows(label: np.ndarray, classes: range, **options: Any) -> Any:
    """The split of all rows with only the rows of `classes`."""
    split = few_shot_split(
        torch.from_numpy(label), [str(i) for i in range(len(label))], seed=1, **options
    )
    keep = {
        role: [i for i in getattr(split, role).tolist() if label[i] in classes]
        for role in ("train", "val", "test")
    }
    return keep


@pytest.mark.parametrize(("classes", "base"), [(2, 1), (3, 2), (4, 2), (5, 3)])
def test_the_first_half_by_label_is_base_and_the_larger_one(classes, base):
    label = torch.arange(classes).repeat(3)
    text, names = torch.eye(8)[:classes], [f"class {k}" for k in range(classes)]
    records = Records.from_tensors(torch.ones(len(label), 8), label, text, names)
    one, two = base_and_new(records)
    assert (one.class_names, two.class_names) == (names[:base], names[base:])
    assert torch.equal(torch.cat([one.text, two.text]), records.text)
    assert [int(part.label.max()) + 1 for part in (one, two)] == [base, classes - base]
    assert sorted(one.names + two.names) == sorted(records.names)


def test_no_image_of_a_new_class_and_no_test_image_is_trained_on(source, tmp_path, monkeypatch):
    """Rows of the file, as the store is asked for them, before and after the training ends."""
    from vtclip.data.records import MemoryStore

    asked: list[int] = []
    trained_on: list[int] = []
    real, training = MemoryStore.image, engine.train_head

    def image(self: MemoryStore, row: torch.Tensor, augment_pass: int) -> Any:
        asked.extend(row.tolist())
        return real(self, row, augment_pass)

    def fit(*args: Any, **options: Any) -> None:
        training(*args, **options)
        trained_on.extend(asked)

    monkeypatch.setattr(MemoryStore, "image", image)
    monkeypatch.setattr(engine, "train_head", fit)
    result = vtclip.fit(
        source, method="rada", shots=4, base_to_new=True, overrides={"epochs": 2},
        out=tmp_path / "r", device="cpu",
    ).result  # fmt: skip
    label = arrays()["label"]
    base, new = rows(label, range(3), shots=4), rows(label, range(3, 5), shots=4)
    assert set(trained_on) == {*base["train"], *base["val"]}
    after = asked[len(trained_on) :]
    pool = {*base["val"]}
    assert {row for row in after if row not in pool} == {*base["test"], *new["test"]}
    # once for zero-shot and once for the adapted head
    assert all(asked.count(row) == 2 for row in (*base["test"], *new["test"]))
    assert result["images"] == {"train": 12, "val": 12, "test": 30}
    assert result["new"]["adapted"]["count"] == 20


@pytest.mark.parametrize("method", METHODS)
def test_numbers_of_either_half_agree_with_a_count_by_hand(source, tmp_path, method):
    overrides = {} if method == "zeroshot" else {"epochs": 3}
    found = vtclip.fit(
        source, method=method, shots=4, base_to_new=True, overrides=overrides,
        out=tmp_path / "r", device="cpu",
    )  # fmt: skip
    adapter, data = load_adapter(tmp_path / "r"), arrays()
    assert adapter.class_names == list(NAMES[:3])
    image, spatial = torch.from_numpy(data["image"]), torch.from_numpy(data["spatial"])
    seen = {}
    for part, classes in (("base", range(3)), ("new", range(3, 5))):
        text = torch.from_numpy(data["text"][classes.start : classes.stop])
        index = torch.tensor(rows(data["label"], classes, shots=4)["test"])
        label = torch.from_numpy(data["label"])[index] - classes.start
        for name, head in (
            ("adapted", adapter.head.with_text(text)),
            ("zero_shot", HEADS["zeroshot"](text, logit_scale=np.exp(3.0))),
        ):
            with torch.no_grad():
                logits = head(image[index], spatial[index])
            values = found.result[part][name]
            assert values["accuracy"] == pytest.approx(metrics.accuracy(logits, label))
            assert values["nll"] == pytest.approx(metrics.nll(logits, label), rel=1e-5)
            assert list(values["per_class"]) == list(NAMES[classes.start : classes.stop])
            seen[part, name] = metrics.accuracy(logits, label)
    for name in ("zero_shot", "adapted"):
        b, n = seen["base", name], seen["new", name]
        assert found.result["harmonic_mean"][name] == pytest.approx(2 / (1 / b + 1 / n))
    for name in ("zero_shot", "adapted"):
        assert found.result[name] == found.result["base"][name]
    assert found.accuracy == found.result["base"]["adapted"]["accuracy"]


def test_the_harmonic_mean_of_nothing_is_nothing():
    assert harmonic_mean(0.0, 0.0) == 0
    assert harmonic_mean(0.0, 0.9) == 0
    assert harmonic_mean(0.5, 0.5) == pytest.approx(0.5)
    assert harmonic_mean(1.0, 0.5) == pytest.approx(2 / 3)


def test_the_table_shows_both_halves(source, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["--method", "rada", "--shots", "2", "--epochs", "2", "--device", "cpu"]
    assert main(["fit", str(source), "--base-to-new", *words]) == 0
    out = capsys.readouterr().out
    assert "3 classes, 6 training, 6 validation and 30 test images" in out
    assert "new: 2 classes, 20 test images" in out
    for name in ("base zero-shot", "base rada", "new zero-shot", "new rada"):
        assert re.search(rf"^{name} +\d+\.\d\d %", out, re.M)
    assert re.search(r"^harmonic mean .*: zero-shot \d+\.\d\d %, rada \d+\.\d\d %$", out, re.M)
    assert (tmp_path / "runs" / "animals-rada-base-to-new-2shot-seed1" / "result.json").is_file()
    # the whole task has a folder of its own
    assert main(["fit", str(source), *words]) == 0


def test_evaluating_the_run_again_gives_its_numbers(source, run, capsys):
    for words in ([], [str(source)]):
        values = json_of(capsys, "evaluate", run.folder, *words)
        for part in ("base", "new"):
            assert values[part] == run.result[part]["adapted"]
        assert values["harmonic_mean"] == run.result["harmonic_mean"]["adapted"]
        assert values["test"]["images"] == 50
    assert main(["evaluate", str(run.folder)]) == 0
    out = capsys.readouterr().out
    assert re.search(r"^base +\d+\.\d\d %", out, re.M)
    assert re.search(r"^new +\d+\.\d\d %", out, re.M)
    assert "harmonic mean" in out


def other_source(path: Path, classes: list[int]) -> Path:
    """Other pictures of some classes, in the given order of classes."""
    data = arrays()
    keep = np.isin(data["label"], classes)
    data["image"] = data["image"][keep] + np.float32(0.01)
    data["spatial"] = data["spatial"][keep]
    data["label"] = np.array([classes.index(k) for k in data["label"][keep]])
    data["text"], data["classname"] = data["text"][classes], data["classname"][classes]
    np.savez(path, **data)
    return path


def test_another_source_is_told_apart_by_the_names_of_its_classes(run, tmp_path):
    both = vtclip.evaluate(run, other_source(tmp_path / "both.npz", [4, 1, 0, 3]), device="cpu")
    assert both["base"]["count"] + both["new"]["count"] == both["test"]["images"] == 80
    assert list(both["new"]["per_class"]) == ["dog", "eel"]
    again = vtclip.evaluate(run, other_source(tmp_path / "sorted.npz", [0, 1, 3, 4]), device="cpu")
    for part in ("base", "new"):
        assert again[part]["per_class"] == pytest.approx(both[part]["per_class"], nan_ok=True)
    base = vtclip.evaluate(run, other_source(tmp_path / "base.npz", [2, 0]), device="cpu")
    assert "new" not in base
    assert "harmonic_mean" not in base
    assert base["base"]["count"] == 40
    new = vtclip.evaluate(run, other_source(tmp_path / "new.npz", [3, 4]), device="cpu")
    assert "base" not in new
    assert new["new"]["per_class"] == pytest.approx(both["new"]["per_class"])


def test_bad_base_to_new_is_one_line_and_writes_nothing(source, run, tmp_path, capsys, monkeypatch):
    one = other_source(tmp_path / "one.npz", [2])
    half = other_source(tmp_path / "half.npz", [0, 3])
    monkeypatch.chdir(tmp_path)
    files = sorted(tmp_path.rglob("*"))

    fit = ["fit", one, "--method", "rada", "--base-to-new"]
    for shots in ([], ["--shots", "2"]):
        assert "must have at least 2 classes, got 1" in refused(capsys, *fit, *shots)
    assert "must have all new classes or none, 'eel' is missing" in refused(
        capsys, "evaluate", run.folder, half
    )
    with pytest.raises(ValueError, match="method must be one of .*rada.* got 'proker'"):
        vtclip.fit(source, method="proker", base_to_new=True)
    assert sorted(tmp_path.rglob("*")) == files


def test_copies_of_base_images_do_not_test_new_classes(tmp_path, caplog):
    photos = dots(tmp_path / "photos")
    options: dict[str, Any] = {"base_to_new": True, "shots": 2, "method": "rada",
                               "overrides": {"epochs": 1}, "cache_dir": tmp_path / "cache",
                               "device": "cpu"}  # fmt: skip
    first = vtclip.fit(photos, out=tmp_path / "one", **options)
    seen = Seen.read(first.folder, first.result["seen"])
    new = first.result["new"]["classes"]
    of_role = {role: name for name, role in zip(seen.names, seen.roles, strict=True)}
    tested = [name for name, label, role in zip(seen.names, seen.labels, seen.roles, strict=True)
              if role == "test" and label in new]  # fmt: skip
    shutil.copy(photos / of_role["train"], photos / tested[0])
    with Image.open(photos / of_role["val"]) as image:  # the same pixels in another file
        image.save(photos / tested[1], compress_level=0)
    caplog.clear()
    second = vtclip.fit(photos, out=tmp_path / "two", **options)
    assert "2 test images of new classes have the content of images of base classes" in caplog.text
    assert second.result["left_out"] == {"trained": 1, "validated": 1}
    assert second.result["new"]["adapted"]["count"] == len(tested) - 2
    again = vtclip.evaluate(second, cache_dir=tmp_path / "cache", device="cpu")
    for part in ("base", "new"):
        assert again[part] == second.result[part]["adapted"]
    assert (again["left_out"]["gone"], again["left_out"]["repeated"]) == (0, 0)
    assert vtclip.repeat(second, cache_dir=tmp_path / "cache")["verdict"] == "MATCH"
    with pytest.raises(ValueError, match="2 test images of new classes .* strict refuses"):
        vtclip.fit(photos, out=tmp_path / "three", strict=True, **options)
    assert not (tmp_path / "three").exists()
