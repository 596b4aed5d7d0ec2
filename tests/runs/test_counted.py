# SPDX-License-Identifier: Apache-2.0
"""Which images an evaluation counts: none that the run trained or validated on."""

from __future__ import annotations

import hashlib
import math
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commands import call, json_of, refused
from pictures import noise, save, small_model
from PIL import Image
from sealing import as_older

import vtclip
from vtclip.data.extract import extract_features
from vtclip.files import NewFiles
from vtclip.heads import HEADS
from vtclip.runs.adapter import load_adapter
from vtclip.runs.result import Run
from vtclip.runs.seen import Seen
from vtclip.runs.sources import RunSources

CLASSES = ("grass", "ocean")  # which the small model can tokenise
EACH, SHOTS = 24, 8


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Noise, a model of random weights, and a run that learned the noise by heart.

    Its validation images validate and do no more, so that there are images of every role.
    """
    root = tmp_path_factory.mktemp("counted")
    noise(root / "noise", CLASSES, EACH)
    small_model(root / "model")
    vtclip.fit(
        root / "noise", method="linear-probe", shots=SHOTS, model=f"local-dir:{root / 'model'}",
        out=root / "run", cache_dir=root / "cache", device="cpu", refit=False,
    )  # fmt: skip
    return root


@pytest.fixture
def copied(place: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(place / "noise", tmp_path / "noise"))


def evaluated(place: Path, *source: Path, run: str = "run") -> dict[str, Any]:
    found: dict[str, Any] = vtclip.evaluate(
        place / run, *source, cache_dir=place / "cache", device="cpu"
    )
    return found


def roles(place: Path, run: str = "run") -> dict[str, str]:
    """Name of each image of the run's source to its role."""
    seen = Seen.read(place / run, Run.load(place / run).result["seen"])
    return dict(zip(seen.names, seen.roles, strict=True))


def fresh(path: Path, seed: int = 9) -> None:
    save(np.random.default_rng(seed).integers(0, 256, (12, 14, 3)), path)


def one_of(place: Path, role: str) -> str:
    return next(name for name, own in roles(place).items() if own == role)


def test_a_run_keeps_content_and_role_of_every_image(place):
    run = Run.load(place / "run")
    seen = Seen.read(run.folder, run.result["seen"])
    assert run.result["seen"]["images"] == seen.counts() == {
        "train": 2 * SHOTS, "val": 8, "test": EACH, "unused": 0,
    }  # fmt: skip
    assert len(set(seen.digests)) == 2 * EACH
    assert {name.partition("/")[0] for name in seen.names} == set(seen.labels) == set(CLASSES)
    assert [name.partition("/")[0] for name in seen.names] == seen.labels


def test_one_picture_more_adds_one_image_and_no_trained_one(place, copied):
    before = evaluated(place)
    assert before["test"]["images"] == EACH
    assert before["accuracy"] == Run.load(place / "run").accuracy
    same = evaluated(place, copied)
    assert {**same, "left_out": 0} == {**before, "left_out": 0}
    fresh(copied / "grass" / "new.png")
    after = evaluated(place, copied)
    assert after["test"]["images"] == EACH + 1
    assert after["left_out"]["trained"] == 2 * SHOTS
    assert after["left_out"]["validated"] == 8


def test_the_command_says_in_sentences_what_is_left_out(place, copied, capsys):
    fresh(copied / "grass" / "new.png")
    fresh(copied / "plum" / "a.png", 10)
    words = ["evaluate", place / "run", copied, "--cache-dir", place / "cache"]
    found = json_of(capsys, *words)
    assert found["left_out"]["other_classes"] == 1
    assert found["left_out"]["classes"] == {"plum": 1}
    assert call(*words) == 0
    out = capsys.readouterr().out
    assert f": {EACH + 1} images\n" in out
    counted = "25 of 50 images left out: 16 trained, 8 validated on, 1 of classes that the run"
    assert counted in out
    assert "Class that the run does not know: plum (1)." in out


def test_images_that_changed_their_class_are_counted_and_said(place, copied, capsys):
    tested = [Path(name) for name, role in roles(place).items() if role == "test"]
    moved = [name for name in tested if name.parent.name == "grass"][:3]
    for name in moved:
        (copied / name).rename(copied / "ocean" / f"moved_{name.name}")
    found = evaluated(place, copied)
    assert found["test"]["images"] == len(tested)
    assert found["left_out"]["relabelled"] == 3
    assert evaluated(place)["left_out"]["relabelled"] == 0
    assert call("evaluate", place / "run", copied, "--cache-dir", place / "cache") == 0
    line = "3 of the counted images have another class here than in the run's list of images.\n"
    assert line in capsys.readouterr().out


def test_a_class_folder_in_another_case_is_that_of_the_run_and_said(place, copied, caplog):
    (copied / "grass").rename(copied / "Grass_")
    found = evaluated(place, copied)
    assert found["test"]["images"] == EACH
    assert found["left_out"]["other_classes"] == found["left_out"]["relabelled"] == 0
    assert found["accuracy"] == evaluated(place)["accuracy"]
    said = [record.getMessage() for record in caplog.records]
    assert said == [f"{copied}: class 'Grass_' is taken as the run's 'grass'"]


def test_a_test_source_in_another_case_is_evaluated_as_it_was_fitted(place, copied, caplog):
    for kind in ("images", "features"):
        source = noise(copied.parent / kind, ("a", "b", "Grass", "OCEAN"), 3)
        for name in "ab":  # whose draws are those of the training images
            shutil.rmtree(source / name)
        model = f"local-dir:{place / 'model'}"
        if kind == "features":
            extract_features(source, copied.parent / "table", model=model, device="cpu")
            source = copied.parent / "table"
        run = copied.parent / f"run of {kind}"
        options: dict[str, Any] = {"cache_dir": place / "cache", "device": "cpu"}
        caplog.clear()
        fitted = vtclip.fit(copied, method="proker", shots=2, model=model, out=run, test=source,
                            **options)  # fmt: skip
        said = [record.getMessage() for record in caplog.records]
        assert [line for line in said if line.startswith("test: ")] == [
            "test: class 'Grass' is taken as 'grass'", "test: class 'OCEAN' is taken as 'ocean'"
        ]  # fmt: skip
        assert "has no images of" not in caplog.text
        found = vtclip.evaluate(run, **options)
        assert found["test"]["images"] == fitted.result["test"]["images"] == 6
        assert found["accuracy"] == fitted.result["adapted"]["accuracy"]


def test_a_source_that_moved_is_asked_for_by_name(place, copied, capsys):
    words = ["--cache-dir", str(place / "cache"), "--device", "cpu"]
    run, model = copied.parent / "run", f"local-dir:{place / 'model'}"
    vtclip.fit(copied, method="proker", shots=2, model=model, out=run,
               cache_dir=place / "cache", device="cpu")  # fmt: skip
    moved = copied.rename(copied.parent / "moved")
    line = f"evaluate: the test images of the run were in {copied}, which is gone"
    assert f"{line}; bring them back, or evaluate what moved by naming it as SOURCE" in refused(
        capsys, "evaluate", run, *words
    )
    assert json_of(capsys, "evaluate", run, moved, *words)["test"]["images"] == EACH


def test_classes_of_the_run_without_an_image_are_said(place, copied, caplog):
    shutil.rmtree(copied / "ocean")
    evaluated(place, copied)
    assert "no counted image for 1 of the run's 2 classes: ocean" in caplog.text
    caplog.clear()
    evaluated(place, place / "noise")
    assert "no counted image" not in caplog.text


def test_copies_with_loss_are_counted_and_said(place, tmp_path, caplog):
    pytest.importorskip("imagehash", reason="the extra duplicates is not installed")
    options = {"cache_dir": place / "cache", "device": "cpu"}
    source = tmp_path / "blobs"
    for name in CLASSES:
        for number in range(4):
            rng = np.random.default_rng([ord(name[0]), number])
            coarse = Image.fromarray(rng.integers(0, 256, (6, 6, 3)).astype("uint8"))
            (source / name).mkdir(parents=True, exist_ok=True)
            coarse.resize((48, 48), Image.Resampling.BICUBIC).save(source / name / f"{number}.png")
    run = vtclip.fit(
        source, method="linear-probe", shots=1, model=f"local-dir:{place / 'model'}",
        out=tmp_path / "run", **options,
    )  # fmt: skip
    seen = Seen.read(run.folder, run.result["seen"])
    fitted = [name for name, role in zip(seen.names, seen.roles, strict=True)
              if role in ("train", "val")]  # fmt: skip
    other = tmp_path / "saved again"
    for name in seen.names:
        (other / name).parent.mkdir(parents=True, exist_ok=True)
        with Image.open(source / name) as picture:
            picture.save((other / name).with_suffix(".jpg"), quality=95)
    caplog.clear()
    found = vtclip.evaluate(run, other, **options)
    assert found["test"]["images"] == len(seen.names)
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 1
    assert said[0].startswith(f"{len(fitted)} of the counted images look nearly like images that")
    assert Path(fitted[0]).with_suffix(".jpg").as_posix() + f" like {fitted[0]}" in said[0]
    caplog.clear()
    vtclip.evaluate(run, source, **options)
    assert not caplog.records


def test_a_name_with_any_line_end_stays_one_row_of_the_list(tmp_path):
    names = ["a\r.png", "b\n.png", "c\r\n.png", 'd",.png']
    seen = Seen(names, ["grass"] * 4, ["train"] * 4, ["d"] * 4, ["p"] * 4, [""] * 4)
    with NewFiles(tmp_path) as new:
        entry = seen.write(new)
        new.commit()
    assert Seen.read(tmp_path, entry) == seen


def test_a_row_of_another_length_is_named(tmp_path):
    text = "name,label,role,digest,pixels,perceptual\na\r.png,grass,train,d1,p1,\n"
    (tmp_path / "images.csv").write_bytes(text.encode())
    entry = {"file": "images.csv", "sha256": hashlib.sha256(text.encode()).hexdigest()}
    with pytest.raises(ValueError, match=r"row 2 of .*images\.csv has 1 cells, not 6$"):
        Seen.read(tmp_path, entry)


def test_a_list_of_images_from_before_perceptual_hashes_is_read(tmp_path):
    text = "name,label,role,digest,pixels\na.png,grass,train,d1,p1\n"
    (tmp_path / "images.csv").write_text(text)
    entry = {"file": "images.csv", "sha256": hashlib.sha256(text.encode()).hexdigest()}
    assert Seen.read(tmp_path, entry) == Seen(["a.png"], ["grass"], ["train"], ["d1"], ["p1"], [""])


def test_its_own_source_counts_its_own_test_images_and_says_what_changed(tmp_path, capsys):
    source, cache = noise(tmp_path / "noise", CLASSES, 8), tmp_path / "cache"
    model = f"local-dir:{small_model(tmp_path / 'model')}"
    vtclip.fit(source, method="proker", shots=2, model=model, out=tmp_path / "run",
               cache_dir=cache, device="cpu")  # fmt: skip
    drawn = roles(tmp_path)
    tested = [name for name, role in drawn.items() if role == "test"]
    (source / tested[0]).unlink()
    (source / tested[1]).rename(source / "grass" / "renamed.png")
    shutil.copy(source / tested[2], source / "ocean" / "copy.png")
    fresh(source / "grass" / "new.png")
    words = ["evaluate", tmp_path / "run", "--cache-dir", cache]
    found = json_of(capsys, *words)
    assert found["test"]["images"] == len(tested) - 1
    left_out = found["left_out"]
    assert (left_out["gone"], left_out["new"], left_out["trained"]) == (1, 1, 8)
    assert call(*words) == 0
    out = capsys.readouterr().out
    assert f"1 of {len(tested)} test images of the run is gone." in out
    assert "1 new image is not counted; give the folder as SOURCE to count it." in out
    # given as a source the new one counts too
    assert evaluated(tmp_path, source)["test"]["images"] == len(tested)


@pytest.mark.parametrize("what", ["empty class", "class gone", "unreadable", "class unreadable"])
def test_no_evaluation_dies_of_a_file_that_came_or_went(what, place, copied):
    tested = [name for name, role in roles(place).items() if role == "test"]
    wanted = len(tested)
    if what == "empty class":
        (copied / "plum").mkdir()
    elif what == "class gone":
        shutil.rmtree(copied / "ocean")
        wanted = sum(name.startswith("grass") for name in tested)
    elif what == "unreadable":
        (copied / tested[0]).write_bytes(b"no picture")
        (copied / "grass" / "empty.jpg").touch()
        wanted -= 1
    else:
        for path in (copied / "ocean").iterdir():
            path.write_bytes(f"no picture {path}".encode())
        wanted = sum(name.startswith("grass") for name in tested)
    found = evaluated(place, copied)
    assert found["test"]["images"] == wanted
    assert found["left_out"]["unreadable"] == len(found["test"]["unreadable"])
    assert (what in ("unreadable", "class unreadable")) == bool(found["left_out"]["unreadable"])


def test_nothing_left_is_one_line_that_says_why(place, tmp_path, capsys):
    for name, role in roles(place).items():
        if role in ("train", "val"):
            target = tmp_path / "trained" / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(place / "noise" / name, target)
    words = ["evaluate", place / "run", tmp_path / "trained", "--cache-dir", place / "cache"]
    line = refused(capsys, *words)
    assert "no image is left to count" in line
    assert "16 trained, 8 validated on" in line
    noise(tmp_path / "plums", ["plum"], 2)
    line = refused(capsys, "evaluate", place / "run", tmp_path / "plums")
    assert "unknown class 'plum'" in line


def test_images_that_lay_unused_count_where_no_test_image_is_there(place, tmp_path):
    model = f"local-dir:{place / 'model'}"
    vtclip.fit(place / "noise", method="proker", shots=2, model=model, out=tmp_path / "run",
               cache_dir=place / "cache", device="cpu")  # fmt: skip
    unused = [name for name, role in roles(tmp_path).items() if role == "unused"]
    assert len(unused) == 2 * (12 - 2 - 2)
    found = vtclip.evaluate(tmp_path / "run", place / "noise", cache_dir=place / "cache")
    assert found["test"]["images"] == EACH
    assert found["left_out"]["unused"] == len(unused)
    for name in unused:
        (tmp_path / "rest" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(place / "noise" / name, tmp_path / "rest" / name)
    found = vtclip.evaluate(tmp_path / "run", tmp_path / "rest", cache_dir=place / "cache")
    assert found["test"]["images"] == len(unused)


def changed(folder: Path, draw: np.random.Generator, lossless: bool) -> None:
    """Some files more, fewer, elsewhere, twice, and saved anew."""
    for number in range(int(draw.integers(0, 6))):
        fresh(folder / str(draw.choice(CLASSES)) / f"new {number}.png", int(draw.integers(2**31)))
    for number, step in enumerate(draw.permutation(int(draw.integers(1, 40)))):
        paths = sorted(folder.glob("*/*"))
        path = paths[int(draw.integers(len(paths)))]
        kind = ("remove", "rename", "move", "copy", "resave")[step % 5]
        if kind == "remove":
            path.unlink()
        elif kind == "rename":
            path.rename(path.with_name(f"r{number}{path.suffix}"))
        elif kind == "move":  # into the other class: the label of a copy does not matter
            path.rename(
                folder / CLASSES[path.parent.name == CLASSES[0]] / f"m{number}{path.suffix}"
            )
        elif kind == "copy":
            shutil.copy(path, folder / str(draw.choice(CLASSES)) / f"c{number}{path.suffix}")
        elif lossless:
            Image.open(path).convert("RGB").save(path.with_name(f"s{number}.bmp"))


def pixels(path: Path) -> bytes:
    return Image.open(path).convert("RGB").tobytes()


@pytest.mark.parametrize("seed", range(12))
def test_no_trained_image_is_counted_whatever_happens_to_the_folder(seed, place, copied):
    """The contents that may count are found here by the pixels of every file."""
    drawn = {pixels(place / "noise" / name): role for name, role in roles(place).items()}
    lossless = getattr(vtclip.open_source(place / "noise", cache_dir=place / "cache",
                                          progress=False), "pixels", None) is not None  # fmt: skip
    changed(copied, np.random.default_rng(seed), lossless)
    adapter = load_adapter(place / "run")
    sources = RunSources(Run.load(place / "run"), adapter, torch.device("cpu"),
                         cache_dir=place / "cache")  # fmt: skip
    rows = sources.other(copied)
    counted = [rows.records.names[row] for row in rows.test.tolist()]
    there = {pixels(path) for path in copied.glob("*/*")}
    met = Counter(pixels(copied / name) for name in counted)
    assert set(met) == {picture for picture in there if drawn.get(picture, "test") == "test"}
    assert max(met.values()) == 1
    found = evaluated(place, copied)
    n = found["test"]["images"]
    assert n == len(counted)
    assert abs(found["accuracy"] - 0.5) < 3.3 * math.sqrt(0.25 / n)


METHODS = [name for name in HEADS if name != "coop"]


@pytest.mark.parametrize("each", [2, 3, 4, 8, 16])
@pytest.mark.parametrize("method", METHODS)
def test_every_run_can_be_evaluated_repeated_and_exported(method, each, tmp_path):
    draw = np.random.default_rng(each)
    label = np.repeat(np.arange(3), each)
    text = draw.standard_normal((3, 16)).astype(np.float32)
    spatial = draw.standard_normal((3 * each, 4, 16)).astype(np.float32)
    image = text[label] + draw.standard_normal((3 * each, 16)).astype(np.float32)
    np.savez(tmp_path / "t.npz", image=image, label=label, text=text, spatial=spatial,
             classname=np.array(["ant", "bee", "cat"]))  # fmt: skip
    recipe = HEADS[method].recipe(1)
    overrides = {"epochs": 1} if recipe.epochs else {}
    if method == "auto":
        overrides = {}
    run = vtclip.fit(tmp_path / "t.npz", method=method, overrides=overrides, device="cpu",
                     out=tmp_path / "run")  # fmt: skip
    for source in ([], [tmp_path / "t.npz"]):
        again = vtclip.evaluate(tmp_path / "run", *source, device="cpu")
        assert again["accuracy"] == run.accuracy
        assert again["per_class"] == pytest.approx(run.result["adapted"]["per_class"], nan_ok=True)
    assert vtclip.repeat(tmp_path / "run")["verdict"] == "MATCH"


@pytest.mark.parametrize("method", ["zeroshot", "tip-adapter"])
def test_an_extension_with_copies_of_old_images_counts_each_once(method, place, tmp_path, caplog):
    options: dict[str, Any] = {"cache_dir": place / "cache", "device": "cpu"}
    run = vtclip.fit(place / "noise", method=method, shots=2, model=f"local-dir:{place / 'model'}",
                     out=tmp_path / "run", **options)  # fmt: skip
    more = noise(tmp_path / "more", [*CLASSES, "sunset"], 12) / "sunset"
    for number in range(8):
        shutil.copy(place / "noise" / "grass" / f"{number}.png", more / f"{number}.png")
    caplog.clear()
    wider = vtclip.extend(run, more, out=tmp_path / "wider", **options)
    assert "the new classes hold images that the run saw under others" in caplog.text
    again = vtclip.evaluate(wider, **options)
    assert again["test"]["images"] == wider.result["test"]["images"]
    assert again["accuracy"] == wider.accuracy


@pytest.mark.parametrize("each", [2, 8])
@pytest.mark.parametrize("method", ["zeroshot", "autoclip"])
def test_a_run_that_learned_nothing_is_exported_and_extended(method, each, place, tmp_path):
    """Its shots were recorded as 0, so that its split could not be found again."""
    options: dict[str, Any] = {"cache_dir": tmp_path / "cache", "device": "cpu"}
    source = noise(tmp_path / "noise", CLASSES, each)
    run = vtclip.fit(source, method=method, model=f"local-dir:{place / 'model'}",
                     out=tmp_path / "run", **options)  # fmt: skip
    more = noise(tmp_path / "more", [*CLASSES, "sunset"], 4)
    wider = vtclip.extend(run, more / "sunset", out=tmp_path / "wider", **options)
    assert vtclip.evaluate(wider, **options)["accuracy"] == wider.accuracy
    assert vtclip.repeat(run, cache_dir=tmp_path / "cache")["verdict"] == "MATCH"
    for kind in ("image", "features"):
        vtclip.export(run, tmp_path / f"{kind}.pt2", kind=kind, cache_dir=tmp_path / "cache")
        assert (tmp_path / f"{kind}.pt2").is_file()


def test_a_changed_list_of_images_is_refused(place, tmp_path, capsys):
    run = Path(shutil.copytree(place / "run", tmp_path / "run"))
    lines = (run / "images.csv").read_text().splitlines(keepends=True)
    (run / "images.csv").write_text("".join(lines[:-1]))
    assert "was changed after it was written" in refused(capsys, "evaluate", run)
    (run / "images.csv").unlink()
    assert "images.csv does not exist" in refused(capsys, "evaluate", run)


def older(place: Path, to: Path) -> Path:
    """The run as an earlier version wrote it, without its list of images."""
    run = Path(shutil.copytree(place / "run", to))
    (run / "images.csv").unlink()

    def change(result: dict[str, Any]) -> None:
        del result["seen"], result["left_out"]

    as_older(run / "result.json", change)
    return run


def test_an_older_run_is_known_by_its_split_or_says_that_it_is_not(place, copied, tmp_path, caplog):
    run = older(place, tmp_path / "run")
    options: dict[str, Any] = {"cache_dir": place / "cache", "device": "cpu"}
    same = vtclip.evaluate(run, **options)
    assert same["left_out"] == evaluated(place)["left_out"]
    fresh(copied / "grass" / "new.png")
    # the source is as it was, so that every image of then is known
    assert vtclip.evaluate(run, copied, **options)["test"]["images"] == EACH + 1
    # it has changed, but the cache has the list of then
    as_older(run / "result.json", lambda result: result["config"].update(source=str(copied)))
    assert vtclip.evaluate(run, copied, **options)["test"]["images"] == EACH + 1
    assert vtclip.evaluate(run, **options)["left_out"]["new"] == 1
    # nobody knows
    elsewhere = {**options, "cache_dir": tmp_path / "empty"}
    for source in ([], [copied]):
        with pytest.raises(ValueError, match="it is not known which of them trained"):
            vtclip.evaluate(run, *source, **elsewhere)
    caplog.clear()
    found = vtclip.evaluate(run, place / "noise", **elsewhere)
    assert found["test"]["images"] == 2 * EACH
    assert "cannot be told apart and are counted" in caplog.text
