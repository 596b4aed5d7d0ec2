# SPDX-License-Identifier: Apache-2.0
"""Frozen CLIP models: features against those of the model itself, texts, transforms and loading."""

from __future__ import annotations

import json
import logging
import os
import re
import subprocess
import sys
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import safetensors.torch
import torch
from PIL import Image

from vtclip.clip import (
    Clip,
    ClipNotFound,
    build_clip,
    load_clip,
    resolve_templates,
)
from vtclip.clip.spatial import attention_pool
from vtclip.clip.weights import Weights
from vtclip.clip.word_tokenizer import WordTokenizer, build_vocab

TEXT = {"context_length": 16, "vocab_size": 64, "width": 32, "heads": 2, "layers": 2}
VIT = {"image_size": 32, "layers": 2, "width": 64, "head_width": 32, "patch_size": 8}
CONFIGS: dict[str, dict[str, Any]] = {
    "vit": {"embed_dim": 48, "vision_cfg": VIT, "text_cfg": TEXT},
    "vit quick": {"embed_dim": 48, "quick_gelu": True, "vision_cfg": VIT, "text_cfg": TEXT},
    "vit avg": {
        "embed_dim": 48,
        "vision_cfg": {**VIT, "pool_type": "avg", "final_ln_after_pool": True, "no_ln_pre": True},
        "text_cfg": TEXT,
    },
    "resnet": {
        "embed_dim": 48,
        "vision_cfg": {"image_size": 64, "layers": [1, 1, 1, 1], "width": 8},
        "text_cfg": TEXT,
    },
    "pooler": {
        "embed_dim": 48,
        "vision_cfg": {**VIT, "attentional_pool": True, "attn_pooler_heads": 4},
        "text_cfg": TEXT,
    },
}
VOCAB = build_vocab(re.findall(r"\w+", "a photo of cat dog black white big small the drawing"))


def make(kind: str) -> Clip:
    torch.manual_seed(1)
    model = build_clip(CONFIGS[kind])
    for name, value in model.named_parameters():
        if "norm" in name or "ln" in name or "bn" in name:  # so that no layer is an identity
            torch.nn.init.normal_(value, 0.5, 0.3)
    for name, buffer in model.named_buffers():
        if "running" in name:
            buffer.uniform_(0.5, 1.5)
    return Clip(model, WordTokenizer(VOCAB, 16), CONFIGS[kind], name=kind)


@pytest.fixture(scope="module")
def clips() -> dict[str, Clip]:
    return {kind: make(kind) for kind in CONFIGS}


def pixels_for(clip: Clip, count: int = 3) -> torch.Tensor:
    return torch.randn(count, 3, clip.preprocess_cfg["size"], clip.preprocess_cfg["size"])


@pytest.mark.parametrize(
    ("kind", "option", "tokens", "width"),
    [
        ("vit", "raw", 16, 64),
        ("vit", "projected", 16, 48),
        ("vit quick", "projected", 16, 48),
        ("vit avg", "projected", 16, 48),
        ("resnet", "raw", 4, 256),
        ("resnet", "pooled", 4, 48),
        ("resnet", "value", 4, 48),
    ],
)
def test_global_features_equal_those_of_the_model(
    clips: dict[str, Clip], kind: str, option: str, tokens: int, width: int
) -> None:
    clip = clips[kind]
    pixels = pixels_for(clip)
    image, spatial = clip.encode_image(pixels, option)
    assert spatial is not None
    assert spatial.shape == (3, tokens, width)
    assert clip.spatial_options[option] == width
    with torch.no_grad():
        expected = clip.model.encode_image(pixels)  # type: ignore[operator]
    # the same operations, in one batch of the same size
    torch.testing.assert_close(image, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(clip.encode_image(pixels)[0], expected, rtol=0, atol=0)
    assert clip.encode_image(pixels)[1] is None
    assert not image.requires_grad
    assert not spatial.requires_grad


def test_pooled_token_0_is_the_global_feature(clips: dict[str, Clip]) -> None:
    clip = clips["resnet"]
    pixels = pixels_for(clip)
    visual: Any = clip.model.visual
    with torch.no_grad():
        x4 = visual.layer4(visual.layer3(visual.layer2(visual.layer1(visual.stem(pixels)))))
        every = attention_pool(visual.attnpool, x4)
        expected = visual(pixels)
    assert every.shape == (3, 5, 48)
    # softmax and products of 256 numbers in two orders
    torch.testing.assert_close(every[:, 0], expected, rtol=1e-4, atol=1e-5)
    pooled = clip.encode_image(pixels, "pooled")[1]
    torch.testing.assert_close(pooled, every[:, 1:], rtol=1e-5, atol=1e-6)


def test_pooled_matches_attention_written_out(clips: dict[str, Clip]) -> None:
    pool: Any = clips["resnet"].model.visual.attnpool  # type: ignore[union-attr]
    image_map = torch.randn(2, 256, 2, 2)
    with torch.no_grad():
        got = attention_pool(pool, image_map)
        for b in range(2):
            tokens = image_map[b].reshape(256, 4).T
            tokens = torch.cat([tokens.mean(0, keepdim=True), tokens]) + pool.positional_embedding
            q, k, v = (proj(tokens) for proj in (pool.q_proj, pool.k_proj, pool.v_proj))
            heads = [
                torch.softmax(q[:, h] @ k[:, h].T / len(h) ** 0.5, -1) @ v[:, h]
                for h in torch.arange(256).chunk(pool.num_heads)
            ]
            expected = pool.c_proj(torch.cat(heads, 1))
            torch.testing.assert_close(got[b], expected, rtol=1e-4, atol=1e-5)


def test_raw_and_value_tokens_keep_the_order_of_the_map(clips: dict[str, Clip]) -> None:
    clip = clips["resnet"]
    pixels = pixels_for(clip, 1)
    visual: Any = clip.model.visual
    with torch.no_grad():
        x4 = visual.layer4(visual.layer3(visual.layer2(visual.layer1(visual.stem(pixels)))))
        raw = clip.encode_image(pixels, "raw")[1]
        value = clip.encode_image(pixels, "value")[1]
        expected = visual.attnpool.c_proj(visual.attnpool.v_proj(x4[0, :, 1, 0]))
    assert raw is not None
    assert value is not None
    torch.testing.assert_close(raw[0, 2], x4[0, :, 1, 0], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(value[0, 2], expected, rtol=1e-5, atol=1e-5)


def test_class_token_through_the_spatial_path_is_the_global_feature(clips: dict[str, Clip]) -> None:
    clip = clips["vit"]
    pixels = pixels_for(clip)
    visual: Any = clip.model.visual
    with torch.no_grad():
        x = visual._embeds(pixels)
        for block in visual.transformer.resblocks:
            x = block(x)
        every = visual.ln_post(x) @ visual.proj
        expected = visual(pixels)
    torch.testing.assert_close(every[:, 0], expected, rtol=1e-5, atol=1e-5)
    projected = clip.encode_image(pixels, "projected")[1]
    torch.testing.assert_close(projected, every[:, 1:], rtol=1e-5, atol=1e-5)


def test_models_without_patch_tokens_say_so(clips: dict[str, Clip]) -> None:
    clip = clips["pooler"]
    assert clip.spatial_options == {}
    assert clip.default_spatial is None
    assert clip.encode_image(pixels_for(clip))[0].shape == (3, 48)
    with pytest.raises(ValueError, match="pooler offers global features only"):
        clip.encode_image(pixels_for(clip), "raw")
    with pytest.raises(ValueError, match="vit offers raw, projected, got 'pooled'"):
        clips["vit"].encode_image(pixels_for(clips["vit"]), "pooled")


@pytest.mark.parametrize(("name", "tokens"), [("vit_tiny_patch16_224", 196), ("resnet10t", 49)])
def test_timm_towers(name: str, tokens: int) -> None:
    vision = {"timm_model_name": name, "timm_pool": "avg", "timm_proj": "linear", "image_size": 224}
    config = {"embed_dim": 32, "vision_cfg": vision, "text_cfg": TEXT}
    clip = Clip(build_clip(config), WordTokenizer(VOCAB, 16), config)
    assert config["vision_cfg"] == vision, "build_clip must not change its argument"
    pixels = torch.randn(1, 3, 224, 224)
    image, spatial = clip.encode_image(pixels, "default")
    assert spatial is not None
    assert spatial.shape == (1, tokens, clip.spatial_options["raw"])
    torch.testing.assert_close(image, clip.encode_image(pixels)[0], rtol=1e-5, atol=1e-5)


def test_models_are_frozen_and_in_eval_mode(clips: dict[str, Clip]) -> None:
    for clip in clips.values():
        assert not clip.model.training
        assert not any(value.requires_grad for value in clip.model.parameters())
        before = clip.weights_digest
        clip.encode_image(pixels_for(clip))
        assert make(clip.name).weights_digest == before


def test_logit_scale_is_exponentiated(clips: dict[str, Clip]) -> None:
    assert clips["vit"].logit_scale == pytest.approx(1 / 0.07, rel=1e-5)


# texts


def test_texts_are_normalised_means_of_normalised_rows(clips: dict[str, Clip]) -> None:
    clip = clips["vit"]
    templates = ["a photo of a {}.", "the big {}"]
    got = clip.encode_text(["black_cat", "dog"], templates)
    rows = []
    for template in templates:
        tokens = clip.tokenizer([template.replace("{}", name) for name in ("black cat", "dog")])
        with torch.no_grad():
            row = clip.model.encode_text(tokens)  # type: ignore[operator]
        rows.append(row / row.norm(dim=-1, keepdim=True))
    mean = torch.stack(rows).mean(0)
    expected = mean / mean.norm(dim=-1, keepdim=True)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
    views = clip.encode_text_views(["black_cat", "dog"], templates)
    torch.testing.assert_close(views, torch.stack(rows, dim=1), rtol=1e-5, atol=1e-6)


def test_chunks_do_not_change_texts(
    clips: dict[str, Clip], monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ["cat", "dog", "big cat", "small dog", "white cat"]
    whole = clips["vit"].encode_text(names)
    monkeypatch.setattr("vtclip.clip.model.TEXT_CHUNK", 2)
    torch.testing.assert_close(clips["vit"].encode_text(names), whole, rtol=1e-5, atol=1e-6)


def test_default_template_and_named_ensembles() -> None:
    assert resolve_templates(None) == ["a photo of a {}."]
    seven, eighty = resolve_templates("imagenet7"), resolve_templates("imagenet80")
    assert (len(seven), len(eighty)) == (7, 80)
    assert seven == [
        "itap of a {}.", "a bad photo of the {}.", "a origami {}.", "a photo of the large {}.",
        "a {} in a video game.", "art of the {}.", "a photo of the small {}.",
    ]  # fmt: skip
    assert "a photo of a {}." in eighty
    assert len(set(eighty)) == 80
    assert resolve_templates(["imagenet7", "{} texture."]) == [*seven, "{} texture."]


def test_templates_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "templates.txt"
    path.write_text("a {}\n\n  the {}  \n")
    assert resolve_templates(str(path)) == ["a {}", "the {}"]
    path.write_text("a cat\n")
    with pytest.raises(ValueError, match=r"'a cat' must hold exactly one '\{\}', got 0"):
        resolve_templates(str(path))
    with pytest.raises(ValueError, match="no such file: nothing.txt"):
        resolve_templates("nothing.txt")


@pytest.mark.parametrize("bad", ["a photo", "{} and {}", "{0}", ""])
def test_templates_hold_exactly_one_place(bad: str) -> None:
    with pytest.raises(ValueError, match=re.escape(repr(bad))):
        resolve_templates([bad])


def test_no_templates_and_no_strings() -> None:
    with pytest.raises(ValueError, match="at least one template"):
        resolve_templates([])
    with pytest.raises(TypeError, match="each template must be a str, got int"):
        resolve_templates([3])  # type: ignore[list-item]


def test_class_names_with_braces_percent_and_nothing(clips: dict[str, Clip]) -> None:
    odd = clips["vit"].encode_text(["{}", "{0}", "100 %s", "a\\b"])
    assert odd.isfinite().all()
    for names, index in ((["cat", ""], 1), (["  "], 0)):
        with pytest.raises(ValueError, match=f"class name {index} is empty"):
            clips["vit"].encode_text(names)


def test_long_prompts_are_reported(
    clips: dict[str, Clip], caplog: pytest.LogCaptureFixture
) -> None:
    clips["vit"].encode_text(["cat", "dog " * 30])
    assert "1 of 2 prompts are longer than the context of 16 tokens" in caplog.text
    caplog.clear()
    clips["vit"].encode_text(["cat"])
    assert caplog.text == ""


def test_long_prompts_are_reported_for_byte_pairs(caplog: pytest.LogCaptureFixture) -> None:
    config = deepcopy(CONFIGS["vit"])
    config["text_cfg"]["vocab_size"] = 49408
    tokenizer = open_clip.get_tokenizer("RN50", context_length=16)
    clip = Clip(build_clip(config), tokenizer, config)
    caplog.set_level(logging.WARNING)
    clip.encode_text(["cat", "word " * 12], ["a photo of a {}.", "{}"])
    assert "1 of 4 prompts are longer" in caplog.text


# transforms


def test_preprocess_is_open_clips(clips: dict[str, Clip]) -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8))
    expected = open_clip.image_transform(32, is_train=False)(image)
    assert torch.equal(clips["vit"].preprocess(image), expected)
    assert expected.shape == (3, 32, 32)


def test_augment_depends_on_its_generator_only(clips: dict[str, Clip]) -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8))
    state = torch.get_rng_state()
    views = [clips["vit"].augment(image, torch.Generator().manual_seed(seed)) for seed in (1, 2, 1)]
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(views[0], views[2])
    assert not torch.equal(views[0], views[1])
    assert views[0].shape == (3, 32, 32)


# loading


def save_folder(folder: Path, kind: str = "vit", *, dtype: torch.dtype = torch.float32) -> Clip:
    folder.mkdir(parents=True, exist_ok=True)
    clip = make(kind)
    half = {name: value.to(dtype) for name, value in clip.model.state_dict().items()}
    safetensors.torch.save_file(half, folder / "open_clip_model.safetensors")
    mean = {"mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25]}
    (folder / "open_clip_config.json").write_text(
        json.dumps({"model_cfg": CONFIGS[kind], "preprocess_cfg": mean})
    )
    (folder / "vocab.json").write_text(json.dumps(VOCAB))
    return clip


def test_folder_with_word_tokenizer(tmp_path: Path) -> None:
    saved = save_folder(tmp_path / "model")
    state = torch.get_rng_state()
    for name in (f"local-dir:{tmp_path / 'model'}", str(tmp_path / "model")):
        clip = load_clip(name)
        assert clip.weights_digest == saved.weights_digest
        assert isinstance(clip.tokenizer, WordTokenizer)
        assert clip.preprocess_cfg["mean"] == [0.5, 0.5, 0.5]
        assert clip.preprocess_cfg["size"] == 32
        json.dumps(clip.config)
        assert str(tmp_path) not in json.dumps(clip.config)
        assert clip.config["model_cfg"] == CONFIGS["vit"]
        pixels = pixels_for(clip)
        assert torch.equal(clip.encode_image(pixels)[0], saved.encode_image(pixels)[0])
        assert torch.equal(clip.encode_text(["cat"]), saved.encode_text(["cat"]))
    torch.set_rng_state(state)


def test_loading_leaves_the_random_state_alone(tmp_path: Path) -> None:
    save_folder(tmp_path / "model")
    state = torch.get_rng_state()
    load_clip(tmp_path / "model")
    assert torch.equal(torch.get_rng_state(), state)


def test_half_precision_weights_become_float32(tmp_path: Path) -> None:
    save_folder(tmp_path / "model", dtype=torch.float16)
    clip = load_clip(tmp_path / "model")
    assert {value.dtype for value in clip.model.parameters()} == {torch.float32}
    exact = {name: value.half().float() for name, value in make("vit").model.state_dict().items()}
    loaded = clip.model.state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in exact.items())


def test_activation_is_part_of_the_config(tmp_path: Path) -> None:
    """The same weights under GELU and QuickGELU differ in features, and so do their configs."""
    clips = []
    for kind in ("vit", "vit quick"):
        save_folder(tmp_path / kind)
        (tmp_path / kind / "open_clip_config.json").write_text(
            json.dumps({"model_cfg": CONFIGS[kind], "preprocess_cfg": {}})
        )
        clips.append(load_clip(tmp_path / kind))
    one, two = clips
    assert one.weights_digest == two.weights_digest
    assert one.config != two.config
    pixels = pixels_for(one)
    assert not torch.allclose(one.encode_image(pixels)[0], two.encode_image(pixels)[0], atol=1e-4)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_named_architecture_with_a_file(
    tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    config = deepcopy(CONFIGS["vit"])
    config["text_cfg"]["vocab_size"] = 49408
    monkeypatch.setattr(open_clip, "get_model_config", lambda name: deepcopy(config))
    model = build_clip(config)
    path = tmp_path / f"w{suffix}"
    if suffix == ".pt":
        torch.save({"state_dict": {f"module.{k}": v for k, v in model.state_dict().items()}}, path)
    else:
        safetensors.torch.save_file(model.state_dict(), path)
    clip = load_clip(f"ViT-B-32:{path}")
    pixels = pixels_for(clip)
    with torch.no_grad():
        expected = model.eval().encode_image(pixels)  # type: ignore[operator]
    torch.testing.assert_close(clip.encode_image(pixels)[0], expected, rtol=1e-6, atol=1e-6)
    assert clip.preprocess_cfg["mean"][0] == pytest.approx(0.48145466)
    (tmp_path / "open_clip_config.json").write_text(
        json.dumps({"preprocess_cfg": {"mean": [0.1, 0.2, 0.3]}})
    )
    assert load_clip(f"ViT-B-32:{path}").preprocess_cfg["mean"] == [0.1, 0.2, 0.3]


class Trap:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("empty.pt", "does not hold these weights"),
        ("html.pt", "does not hold these weights"),
        ("words.pt", "does not hold these weights: not a file of weights$"),
        ("cut.safetensors", "does not hold these weights"),
        ("other.safetensors", "does not hold these weights"),
        ("nan.safetensors", "holds non-finite weights"),
        ("script.pt", "does not hold these weights: of 62 tensors it lacks 62"),
        ("trap.pt", "does not hold these weights"),
    ],
)
def test_bad_weights_are_one_line_and_run_nothing(tmp_path: Path, name: str, message: str) -> None:
    clip = make("vit")
    state = clip.model.state_dict()
    path = tmp_path / name
    if name == "empty.pt":
        path.write_bytes(b"")
    elif name == "html.pt":
        path.write_text("<html>404</html>")
    elif name == "words.pt":
        path.write_text("hi\n")
    elif name == "cut.safetensors":
        path.write_bytes(safetensors.torch.save(state)[:5000])
    elif name == "other.safetensors":
        safetensors.torch.save_file({"x": torch.ones(2)}, path)
    elif name == "nan.safetensors":
        safetensors.torch.save_file({**state, "ln_final.bias": torch.full((32,), torch.nan)}, path)
    elif name == "script.pt":
        torch.jit.script(torch.nn.Linear(2, 2)).save(str(path))
    else:
        torch.save({"state_dict": Trap(tmp_path / "trapped")}, path)
    folder = tmp_path / "model"
    save_folder(folder)
    (folder / "open_clip_model.safetensors").unlink()
    weights = folder / ("open_clip_pytorch_model.bin" if path.suffix == ".pt" else "w.safetensors")
    path.rename(weights)
    with pytest.raises(ClipNotFound, match=message) as caught:
        load_clip(folder)
    assert "\n" not in str(caught.value)
    assert "weights_only" not in str(caught.value)
    assert not (tmp_path / "trapped").exists()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("foo", "neither a folder nor a known architecture"),
        ("ViT-B-32", r"an architecture without weights; give ViT-B-32:TAG \(one of openai,"),
        ("ViT-B-32:nope", "unknown weights tag 'nope'; give ViT-B-32:TAG"),
        ("ViT-B-32:/nope/w.pt", "no such weights file: /nope/w.pt"),
        ("local-dir:/nope", "must hold open_clip_config.json, got no folder at /nope"),
    ],
)
def test_unknown_models_say_what_to_give(name: str, message: str) -> None:
    with pytest.raises(ClipNotFound, match=message):
        load_clip(name)


def test_folders_that_are_no_models(tmp_path: Path) -> None:
    with pytest.raises(ClipNotFound, match=r"must hold open_clip_config.json, got none at"):
        load_clip(tmp_path)
    path = tmp_path / "open_clip_config.json"
    path.write_text("{")
    with pytest.raises(ClipNotFound, match="is not JSON"):
        load_clip(tmp_path)
    path.write_text("{}")
    with pytest.raises(ClipNotFound, match="must hold model_cfg"):
        load_clip(tmp_path)
    path.write_text(json.dumps({"model_cfg": CONFIGS["vit"]}))
    with pytest.raises(ClipNotFound, match="no weights in .*, looked for open_clip_model.safetens"):
        load_clip(tmp_path)


def without_network(code: str, cache: Path) -> str:
    """What a program prints where no hub can be reached, which it does not try twice."""
    # nothing listens on port 9 of this machine
    env = {**os.environ, "HF_HOME": str(cache), "HF_ENDPOINT": "https://127.0.0.1:9"}
    env = {key: value for key, value in env.items() if not key.lower().endswith("_proxy")}
    run = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True,
                         timeout=300, check=False)  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert "Retrying" not in run.stderr
    return run.stdout


def test_offline_is_one_clear_line_at_once(tmp_path: Path) -> None:
    """No retries, no trace: what was looked for and how to give a local file."""
    code = (
        "import time\n"
        "import open_clip\n"
        "from vtclip.clip import ClipNotFound, load_clip\n"
        "for name in ('ViT-B-32:openai', 'hf-hub:owner/name'):\n"
        "    start = time.perf_counter()\n"
        "    try:\n"
        "        load_clip(name)\n"
        "    except ClipNotFound as error:\n"
        "        print(time.perf_counter() - start, error)\n"
    )
    lines = without_network(code, tmp_path).splitlines()
    assert len(lines) == 2
    for line in lines:
        seconds, message = line.split(" ", 1)
        assert float(seconds) < 20  # the hub client alone retries for 23 s
        assert "is neither cached nor could it be fetched" in message
        assert "give a local copy as" in message


def test_cached_hub_model_needs_no_network(tmp_path: Path) -> None:
    config = deepcopy(CONFIGS["vit"])
    config["text_cfg"]["vocab_size"] = 49408
    repo = tmp_path / "hub" / "models--owner--name"
    folder = repo / "snapshots" / "0123"
    folder.mkdir(parents=True)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("0123")
    model = build_clip(config)
    safetensors.torch.save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config}))
    code = (
        "from vtclip.clip import load_clip\n"
        "clip = load_clip('hf-hub:owner/name')\n"
        "print(clip.weights_digest, clip.tokenizer.context_length)\n"
    )
    found = without_network(code, tmp_path)
    expected = Clip(model, WordTokenizer(VOCAB, 16), config).weights_digest
    assert found.split() == [expected, "16"]


def test_build_clip_names_what_is_missing() -> None:
    with pytest.raises(ValueError, match="got no vision_cfg, text_cfg"):
        build_clip({"embed_dim": 3})


def test_tags_decide_the_activation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """OpenAI weights under the plain name ViT-B-32 are QuickGELU weights."""
    seen: list[dict[str, Any]] = []
    monkeypatch.setattr("vtclip.clip.loading.fetch", lambda *args: tmp_path / "w.safetensors")
    monkeypatch.setattr("vtclip.clip.loading.read_weights", lambda path: Weights(path, {}))
    monkeypatch.setattr(
        "vtclip.clip.loading._finish", lambda name, config, *rest: seen.append(config)
    )
    for name in ("ViT-B-32:openai", "ViT-B-32:laion2b_s34b_b79k", "ViT-B-32-quickgelu:openai"):
        load_clip(name)
    assert [config["model_cfg"].get("quick_gelu", False) for config in seen] == [True, False, True]
