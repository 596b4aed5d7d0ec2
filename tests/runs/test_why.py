# SPDX-License-Identifier: Apache-2.0
"""`vtclip explain`: why a class and not another, from a folder of pictures to table and page."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commands import call, json_of, refused
from pictures import colours, save, small_model
from PIL import Image
from sealing import as_older, resealed

import vtclip
from vtclip.heads import HEADS, Auto
from vtclip.runs.adapter import Adapter, load_adapter, save_adapter
from vtclip.runs.classifier import Classifier
from vtclip.runs.training_images import training_images
from vtclip.runs.why import Why, explain_choice
from vtclip.runs.why_page import _ascii, _wrapped, draw_page

ODD = "=sum(1)\n\\x.png"  # a formula, a line end and a backslash, as a file may be called
OLD = Path(__file__).with_name("old")


class World:
    """A model, a folder of pictures of three classes, and runs of it by method."""

    def __init__(self, root: Path) -> None:
        self.root, self.images = root, colours(root / "images", 12, (20, 24))
        (self.images / "grass" / "00.png").rename(self.images / "grass" / ODD)
        self.model = small_model(root / "model")

    def run(self, method: str, name: str = "", **options: Any) -> Path:
        out = self.root / (name or method)
        if not out.exists():
            usual = {"shots": 3, "device": "cpu", "threads": 1, "cache_dir": self.root / "cache"}
            vtclip.fit(
                self.images, method=method, model=str(self.model), out=out, **{**usual, **options}
            )
        return out


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("why"))


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    """A picture of no class alone, of none of the folder's."""
    pixels = np.random.default_rng(7).integers(0, 120, (24, 20, 3))
    pixels[:, :11, 2] += 100
    save(pixels, tmp_path / "photo.png")
    return tmp_path / "photo.png"


def table_of(capsys: Any, *words: Any) -> list[str]:
    capsys.readouterr()
    assert call("explain", *words) == 0
    return capsys.readouterr().out.splitlines()


@pytest.mark.parametrize("method", ["takl", "proker", "tip-adapter", "cross-modal", "zeroshot"])
def test_the_lines_add_up_to_the_log_odds_of_predict(world, photo, capsys, method):
    run = world.run(method)
    (answer,) = json_of(capsys, "predict", run, photo)["images"]
    first, second = answer["predictions"][:2]
    why = json_of(capsys, "explain", run, photo, "--top", "2")
    assert (why["label"], why["other"]) == (first["label"], second["label"])
    assert why["probability"] == pytest.approx(first["probability"], abs=1e-6)
    odds = np.log(first["probability"] / second["probability"])
    assert why["log_odds"] == pytest.approx(odds, abs=2e-4)
    parts = [*why["terms"].values(), *(row["log_odds"] for row in why["rows"])]
    assert sum(parts) + why["rest"]["log_odds"] == pytest.approx(why["log_odds"], abs=1e-9)
    assert why["notes"] == []
    # of each class 3 images that trained and 3 that validated before the second fit
    rows = 0 if method == "zeroshot" else 18 + 3 * (method in ("takl", "cross-modal"))
    assert len(why["rows"]) + why["rest"]["images"] + why["rest"]["prompts"] == rows
    if not rows:
        assert list(why["terms"]) == ["prompts"]
        return
    assert list(why["terms"]) == ["prompts", "shared"]
    signs = [row["log_odds"] > 0 for row in why["rows"]]
    assert signs == sorted(signs, reverse=True)
    assert sum(signs) <= 2
    every = json_of(capsys, "explain", run, photo, "--top", "100")
    thirds = 6 * (method == "tip-adapter")  # images of a third class do not vote here
    assert (every["rest"]["images"], every["rest"]["prompts"]) == (thirds, 0)
    assert every["rest"]["log_odds"] == pytest.approx(0, abs=1e-9)
    listed = {row["name"]: row["label"] for row in every["rows"] if row["kind"] == "image"}
    assert len(listed) == 18 - thirds
    assert all(name.startswith(f"{label}/") for name, label in listed.items())


def test_each_row_is_the_image_that_it_is_called(world, photo, capsys):
    """The cosine of a row is that of the file, encoded again."""
    run = world.run("takl")
    classifier = Classifier.load(run, device="cpu")

    def features(path: Path) -> torch.Tensor:
        with Image.open(path) as file:
            pixels = classifier.clip.preprocess(file.convert("RGB"))
        return torch.nn.functional.normalize(classifier.encode(pixels[None])[0], dim=1)

    for row in json_of(capsys, "explain", run, photo, "--top", "100")["rows"]:
        if row["kind"] == "image":
            cosine = float(features(world.images / row["name"]) @ features(photo).T)
            assert row["cosine"] == pytest.approx(cosine, abs=1e-5)


def test_the_table_has_the_names_as_predictions_csv_has_them(world, photo, capsys):
    lines = table_of(capsys, world.run("proker", "odd", shots=8, test_fraction=0.1), photo,
                     "--top", "100")  # fmt: skip
    assert lines[0].startswith(f"{photo}: ")
    assert lines[1].startswith("log-odds of ")
    assert lines[-1].endswith("  sum")
    assert any(line.endswith("  what the prompts say") for line in lines)
    shown = [line for line in lines if line.endswith(r"grass/=sum(1)\n\\x.png")]
    assert len(shown) == 1
    assert " grass " in shown[0]
    numbers = [float(line[:9]) for line in lines[2:]]
    assert sum(numbers[:-1]) == pytest.approx(numbers[-1], abs=0.0005 * len(numbers))
    assert not any("-0.000" in line for line in lines)


def test_a_class_of_ones_choice_is_explained_against_the_most_probable(world, photo, capsys):
    run = world.run("takl")
    (answer,) = json_of(capsys, "predict", run, photo)["images"]
    ranked = [one["label"] for one in answer["predictions"]]
    why = json_of(capsys, "explain", run, photo, "--class", ranked[2])
    assert (why["label"], why["other"]) == (ranked[2], ranked[0])
    assert why["log_odds"] < 0
    assert "did you mean" in refused(capsys, "explain", run, photo, "--class", ranked[2] + "s")


def test_an_image_that_trained_is_said_to_have(world, capsys):
    run = world.run("takl")
    every = json_of(capsys, "explain", run, world.images / "ocean" / "03.png", "--top", "9")
    row = next(row["name"] for row in every["rows"] if row["name"].startswith("ocean/"))
    why = json_of(capsys, "explain", run, world.images / row)
    assert why["notes"] == [f"the run was trained on this image or a copy of it, {row}"]


def test_tip_adapter_f_says_that_its_images_were_trained(world, photo, capsys):
    (note,) = json_of(capsys, "explain", world.run("tip-adapter-f"), photo)["notes"]
    assert note.startswith("tip-adapter-f trains the features of its images; cosines are with")


def pooled(
    world: World, out: Path, pool: str, methods: tuple[str, ...] = ("takl", "rada", "vtclip")
) -> Path:
    """A run of an average of these methods, made of their runs."""
    shutil.copytree(world.run("takl"), out)
    few = {"overrides": {"epochs": 2}}
    runs = [world.run(name, **({} if name == "takl" else few)) for name in methods]
    adapters = [load_adapter(run) for run in runs]
    members = [
        {"method": one.head.method, "options": one.head.options(), "temperature": T, "weight": w}
        for one, T, w in zip(adapters, (0.7, 1.4, 2.0), (2.0, 5.0, 1.0), strict=False)
    ]
    scale = adapters[0].head.logit_scale
    head = Auto(adapters[0].head.text, members=members, pool=pool, logit_scale=scale)
    for own, one in zip(head.heads, adapters, strict=True):
        own.load_state_dict(one.head.state_dict())
    save_adapter(out, Adapter(head, adapters[0].class_names, 0.8, adapters[-1].features))
    digest = json.loads((out / "adapter_config.json").read_text())["tensors_digest"]
    resealed(out / "result.json", lambda result: result["digests"].update(adapter=digest))
    return out


def test_a_log_linear_pool_is_a_sum_with_a_heat_map(world, photo, tmp_path, capsys):
    run = pooled(world, tmp_path / "pool", "log-linear")
    (answer,) = json_of(capsys, "predict", run, photo)["images"]
    first, second = answer["predictions"][:2]
    out = tmp_path / "page.png"
    why = json_of(capsys, "explain", run, photo, "--out", out)
    odds = np.log(first["probability"] / second["probability"])
    assert why["log_odds"] == pytest.approx(odds, abs=2e-4)
    assert set(why["terms"]) == {"prompts", "rada", "vtclip", "shared"}
    assert (why["notes"], why["temperature"], why["picture"]) == ([], 0.8, str(out))
    with Image.open(out) as page:
        assert page.height > 700  # two pictures above each other on the left
    lines = table_of(capsys, run, photo)
    assert any(line.endswith("  member rada, as a whole") for line in lines)


def test_a_mixture_is_explained_by_a_member_that_is_named(world, photo, tmp_path, capsys):
    run = pooled(world, tmp_path / "mixture", "mixture")
    why = json_of(capsys, "explain", run, photo)
    alone = json_of(capsys, "explain", world.run("takl"), photo, "--class", why["label"])
    assert "mixture of 3 heads" in why["notes"][0]
    assert "takl, of weight 0.25, alone" in why["notes"][0]
    assert why["temperature"] == 0.7
    if why["other"] == alone["other"]:
        ratio = alone["temperature"] / 0.7
        assert why["log_odds"] == pytest.approx(alone["log_odds"] * ratio, rel=1e-4)


def test_a_mixture_of_no_such_member_is_refused(world, photo, tmp_path, capsys):
    run = pooled(world, tmp_path / "mixture", "mixture", methods=("rada", "vtclip"))
    line = refused(capsys, "explain", run, photo)
    assert line.startswith("vtclip explain: method auto cannot be explained")
    run = pooled(world, tmp_path / "pool", "log-linear", methods=("rada", "vtclip"))
    why = json_of(capsys, "explain", run, photo)
    assert (set(why["terms"]), why["rows"]) == ({"rada", "vtclip"}, [])


def test_pseudo_labels_are_called_so(world, photo, capsys):
    run = world.run("proker", "pseudo", pseudo_labels=True)
    why = json_of(capsys, "explain", run, photo, "--top", "99")
    notes = "the run was trained on pseudo-labels: classes of images are zero-shot's"
    assert why["notes"][-1] == notes
    assert all("/" in row["name"] for row in why["rows"])


def test_what_cannot_be_read_is_refused_before_the_model_is_loaded(world, tmp_path, capsys):
    (tmp_path / "text.png").write_text("no picture")
    away = world.model.rename(world.root / "away")
    try:
        line = refused(capsys, "explain", world.run("takl"), tmp_path / "text.png")
    finally:
        away.rename(world.model)
    assert "text.png: " in line


@pytest.mark.parametrize("method", ["rada", "mm-adapter", "gda"])
def test_heads_that_are_no_sum_are_one_line(world, photo, tmp_path, capsys, method):
    few = {} if method == "gda" else {"overrides": {"epochs": 2}}
    line = refused(capsys, "explain", world.run(method, **few), photo, "--out", tmp_path / "x.png")
    assert line.startswith(f"vtclip explain: method {method} cannot be explained, its logits are ")
    assert "proker, takl" in line
    assert "vtclip has a heat map" in line
    assert not (tmp_path / "x.png").exists()


def test_options_of_the_table_are_refused_with_a_heat_map(world, photo, capsys):
    run = world.run("vtclip", overrides={"epochs": 2})
    assert "name its file as --out PNG" in refused(capsys, "explain", run, photo)
    line = refused(capsys, "explain", run, photo, "--top", "3", "--out", "x.png")
    assert "--top: method vtclip is explained by a heat map alone" in line


def test_a_heat_map_says_in_json_which_class_it_shows(world, photo, tmp_path, capsys):
    run, out = world.run("vtclip", overrides={"epochs": 2}), tmp_path / "map.png"
    (answer,) = json_of(capsys, "predict", run, photo)["images"]
    value = json_of(capsys, "explain", run, photo, "--out", out)
    assert value["label"] == answer["predictions"][0]["label"]
    with Image.open(out) as picture:
        assert (value["width"], value["height"]) == picture.size


def test_runs_of_several_labels_or_one_class_are_refused(world, photo, tmp_path, capsys):
    adapter = load_adapter(world.run("zeroshot"))
    features = {
        **adapter.features,
        "multi_label": {"scale": 1.0, "offset": [0.0], "threshold": 0.5},
    }
    save_adapter(tmp_path / "several", Adapter(adapter.head, adapter.class_names, 1.0, features))
    assert "several labels per image" in refused(capsys, "explain", tmp_path / "several", photo)
    head = HEADS["zeroshot"](adapter.head.text[:1])
    save_adapter(tmp_path / "one", Adapter(head, ["grass"], 1.0, adapter.features))
    assert "the run has one class" in refused(capsys, "explain", tmp_path / "one", photo)


def test_the_page_is_the_same_each_time_and_shows_the_training_images(
    world, photo, tmp_path, capsys
):
    run = world.run("takl")
    pages = [tmp_path / "deep" / "one.png", tmp_path / "deep" / "two.png"]
    for page in pages:
        lines = table_of(capsys, run, photo, "--out", page)
        assert lines[-1] == f"page: {page}"
    assert pages[0].read_bytes() == pages[1].read_bytes()
    moved = tmp_path / "moved"
    world.images.rename(moved)
    try:  # the files are gone, the names are not
        table_of(capsys, run, photo, "--out", tmp_path / "gone.png")
    finally:
        moved.rename(world.images)
    assert (tmp_path / "gone.png").read_bytes() != pages[0].read_bytes()
    message = refused(capsys, "explain", run, photo, "--out", photo)
    assert "--out is the image itself" in message


def test_a_file_that_has_changed_is_not_shown(world):
    run = world.run("takl")
    adapter = load_adapter(run)
    labels = [adapter.class_names[k] for k in adapter.head.label.tolist()]
    images = training_images(run, labels)
    place = world.images / images.names[4]
    with Image.open(place) as file:
        wanted = file.convert("RGB").tobytes()
    assert images.open(4).tobytes() == wanted
    before = place.read_bytes()
    try:
        place.write_bytes((world.images / images.names[0]).read_bytes())
        assert training_images(run, labels).open(4) is None
    finally:
        place.write_bytes(before)


def test_training_images_without_names_say_why(world, photo, tmp_path, capsys):
    run = world.run("takl")
    adapter = load_adapter(run)
    labels = [adapter.class_names[k] for k in adapter.head.label.tolist()]
    assert training_images(run, labels).why == ""
    assert "lists 18 training images, the head keeps 17" in training_images(run, labels[1:]).why
    wrong = [labels[-1], *labels[1:]]
    assert "training image 1 is of 'grass', the head's row is of" in training_images(run, wrong).why
    alone = tmp_path / "alone"
    Classifier.load(run, device="cpu").save_pretrained(alone)
    lines = table_of(capsys, alone, photo)
    wanted = "note: training images have numbers in place of names: the folder holds an adapter"
    assert any(line.startswith(wanted) for line in lines)
    assert any("  training image " in line and " of class " in line for line in lines)
    copied = Path(shutil.copytree(run, tmp_path / "copied"))
    (copied / "images.csv").unlink()
    assert "images.csv does not exist" in training_images(copied, labels).why
    as_older(copied / "result.json", lambda result: result.pop("seen"))
    assert "from before runs kept a list" in training_images(copied, labels).why


def test_an_old_run_has_numbers(tmp_path, capsys, monkeypatch):
    old = Path(shutil.copytree(OLD, tmp_path / "old"))
    monkeypatch.chdir(old)
    picture = sorted((old / "pictures" / "dotted square").iterdir())[0]
    lines = table_of(capsys, "tip-adapter-f-pictures", picture, "--out", tmp_path / "page.png")
    assert any("the run is from before runs kept a list of their images" in x for x in lines)
    assert any("training image 3 of class dotted square" in line for line in lines)


def test_names_of_a_final_and_of_an_extended_run(world, photo, tmp_path, capsys):
    final = world.run("proker", "final", final=True)
    why = json_of(capsys, "explain", final, photo, "--top", "100")
    assert len(why["rows"]) == 36
    assert why["notes"] == []
    sky = tmp_path / "sky"
    for number in range(6):
        pixels = np.random.default_rng(number).integers(120, 255, (20, 24, 3))
        save(pixels, sky / f"{number}.png")
    vtclip.extend(world.run("takl"), sky, out=tmp_path / "more", device="cpu",
                  cache_dir=world.root / "cache")  # fmt: skip
    why = json_of(capsys, "explain", tmp_path / "more", photo, "--top", "100")
    rows = [row for row in why["rows"] if row["kind"] == "image"]
    assert {row["name"].split("/")[0] for row in rows if row["label"] != "sky"} == {
        "grass", "ocean", "sunset"
    }  # fmt: skip
    adapter = load_adapter(tmp_path / "more")
    labels = [adapter.class_names[k] for k in adapter.head.label.tolist()]
    images = training_images(tmp_path / "more", labels)
    assert all(images.open(row) is not None for row in range(len(labels)))


def page_of(rows: int) -> Why:
    from vtclip.runs.why import Row

    made = [Row("image", k, f"{'long' * 20}/{k}.png", "Straße " * 9, 0.5, (-1.0) ** k)
            for k in range(rows)]  # fmt: skip
    return Why("a", "b" * 99, 0.6, 0.3, {"prompts": 0.0}, made, 0.0, 2, 0, 1.0, ["x " * 300])


@pytest.mark.parametrize("rows", [0, 1, 9])
def test_any_explanation_can_be_drawn(rows):
    picture = Image.new("RGB", (9, 900), "red")
    run = training_images(OLD, ["a"] * rows)
    page = draw_page(picture, page_of(rows), run, picture)
    assert page.mode == "RGB"
    assert page.size == draw_page(picture, page_of(0), run, picture).size or rows


def test_words_of_a_page():
    assert _ascii("plain.png") == "plain.png"
    assert _ascii("é日.png") == "e?.png"
    assert _wrapped("one two", 1) == ["one", "two"]
    assert _wrapped("", 10) == [""]


def test_the_function_takes_a_picture_and_gives_what_the_command_prints(world, photo, capsys):
    run = world.run("proker")
    classifier = Classifier.load(run, device="cpu")
    with Image.open(photo) as file:
        why, _ = explain_choice(
            classifier, file.convert("RGB"), lambda labels: training_images(run, labels), top=1
        )
    wanted = json_of(capsys, "explain", run, photo, "--top", "1", "--device", "cpu")
    said = {"command": "explain", "vtclip_version": vtclip.__version__, "image": str(photo)}
    assert {**said, **why.to_json(), "picture": None} == wanted
