# SPDX-License-Identifier: Apache-2.0
"""From a folder of pictures to predictions and heat maps, through a tiny random CLIP."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import json_of, refused
from pictures import colours, small_model
from PIL import Image

import vtclip
from vtclip.cli import main
from vtclip.data.sources import open_source
from vtclip.runs.classifier import Classifier
from vtclip.runs.heat_map import heat_map, overlay, side_by_side, to_image
from vtclip.train import engine


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A model, a folder of pictures with one broken file, and a run on it."""
    root = tmp_path_factory.mktemp("pictures")
    colours(root / "images", 16, (48, 64))
    (root / "images" / "grass" / "broken.png").write_bytes(b"not a picture")
    model = small_model(root / "model")
    run = vtclip.fit(
        root / "images", method="vtclip", shots=4, model=str(model), out=root / "run",
        device="cpu", threads=1, cache_dir=root / "cache", overrides={"epochs": 30, "lr": 1e-2},
    )  # fmt: skip
    assert run.accuracy == 1.0  # three plain colours
    return {"root": root, "model": model, "run": root / "run", "images": root / "images"}


def test_the_unreadable_file_is_named_and_not_counted(world):
    result = json.loads((world["run"] / "result.json").read_text())
    assert result["test"]["images"] == 24
    (broken,) = result["test"]["unreadable"]
    assert broken.startswith("grass/broken.png: ")
    assert result["digests"]["weights"]
    config = json.loads((world["run"] / "adapter_config.json").read_text())
    assert config["features"]["weights_digest"] == result["digests"]["weights"]
    assert config["features"]["model_config"]["model_cfg"]["embed_dim"] == 16


def test_predict_takes_paths_pictures_and_tensors(world):
    classifier = Classifier.load(world["run"], device="cpu")
    path = world["images"] / "ocean" / "03.png"
    best = classifier.predict(path)
    assert [one.label for one in best][0] == "ocean"
    assert len(best) == 3  # never more than there are classes
    assert sum(one.probability for one in best) == pytest.approx(1, abs=1e-9)
    with Image.open(path) as file:
        picture = file.convert("RGB")
    pixels = classifier.clip.preprocess(picture)
    assert classifier.predict(picture) == best
    assert classifier.predict(pixels) == best
    assert classifier.predict(str(path), topk=1) == best[:1]
    many = classifier.predict([path, picture], topk=2)
    assert [len(one) for one in many] == [2, 2]
    # two rows in one product may round otherwise than one: float32 with scale 14
    assert many[0][0].probability == pytest.approx(best[0].probability, abs=1e-4)
    assert classifier.predict(torch.stack([pixels, pixels]), topk=1)[1][0].label == "ocean"
    assert classifier.predict([]) == []
    with pytest.raises(ValueError, match="topk must be at least 1"):
        classifier.predict(path, topk=0)
    with pytest.raises(TypeError, match="must be a path, bytes, .* or a tensor, got int"):
        classifier.predict([3])  # type: ignore[list-item]


def test_predictions_agree_with_the_evaluation(world):
    """The same picture gives the same probabilities from features and from the file."""
    classifier = Classifier.load(world["run"], device="cpu")
    config = json.loads((world["run"] / "result.json").read_text())["config"]
    records = open_source(
        config["source"], model=config["model"], need_spatial=True, progress=False,
        cache_dir=world["root"] / "cache",
    )  # fmt: skip
    rows = torch.arange(0, len(records), 7)
    logits, _ = engine.all_logits(
        classifier.adapter.head, records, rows, device=torch.device("cpu")
    )
    stored = (logits.double() / classifier.adapter.temperature).softmax(1)
    found = classifier.predict([world["images"] / records.names[row] for row in rows], topk=3)
    for row, best in zip(stored, found, strict=True):
        fresh = {one.label: one.probability for one in best}
        # stored tokens are float16: about 1e-3 relative, times the logit scale of 14
        for name, value in zip(records.class_names, row.tolist(), strict=True):
            assert fresh[name] == pytest.approx(value, abs=2e-2)


def test_predict_and_explain_commands(world, tmp_path, capsys):
    image = str(world["images"] / "sunset" / "05.png")
    other = str(world["images"] / "grass" / "05.png")
    rows = json_of(capsys, "predict", world["run"], image, other, "--topk", "2")["images"]
    assert [row["image"] for row in rows] == [image, other]
    assert [row["predictions"][0]["label"] for row in rows] == ["sunset", "grass"]
    assert main(["predict", str(world["run"]), image]) == 0
    assert capsys.readouterr().out.startswith(f"{image}: sunset ")
    for words in ([], ["--class", "ocean"]):
        out = tmp_path / f"heat{len(words)}.png"
        assert main(["explain", str(world["run"]), image, "--out", str(out), *words]) == 0
        with Image.open(out) as picture:
            assert picture.format == "PNG"
            # 64 x 48 fits 640 x 320 as 427 x 320; a gap of 8; the square the model saw
            assert picture.size == (427 + 8 + 320, 320 + 32)
    assert (tmp_path / "heat0.png").read_bytes() != (tmp_path / "heat2.png").read_bytes()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["explain", "RUN", "IMAGE", "--out", "x.png", "--class", "oceon"], "did you mean 'ocean'"),
        (["explain", "RUN", "IMAGE", "--out", "x.jpg"], "--out must end in .png"),
        (["explain", "RUN", "IMAGE", "--out", "IMAGE"], "--out is the image itself"),
        (
            ["predict", "RUN", "IMAGE", "--model", "OTHER"],
            "is not the model of the run; of the run vs of --model: weights",
        ),
        (["predict", "RUN", "IMAGE", "--model", "nowhere"], "neither a folder nor a known"),
        (["evaluate", "RUN", "IMAGES/grass"], "SOURCE: "),
    ],
)
def test_bad_pictures_and_models_are_one_line(world, tmp_path, capsys, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {
        "RUN": world["run"],
        "IMAGE": world["images"] / "ocean" / "03.png",
        "IMAGES/grass": world["images"] / "grass",
    }
    if "OTHER" in words:
        names["OTHER"] = small_model(tmp_path / "other", seed=2)
    assert message in refused(capsys, *(names.get(word, word) for word in words))
    assert not (tmp_path / "x.png").exists()


@pytest.mark.parametrize("method", ["rada", "zeroshot", "mm-adapter"])
def test_heads_that_see_no_places_predict_and_have_no_heat_map(world, tmp_path, method):
    run = vtclip.fit(
        world["images"], method=method, shots=4, model=str(world["model"]), device="cpu",
        out=tmp_path / "run", cache_dir=world["root"] / "cache",
    )  # fmt: skip
    picture = world["images"] / "ocean" / "03.png"
    classifier = Classifier.load(tmp_path / "run", device="cpu")
    assert len(classifier.predict(picture)) == 3
    again = vtclip.evaluate(run, device="cpu", cache_dir=world["root"] / "cache")
    assert again["accuracy"] == run.accuracy
    with pytest.raises(ValueError, match=f"^method {method} has no attention to show; fit with"):
        classifier.explain(picture)
    with Image.open(picture) as file:
        assert classifier.heat_map(file.convert("RGB"), "ocean") is None


def test_features_command_makes_a_source(world, tmp_path):
    out = tmp_path / "features"
    words = ["--model", str(world["model"]), "--augment-passes", "1", "--device", "cpu"]
    assert main(["features", str(world["images"]), "--out", str(out), *words]) == 0
    run = vtclip.fit(
        out, method="vtclip", shots=4, out=tmp_path / "run", device="cpu", overrides={"epochs": 2}
    )
    fitted = json.loads((world["run"] / "result.json").read_text())
    assert run.result["split"] == fitted["split"]
    assert run.result["zero_shot"] == fitted["zero_shot"]
    classifier = Classifier.load(run.folder, device="cpu")  # the model's folder is remembered
    assert classifier.clip.weights_digest == fitted["digests"]["weights"]


def test_save_and_from_pretrained(world, tmp_path):
    classifier = Classifier.load(world["run"], device="cpu")
    classifier.save_pretrained(tmp_path / "shared")
    again = Classifier.from_pretrained(tmp_path / "shared", device="cpu")
    path = world["images"] / "grass" / "01.png"
    assert again.predict(path) == classifier.predict(path)
    names = sorted(file.name for file in (tmp_path / "shared").iterdir())
    assert names == ["adapter.safetensors", "adapter_config.json"]


def test_heat_map_peaks_where_the_weight_is():
    weights = torch.zeros(16)
    weights[6] = 1.0  # row 1, column 2 of 4 x 4
    heat = heat_map(weights, 40, 40)
    assert heat.shape == (40, 40)
    assert (float(heat.min()), float(heat.max())) == (0.0, 1.0)
    row, column = divmod(int(heat.argmax()), 40)
    assert 10 <= row < 20
    assert 20 <= column < 30
    assert float(heat_map(torch.full((9,), 0.5), 6, 6).abs().max()) == 0.0
    with pytest.raises(ValueError, match="square grid, got 12 tokens"):
        heat_map(torch.zeros(12), 4, 4)


def test_pictures_keep_their_colours():
    pixels = torch.zeros(3, 4, 4)
    pixels[0] = 2.0  # with mean 0.5 and std 0.25: red 1, green and blue 0.5
    picture = to_image(pixels, [0.5] * 3, [0.25] * 3)
    assert picture.getpixel((0, 0)) == (255, 128, 128)
    cold = overlay(picture, torch.zeros(4, 4), strength=0.0)
    assert cold.getpixel((1, 1)) == (255, 128, 128)
    canvas = side_by_side(picture, picture, torch.zeros(4), "name")
    assert canvas.getpixel((10, 10)) == (255, 128, 128)
    assert canvas.size == (320 + 8 + 320, 352)
