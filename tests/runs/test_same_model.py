# SPDX-License-Identifier: Apache-2.0
"""The model of a run: found again wherever it lies, refused where a field of it differs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from commands import call, refused
from pictures import noise, small_model

import vtclip
from vtclip.cli import main
from vtclip.runs.adapter import load_adapter
from vtclip.runs.result import Run

CLASSES = ("grass", "ocean")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures, a model, and the runs that a fit and an extension made of relative paths."""
    root = tmp_path_factory.mktemp("model")
    noise(root / "pictures", CLASSES, 8)
    noise(root / "more", (*CLASSES, "sunset"), 8)
    for name in CLASSES:
        shutil.rmtree(root / "more" / name)
    (root / "lines.txt").write_text("a photo of a {}\na {}\n")
    small_model(root / "model")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        words = ["--method", "vtclip", "--epochs", "1", "--shots", "2", "--cache-dir", "cache"]
        words += ["--model", "local-dir:model", "--templates", "lines.txt", "--out", "run"]
        assert main(["fit", "pictures", *words]) == 0
    return root


@pytest.fixture
def place(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the runs in another place, which is the working directory; no file of the fit is
    relative to it.
    """
    monkeypatch.chdir(tmp_path)
    shutil.copytree(made / "run", tmp_path / "run")
    return tmp_path


def commands(made: Path, to: Path) -> dict[str, list[Any]]:
    """Each command that needs the model of a run."""
    cache = ["--cache-dir", made / "cache"]
    image = made / "pictures" / "grass" / "0.png"
    return {
        "predict": ["predict", "run", image],
        "explain": ["explain", "run", image, "--out", to / "map.png"],
        "export": ["export", "run", "--out", to / "run.pt2"],
        "extend": ["extend", "run", made / "more", "--out", to / "wider", *cache],
        "evaluate": ["evaluate", "run", *cache],
        "evaluate other": ["evaluate", "run", made / "pictures", *cache],
        "repeat": ["repeat", "run", *cache],
    }


NAMES = ("predict", "explain", "export", "extend", "evaluate", "evaluate other", "repeat")


def changed(made: Path, to: Path, part: str, **values: Any) -> Path:
    """The model with other values in one part of its configuration."""
    folder = Path(shutil.copytree(made / "model", to))
    file = folder / "open_clip_config.json"
    config = json.loads(file.read_text())
    config[part].update(values)
    file.write_text(json.dumps(config))
    return folder


def test_a_run_records_what_was_given_in_absolute_paths(made):
    config = Run.load(made / "run").result["config"]
    name = f"local-dir:{made / 'model'}"
    assert config["model"] == load_adapter(made / "run").features["model"] == name
    assert config["source"] == str(made / "pictures")
    assert config["templates"] == ["a photo of a {}", "a {}"]


@pytest.mark.parametrize("name", NAMES)
def test_no_command_depends_on_the_working_directory(name, made, place, monkeypatch):
    monkeypatch.setenv("VTCLIP_CACHE", str(place / "cache"))
    (made / "lines.txt").rename(made / "gone.txt")
    try:
        assert call(*commands(made, place)[name]) == 0
    finally:
        (made / "gone.txt").rename(made / "lines.txt")


@pytest.mark.parametrize("name", NAMES)
def test_a_model_that_moved_is_named_and_found_again(name, made, place, capsys):
    words = commands(made, place)[name]
    moved = place / "moved"
    (made / "model").rename(moved)
    try:
        line = refused(capsys, *words)
        assert f"local-dir:{made / 'model'}" in line
        assert "name its present place with --model" in line
        assert call(*words, "--model", f"local-dir:{moved}") == 0
    finally:
        moved.rename(made / "model")


OTHERS: dict[str, tuple[str, dict[str, Any], str]] = {
    "mean": ("preprocess_cfg", {"mean": [0, 0, 0]},
             "of the run vs of --model: preprocess mean [0.5, 0.4, 0.6] vs [0, 0, 0]"),
    "interpolation": ("preprocess_cfg", {"interpolation": "bilinear"}, "preprocess interpolation"),
    "activation": ("model_cfg", {"quick_gelu": True}, "quick_gelu"),
}  # fmt: skip


@pytest.mark.parametrize("other", OTHERS)
@pytest.mark.parametrize("name", NAMES)
def test_a_model_with_another_field_is_refused_by_that_field(name, other, made, place, capsys):
    part, values, said = OTHERS[other]
    folder = changed(made, place / "other", part, **values)
    line = refused(capsys, *commands(made, place)[name], "--model", f"local-dir:{folder}")
    assert said in line
    assert {path.name for path in place.iterdir()} == {"run", "other"}


def test_other_weights_are_refused(made, place, capsys):
    folder = small_model(place / "other", seed=2)
    line = refused(capsys, *commands(made, place)["predict"], "--model", f"local-dir:{folder}")
    assert "of the run vs of --model: weights " in line


def test_features_of_another_model_name_the_field(made, place, capsys):
    folder = changed(made, place / "other", "preprocess_cfg", std=[1, 1, 1])
    options: dict[str, Any] = {"cache_dir": place / "cache", "progress": False}
    model = f"local-dir:{folder}"
    vtclip.open_source(made / "pictures", model=model, need_spatial=True, **options)
    (features,) = (place / "cache" / "features").iterdir()
    line = refused(capsys, "evaluate", "run", features)
    assert "of the run vs of the source: preprocess std [0.25, 0.3, 0.2] vs [1, 1, 1]" in line


def test_cached_features_do_not_bring_the_name_of_the_model_that_made_them(made, place):
    second = Path(shutil.copytree(made / "model", place / "second"))
    options: dict[str, Any] = {"method": "proker", "shots": 2, "cache_dir": made / "cache"}
    vtclip.fit(made / "pictures", model=f"local-dir:{made / 'model'}", out=place / "a", **options)
    run = vtclip.fit(made / "pictures", model=f"local-dir:{second}", out=place / "b", **options)
    assert load_adapter(run.folder).features["model"] == f"local-dir:{second}"
    assert run.result["config"]["model"] == f"local-dir:{second}"


def test_a_field_that_an_older_adapter_lacks_is_not_checked(made, place):
    from vtclip.runs.adapter import check_same_model

    features = load_adapter(place / "run").features
    older = {name: features[name] for name in ("weights_digest",)}
    check_same_model(older, features["weights_digest"], {"preprocess_cfg": {}}, "it", "--model")
    with pytest.raises(ValueError, match="of --model: weights "):
        check_same_model(older, "0" * 64, None, "it", "--model")


def test_a_batch_size_and_links_reach_the_evaluation(made, place, capsys):
    linked = place / "linked"
    linked.mkdir()
    save_to = made / "pictures"
    (linked / "grass").symlink_to(save_to / "grass", target_is_directory=True)
    (linked / "ocean").symlink_to(save_to / "ocean", target_is_directory=True)
    words = ["evaluate", "run", linked, "--cache-dir", made / "cache", "--follow-links"]
    assert call(*words, "--encoder-batch-size", 3) == 0
    assert "8 images" in capsys.readouterr().out
