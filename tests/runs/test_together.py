# SPDX-License-Identifier: Apache-2.0
"""Unlabelled images decided together: what comes of it, that no label counts, what is refused."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import logging
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import call, json_of, refused
from pictures import dots, scenes_of
from tables import animal_features

import vtclip
from vtclip.data.decode import ImageError
from vtclip.runs.adapter import CONFIG, load_adapter
from vtclip.runs.classifier import Classifier
from vtclip.runs.together import answer_together

FIT = {"method": "proker", "shots": 2, "device": "cpu"}


@pytest.fixture
def table(tmp_path):
    """A table of features in two files: one that trains, one that tests."""
    arrays = animal_features()
    del arrays["spatial"]
    rng = np.random.default_rng(0)
    rows = rng.permutation(len(arrays["label"]))
    for name, index in (("train", rows[:48]), ("test", rows[48:])):
        part = {**arrays, "image": arrays["image"][index], "label": arrays["label"][index]}
        np.savez(tmp_path / f"{name}.npz", **part)
    return tmp_path


def rewritten(path: Path, **changed: object) -> None:
    with np.load(path) as arrays:
        kept = {name: value for name, value in arrays.items() if changed.get(name, 0) is not None}
    np.savez(path, **{**kept, **{k: v for k, v in changed.items() if v is not None}})


def fitted(place: Path, name: str, **options: object) -> vtclip.Run:
    options = {"unlabelled": "test", **FIT, **options}
    return vtclip.fit(place / "train.npz", test=place / "test.npz", out=place / name, **options)


def decisions(run: vtclip.Run, role: str = "test") -> list[list[str]]:
    with open(run.folder / "together.csv", newline="", encoding="utf-8") as file:
        return [row[2:] for row in csv.reader(file) if row[1] == role]


def test_the_usual_numbers_stay_and_one_entry_joins_them(table):
    plain = fitted(table, "plain", unlabelled=None)
    run = fitted(table, "run")
    assert "together" not in plain.result
    assert not (table / "plain" / "together.csv").exists()
    for name in ("adapted", "zero_shot", "accuracy", "split"):
        assert run.result[name] == plain.result[name]
    entry = run.result["together"]
    assert entry["unlabelled_images"] == entry["count"] == 48
    assert entry["images"]["others"] == 0
    assert entry["images"]["validation"] == run.result["images"]["val"] > 0
    assert entry["validated"]
    assert entry["neighbours"] == "exact"
    kept = load_adapter(run.folder).together
    assert (kept.share, kept.temperature) == (entry["share"], entry["joint_temperature"])
    assert load_adapter(plain.folder).together is None
    rows = decisions(run)
    label = np.load(table / "test.npz")["label"].tolist()
    names = run.result["classes"]
    hits = [row[0] == names[k] for row, k in zip(rows, label, strict=True)]
    assert entry["accuracy"] == sum(hits) / 48
    assert vtclip.repeat(run)["verdict"] == "MATCH"


@pytest.mark.parametrize("method", ["proker", "auto", "clip-adapter"])
def test_shuffled_labels_change_no_byte_of_the_adapter_and_no_decision(table, method):
    run = fitted(table, "run", method=method)
    with np.load(table / "test.npz") as arrays:
        label = arrays["label"]
    rewritten(table / "test.npz", label=np.random.default_rng(5).permutation(label))
    other = fitted(table, "other", method=method)
    assert other.result["accuracy"] != run.result["accuracy"]
    for name in ("adapter.safetensors", CONFIG):
        assert (other.folder / name).read_bytes() == (run.folder / name).read_bytes()
    assert decisions(other) == decisions(run)


def test_other_images_join_without_their_labels(table, caplog):
    """Whatever a table says of classes, and in whatever order: the same decisions."""
    with np.load(table / "test.npz") as arrays:
        image, label = arrays["image"], arrays["label"]
    others = image[::2] + 0.01
    twice = np.concatenate([others, others[:3], image[:2]])
    np.savez(table / "with.npz", image=twice, label=np.arange(len(twice)),
             classname=np.array([f"c{k}" for k in range(len(twice))]), text=twice)  # fmt: skip
    np.savez(table / "without.npz", image=twice[::-1])
    with caplog.at_level(logging.WARNING, logger="vtclip"):
        run = fitted(table, "run", unlabelled=table / "with.npz")
    assert "unlabelled: 24 images of " in caplog.text
    assert "whose labels, if it has any, are not read; 5 more have the content" in caplog.text
    assert run.result["together"]["images"] == {
        "test": 48, "others": 24, "validation": run.result["images"]["val"], "left_out_copies": 5
    }  # fmt: skip
    assert run.result["together"]["unlabelled_images"] == 72
    other = fitted(table, "other", unlabelled=table / "without.npz")
    assert decisions(other) == decisions(run)
    assert sorted(decisions(other, "unlabelled")) == sorted(decisions(run, "unlabelled"))
    assert len(decisions(run, "unlabelled")) == 24
    assert decisions(run) != decisions(fitted(table, "alone"))
    assert len(label) == 48


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Scenes of three classes, and others that only lie about; a run that saw all of them."""
    root = tmp_path_factory.mktemp("together")
    scenes_of(root / "scenes", (0, 4, 8))
    (root / "loose" / "striped circle").mkdir(parents=True)
    for number, path in enumerate(sorted(scenes_of(root / "more", (0, 4, 8)).glob("*/*.png"))):
        folder = root / "loose" / ("striped circle" if number % 2 else "")
        shutil.copy(path, folder / f"{number}.png")
    dots(root / "dots")
    return root


def of_photos(root: Path, name: str, unlabelled: object) -> vtclip.Run:
    return vtclip.fit(root / "scenes", out=root / name, cache_dir=root / "cache",
                      unlabelled=unlabelled, overwrite=True, **FIT)  # fmt: skip


def test_names_and_folders_of_files_do_not_count(photos, tmp_path):
    """The same pictures loose, in folders of wrong classes, and in a list."""
    root = photos
    shutil.copytree(root / "dots", tmp_path / "wrong" / "x")
    pictures = sorted((root / "dots").glob("*/*.png"))
    (tmp_path / "loose").mkdir()
    for number, path in enumerate(reversed(pictures)):
        shutil.copy(path, tmp_path / "loose" / f"{number}.png")
    lines = ["path,label", *(f"{path},nonsense" for path in pictures)]
    (tmp_path / "list.csv").write_text("\n".join(lines))
    (tmp_path / "bare.jsonl").write_text("\n".join(json.dumps({"file": str(p)}) for p in pictures))
    places = [tmp_path / name for name in ("wrong", "loose", "list.csv", "bare.jsonl")]
    runs = [of_photos(root, f"run{number}", place) for number, place in enumerate(places)]
    first = runs[0]
    assert first.result["together"]["images"]["others"] == len(pictures)
    for run in runs[1:]:
        assert decisions(run) == decisions(first)
        assert sorted(decisions(run, "unlabelled")) == sorted(decisions(first, "unlabelled"))
        for name in ("adapter.safetensors", CONFIG):
            assert (run.folder / name).read_bytes() == (first.folder / name).read_bytes()


def test_predict_decides_a_folder_as_one_batch(photos, capsys):
    run = of_photos(photos, "predicting", "test")
    loaded = Classifier.load(run.folder, device="cpu")
    paths = sorted((photos / "scenes").glob("*/*.png"))
    logits = loaded.logits(paths)
    image = torch.cat([loaded._decide(torch.stack(batch)).image for batch in [
        [loaded._pixels(path) for path in paths]
    ]])  # fmt: skip
    wanted = answer_together(loaded.adapter, logits, image)
    found = loaded.predict_proba(paths, together=True, batch_size=7)
    torch.testing.assert_close(found, wanted, atol=1e-6, rtol=0)
    assert (found - loaded.predict_proba(paths)).abs().max() > 1e-4
    back = loaded.predict_proba(paths[::-1], together=True)
    torch.testing.assert_close(back.flip(0), found, atol=1e-6, rtol=0)
    names = [row[0].label for row in loaded.predict(paths, together=True)]
    assert names == [loaded.class_names[k] for k in found.argmax(dim=1).tolist()]
    words = ["predict", run.folder, photos / "scenes", "--together", "--device", "cpu"]
    rows = json_of(capsys, *words)["images"]
    assert {row["together"] for row in rows} == {len(paths)}
    by_name = {row["image"]: row["predictions"][0]["label"] for row in rows}
    assert [by_name[str(path)] for path in paths] == names
    assert call(*words, "--csv", "--topk", 1) == 0
    cells = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert {row["together"] for row in cells} == {str(len(paths))}
    assert call(*words) == 0
    assert capsys.readouterr().out.startswith(f"{len(paths)} images decided together\n")
    plain = json_of(capsys, "predict", run.folder, photos / "scenes", "--device", "cpu")["images"]
    assert all("together" not in row for row in plain)


def test_one_image_is_decided_alone_and_unreadable_ones_are_named(photos, tmp_path, capsys):
    run = of_photos(photos, "single", "test")
    loaded = Classifier.load(run.folder, device="cpu")
    path = next((photos / "scenes").glob("*/*.png"))
    alone = loaded.predict(path)
    assert loaded.predict(path, together=True) == [
        (name, pytest.approx(value)) for name, value in alone
    ]
    assert loaded.predict([], together=True) == []
    (tmp_path / "broken.png").write_bytes(b"no picture")
    words = ["predict", run.folder, path, tmp_path / "broken.png", "--together", "--json"]
    assert call(*words, "--device", "cpu") == 1
    rows = json.loads(capsys.readouterr().out)["images"]
    assert [row.get("together") for row in rows] == [1, None]
    with pytest.raises(ImageError, match=r"broken\.png"):
        loaded.predict_proba([path, tmp_path / "broken.png"], together=True)


def test_an_adapter_without_a_share_says_so(photos, caplog):
    run = of_photos(photos, "without", None)
    loaded = Classifier.load(run.folder, device="cpu")
    paths = sorted((photos / "scenes").glob("*/*.png"))
    with caplog.at_level(logging.WARNING, logger="vtclip"):
        loaded.predict(paths, together=True)
    assert "share 0.5 and temperature 1 were not validated" in caplog.text


def test_what_together_does_not_go_with_is_refused(photos, capsys, tmp_path):
    run = of_photos(photos, "refusing", "test")
    words = ["predict", run.folder, photos / "scenes", "--together"]
    for name in ("unknown", "coverage"):
        line = refused(capsys, *words, f"--{name}", 0.5)
        assert f"--together cannot be combined with --{name}" in line
    loaded = Classifier.load(run.folder, device="cpu")
    labelled = {**loaded.adapter.features, "multi_label": True}
    several = Classifier(
        dataclasses.replace(loaded.adapter, features=labelled), loaded.clip, loaded.device
    )
    with pytest.raises(ValueError, match="together: the run has several labels per image"):
        several.predict_proba([], together=True)
    for name in ("base_to_new", "train_encoders", "pseudo_labels"):
        flag = "--" + name.replace("_", "-")
        extra = ["--method", "rada"] if name == "train_encoders" else []
        line = refused(capsys, "fit", photos / "scenes", flag, *extra, "--unlabelled", "test",
                       "--out", tmp_path / "no")  # fmt: skip
        assert f"--unlabelled cannot be combined with {flag}" in line
    pictures = sorted((photos / "scenes").glob("*/*.png"))
    lines = [f"{path},{path.parent.name}|{'more' if n % 2 else 'other'}" for n, path in
             enumerate(pictures)]  # fmt: skip
    (tmp_path / "several.csv").write_text("\n".join(["path,labels", *lines]))
    line = refused(capsys, "fit", tmp_path / "several.csv", "--method", "zeroshot", "--unlabelled",
                   "test", "--out", tmp_path / "no")  # fmt: skip
    assert "--unlabelled: " in line
    assert "several labels per image" in line
    (tmp_path / "empty").mkdir()
    for place, words_of in (
        (tmp_path / "gone", "does not exist"),
        (tmp_path / "empty", "is a folder without images"),
    ):
        line = refused(capsys, "fit", photos / "scenes", "--unlabelled", place,
                       "--out", tmp_path / "no")  # fmt: skip
        assert "--unlabelled" in line
        assert words_of in line
    assert not (tmp_path / "no").exists()


def test_tables_of_another_kind_are_refused(table, photos):
    image = np.load(table / "test.npz")["image"]
    np.savez(table / "narrow.npz", image=image[:, :8])
    broken = image.copy()
    broken[3, 2] = np.nan
    np.savez(table / "nan.npz", image=broken)
    for name, words in (
        ("narrow", "unlabelled: its features have width 8, those of the training source 16"),
        ("nan", "image must be finite, got NaN or infinity in 1 rows: 3"),
    ):
        with pytest.raises(ValueError, match=words):
            fitted(table, "no", unlabelled=table / f"{name}.npz")
    with pytest.raises(ValueError, match=r"an \.npz table goes with another alone"):
        fitted(table, "no", unlabelled=photos / "scenes")
    with pytest.raises(ValueError, match="goes with another alone"):
        of_photos(photos, "no", table / "test.npz")
    assert not (table / "no").exists()


def test_without_validation_images_the_share_is_not_validated(table, caplog):
    with np.load(table / "train.npz") as arrays:
        label = arrays["label"]
    rows = np.concatenate([np.flatnonzero(label == k)[:1] for k in range(4)])
    rewritten(table / "train.npz", image=np.load(table / "train.npz")["image"][rows],
              label=label[rows])  # fmt: skip
    with caplog.at_level(logging.WARNING, logger="vtclip"):
        run = fitted(table, "run", shots=1)
    entry = run.result["together"]
    assert run.result["images"]["val"] == 0
    assert (entry["validated"], entry["share"], entry["joint_temperature"]) == (False, 0.5, 1.0)
    assert "the run has no validation images" in caplog.text
    assert load_adapter(run.folder).together is None
