# SPDX-License-Identifier: Apache-2.0
"""Folders of transformers' CLIP and SigLIP: the features that transformers itself computes."""

from __future__ import annotations

import importlib.util
import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image
from torch import Tensor

from vtclip.clip import ClipNotFound, build_clip, load_clip
from vtclip.clip.transformers_folders import model_cfg_of
from vtclip.clip.transformers_keys import to_open_clip
from vtclip.clip.weights import load_into, read_weights

needs_transformers = pytest.mark.skipif(
    importlib.util.find_spec("transformers") is None,
    reason="parity with transformers: needs transformers",
)
TEXT = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
}  # fmt: skip
VISION = {
    "hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 3,
    "image_size": 32, "patch_size": 8,
}  # fmt: skip
CLIP_CONFIG: dict[str, Any] = {
    "model_type": "clip",
    "architectures": ["CLIPModel"],
    "projection_dim": 24,
    "text_config": {**TEXT, "max_position_embeddings": 16},
    "vision_config": VISION,
}
SIGLIP_CONFIG: dict[str, Any] = {
    "model_type": "siglip",
    "architectures": ["SiglipModel"],
    "text_config": {**TEXT, "vocab_size": 60, "max_position_embeddings": 16},
    "vision_config": VISION,
}


def under_their_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """An open_clip state dict of CLIP as transformers names it, written from its documentation."""
    out = {"logit_scale": state["logit_scale"]}
    out["visual_projection.weight"] = state["visual.proj"].T
    out["text_projection.weight"] = state["text_projection"].T
    for theirs, ours in (("vision_model", "visual."), ("text_model", "")):
        out[f"{theirs}.embeddings.position_embedding.weight"] = state[f"{ours}positional_embedding"]
        for number in range(2):
            block = f"{ours}transformer.resblocks.{number}"
            layer = f"{theirs}.encoder.layers.{number}"
            for kind in ("weight", "bias"):
                parts = state[f"{block}.attn.in_proj_{kind}"].chunk(3)
                for letter, part in zip("qkv", parts, strict=True):
                    out[f"{layer}.self_attn.{letter}_proj.{kind}"] = part
                for their, our in (
                    ("self_attn.out_proj", "attn.out_proj"), ("layer_norm1", "ln_1"),
                    ("layer_norm2", "ln_2"), ("mlp.fc1", "mlp.c_fc"), ("mlp.fc2", "mlp.c_proj"),
                ):  # fmt: skip
                    out[f"{layer}.{their}.{kind}"] = state[f"{block}.{our}.{kind}"]
    for kind in ("weight", "bias"):
        out[f"vision_model.pre_layrnorm.{kind}"] = state[f"visual.ln_pre.{kind}"]
        out[f"vision_model.post_layernorm.{kind}"] = state[f"visual.ln_post.{kind}"]
        out[f"text_model.final_layer_norm.{kind}"] = state[f"ln_final.{kind}"]
    out["vision_model.embeddings.class_embedding"] = state["visual.class_embedding"]
    out["vision_model.embeddings.patch_embedding.weight"] = state["visual.conv1.weight"]
    out["text_model.embeddings.token_embedding.weight"] = state["token_embedding.weight"]
    return {name: value.contiguous().clone() for name, value in out.items()}


def clip_folder(folder: Path, config: dict[str, Any] | None = None) -> dict[str, Tensor]:
    """A folder of transformers without transformers; returns the weights in open_clip's names."""
    torch.manual_seed(0)
    config = config or CLIP_CONFIG
    state = build_clip(model_cfg_of(CLIP_CONFIG)).state_dict()
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "preprocessor_config.json").write_text(json.dumps({
        "size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}, "resample": 2,
        "image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6], "do_center_crop": True,
    }))  # fmt: skip
    safetensors.torch.save_file(under_their_names(state), folder / "model.safetensors")
    return state


def changed(*path: str, to: Any) -> dict[str, Any]:
    config = deepcopy(CLIP_CONFIG)
    place: Any = config
    for name in path[:-1]:
        place = place[name]
    place[path[-1]] = to
    return config


def test_names_become_those_of_open_clip() -> None:
    torch.manual_seed(0)
    state = build_clip(model_cfg_of(CLIP_CONFIG)).state_dict()
    theirs = {**under_their_names(state), "text_model.embeddings.position_ids": torch.arange(16)}
    ours = to_open_clip(theirs)
    assert set(ours) == set(state)
    assert all(torch.equal(ours[name], value) for name, value in state.items())


@pytest.mark.parametrize("prefix", ["", "local-dir:"])
def test_a_folder_of_clip_loads(tmp_path: Path, prefix: str) -> None:
    state = clip_folder(tmp_path / "model")
    clip = load_clip(f"{prefix}{tmp_path / 'model'}")
    loaded = clip.model.state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in state.items())
    assert clip.config["model_cfg"]["quick_gelu"] is True
    assert clip.identity["activation"] == "QuickGELU"
    cfg = clip.preprocess_cfg
    assert (cfg["mean"], cfg["std"]) == ([0.1, 0.2, 0.3], [0.4, 0.5, 0.6])
    assert (cfg["interpolation"], cfg["resize_mode"], cfg["size"]) == ("bilinear", "shortest", 32)
    assert clip.encode_text(["cat", "dog"]).shape == (2, 24)
    assert clip.encode_image(torch.zeros(1, 3, 32, 32), "projected")[1] is not None
    assert str(tmp_path) not in json.dumps(clip.config)


def test_a_part_by_part_folder_and_a_bin_load(tmp_path: Path) -> None:
    state = clip_folder(tmp_path / "model")
    whole = tmp_path / "model" / "model.safetensors"
    tensors = safetensors.torch.load_file(whole)
    whole.unlink()
    names = sorted(tensors)
    parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for part, keys in parts.items():
        safetensors.torch.save_file({k: tensors[k] for k in keys}, tmp_path / "model" / part)
    index = {"weight_map": {key: part for part, keys in parts.items() for key in keys}}
    (tmp_path / "model" / "model.safetensors.index.json").write_text(json.dumps(index))
    expected = load_clip(tmp_path / "model").weights_digest
    (tmp_path / "model" / "model.safetensors.index.json").unlink()
    torch.save(tensors, tmp_path / "model" / "pytorch_model.bin")
    clip = load_clip(tmp_path / "model")
    assert clip.weights_digest == expected
    assert torch.equal(clip.model.state_dict()["visual.proj"], state["visual.proj"])


def test_without_a_preprocessor_the_usual_one_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    clip_folder(tmp_path / "model")
    (tmp_path / "model" / "preprocessor_config.json").unlink()
    assert load_clip(tmp_path / "model").preprocess_cfg["mean"][0] == 0.48145466
    assert "has no preprocessor_config.json; images are prepared as usual for clip" in caplog.text


def test_another_size_of_the_preprocessor_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    clip_folder(tmp_path / "model")
    (tmp_path / "model" / "preprocessor_config.json").write_text('{"size": 256}')
    load_clip(tmp_path / "model")
    assert "images are resized to 32, the model's size, not to 256" in caplog.text


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "bert"}, "is of model_type 'bert', which is not one of clip and siglip"),
        ({"architectures": ["CLIPModel"]}, "is of model_type None"),
        ({"model_type": "clip", "architectures": ["CLIPVisionModel"]}, "which is not CLIPModel"),
        (changed("vision_config", "hidden_act", to="relu"), "hidden_act must be quick_gelu or"),
        (changed("text_config", "hidden_act", to="gelu"), "hidden_act must be quick_gelu or"),
        (changed("text_config", "vocab_size", to=99), "has no tokenizer.json or spiece.model"),
        (changed("vision_config", "num_hidden_layers", to=3), "it lacks 12"),
        (changed("vision_config", "num_attention_heads", to=5), "5 heads do not divide"),
        (changed("projection_dim", to=25), "must be"),
        ([], "must hold an object"),
    ],
)
def test_other_configs_are_one_line(tmp_path: Path, config: Any, message: str) -> None:
    clip_folder(tmp_path / "model", config)
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ClipNotFound, match=message) as caught:
        load_clip(tmp_path / "model")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("model.safetensors", b"", r"the file is empty \(0 bytes\)"),
        ("model.safetensors", b"version https://git-lfs.github.com/spec/v1\n", "does not hold"),
        ("model.safetensors", None, "holds no weights, looked for model.safetensors"),
        ("config.json", b"{", "is not JSON"),
        ("preprocessor_config.json", b'{"resample": 0}', "images must be resized by resample 2"),
        ("preprocessor_config.json", b"[]", "must hold an object"),
    ],
)
def test_damaged_folders_are_one_line(
    tmp_path: Path, name: str, data: bytes | None, message: str
) -> None:
    clip_folder(tmp_path / "model")
    if data is None:
        (tmp_path / "model" / name).unlink()
    else:
        (tmp_path / "model" / name).write_bytes(data)
    with pytest.raises(ClipNotFound, match=message) as caught:
        load_clip(tmp_path / "model")
    assert "\n" not in str(caught.value)


def test_a_siglip_without_its_tokenizer_says_what_to_put_there(tmp_path: Path) -> None:
    config = model_cfg_of(SIGLIP_CONFIG)
    model = build_clip(config)
    assert model.visual.trunk.pos_embed.shape == (1, 16, 48)  # type: ignore[union-attr]
    (tmp_path / "config.json").write_text(json.dumps(SIGLIP_CONFIG))
    safetensors.torch.save_file(model.state_dict(), tmp_path / "model.safetensors")
    with pytest.raises(ClipNotFound, match=r"no tokenizer.json or spiece.model.*vtclip\[siglip"):
        load_clip(tmp_path)


# parity with transformers


def image(size: tuple[int, int] = (50, 70)) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def features(output: Any) -> Tensor:
    """transformers returns the features, or, from version 5 on, an object that holds them."""
    return output if isinstance(output, Tensor) else output.pooler_output


def randomized(model: torch.nn.Module) -> torch.nn.Module:
    """So that no bias is 0 and no layer an identity."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for value in model.parameters():
            value += 0.05 * torch.randn(value.shape, generator=generator)
    return model.eval()


@needs_transformers
@pytest.mark.parametrize("act", ["quick_gelu", "gelu"])
@pytest.mark.parametrize("half", [False, True])
def test_features_of_clip_equal_those_of_transformers(tmp_path: Path, act: str, half: bool) -> None:
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

    config = CLIPConfig(
        text_config={**CLIP_CONFIG["text_config"], "hidden_act": act},
        vision_config={**VISION, "hidden_act": act},
        projection_dim=24,
    )
    model: Any = randomized(CLIPModel(config))
    if half:
        model = model.half().float()
        model.half().save_pretrained(tmp_path)
        model.float()
    else:
        model.save_pretrained(tmp_path)
    processor = CLIPImageProcessor(
        size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}
    )
    processor.save_pretrained(tmp_path)
    clip = load_clip(tmp_path)
    pixels = clip.preprocess(image())[None]
    theirs = processor(image(), return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(pixels, theirs, rtol=0, atol=0.03)  # one step of 8 bits, normalised
    tokens = clip.tokenizer(["a photo of a cat.", "two"])
    with torch.no_grad():
        expected = features(model.get_image_features(pixel_values=pixels))
        text = features(model.get_text_features(input_ids=tokens))
        got = clip.model.encode_text(tokens)  # type: ignore[operator]
    torch.testing.assert_close(clip.encode_image(pixels)[0], expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got, text, rtol=1e-5, atol=1e-5)
    assert clip.logit_scale == pytest.approx(float(model.logit_scale.detach().exp()), rel=1e-6)


@needs_transformers
def test_features_of_siglip_equal_those_of_transformers(tmp_path: Path) -> None:
    from transformers import SiglipConfig, SiglipImageProcessor, SiglipModel

    pieces = pytest.importorskip("sentencepiece", reason="SigLIP's tokenizer: needs sentencepiece")
    train_pieces(pieces, tmp_path / "spiece.model")
    text = {**SIGLIP_CONFIG["text_config"], "projection_size": 48}
    model: Any = randomized(SiglipModel(SiglipConfig(text_config=text, vision_config=VISION)))
    model.save_pretrained(tmp_path)
    SiglipImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path)
    clip = load_clip(f"local-dir:{tmp_path}")
    assert clip.preprocess_cfg["resize_mode"] == "squash"
    assert clip.preprocess_cfg["mean"] == [0.5, 0.5, 0.5]
    pixels = clip.preprocess(image())[None]
    tokens = clip.tokenizer(["a photo of a cat.", "two dogs"])
    with torch.no_grad():
        expected = features(model.get_image_features(pixel_values=pixels))
        text_rows = features(model.get_text_features(input_ids=tokens))
        got = clip.model.encode_text(tokens)  # type: ignore[operator]
    torch.testing.assert_close(clip.encode_image(pixels)[0], expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got, text_rows, rtol=1e-5, atol=1e-5)
    assert clip.encode_image(pixels, "raw")[1] is not None
    assert clip.config["tokenizer"]["vocab_digest"]


def train_pieces(sentencepiece: Any, path: Path) -> None:
    """A tiny sentencepiece model with SigLIP's end token."""
    lines = ["a photo of a cat", "a photo of two dogs", "the small drawing of a house"] * 30
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_prefix=str(path.with_suffix("")), vocab_size=40,
        eos_id=1, unk_id=2, bos_id=-1, pad_id=0, hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip


@needs_transformers
def test_tokens_equal_those_of_transformers(tmp_path: Path) -> None:
    from transformers import SiglipTokenizer

    pieces = pytest.importorskip("sentencepiece", reason="SigLIP's tokenizer: needs sentencepiece")
    train_pieces(pieces, tmp_path / "spiece.model")
    from vtclip.clip.folder_tokenizer import read_tokenizer

    ours = read_tokenizer(tmp_path, context_length=16, vocab_size=60)
    assert ours is not None
    theirs = SiglipTokenizer(str(tmp_path / "spiece.model"))
    for text in ("a photo of a cat", "A Photo, of: two dogs!", "", "zebra", "cat " * 30):
        expected = theirs(text, padding="max_length", max_length=16, truncation=True)["input_ids"]
        assert ours(text)[0].tolist() == expected, text


def test_a_state_dict_in_their_names_loads_under_an_architecture(tmp_path: Path) -> None:
    clip_folder(tmp_path / "model")
    weights = read_weights(tmp_path / "model" / "model.safetensors")
    model = build_clip(model_cfg_of(CLIP_CONFIG))
    load_into(model, weights)
    assert torch.equal(model.state_dict()["visual.proj"], weights.tensors["visual.proj"])
