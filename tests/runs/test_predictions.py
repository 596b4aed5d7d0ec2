# SPDX-License-Identifier: Apache-2.0
"""predictions.csv, the confusion matrix and its picture, and the scores that a run keeps."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commands import call, json_of, refused
from hypothesis import given, settings
from hypothesis import strategies as st
from pictures import noise
from PIL import Image
from tables import ANIMALS, animal_features

import vtclip
from vtclip.files import escape, unescape
from vtclip.runs.adapter import load_adapter
from vtclip.runs.confusion import confused_pairs, draw_confusion
from vtclip.runs.predictions import (
    confused_line,
    confusion_counts,
    confusion_of,
    read_predictions,
)
from vtclip.train import conformal, engine

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def run(npz: Path, tmp_path_factory: pytest.TempPathFactory) -> vtclip.Run:
    out = tmp_path_factory.mktemp("predictions") / "run"
    return vtclip.fit(npz, method="proker", shots=4, out=out, device="cpu")


@pytest.fixture(scope="module")
def table(run: vtclip.Run) -> list[dict[str, str]]:
    return read_predictions(run.folder / "predictions.csv")


def test_every_validation_and_test_image_has_a_line(run, table, npz):
    images = run.result["images"]
    roles = [row["role"] for row in table]
    assert roles == ["val"] * images["val"] + ["test"] * images["test"]
    assert len({row["file"] for row in table}) == len(table)
    records = vtclip.open_source(npz)
    adapter = load_adapter(run.folder)
    index = torch.tensor([records.names.index(row["file"]) for row in table])
    logits, label = engine.all_logits(adapter.head, records, index, device=CPU)
    probs = (logits.double() / adapter.temperature).softmax(1)
    assert [row["label"] for row in table] == [ANIMALS[k] for k in label.tolist()]
    for row, ours in zip(table, probs, strict=True):
        order = ours.argsort(descending=True).tolist()
        assert [row[f"label{rank}"] for rank in range(1, 5)] == [ANIMALS[k] for k in order]
        given = [float(row[f"prob{rank}"]) for rank in range(1, 5)]
        assert given == pytest.approx(ours[order].tolist(), rel=1e-4)
        assert row["predicted"] == row["label1"]
    assert "label5" not in table[0]  # there are 4 classes


def test_the_numbers_of_the_result_follow_from_the_lines(run, table):
    test = [row for row in table if row["role"] == "test"]
    right = sum(row["label"] == row["predicted"] for row in test)
    assert right / len(test) == pytest.approx(run.accuracy)
    counts = run.confusion()
    for true, name in enumerate(ANIMALS):
        for other, named in enumerate(ANIMALS):
            pair = (name, named)
            assert int(counts[true, other]) == sum(
                (row["label"], row["predicted"]) == pair for row in test
            )
    assert run.result["confusion"]["classes"] == ANIMALS
    held = (run.folder / "predictions.csv").read_bytes()
    assert run.result["predictions"] == {
        "file": "predictions.csv",
        "sha256": hashlib.sha256(held).hexdigest(),
        "images": {"val": 16, "test": 48},
    }
    with Image.open(run.folder / "confusion.png") as picture:
        assert min(picture.size) > 200


def test_evaluate_writes_the_same_lines(run, table, tmp_path, capsys):
    out = tmp_path / "table.csv"
    values = json_of(capsys, "evaluate", run.folder, "--predictions", out)
    assert read_predictions(out) == [row for row in table if row["role"] == "test"]
    assert values["confusion"] == run.result["confusion"]
    for place, fact in ((tmp_path, "a folder"), (tmp_path / "no" / "t.csv", "does not exist")):
        line = refused(capsys, "evaluate", run.folder, "--predictions", place)
        assert "--predictions must be a file to write" in line
        assert fact in line


def test_fit_names_the_pairs_that_are_confused_most(npz, tmp_path, capsys):
    assert call("fit", npz, "--method", "zeroshot", "--out", tmp_path / "r") == 0
    out = capsys.readouterr().out
    pairs = confused_pairs(vtclip.Run.load(tmp_path / "r").confusion(), 3)
    shown = [f"{ANIMALS[true]} as {ANIMALS[other]} ({count})" for true, other, count in pairs]
    assert shown
    assert f"most confused: {', '.join(shown)}" in out


def test_another_fit_replaces_what_the_first_said(npz, tmp_path):
    first = vtclip.fit(npz, method="zeroshot", shots=4, out=tmp_path / "r")
    before = (tmp_path / "r" / "predictions.csv").read_bytes()
    with pytest.raises(FileExistsError, match="holds a run already"):
        vtclip.fit(npz, method="proker", shots=4, out=tmp_path / "r")
    assert (tmp_path / "r" / "predictions.csv").read_bytes() == before
    second = vtclip.fit(npz, method="proker", shots=4, out=tmp_path / "r", overwrite=True)
    held = (tmp_path / "r" / "predictions.csv").read_bytes()
    assert held != before
    assert second.result["predictions"]["sha256"] == hashlib.sha256(held).hexdigest()
    assert first.result["predictions"] != second.result["predictions"]


def test_a_folder_with_only_a_table_of_ours_is_a_run(npz, tmp_path):
    (tmp_path / "r").mkdir()
    (tmp_path / "r" / "predictions.csv").write_text("")
    with pytest.raises(FileExistsError, match="holds a run already"):
        vtclip.fit(npz, method="zeroshot", out=tmp_path / "r")


def test_names_that_a_spreadsheet_or_a_line_would_break_come_back(tmp_path):
    """A formula, a quote, a comma, a line end, a backslash, and bytes that are no UTF-8."""
    names = ["=1+1.png", "'q.png", "a,b.png", "two\nlines.png", r"back\x41.png", "@x.png"]
    names.append(os.fsdecode(b"bad\xff.png"))
    images = noise(tmp_path / "in", ["+sum", "dog"], each=4)
    for number, name in enumerate(names):
        pixels = np.random.default_rng(number).integers(0, 255, (12, 14, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "one.png")
        (tmp_path / "one.png").rename(images / "+sum" / name)
    run = vtclip.fit(
        images,
        method="zeroshot",
        shots=1,
        test_fraction=0.9,
        out=tmp_path / "r",
        cache_dir=tmp_path,
    )
    raw = (run.folder / "predictions.csv").read_bytes()
    raw.decode("utf-8")
    assert len(raw.splitlines()) == 1 + sum(run.result["predictions"]["images"].values())
    rows = read_predictions(run.folder / "predictions.csv")
    every = {f"+sum/{name}" for name in names} | {f"+sum/{n}.png" for n in range(4)}
    assert {row["file"] for row in rows if row["label"] == "+sum"} <= every
    cells = list(csv.reader(io.StringIO(raw.decode())))
    assert not [cell for row in cells for cell in row if cell.startswith(("=", "+", "-", "@"))]


@settings(deadline=None)
@given(st.text(st.characters(), max_size=8))
def test_escaped_names_come_back(name):
    cell = escape(name)
    assert unescape(cell) == name
    assert not cell.startswith(("=", "+", "-", "@"))
    assert cell.isprintable()


@pytest.mark.parametrize(
    "name", ["\udcff\udc80", "\x85", "\u2028", "\\udcff", "''", "\\", "\t=", "😀"]
)
def test_awkward_names_come_back(name):
    assert unescape(escape(name)) == name


def test_many_classes_are_listed_by_cell_and_drawn_as_pairs():
    K = 60
    counts = torch.eye(K, dtype=torch.long) * 5
    counts[3, 7], counts[9, 1] = 4, 2
    names = [f"kind {k}" for k in range(K)]
    held = confusion_of(counts, names)
    assert "matrix" not in held
    assert len(held["cells"]) == K + 2
    assert torch.equal(confusion_counts(held), counts)
    assert confused_line(held) == "most confused: kind 3 as kind 7 (4), kind 9 as kind 1 (2)"
    small = confusion_of(counts[:5, :5], names[:5])
    assert torch.equal(confusion_counts(small), counts[:5, :5])
    assert confused_line(small) == ""
    for shown in (counts, counts[:2, :2], counts[:1, :1], torch.zeros(3, 3, dtype=torch.long)):
        with Image.open(io.BytesIO(draw_confusion(shown, names[: len(shown)]))) as picture:
            picture.load()


def test_the_scores_of_validation_images_are_kept_and_guarded(run, npz):
    kept = load_adapter(run.folder).calibration
    assert kept is not None
    assert [len(column) for column in kept] == [16, 16, 16]
    assert kept.weight.tolist() == [1.0] * 16
    assert bool((kept.loss >= 0).all())
    config = json.loads((run.folder / "adapter_config.json").read_text())
    config["calibration"]["loss"][0] += 1
    place = run.folder.parent / "changed"
    place.mkdir()
    (place / "adapter_config.json").write_text(json.dumps(config))
    (place / "adapter.safetensors").write_bytes((run.folder / "adapter.safetensors").read_bytes())
    with pytest.raises(ValueError, match="was changed after it was written"):
        load_adapter(place)


def test_auto_keeps_scores_that_rise_with_the_evidence_for_a_class(npz, tmp_path, monkeypatch):
    """Logits of a pool are sums of log-probabilities, which an image of no class has too."""
    from vtclip.train import auto
    from vtclip.train.calibration import decide

    monkeypatch.setattr(auto, "CANDIDATES", ("zeroshot", "proker"))
    run = vtclip.fit(npz, shots=4, out=tmp_path / "r", device="cpu")
    adapter, records = load_adapter(run.folder), vtclip.open_source(npz)
    found = decide(adapter.head, records, torch.arange(len(records)), CPU)
    assert bool((found.logits <= 0).all())
    assert not torch.allclose(found.evidence, found.logits)
    parts = adapter.head.member_logits(records.batch(torch.arange(96)).image)
    mean = sum(w * z for w, z in zip(adapter.head.weights, parts, strict=True))
    torch.testing.assert_close(found.evidence, mean)
    assert adapter.calibration is not None
    assert len(adapter.calibration.known) == run.result["images"]["val"]


def test_without_validation_images_nothing_is_kept(npz, tmp_path, records):
    run = vtclip.fit(npz, method="zeroshot", test_fraction=1, out=tmp_path / "r")
    assert load_adapter(run.folder).calibration is None
    rows = read_predictions(run.folder / "predictions.csv")
    assert {row["role"] for row in rows} == {"test"}
    assert run.result["predictions"]["images"] == {"test": 96}


def test_base_to_new_says_what_it_says_of_its_base_classes(npz, tmp_path, capsys):
    run = vtclip.fit(npz, method="rada", shots=2, base_to_new=True, out=tmp_path / "r",
                     overrides={"epochs": 1})  # fmt: skip
    rows = read_predictions(run.folder / "predictions.csv")
    assert {row["label"] for row in rows} == {"ant", "bee"}
    assert int(run.confusion().sum()) == run.result["base"]["adapted"]["count"]
    line = refused(capsys, "evaluate", run.folder, "--predictions", tmp_path / "t.csv")
    assert "a base-to-new run has no table of predictions" in line
    assert not (tmp_path / "t.csv").exists()


def test_an_extended_run_holds_nothing_of_the_run_it_extends(tmp_path, capsys):
    features = animal_features()
    for name, classes in (("old", (0, 1, 2)), ("new", (3,))):
        rows = np.isin(features["label"], classes)
        table: dict[str, Any] = {
            **features,
            "image": features["image"][rows],
            "spatial": features["spatial"][rows],
            "label": features["label"][rows] - min(classes),
            "text": features["text"][list(classes)],
            "classname": features["classname"][list(classes)],
        }
        np.savez(tmp_path / f"{name}.npz", **table)
    vtclip.fit(tmp_path / "old.npz", method="proker", shots=4, out=tmp_path / "r")
    wider = vtclip.extend(tmp_path / "r", tmp_path / "new.npz", out=tmp_path / "wider")
    assert load_adapter(wider.folder).calibration is None
    assert not (wider.folder / "predictions.csv").exists()
    assert "confusion" not in wider.result
    with pytest.raises(ValueError, match="holds no confusion matrix"):
        wider.confusion()
    line = refused(capsys, "evaluate", wider.folder, "--predictions", tmp_path / "t.csv")
    assert "an extended run has no table of predictions" in line


def test_classes_of_unequal_size_have_weights(tmp_path):
    features = animal_features()
    keep = np.ones(len(features["label"]), dtype=bool)
    keep[np.flatnonzero(features["label"] == 3)[12:]] = False  # 24, 24, 24 and 12 images
    rows = {name: features[name][keep] for name in ("image", "label", "spatial")}
    np.savez(tmp_path / "uneven.npz", **{**features, **rows})
    run = vtclip.fit(tmp_path / "uneven.npz", method="zeroshot", shots=2, out=tmp_path / "r")
    kept = load_adapter(run.folder).calibration
    assert kept is not None
    labels = torch.arange(4).repeat_interleave(2)
    pool = torch.arange(4).repeat_interleave(torch.tensor([12, 12, 12, 6]))  # half of each tests
    wanted = conformal.class_weights(labels, pool)
    torch.testing.assert_close(kept.weight.sort().values, wanted.sort().values)
    assert len(set(kept.weight.tolist())) == 2


def test_a_run_has_a_short_name(run):
    assert repr(run) == (
        f"Run({str(run.folder)!r}, method='proker', classes=4, "
        f"accuracy={run.accuracy:.4f}, test_images=48)"
    )
    assert len(repr(vtclip.Run(Path("x"), {}))) < 60
