# SPDX-License-Identifier: Apache-2.0
"""Folders in transformers' layout: CLIPModel and SiglipModel as open_clip's models.

config.json names the architecture, model.safetensors or pytorch_model.bin hold the weights (whole
or in parts with an index), preprocessor_config.json the preprocessing, tokenizer.json or
spiece.model the tokenizer. OpenAI's byte-pair tokenizer needs no file.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vtclip.clip.architecture import CLIP_VOCABULARY
from vtclip.clip.folder_tokenizer import FILES, INSTALL, read_tokenizer
from vtclip.clip.names import say_once
from vtclip.clip.no_code import check_folder
from vtclip.clip.texts import Tokenizer
from vtclip.clip.transformers_keys import to_open_clip
from vtclip.clip.weights import Weights, read_weights
from vtclip.files import Json, parse_json
from vtclip.schemas import check, number, table, whole
from vtclip.schemas import text as text_

CONFIG = "config.json"
WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")
PREPROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")
TOKENIZER_FILES = (*FILES, "tokenizer_config.json", "special_tokens_map.json")
# what transformers takes where a config leaves a value out
_DEFAULTS: dict[str, Json] = {
    "clip": {"hidden_act": "quick_gelu", "layer_norm_eps": 1e-5},
    "siglip": {"hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6},
}
_VISION: Json = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "image_size": 224,
}
_TEXTS: dict[str, Json] = {
    "clip": {
        "hidden_size": 512,
        "intermediate_size": 2048,
        "num_hidden_layers": 12,
        "num_attention_heads": 8,
        "vocab_size": CLIP_VOCABULARY,
        "max_position_embeddings": 77,
    },
    "siglip": {
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "vocab_size": 32000,
        "max_position_embeddings": 64,
    },
}
_PREPROCESS: dict[str, Json] = {
    "clip": {
        "mean": [0.48145466, 0.4578275, 0.40821073],
        "std": [0.26862954, 0.26130258, 0.27577711],
        "interpolation": "bicubic",
        "resize_mode": "shortest",
    },
    "siglip": {
        "mean": [0.5, 0.5, 0.5],
        "std": [0.5, 0.5, 0.5],
        "interpolation": "bicubic",
        "resize_mode": "squash",
    },
}
_size = whole(1, 2**20)
_TOWER = {
    "hidden_size": _size,
    "intermediate_size": _size,
    "num_hidden_layers": whole(0, 1000),
    "num_attention_heads": _size,
    "hidden_act": text_,
    "layer_norm_eps": number(0),
}
_VISION_TOWER = table({**_TOWER, "image_size": _size, "patch_size": _size})
_TEXT_TOWER = table({**_TOWER, "vocab_size": whole(1, 2**24), "max_position_embeddings": _size})
_RESAMPLE = {2: "bilinear", 3: "bicubic"}  # Pillow's numbers


def is_transformers_folder(folder: Path) -> bool:
    """Whether the folder has the config of a model of transformers."""
    return (folder / CONFIG).is_file()


def read_folder(folder: Path) -> tuple[Json, Weights, Tokenizer]:
    """{model_cfg, preprocess_cfg}, weights and tokenizer, or a ValueError in one line."""
    config, weights = read_model(folder)
    return config, weights, tokenizer_of(folder, config["model_cfg"])


def read_model(folder: Path) -> tuple[Json, Weights]:
    """{model_cfg, preprocess_cfg} and weights, or a ValueError in one line."""
    config = read_config(folder)
    model_cfg = model_cfg_of(config)
    weights = _read_weights(folder)
    size = model_cfg["vision_cfg"]["image_size"]
    preprocess = _preprocess_of(folder, config["model_type"], size)
    return {"model_cfg": model_cfg, "preprocess_cfg": preprocess}, weights


def read_config(folder: Path) -> Json:
    """config.json of a CLIP or SigLIP, or a ValueError that says what it is of."""
    check_folder(folder)
    config = _json(folder / CONFIG)
    kind = config.get("model_type")
    kind = kind if isinstance(kind, str) else None
    if kind not in _DEFAULTS:
        raise ValueError(
            f"{folder / CONFIG} is of model_type {kind!r}, which is not one of clip and siglip"
        )
    names = config.get("architectures") or []
    if not isinstance(names, list):
        raise ValueError(f"{folder / CONFIG}: architectures must be a list")
    whole = {"clip": "CLIPModel", "siglip": "SiglipModel"}[kind]
    if names and whole not in names:
        raise ValueError(
            f"{folder / CONFIG} is of {', '.join(map(str, names))}, which is not {whole}: "
            "image and text encoder are needed"
        )
    return config


def model_cfg_of(config: Json) -> Json:
    """open_clip's model_cfg for a config.json of model_type clip or siglip."""
    kind = config["model_type"]
    vision = {**_DEFAULTS[kind], **_VISION, **_part(config, "vision_config")}
    text = {**_DEFAULTS[kind], **_TEXTS[kind], **_part(config, "text_config")}
    vision.setdefault("patch_size", {"clip": 32, "siglip": 16}[kind])
    for name, tower in (("vision_config", vision), ("text_config", text)):
        check(tower, _VISION_TOWER if tower is vision else _TEXT_TOWER, f"{CONFIG}: {name}")
        if tower["hidden_size"] % tower["num_attention_heads"]:
            raise ValueError(
                f"{CONFIG}: {name} has a width of {tower['hidden_size']}, which "
                f"{tower['num_attention_heads']} heads do not divide"
            )
    return _clip_cfg(config, vision, text) if kind == "clip" else _siglip_cfg(vision, text)


def _clip_cfg(config: Json, vision: Json, text: Json) -> Json:
    acts = {vision["hidden_act"], text["hidden_act"]}
    if acts not in ({"quick_gelu"}, {"gelu"}):
        raise ValueError(
            f"{CONFIG}: hidden_act must be quick_gelu or gelu in both encoders, got "
            f"{vision['hidden_act']} and {text['hidden_act']}"
        )
    model_cfg: Json = {
        "embed_dim": config.get("projection_dim", 512),
        "vision_cfg": {
            "image_size": vision["image_size"],
            "layers": vision["num_hidden_layers"],
            "width": vision["hidden_size"],
            "head_width": vision["hidden_size"] // vision["num_attention_heads"],
            "patch_size": vision["patch_size"],
        },
        "text_cfg": _text_cfg(text),
    }
    if acts == {"quick_gelu"}:
        model_cfg["quick_gelu"] = True
    _add_unusual(model_cfg["vision_cfg"], vision, 1e-5)
    _add_unusual(model_cfg["text_cfg"], text, 1e-5)
    return model_cfg


def _siglip_cfg(vision: Json, text: Json) -> Json:
    acts = {vision["hidden_act"], text["hidden_act"]}
    if not acts <= {"gelu_pytorch_tanh", "gelu"} or vision.get("vision_use_head") is False:
        raise ValueError(
            f"{CONFIG}: SigLIP must have hidden_act gelu_pytorch_tanh or gelu and its pooling "
            f"head, got {vision['hidden_act']}, {text['hidden_act']}, "
            f"vision_use_head={vision.get('vision_use_head', True)}"
        )
    if {vision["layer_norm_eps"], text["layer_norm_eps"]} != {1e-6}:
        raise ValueError(f"{CONFIG}: layer_norm_eps of SigLIP must be 1e-06")
    text_cfg = _text_cfg(text) | {
        "no_causal_mask": True,
        "proj_bias": True,
        "pool_type": "last",
        "norm_kwargs": {"eps": 1e-6},
    }
    if text["hidden_act"] == "gelu_pytorch_tanh":
        text_cfg["act_kwargs"] = {"approximate": "tanh"}
    _add_unusual(text_cfg, text, 1e-6)
    return {
        "embed_dim": vision["hidden_size"],
        "init_logit_bias": -10,
        "custom_text": True,
        "vision_cfg": {
            "image_size": vision["image_size"],
            "siglip_trunk": {
                "patch_size": vision["patch_size"],
                "width": vision["hidden_size"],
                "layers": vision["num_hidden_layers"],
                "heads": vision["num_attention_heads"],
                "mlp_ratio": vision["intermediate_size"] / vision["hidden_size"],
                "act": "gelu_tanh" if vision["hidden_act"] == "gelu_pytorch_tanh" else "gelu",
            },
        },
        "text_cfg": text_cfg,
    }


def _text_cfg(text: Json) -> Json:
    return {
        "context_length": text["max_position_embeddings"],
        "vocab_size": text["vocab_size"],
        "width": text["hidden_size"],
        "heads": text["num_attention_heads"],
        "layers": text["num_hidden_layers"],
    }


def _add_unusual(tower: Json, config: Json, eps: float) -> None:
    """Settings of a transformer where they are not open_clip's default."""
    ratio = config["intermediate_size"] / config["hidden_size"]
    if ratio != 4:
        tower["mlp_ratio"] = ratio
    if config["layer_norm_eps"] != eps:
        tower["norm_kwargs"] = {"eps": config["layer_norm_eps"]}


def _part(config: Json, name: str) -> Json:
    """One encoder's part; older files have it under two names, of which NAME_dict is whole."""
    part = config.get(name) or config.get(f"{name}_dict") or {}
    if not isinstance(part, dict):
        raise ValueError(f"{CONFIG}: {name} must be an object, got {type(part).__name__}")
    return part


def _preprocess_of(folder: Path, kind: str, image_size: int) -> Json:
    default = _PREPROCESS[kind]
    path = next((folder / n for n in PREPROCESSOR_FILES if (folder / n).is_file()), None)
    if path is None:
        say_once(
            f"{folder} has no {PREPROCESSOR_FILES[0]}; images are prepared as usual for {kind}: "
            f"mean {default['mean']}, std {default['std']}, {default['interpolation']}"
        )
        return dict(default)
    config = _json(path)
    config = config.get("image_processor", config)
    out = dict(default)
    if config.get("do_normalize") is False:
        out |= {"mean": [0.0] * 3, "std": [1.0] * 3}
    else:
        out["mean"] = list(config.get("image_mean") or default["mean"])
        out["std"] = list(config.get("image_std") or default["std"])
    resample = config.get("resample", 3)
    if resample not in _RESAMPLE or config.get("do_resize") is False:
        raise ValueError(
            f"{path}: images must be resized by resample 2 (bilinear) or 3 (bicubic), got "
            f"{'no resizing' if config.get('do_resize') is False else resample}"
        )
    out["interpolation"] = _RESAMPLE[resample]
    size = config.get("size", image_size)
    crops = config.get("do_center_crop", kind == "clip")
    if isinstance(size, dict):
        edge = size.get("shortest_edge") or size.get("height")
        out["resize_mode"] = "shortest" if "shortest_edge" in size else "squash"
        same = edge == image_size and size.get("width", edge) == image_size
    else:
        same = size == image_size
        out["resize_mode"] = "shortest" if crops else default["resize_mode"]
    if not same:
        say_once(f"{path}: images are resized to {image_size}, the model's size, not to {size}")
    return out


def tokenizer_of(folder: Path, model_cfg: Json) -> Tokenizer:
    """CLIP's own tokenizer for its vocabulary, else the one in the folder; else a ValueError."""
    import open_clip

    text = model_cfg["text_cfg"]
    context, size = text.get("context_length", 77), text.get("vocab_size", CLIP_VOCABULARY)
    siglip = bool(model_cfg.get("custom_text"))
    if size == CLIP_VOCABULARY and not siglip:
        own: Tokenizer = open_clip.SimpleTokenizer(context_length=context)
        return own
    found = read_tokenizer(folder, context_length=context, vocab_size=size)
    if found is None:
        raise ValueError(
            f"{folder} has no {' or '.join(FILES[:2])}, and its vocabulary of {size} tokens is not "
            f"that of CLIP's own tokenizer ({CLIP_VOCABULARY}); put the model's tokenizer there "
            f"(reading it: {INSTALL})"
        )
    if text.get("pool_type", "argmax") == "argmax" and found.facts["end"] != size - 1:
        raise ValueError(
            f"{folder}: the end token must be the last of the vocabulary, {size - 1}, got "
            f"{found.facts['end']}"
        )
    return found


def _read_weights(folder: Path) -> Weights:
    for name in WEIGHT_FILES:
        path = folder / name
        index = folder / f"{name}.index.json"
        if path.is_file():
            return _of_file(path)
        if index.is_file():
            parts = sorted({str(part) for part in _json(index).get("weight_map", {}).values()})
            tensors: dict[str, Any] = {}
            for part in parts:
                if not (folder / Path(part).name).is_file():
                    raise ValueError(f"{index} names {part}, which is not there")
                tensors |= _of_file(folder / Path(part).name, whole=False).tensors
            return Weights(index, to_open_clip(tensors))
    raise ValueError(f"{folder} holds no weights, looked for {', '.join(WEIGHT_FILES)}")


def _of_file(path: Path, whole: bool = True) -> Weights:
    try:
        return read_weights(path, rename=whole)
    except ValueError as error:
        raise ValueError(f"{path} does not hold these weights: {error}") from None


def _json(path: Path) -> Json:
    try:
        value = parse_json(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise ValueError(f"{path} is not JSON: {' '.join(str(error).split())[:160]}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} must hold an object, got {type(value).__name__}")
    return value
