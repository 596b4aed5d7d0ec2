# SPDX-License-Identifier: Apache-2.0
"""Prediction in batches: every kind of input, unreadable files, folders, JSON and CSV."""

from __future__ import annotations

import csv
import dataclasses
import io
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commands import json_of, refused
from pictures import scenes_of
from PIL import Image

import vtclip
from vtclip.cli import main
from vtclip.data.decode import ImageError
from vtclip.demo.scenes import CLASS_NAMES
from vtclip.files import unescape
from vtclip.runs import classifier
from vtclip.runs import pictures as kinds
from vtclip.runs.answers import Prediction
from vtclip.runs.classifier import Classifier
from vtclip.train import conformal

CLASSES = (0, 4, 8)  # striped circle, dotted square, checked triangle


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return scenes_of(tmp_path_factory.mktemp("scenes") / "images", CLASSES)


@pytest.fixture(scope="module")
def run(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("run")
    vtclip.fit(images, method="zeroshot", shots=2, out=place / "run", cache_dir=place, device="cpu")
    return place / "run"


@pytest.fixture(scope="module")
def loaded(run: Path) -> Classifier:
    return Classifier.load(run, device="cpu")


@pytest.fixture(scope="module")
def paths(images: Path) -> list[Path]:
    return sorted(images.glob("*/*.png"))


@pytest.fixture(scope="module")
def expected(loaded: Classifier, paths: list[Path]) -> torch.Tensor:
    """Probabilities [24, 3] by the model itself, one image at a time, in float64."""
    rows = []
    for path in paths:
        with Image.open(path) as file:
            pixels = loaded.clip.preprocess(file.convert("RGB"))[None]
        image = loaded.clip.model.encode_image(pixels).double()
        text = loaded.adapter.head.text.double()
        cosine = torch.nn.functional.normalize(image, dim=1) @ text.T
        rows.append((cosine * loaded.clip.logit_scale / loaded.adapter.temperature).softmax(1))
    return torch.cat(rows)


def table(found: list[list[Prediction]], names: list[str]) -> torch.Tensor:
    rows = [dict(row) for row in found]
    return torch.tensor([[row[name] for name in names] for row in rows], dtype=torch.float64)


@pytest.mark.parametrize("batch_size", [1, 5, 24, 1000])
def test_every_kind_of_input_gives_the_same_numbers(loaded, paths, expected, batch_size):
    pictures: list[Any] = []
    for path in paths:
        with Image.open(path) as file:
            pictures.append(file.convert("RGB"))
    pixels = torch.stack([loaded.clip.preprocess(one) for one in pictures])
    mixed: list[Any] = [str(paths[0]), pictures[1], pixels[2], *paths[3:]]
    kinds = [paths, tuple(map(str, paths)), pictures, pixels, list(pixels), mixed, iter(mixed)]
    for given in kinds:
        found = loaded.predict(given, batch_size=batch_size)
        seen = table(found, loaded.class_names)
        assert (seen - expected).abs().max() < 1e-4
        assert all(row == sorted(row, key=lambda one: -one.probability) for row in found)


def test_bytes_files_and_arrays_are_images(loaded, paths, expected):
    data = [path.read_bytes() for path in paths]
    arrays = []
    for path in paths:
        with Image.open(path) as file:
            arrays.append(np.asarray(file.convert("RGB")))
    given: list[Any] = [
        data,
        [bytearray(one) for one in data],
        [memoryview(one) for one in data],
        [io.BytesIO(one) for one in data],
        arrays,
        np.stack(arrays),
        [data[0], arrays[1], io.BytesIO(data[2]), *paths[3:]],
    ]
    for images in given:
        seen = table(loaded.predict(images, batch_size=7), loaded.class_names)
        assert (seen - expected).abs().max() < 1e-4
    one = loaded.predict(paths[0])
    with open(paths[0], "rb") as file:
        singles: list[Any] = [data[0], bytearray(data[0]), io.BytesIO(data[0]), arrays[0], file]
        for image in singles:
            assert loaded.predict(image) == one
    assert loaded.predict(arrays[0][:, ::-1]) == loaded.predict(Image.fromarray(arrays[0][:, ::-1]))


def test_broken_bytes_and_files_are_named(loaded, paths, tmp_path):
    closed = io.BytesIO(b"x")
    closed.close()
    found = list(loaded.predict_each([b"", b"not a picture", io.BytesIO(), closed, paths[0]]))
    assert [isinstance(one, ImageError) for one in found] == [True] * 4 + [False]
    for error, words in zip(found, ("bytes: the file is empty", "bytes: not an image", "is empty",
                                    "cannot be read"), strict=False):  # fmt: skip
        assert words in str(error)
    with open(paths[0], encoding="latin-1") as text, pytest.raises(TypeError, match="not for text"):
        loaded.predict(text)


def test_probabilities_and_logits_are_tables(loaded, paths, expected):
    probs, logits = loaded.predict_proba(paths, batch_size=5), loaded.logits(paths)
    assert probs.dtype == torch.float64
    torch.testing.assert_close(probs, expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(
        (logits.double() / loaded.adapter.temperature).softmax(1), expected, atol=1e-4, rtol=0
    )
    assert loaded.classes_ == loaded.class_names
    assert loaded.predict_proba(paths[0]).shape == loaded.logits(paths[0]).shape == (1, 3)
    assert loaded.predict_proba([]).shape == (0, 3)
    with pytest.raises(ImageError, match="empty"):
        loaded.logits([paths[0], b""])
    with pytest.raises(ValueError, match="batch_size must be at least 1"):
        loaded.predict_proba(paths, batch_size=0)


def test_a_classifier_has_a_short_name(loaded):
    wanted = "Classifier(method='zeroshot', classes=3, model='demo', device='cpu')"
    assert repr(loaded) == wanted


def test_unknown_images_and_sets(loaded, paths):
    """6 validation images: rates from 1/7 on, coverage up to 6/7."""
    kept = loaded.adapter.calibration
    logits = loaded.logits(paths)
    refused = conformal.known_score(logits) < conformal.unknown_threshold(kept.known, 0.5)
    plain = loaded.predict(paths)
    found = loaded.predict(paths, unknown=0.5)
    assert 0 < int(refused.sum()) < len(paths)
    for row, usual, below in zip(found, plain, refused.tolist(), strict=True):
        assert row[int(below) :] == usual
        assert (row[0].label == "unknown") == below
        assert not below or 1 / 7 <= row[0].probability <= 0.5
    losses = conformal.class_losses(logits, loaded.adapter.temperature)
    inside = losses <= conformal.coverage_threshold(kept.loss, 0.8)
    sets = loaded.predict_sets(paths, 0.8)
    for names, row, usual in zip(sets, inside, plain, strict=True):
        assert names == [one.label for one in usual[: int(row.sum())]]
    assert loaded.predict_sets(paths[0], 0.8) == sets[0]
    assert [one.label for one in loaded.predict(paths[0], unknown=0.5)] == [
        one.label for one in found[0]
    ]
    with pytest.raises(ValueError, match=r"at least 1/7 = 0.1429 with 6 validation images"):
        loaded.predict(paths, unknown=0.05)
    with pytest.raises(ValueError, match=r"at most 6/7 = 0.8571 with 6 validation images"):
        loaded.predict_sets(paths)


def test_without_scores_unknown_is_refused_in_one_line(loaded, paths, monkeypatch):
    adapter = dataclasses.replace(loaded.adapter, calibration=None)
    bare = Classifier(adapter, loaded.clip, loaded.device)
    with pytest.raises(ValueError, match="unknown needs the scores of validation images"):
        bare.predict(paths, unknown=0.5)
    with pytest.raises(ValueError, match="coverage needs the scores of validation images"):
        bare.predict_sets(paths, 0.5)
    names = ["Unknown", *loaded.class_names[1:]]
    named = Classifier(
        dataclasses.replace(loaded.adapter, class_names=names), loaded.clip, loaded.device
    )
    with pytest.raises(ValueError, match="a class of the run is called 'unknown' itself"):
        named.predict(paths, unknown=0.5)


def test_the_command_says_unknown_and_sets(run, loaded, paths, capsys):
    words = ["predict", str(run), *map(str, paths), "--topk", "1"]
    asked = [*words, "--unknown", "0.5", "--coverage", "0.8"]
    answers = list(loaded.answer_each(paths, 1, unknown=0.5, coverage=0.8))
    plain = json_of(capsys, *words)["images"]
    assert all(set(row) == {"image", "predictions"} for row in plain)
    rows = json_of(capsys, *asked)["images"]
    for row, usual, answer in zip(rows, plain, answers, strict=True):
        assert row == {
            **usual,
            "unknown": answer.unknown,
            "p_value": pytest.approx(answer.p_value),
            "set": [one.label for one in answer.set],
        }
    assert main([*asked, "--csv"]) == 0
    cells = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    for path, answer in zip(paths, answers, strict=True):
        mine = [row for row in cells if row["image"] == str(path)]
        assert len(mine) == max(1, len(answer.set))  # no class of a set is cut by --topk
        assert {row["unknown"] for row in mine} == {str(answer.unknown).lower()}
        named = [row["label"] for row in mine if row["in_set"] == "true"]
        assert named == [one.label for one in answer.set]
    assert main(asked) == 0
    lines = capsys.readouterr().out.splitlines()
    for line, answer in zip(lines, answers, strict=True):
        assert ("unknown (" in line) == answer.unknown
        assert line.endswith("; set: {" + ", ".join(one.label for one in answer.set) + "}")


def test_nothing_gives_nothing(loaded):
    for given in ([], (), iter(()), torch.empty(0, 3, 64, 64)):
        assert loaded.predict(given) == []


def test_a_generator_is_taken_two_batches_ahead_and_no_further(loaded, paths):
    taken = 0

    def endless() -> Iterator[Path]:
        nonlocal taken
        while True:
            taken += 1
            yield paths[taken % len(paths)]

    found = loaded.predict_each(endless(), 1, batch_size=4)
    assert taken == 0
    first = [next(found) for _ in range(4)]
    assert len(first) == 4
    assert 4 < taken <= 12  # decoding is ahead of the model, and bounded
    found.close()


def test_files_are_decoded_outside_of_the_caller(loaded, paths, monkeypatch):
    seen = set()

    def spy(path: Any) -> Any:
        seen.add(threading.current_thread().name)
        return opened(path)

    opened = kinds.open_image
    monkeypatch.setattr(kinds, "open_image", spy)
    loaded.predict(paths)
    assert seen
    assert all(name.startswith("vtclip-decode") for name in seen)


def test_a_picture_object_is_read_as_its_file_is(loaded, tmp_path):
    """Transparency goes over white and EXIF turns the picture, from a file and from PIL alike."""
    draw = np.random.default_rng(0).integers(0, 255, (64, 64, 4), dtype=np.uint8)
    clear, turned = tmp_path / "clear.png", tmp_path / "turned.jpg"
    Image.fromarray(draw).save(clear)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(draw[..., :3]).save(turned, exif=exif)
    for path in (clear, turned):
        with Image.open(path) as picture:
            assert loaded.predict(picture) == loaded.predict(path)


def test_an_unreadable_image_is_named_and_stops_nothing(loaded, paths, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"not a picture")
    (tmp_path / "cut.png").write_bytes(paths[0].read_bytes()[:2000])
    with Image.open(tmp_path / "cut.png") as half:
        given = [paths[0], tmp_path / "broken.png", half, paths[1], tmp_path]
        found = list(loaded.predict_each(given, 1, batch_size=2))
    assert [isinstance(one, ImageError) for one in found] == [False, True, True, False, True]
    assert "broken.png: not an image" in str(found[1])
    assert "cut.png" in str(found[2])
    assert "a folder" in str(found[4])
    assert found[0] == loaded.predict([paths[0]], 1)[0]
    with pytest.raises(ImageError, match=r"broken\.png"):
        loaded.predict(given[:2])


def test_logits_that_are_not_finite_are_no_prediction(loaded, paths, monkeypatch):
    real = classifier.forward_both

    def broken(*args: Any) -> tuple[torch.Tensor, torch.Tensor]:
        logits, evidence = real(*args)
        logits[-1, 0] = torch.nan
        return logits, evidence

    monkeypatch.setattr(classifier, "forward_both", broken)
    with pytest.raises(FloatingPointError, match="predict: logits must be finite, got NaN"):
        loaded.predict(paths[:3])


def test_more_classes_than_there_are_give_all(loaded, paths):
    (best,) = loaded.predict(paths[:1], topk=5)
    assert [row.label for row in best] != []
    assert sorted(row.label for row in best) == sorted(loaded.class_names)


@pytest.mark.parametrize(
    ("given", "options", "error", "message"),
    [
        (torch.zeros(64, 64), {}, ValueError, r"must be \[3, H, W\] or .*, got \[64, 64\]"),
        ([torch.zeros(3, 8, 8)], {}, ValueError, r"must be \[3, 64, 64\], .* got \[3, 8, 8\]"),
        ([torch.zeros(3, 64, 64, dtype=torch.uint8)], {}, TypeError, "floating-point, got torch.u"),
        (["x.png", None], {}, TypeError, "must be a path, .* or a tensor, got NoneType"),
        (5, {}, TypeError, "images must be a path, .* or several of them, got int"),
        (np.zeros((4, 5), np.uint8), {}, ValueError, r"\[H, W, 3\] or .* got uint8 \[4, 5\]"),
        (np.zeros((4, 5, 4), np.uint8), {}, ValueError, r"in RGB, got uint8 \[4, 5, 4\]"),
        ([np.zeros((4, 5, 3))], {}, ValueError, r"uint8 in RGB, got float64 \[4, 5, 3\]"),
        (["x.png"], {"unknown": 1.5}, ValueError, "unknown must lie between 0 and 1, got 1.5"),
        ([], {"batch_size": 0}, ValueError, "batch_size must be at least 1, got 0"),
        ([], {"topk": 0}, ValueError, "topk must be at least 1, got 0"),
        ([torch.full((3, 64, 64), float("nan"))], {}, FloatingPointError, "must be finite"),
    ],
)
def test_wrong_arguments_are_named(loaded, given, options, error, message):
    with pytest.raises(error, match=message):
        loaded.predict(given, **options)


def test_the_command_takes_folders_and_goes_on_after_broken_files(run, images, tmp_path, capsys):
    deep = tmp_path / "in" / "deep"
    deep.mkdir(parents=True)
    for name in ("in/10.png", "in/9.png", "in/deep/a.PNG"):
        (tmp_path / name).write_bytes((images / CLASS_NAMES[4] / "00.png").read_bytes())
    (tmp_path / "in" / "notes.txt").write_text("no image")
    (tmp_path / "in" / "deep" / "b.png").write_bytes(b"broken")
    one = str(images / CLASS_NAMES[0] / "00.png")
    words = ["predict", str(run), str(tmp_path / "in"), one, "--topk", "1", "--batch-size", "2"]
    order = [str(tmp_path / "in" / name) for name in ("9.png", "10.png", "deep/a.PNG")] + [one]

    assert main(words) == 1
    seen = capsys.readouterr()
    assert [line.rpartition(": ")[0] for line in seen.out.splitlines()] == order
    assert seen.err.count("\n") == 1
    assert str(deep / "b.png") in seen.err

    rows = json_of(capsys, *words, status=1)["images"]
    assert [row["image"] for row in rows if "predictions" in row] == order
    (bad,) = (row for row in rows if "error" in row)
    assert bad["image"] == str(deep / "b.png")

    assert main([*words[:-4], "--topk", "2", "--csv"]) == 1
    lines = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [(row["image"], row["rank"]) for row in lines] == [
        (path, rank) for path in order for rank in ("1", "2")
    ]
    best = {row["image"]: row["predictions"][0] for row in rows if "predictions" in row}
    for row in lines[::2]:
        first = best[row["image"]]
        assert row["label"] == first["label"]
        assert float(row["probability"]) == pytest.approx(first["probability"], abs=1e-5)

    (deep / "b.png").unlink()
    assert main(words) == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["RUN", "nowhere.png"], "IMAGE 'nowhere.png' does not exist"),
        (["RUN", "EMPTY"], "is a folder without images"),
        (["RUN", "IMAGES", "--json", "--csv"], "--json and --csv exclude each other"),
        (["RUN", "IMAGES", "--batch-size", "0"], "--batch-size: must be in"),
        (["RUN", "IMAGES", "--unknown", "0.1"], "--unknown must be at least 1/7 = 0.1429 with 6"),
        (["RUN", "IMAGES", "--coverage", "0.9"], "--coverage must be at most 6/7 = 0.8571 with 6"),
        (["RUN", "IMAGES", "--unknown", "2"], "--unknown: must be above 0 and at most 1"),
        (["IMAGES", "IMAGES"], "not a vtclip adapter"),
    ],
)
def test_bad_input_is_one_line(run, images, tmp_path, capsys, words, message):
    places = {"RUN": str(run), "IMAGES": str(images), "EMPTY": str(tmp_path)}
    assert message in refused(capsys, "predict", *(places.get(word, word) for word in words))


def test_a_name_with_a_line_end_stays_one_line_and_one_row(run, images, tmp_path, capsys):
    place = tmp_path / "two\nlines\r.png"
    place.write_bytes((images / CLASS_NAMES[0] / "00.png").read_bytes())
    words = ["predict", str(run), str(place), "--topk", "1"]
    assert main(words) == 0
    assert capsys.readouterr().out.splitlines()[0].startswith(f"{tmp_path}/two\\nlines\\r.png: ")
    assert main([*words, "--csv"]) == 0
    (row,) = csv.DictReader(io.StringIO(capsys.readouterr().out, newline=""))
    assert unescape(row["image"]) == str(place)
