# SPDX-License-Identifier: Apache-2.0
"""CLIP-LoRA through PEFT: it starts at the frozen model, learns, resumes, and is kept small."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from commands import call, refused
from pictures import DOTS, dots, noise, write_model

import vtclip
from vtclip.clip import load_clip
from vtclip.clip.low_rank import add_low_rank
from vtclip.distributed import Interrupted
from vtclip.runs import folder as run_files
from vtclip.runs.classifier import Classifier
from vtclip.runs.encoders import LORA
from vtclip.runs.result import Run
from vtclip.train import finetune
from vtclip.train.finetune_config import LoraConfig, get_lora_config
from vtclip.train.lora import ADAPTER, LoRA

HAVE_PEFT = importlib.util.find_spec("peft") is not None
needs_peft = pytest.mark.skipif(not HAVE_PEFT, reason="the extra vtclip[lora] is not installed")
VIT = {"image_size": 16, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8}
TEXT = {"context_length": 12, "width": 32, "heads": 2, "layers": 2}
CONFIG = {"model_cfg": {"embed_dim": 32, "vision_cfg": VIT, "text_cfg": TEXT}}
QUICK: dict[str, Any] = {"epochs": 16, "lr": 3e-2, "batch_size": 6, "lora_rank": 3}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three classes of coloured dots, and a model with random weights."""
    root = tmp_path_factory.mktemp("lora")
    dots(root / "dots")
    write_model(root / "model", CONFIG, ["a", "photo", "of", *" ".join(DOTS).split()], seed=3)
    return root


def fit(place: Path, out: Path, **options: Any) -> Run:
    overrides = {**QUICK, **options.pop("overrides", {})}
    given = {"lora": True, "shots": 3, "model": str(place / "model"), "threads": 1, "device": "cpu"}
    given |= {"cache_dir": place / "cache", "out": out, "overrides": overrides}
    return vtclip.fit(place / "dots", **{**given, **options})


@pytest.fixture(scope="module")
def fitted(place: Path) -> Run:
    return fit(place, place / "run")


def losses(run: Run) -> list[float]:
    lines = (run.folder / "log.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


@needs_peft
def test_adapters_start_at_the_frozen_model_and_close_to_what_they_are(place):
    clip = load_clip(str(place / "model"))
    before = {name: value.clone() for name, value in clip.model.state_dict().items()}
    pixels, names = torch.randn(5, 3, 16, 16), list(DOTS)
    image, text = clip.encode_image(pixels)[0], clip.encode_text(names)
    lora = LoRA(clip, LoraConfig(**dataclasses.asdict(get_lora_config(12, 4))))
    torch.testing.assert_close(clip.encode_image(pixels)[0], image, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(clip.encode_text(names), text, rtol=1e-5, atol=1e-6)
    trained = [name for name, p in clip.model.named_parameters() if p.requires_grad]
    assert len(trained) == 2 * 3 * len(attention_layers_of(lora))
    assert all(".lora_" in name for name in trained)

    for layer in lora.layers.values():
        torch.nn.init.normal_(layer.lora_B[ADAPTER].weight, std=0.2)
    image, text = clip.encode_image(pixels)[0], clip.encode_text(names)
    change = lora.close()
    assert all(torch.equal(before[name], v) for name, v in clip.model.state_dict().items())
    add_low_rank(clip, change)
    torch.testing.assert_close(clip.encode_image(pixels)[0], image, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(clip.encode_text(names), text, rtol=1e-4, atol=1e-5)


def attention_layers_of(lora: LoRA) -> list[str]:
    assert list(lora.closed) == [
        *(f"visual.transformer.resblocks.{i}.attn" for i in range(2)),
        *(f"transformer.resblocks.{i}.attn" for i in range(2)),
    ]
    return list(lora.closed)


@needs_peft
def test_no_step_leaves_the_frozen_model_to_the_bit(place):
    clip = load_clip(str(place / "model"))
    digest, pixels = clip.weights_digest, torch.randn(5, 3, 16, 16)
    image = clip.encode_image(pixels)[0]
    add_low_rank(clip, LoRA(clip, get_lora_config(12, 4)).close())
    assert torch.equal(clip.encode_image(pixels)[0], image)
    assert type(clip)(clip.model, clip.tokenizer, clip.config).weights_digest == digest


@needs_peft
def test_dropout_is_drawn_from_seed_step_and_process_alone(place):
    clip = load_clip(str(place / "model"))
    lora = LoRA(clip, get_lora_config(12, 4, overrides={"lora_dropout": 0.5}))
    for layer in lora.layers.values():
        torch.nn.init.normal_(layer.lora_B[ADAPTER].weight, std=0.2)
    pixels = torch.randn(2, 3, 16, 16)

    def drawn(*place: int) -> torch.Tensor:
        torch.rand(1)
        with lora.dropout(*place):
            return clip.encode_image(pixels)[0]

    one, state = drawn(1, 2, 0), torch.get_rng_state()
    assert torch.equal(drawn(1, 2, 0), one)
    for other in ((2, 2, 0), (1, 3, 0), (1, 2, 1)):
        assert not torch.equal(drawn(*other), one)
    plain = clip.encode_image(pixels)[0]
    assert torch.equal(clip.encode_image(pixels)[0], plain)
    assert not torch.equal(plain, one)
    torch.set_rng_state(state)


@needs_peft
def test_a_run_learns_and_holds_what_the_other_commands_need(fitted, place, tmp_path):
    assert losses(fitted)[-1] < 0.7 * losses(fitted)[0]
    result = fitted.result
    assert (result["method"], result["config"]["lora"]) == ("zeroshot", True)
    assert result["accuracy"] > result["zero_shot"]["accuracy"] + 0.2
    assert result["images"]["train"] == 9
    held = {path.name for path in fitted.folder.iterdir()}
    assert LORA in held
    assert "encoders.safetensors" not in held
    factors = safetensors.torch.load_file(fitted.folder / LORA)
    assert sum(value.numel() for value in factors.values()) == 4 * 3 * 2 * 3 * 32
    again = vtclip.evaluate(fitted.folder, device="cpu", threads=1, cache_dir=place / "cache")
    for name in ("accuracy", "nll", "ece", "temperature"):
        assert again[name] == result["adapted"][name]
    classifier = Classifier.load(fitted.folder, device="cpu")
    assert classifier.clip.weights_digest != load_clip(str(place / "model")).weights_digest
    classifier.save_pretrained(tmp_path / "shared")
    assert (tmp_path / "shared" / LORA).read_bytes() == (fitted.folder / LORA).read_bytes()
    pixels = torch.randn(2, 3, 16, 16)
    two = Classifier.from_pretrained(tmp_path / "shared", device="cpu")
    assert torch.equal(classifier.probabilities(pixels), two.probabilities(pixels))
    about = vtclip.export(fitted.folder, tmp_path / "m.pt2", kind="image")
    assert about["parity"]


@needs_peft
def test_other_classes_join_a_run(fitted, place, tmp_path):
    noise(tmp_path / "more", ["photo"])
    run = vtclip.extend(
        fitted.folder, tmp_path / "more", out=tmp_path / "wider", device="cpu",
        cache_dir=place / "cache",
    )  # fmt: skip
    assert (run.folder / LORA).read_bytes() == (fitted.folder / LORA).read_bytes()


@needs_peft
def test_the_same_command_gives_the_same_bits(fitted, place, tmp_path):
    assert fit(place, tmp_path / "again").result["digests"] == fitted.result["digests"]
    other = fit(place, tmp_path / "other", seed=2)
    assert other.result["digests"]["encoders"] != fitted.result["digests"]["encoders"]
    repeated = vtclip.repeat(fitted.folder, out=tmp_path / "rerun", cache_dir=place / "cache")
    assert repeated["verdict"] == "MATCH"


@needs_peft
@pytest.mark.parametrize("stop_at", [3, 16])
def test_interrupted_and_resumed_equals_uninterrupted(
    fitted, place, tmp_path, monkeypatch, stop_at
):
    drawn = finetune.drawn_templates

    def interrupt(count: int, classes: int, seed: int, number: int) -> torch.Tensor:
        if number + 1 == stop_at:
            os.kill(os.getpid(), signal.SIGTERM)
        return drawn(count, classes, seed, number)

    with monkeypatch.context() as patched:
        patched.setattr(finetune, "drawn_templates", interrupt)
        with pytest.raises(Interrupted, match=f"SIGTERM after step {stop_at}"):
            fit(place, tmp_path / "run")
    assert not (tmp_path / "run" / LORA).exists()
    resumed = fit(place, tmp_path / "run", resume=True)
    assert resumed.result["digests"] == fitted.result["digests"]
    assert losses(resumed) == losses(fitted)
    assert fit(place, tmp_path / "run", resume=True).result == resumed.result
    with pytest.raises(ValueError, match="finished run with another fit"):
        fit(place, tmp_path / "run", resume=True, overrides={"lora_rank": 2})


@needs_peft
def test_recomputed_activations_draw_the_same_dropout(fitted, place, tmp_path):
    less = fit(place, tmp_path / "less", overrides={"grad_checkpointing": True})
    assert losses(less) == losses(fitted)


@pytest.mark.parametrize("missing", ["peft", "transformers"])
def test_what_is_not_installed_is_named_with_its_extra(place, tmp_path, monkeypatch, missing):
    found = importlib.util.find_spec

    def find(name: str, *more: Any) -> Any:
        return None if name == missing else found(name, *more) or name in ("peft", "transformers")

    monkeypatch.setattr(importlib.util, "find_spec", find)
    with pytest.raises(ValueError, match=rf"^lora needs {missing}; pip install 'vtclip\[lora\]'"):
        fit(place, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--lora", "--method", "rada"], "--lora: --method must be zeroshot, got 'rada'"),
        (["--lora", "--shots", "0"], "--shots must be at least 1 to train"),
        (["--lora", "--augment-passes", "2"], "--lora: --augment-passes must be left out, got 2"),
        (["--lora", "--base-to-new"], "--lora: --base-to-new must be left out, got True"),
        (["--lora", "--loss", "gce"], "--loss cannot be combined with --lora"),
        (["--lora-rank", "4"], "--lora-rank is for --lora, which is not given"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(place, tmp_path, capsys, words, message):
    fixed = ["--model", place / "model", "--out", tmp_path / "run", "--device", "cpu"]
    assert message in refused(capsys, "fit", place / "dots", *words, *fixed)
    assert not (tmp_path / "run").exists()


@needs_peft
def test_the_command_trains_adapters(place, tmp_path):
    words = ["--lora", "--lora-rank", "1", "--epochs", "1", "--shots", "2", "--device", "cpu"]
    words += ["--model", place / "model", "--out", tmp_path / "run"]
    assert call("fit", place / "dots", *words, "--cache-dir", place / "cache") == 0
    assert safetensors.torch.load_file(tmp_path / "run" / LORA)[
        "visual.transformer.resblocks.0.attn.q.A"
    ].shape == (1, 32)


def test_the_recipe_is_the_published_one():
    config = get_lora_config(1600, 16, model="ViT-B-16:openai")
    assert (config.lr, config.weight_decay, config.batch_size) == (2e-4, 1e-2, 32)
    assert (config.lora_rank, config.lora_alpha, config.lora_dropout) == (2, 1.0, 0.25)
    assert config.epochs * (1600 // 32) == 500 * 16
    assert config.rate(0, 8000) == 1
    assert (config.epochs // config.checkpoint_every) == 10
    assert get_lora_config(5, 1, model="x").batch_size == 5
    for name, value in (("lora_rank", 0), ("lora_alpha", 0), ("lora_dropout", 1.0)):
        with pytest.raises(ValueError, match=name):
            dataclasses.replace(config, **{name: value})


@needs_peft
def test_a_run_that_is_replaced_stays_until_the_new_one_is_whole(
    fitted, place, tmp_path, monkeypatch
):
    shutil.copytree(fitted.folder, tmp_path / "run")

    def killed(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(run_files, "write_decisions", killed)  # the adapter is written by then
        with pytest.raises(KeyboardInterrupt):
            fit(place, tmp_path / "run", seed=2, overwrite=True)
    vtclip.evaluate(tmp_path / "run", cache_dir=place / "cache")
    assert Run.load(tmp_path / "run").result["seed"] == 1
    again = fit(place, tmp_path / "run", seed=2, resume=True)
    whole = fit(place, tmp_path / "whole", seed=2)
    assert again.result["digests"] == whole.result["digests"]
