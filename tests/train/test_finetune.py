# SPDX-License-Identifier: Apache-2.0
"""Both towers trained with RAda: it learns, resumes bit by bit, and two processes are as one."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from commands import call, python, refused
from pictures import save, write_model

import vtclip
from vtclip.clip import load_clip
from vtclip.data.extract import extract_features
from vtclip.distributed import Interrupted, World, device_of_rank
from vtclip.runs.classifier import Classifier
from vtclip.runs.encoders import ENCODERS
from vtclip.runs.folder import LOG
from vtclip.runs.result import Run
from vtclip.train import finetune
from vtclip.train.finetune_config import get_config

ROOT = Path(vtclip.__file__).parents[1]
HERE = Path(__file__).parent
TEXT = {"context_length": 16, "vocab_size": 64, "width": 32, "heads": 2, "layers": 2}
VIT = {"image_size": 32, "layers": 2, "width": 64, "head_width": 32, "patch_size": 8}
RESNET = {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8}
COLOURS = {"red dot": (220, 40, 40), "green dot": (40, 200, 60), "blue dot": (50, 60, 220)}
TEMPLATES = ["a photo of a {}.", "a drawing of a {}."]
QUICK: dict[str, Any] = {"epochs": 4, "lr": 1e-3, "head_lr": 1e-3, "batch_size": 6}


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three classes of sixteen pictures: a coloured square somewhere on noise."""
    folder = tmp_path_factory.mktemp("photos")
    draw = np.random.default_rng(5)
    for name, colour in COLOURS.items():
        for number in range(16):
            pixels = draw.integers(0, 256, (32, 32, 3))
            top, left = draw.integers(0, 16, 2)
            pixels[top : top + 16, left : left + 16] = colour
            save(pixels, folder / name / f"{number:02d}.png")
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("models")
    words = re.findall(r"\w+", "a photo of drawing red green blue dot")
    found = {}
    for name, vision in {"vit": VIT, "resnet": RESNET}.items():
        config = {"embed_dim": 32, "vision_cfg": vision, "text_cfg": TEXT}
        model = write_model(folder / name, {"model_cfg": config}, words, seed=3)
        found[name] = str(model)
    return found


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def fitted(
    photos: Path, models: dict[str, str], cache: Path, tmp_path_factory: pytest.TempPathFactory
) -> Run:
    return fit(photos, models["vit"], tmp_path_factory.mktemp("runs") / "run", cache)


def fit(source: Path, model: str, out: Path, cache: Path, **options: Any) -> Run:
    overrides = {**QUICK, **options.pop("overrides", {})}
    given = {"method": "rada", "shots": 4, "templates": TEMPLATES, "train_encoders": True}
    given |= {"model": model, "out": out, "cache_dir": cache, "device": "cpu", "threads": 1}
    return vtclip.fit(source, overrides=overrides, **{**given, **options})


def steps(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(folder / ENCODERS)


def test_a_run_learns_and_holds_what_the_other_commands_need(fitted, photos, models, cache):
    rows = steps(fitted.folder)
    assert [row["step"] for row in rows] == list(range(1, 9))
    assert rows[-1]["epoch_loss"] < 0.8 * rows[1]["epoch_loss"]
    assert {"val_accuracy", "val_nll"} <= rows[-1].keys()
    result = fitted.result
    assert result["accuracy"] > result["zero_shot"]["accuracy"] + 0.2
    assert result["images"] == {"train": 12, "val": 12, "test": 24}
    assert result["adapted"]["ece_scaled"] is not None
    held = {"adapter.safetensors", "adapter_config.json", ENCODERS, "result.json", "log.jsonl"}
    held |= {"predictions.csv", "confusion.png", "images.csv"}
    assert {path.name for path in fitted.folder.iterdir()} == held

    again = vtclip.evaluate(fitted.folder, device="cpu", threads=1, cache_dir=cache)
    for name in ("accuracy", "nll", "ece", "nll_scaled", "temperature"):
        assert again[name] == result["adapted"][name]

    classifier = Classifier.load(fitted.folder, device="cpu")
    assert classifier.clip.weights_digest != load_clip(models["vit"]).weights_digest
    paths = sorted(photos.rglob("*.png"))
    best = [one[0].label for one in classifier.predict(paths, topk=1)]
    right = sum(label == path.parent.name for label, path in zip(best, paths, strict=True))
    assert right / len(paths) >= result["accuracy"] - 0.1


def test_zero_shot_is_the_untouched_model(fitted, photos, models, cache, tmp_path):
    options = {"model": models["vit"], "shots": 4, "templates": TEMPLATES, "device": "cpu"}
    options |= {"out": tmp_path / "plain", "cache_dir": cache}
    plain = vtclip.fit(photos, method="zeroshot", **options).result
    assert plain["split"] == fitted.result["split"]
    assert fitted.result["zero_shot"] == plain["zero_shot"]


def test_every_part_is_trained(fitted, models):
    before, after = load_clip(models["vit"]).model.state_dict(), weights(fitted.folder)
    assert before.keys() == after.keys()
    same = [name for name in before if torch.equal(before[name], after[name])]
    assert not [name for name in same if "token_embedding" not in name]
    head = safetensors.torch.load_file(fitted.folder / "adapter.safetensors")
    assert float(head["head.out.weight"].abs().max()) > 0


def test_the_same_command_gives_the_same_bits(fitted, photos, models, cache, tmp_path):
    again = fit(photos, models["vit"], tmp_path / "again", cache)
    assert again.result["digests"] == fitted.result["digests"]
    other = fit(photos, models["vit"], tmp_path / "other", cache, seed=2)
    assert other.result["digests"]["encoders"] != fitted.result["digests"]["encoders"]


@pytest.mark.parametrize("stop_at", [3, 4, 8])  # inside and at the end of an epoch, last step
def test_interrupted_and_resumed_equals_uninterrupted(
    fitted, photos, models, cache, tmp_path, monkeypatch, stop_at
):
    drawn = finetune.drawn_templates

    def interrupt(count: int, classes: int, seed: int, number: int) -> torch.Tensor:
        if number + 1 == stop_at:
            os.kill(os.getpid(), signal.SIGTERM)
        return drawn(count, classes, seed, number)

    with monkeypatch.context() as patched:
        patched.setattr(finetune, "drawn_templates", interrupt)
        with pytest.raises(Interrupted, match=f"SIGTERM after step {stop_at}"):
            fit(photos, models["vit"], tmp_path / "run", cache)
    assert not (tmp_path / "run" / ENCODERS).exists()
    resumed = fit(photos, models["vit"], tmp_path / "run", cache, resume=True)
    assert resumed.result["digests"] == fitted.result["digests"]
    losses = [[row["loss"] for row in steps(run.folder)] for run in (resumed, fitted)]
    assert losses[0] == losses[1]
    assert not (resumed.folder / "checkpoint.safetensors").exists()


def test_a_loss_that_is_not_finite_stops_before_its_step(
    fitted, photos, models, cache, tmp_path, monkeypatch
):
    real, build, losses, taken = F.cross_entropy, finetune.build_optimizer, 0, 0

    def cross_entropy(*args: Any, **options: Any) -> torch.Tensor:
        nonlocal losses
        losses += options.get("reduction") == "sum"
        return real(*args, **options) * (math.nan if losses == 6 else 1)

    def counted(*args: Any) -> torch.optim.Optimizer:
        def count(*_: Any) -> None:
            nonlocal taken
            taken += 1

        optimizer = build(*args)
        optimizer.register_step_post_hook(count)
        return optimizer

    with monkeypatch.context() as patched:
        patched.setattr(F, "cross_entropy", cross_entropy)
        patched.setattr(finetune, "build_optimizer", counted)
        with pytest.raises(FloatingPointError) as error:
            fit(photos, models["vit"], tmp_path / "run", cache)
    message = r"fit: loss is not finite at step 5 \(epoch 2, lr .*, rows \[.*\]\.\.\.\), "
    assert re.fullmatch(message + r"last finite loss \d[\d.e-]*", str(error.value))
    assert taken == 5
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"checkpoint.safetensors", LOG}
    resumed = fit(photos, models["vit"], tmp_path / "run", cache, resume=True)
    assert resumed.result["digests"] == fitted.result["digests"]


def test_resuming_with_other_settings_is_refused(fitted, photos, models, cache):
    assert fit(photos, models["vit"], fitted.folder, cache, resume=True).result == fitted.result
    with pytest.raises(ValueError, match="finished run with another fit"):
        fit(photos, models["vit"], fitted.folder, cache, resume=True, overrides={"lr": 1e-4})


def test_checkpointing_changes_no_loss_and_bfloat16_little(fitted, photos, models, cache, tmp_path):
    want = [row["loss"] for row in steps(fitted.folder)]
    options: dict[str, Any] = {"overrides": {"grad_checkpointing": True}}
    fit(photos, models["vit"], tmp_path / "less", cache, **options)
    # the same operations in the same order
    assert [row["loss"] for row in steps(tmp_path / "less")] == want
    options = {"overrides": {"precision": "bf16"}}
    fit(photos, models["vit"], tmp_path / "half", cache, **options)
    half = [row["loss"] for row in steps(tmp_path / "half")]
    # features of a relative error 2**-9 times the root of some roundings, times a scale of 14
    assert abs(half[0] - want[0]) < 14 * 2**-7
    assert half != want
    assert all(math.isfinite(loss) for loss in half)


def test_batch_norm_keeps_its_statistics(photos, models, cache, tmp_path):
    before = load_clip(models["resnet"]).model.state_dict()
    run = fit(photos, models["resnet"], tmp_path / "run", cache, overrides={"epochs": 1})
    after = weights(run.folder)
    for name, value in before.items():
        kept = "running" in name or "num_batches" in name
        if "visual" in name and ("bn" in name or kept):
            assert torch.equal(value, after[name]) == kept, name


def test_encoders_are_refused_by_name_where_missing_cut_or_of_another_run(
    fitted, photos, models, cache, tmp_path
):
    import shutil

    folder = tmp_path / "copy"
    shutil.copytree(fitted.folder, folder)
    path = folder / ENCODERS
    data = path.read_bytes()
    for change, message in (
        (None, f"{ENCODERS} does not exist"),
        (data[:-5], f"{ENCODERS} is cut, damaged or another format"),
        (data[:-1] + bytes([data[-1] ^ 1]), f"{ENCODERS} do not have the digest"),
    ):
        path.unlink(missing_ok=True)
        if change is not None:
            path.write_bytes(change)
        with pytest.raises((FileNotFoundError, ValueError), match=re.escape(message)):
            Classifier.load(folder, device="cpu")
        with pytest.raises((FileNotFoundError, ValueError), match=re.escape(message)):
            vtclip.evaluate(folder, device="cpu", cache_dir=cache)
    other = fit(photos, models["vit"], tmp_path / "other", cache, overrides={"epochs": 1})
    shutil.copy(other.folder / ENCODERS, path)
    with pytest.raises(ValueError, match=f"{ENCODERS} has digest .* wants"):
        Classifier.load(folder, device="cpu")
    shutil.copy(fitted.folder / ENCODERS, path)
    with pytest.raises(ValueError, match="the run started from"):
        Classifier.load(folder, model=models["resnet"], device="cpu")


def test_save_pretrained_takes_the_encoders_along(fitted, tmp_path):
    one = Classifier.load(fitted.folder, device="cpu")
    one.save_pretrained(tmp_path / "shared")
    assert (tmp_path / "shared" / ENCODERS).read_bytes() == (fitted.folder / ENCODERS).read_bytes()
    two = Classifier.from_pretrained(tmp_path / "shared", device="cpu")
    pixels = torch.randn(2, 3, 32, 32)
    assert torch.equal(one.probabilities(pixels), two.probabilities(pixels))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--method", "vtclip", "--train-encoders"], "method must be rada, got 'vtclip'"),
        (["--train-encoders", "--shots", "0"], "--shots must be at least 1 to train"),
        (
            ["--train-encoders", "--test-fraction", "0"],
            "leaves no test images: name some as --test",
        ),
        (["--train-encoders", "--final"], "--final cannot be combined with --train-encoders"),
        (["--train-encoders", "--optimizer", "sgd"], "trained with adamw, got 'sgd'"),
        (["--train-encoders", "--spatial", "raw"], "--spatial must be left out, got 'raw'"),
        (["--train-encoders", "--augment-passes", "2"], "--augment-passes must be left out, got 2"),
        (["--train-encoders", "--precision", "fp16"], "--precision: unknown name 'fp16'"),
        (["--precision", "bf16"], "--precision is for --train-encoders"),
        (["--grad-checkpointing"], "--grad-checkpointing is for --train-encoders"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(
    photos, models, cache, tmp_path, capsys, words, message
):
    words = words if "--method" in words else ["--method", "rada", *words]
    fixed = ["--model", models["vit"], "--out", tmp_path / "run", "--cache-dir", cache]
    assert message in refused(capsys, "fit", photos, *words, *fixed, "--device", "cpu")
    assert not (tmp_path / "run").exists()


def test_a_source_without_images_is_refused(photos, models, cache, tmp_path):
    extract_features(photos, tmp_path / "table", model=models["vit"], progress=False)
    (tmp_path / "x.npz").touch()
    for source in (tmp_path / "table", tmp_path / "x.npz"):
        with pytest.raises(ValueError, match="source must be an image folder, got an? "):
            fit(source, models["vit"], tmp_path / "run", cache)


def test_rows_of_the_test_set_are_out_of_reach(photos, models, tmp_path):
    clip = load_clip(models["vit"])
    found, _ = extract_features(photos, tmp_path / "table", model=clip, progress=False)
    rows = torch.tensor([0, 3])
    images = finetune.TrainingImages(photos, found.manifest, clip, rows, seed=1, least_area=0.08)
    plain = list(images.stream(rows, None))
    assert not torch.equal(plain[0], next(images.stream(rows, 0)))
    assert torch.equal(next(images.stream(rows, 7)), next(images.stream(rows, 7)))
    with pytest.raises(IndexError, match="row 1 is neither a training nor a validation row"):
        next(images.stream(torch.tensor([0, 1]), 0))


def test_recipe_follows_its_rule():
    imagenet = get_config(1_281_167)
    assert (imagenet.batch_size, imagenet.warmup_steps) == (512, 500)
    assert (imagenet.epochs, imagenet.lr, imagenet.weight_decay) == (10, 1e-5, 0.1)
    few = get_config(1600)
    assert (few.batch_size, few.warmup_steps) == (100, 16)
    assert get_config(4).batch_size == 4
    assert get_config(1600, overrides={"epochs": 1, "batch_size": 32}).warmup_steps == 5
    rates = [few.rate(number, 160) for number in range(160)]
    assert rates[:16] == [(number + 1) / 16 for number in range(16)]
    assert rates[16:] == sorted(rates[16:], reverse=True)
    assert rates[16] == 1
    assert rates[-1] < 1e-3
    for name, value in (("lr", math.nan), ("epochs", 0), ("precision", "fp16"), ("least_area", 0)):
        with pytest.raises(ValueError, match=name):
            dataclasses.replace(few, **{name: value})


def test_shares_are_all_of_a_batch():
    rows = torch.arange(7)
    for size in (1, 2, 3, 7):
        parts = [World(rank, size).share(rows) for rank in range(size)]
        assert torch.equal(torch.cat(parts), rows)
        assert min(len(part) for part in parts) >= 1
        padded = [World(rank, size).padded_share(5) for rank in range(size)]
        assert torch.cat(padded)[:5].tolist() == list(range(5))
        assert len({len(part) for part in padded}) == 1
    with pytest.raises(ValueError, match="batch_size must give each of 3 processes an image"):
        finetune.check_batch(get_config(100, overrides={"batch_size": 2}), World(0, 3))


def test_two_processes_have_the_losses_of_one(photos, models, cache, tmp_path):
    words = ["fit", photos, "--method", "rada", "--train-encoders", "--model", models["vit"]]
    words += ["--shots", 4, "--epochs", 16, "--batch-size", 6, "--lr", "2e-4", "--threads", 1]
    words += ["--templates", TEMPLATES[0], "--device", "cpu", "--cache-dir", cache, "--out"]
    assert call(*words, tmp_path / "one") == 0
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = python(*launch, "-m", "vtclip", *words, tmp_path / "two", timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("zero-shot") == 1
    one, two = steps(tmp_path / "one"), steps(tmp_path / "two")
    assert [row["step"] for row in two] == list(range(1, 33))
    assert max(abs(a["loss"] - b["loss"]) for a, b in zip(one, two, strict=True)) <= 1e-5
    assert one[0]["loss"] - one[-1]["loss"] > 0.1
    result = Run.load(tmp_path / "two").result
    assert result["processes"] == 2
    assert result["accuracy"] == Run.load(tmp_path / "one").result["accuracy"]


@pytest.fixture(scope="module")
def outcomes(
    photos: Path, models: dict[str, str], cache: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, dict[str, Any]]:
    """What the first process ended with while the second misbehaved."""
    out = tmp_path_factory.mktemp("two processes")
    done = python(HERE / "_finetune_child.py", photos, models["vit"], out, cache, check=True)
    found: dict[str, dict[str, Any]] = json.loads(done.stdout)
    found["sigterm"]["folder"] = out / "sigterm"
    return found


@pytest.mark.parametrize("how", ["raise", "exit", "stall"])
def test_no_process_waits_for_one_that_failed(outcomes, how):
    seen = outcomes[how]
    assert seen["code"] == 1, seen
    assert "rank 0: another process failed or stalled" in seen["stderr"][0]
    assert seen["stderr"][0].count("\n") == 1
    assert ENCODERS not in seen["files"]
    if how == "raise":
        assert "a broken image" in seen["stderr"][1]


def test_processes_with_different_settings_do_not_begin(outcomes):
    seen = outcomes["differ"]
    assert seen["code"] == 1
    assert re.search("rank 0 has settings and images .*, rank 1 has", seen["stderr"][0])
    assert seen["files"] == []


def test_a_launch_that_cannot_work_is_one_line(photos, models, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    words = ["--method", "rada", "--train-encoders", "--model", models["vit"], "--device", "cpu"]
    wanted = "WORLD_SIZE is 2 but RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PORT are not set; start"
    assert wanted in refused(capsys, "fit", photos, *words, "--out", tmp_path / "run")
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ValueError, match="LOCAL_RANK is 1, this torch sees 1 GPUs"):
        device_of_rank(torch.device("cuda"), named=False)
    with pytest.raises(ValueError, match="device cuda:0: several processes take one GPU each"):
        device_of_rank(torch.device("cuda:0"), named=True)


def test_a_signal_to_one_process_stops_all_and_saves(outcomes):
    seen = outcomes["sigterm"]
    assert seen["code"] == 128 + signal.SIGTERM
    for text in seen["stderr"]:
        assert "stopped by SIGTERM after step 3" in text
    assert "checkpoint.safetensors" in seen["files"]


def test_the_state_of_two_processes_goes_on_in_one(outcomes, photos, models, cache, tmp_path):
    words = ["fit", photos, "--method", "rada", "--train-encoders", "--model", models["vit"]]
    words += ["--shots", 4, "--epochs", 4, "--batch-size", 6, "--templates", TEMPLATES[0]]
    words += ["--device", "cpu", "--cache-dir", cache, "--seed", 1, "--threads", 1, "--out"]
    folder = outcomes["sigterm"]["folder"]
    shutil.copytree(folder, tmp_path / "two")
    assert call(*words, tmp_path / "two", "--resume") == 0
    assert call(*words, tmp_path / "one") == 0
    two, one = steps(tmp_path / "two"), steps(tmp_path / "one")
    assert [row["step"] for row in two] == list(range(1, 9))
    assert max(abs(a["loss"] - b["loss"]) for a, b in zip(one, two, strict=True)) <= 1e-5
