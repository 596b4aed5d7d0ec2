# SPDX-License-Identifier: Apache-2.0
"""Architectures: a network from its settings, and the settings that the shapes of weights show.

The shapes of open_clip's plain CLIP (a vision transformer or a modified ResNet, and a text
transformer) show its settings but for the width of a head: it is 64 in OpenAI's models. A known
architecture of the same shapes decides it where there is one.
"""

from __future__ import annotations

import functools
from copy import deepcopy
from typing import Any

from torch import Tensor, nn

from vtclip.clip.names import architectures, say_once
from vtclip.clip.no_code import check_no_code
from vtclip.files import Json

CLIP_VOCABULARY = 49408  # of the byte-pair tokenizer of OpenAI's CLIP


def build_clip(config: Json) -> nn.Module:
    """An open_clip model with random weights from `config`, a model_cfg or {"model_cfg": ...}.

    vision_cfg may hold "siglip_trunk", the settings of SigLIP's image encoder of any size (see
    transformers_folders.py), in place of the name of one of timm's.
    """
    import open_clip

    check_no_code(config, "build_clip")  # whichever way it came
    cfg = deepcopy(config.get("model_cfg", config))
    missing = [key for key in ("embed_dim", "vision_cfg", "text_cfg") if key not in cfg]
    if missing:
        raise ValueError(
            f"build_clip: config must hold embed_dim, vision_cfg and text_cfg, "
            f"got no {', '.join(missing)}"
        )
    trunk = cfg["vision_cfg"].pop("siglip_trunk", None)
    if trunk is not None:  # a small tower keeps the place of the one that follows
        cfg["vision_cfg"] |= {"timm_model_name": "vit_tiny_patch16_224", "timm_proj": "none"}
    custom = cfg.pop("custom_text", False) or "hf_model_name" in cfg["text_cfg"]
    if "timm_model_name" in cfg["vision_cfg"]:
        cfg["vision_cfg"]["timm_model_pretrained"] = False
    if "hf_model_name" in cfg["text_cfg"]:
        cfg["text_cfg"]["hf_model_pretrained"] = False
    kind = open_clip.CLIP
    if custom or "multimodal_cfg" in cfg:
        kind = open_clip.CoCa if "multimodal_cfg" in cfg else open_clip.CustomTextCLIP
    model: nn.Module = kind(**cfg)
    if trunk is not None:
        visual: Any = model.visual
        visual.trunk = _siglip_trunk(trunk, cfg["vision_cfg"]["image_size"])
    return model


def _siglip_trunk(settings: Json, image_size: int | list[int]) -> nn.Module:
    """timm's vision transformer with an attention pool: pixels to features of its width."""
    from timm.models.vision_transformer import VisionTransformer

    trunk: nn.Module = VisionTransformer(
        img_size=image_size if isinstance(image_size, int) else (image_size[0], image_size[1]),
        patch_size=settings["patch_size"],
        embed_dim=settings["width"],
        depth=settings["layers"],
        num_heads=settings["heads"],
        mlp_ratio=settings["mlp_ratio"],
        num_classes=0,
        class_token=False,
        global_pool="map",
        act_layer=settings["act"],
    )
    return trunk


def architecture_of(tensors: dict[str, Tensor]) -> tuple[str, Json]:
    """The known architecture of these weights ("" if none) and a model_cfg; ValueError in one line.

    tensors: under open_clip's names. Of architectures that differ in the activation alone the one
    with GELU is returned: shapes do not show it.
    """
    shown = _settings(tensors)
    known = [name for name, settings in _known_settings() if settings == shown]
    configs = {name: _config(name) for name in known}
    plain = {name: cfg for name, cfg in configs.items() if not cfg.get("quick_gelu")} or configs
    if len(plain) > 1:
        raise ValueError(
            f"its shapes are those of {', '.join(plain)}; give one, as {next(iter(plain))}:FILE"
        )
    if plain:
        return next(iter(plain.items()))
    return "", _unknown(shown)


def _config(name: str) -> Json:
    import open_clip

    return dict(open_clip.get_model_config(name))


def _unknown(shown: Json) -> Json:
    """A model_cfg of settings that no known architecture has, with heads as wide as OpenAI's."""
    widths = [shown["text_cfg"]["width"]]
    if "patch_size" in shown["vision_cfg"]:
        widths.append(shown["vision_cfg"]["width"])
    if any(width % 64 for width in widths):
        raise ValueError(
            f"no known architecture has its shapes (widths {', '.join(map(str, widths))}), so the "
            "number of heads is unknown; give a folder with open_clip_config.json"
        )
    say_once(
        "no known architecture has the shapes of these weights; heads are taken to be 64 wide, "
        "as OpenAI's are"
    )
    config: Json = deepcopy(shown)
    config["text_cfg"]["heads"] = shown["text_cfg"]["width"] // 64
    return config


def _settings(tensors: dict[str, Tensor]) -> Json:
    """What the shapes of plain CLIP's tensors show, as a model_cfg without heads and activation."""
    if any(name.startswith(("visual.trunk.", "text.")) for name in tensors):
        raise ValueError(
            "its architecture does not show in its shapes alone; give it as ARCHITECTURE:FILE"
        )
    if "visual.conv1.weight" not in tensors and "conv1.weight" in tensors:
        raise ValueError("it holds an image encoder alone, without the text encoder of a CLIP")
    try:
        vit = "visual.class_embedding" in tensors
        return {
            "embed_dim": tensors["text_projection"].shape[1],
            "vision_cfg": _vision_transformer(tensors) if vit else _resnet(tensors),
            "text_cfg": {
                "context_length": tensors["positional_embedding"].shape[0],
                "vocab_size": tensors["token_embedding.weight"].shape[0],
                "width": tensors["ln_final.weight"].shape[0],
                "layers": _count(tensors, "transformer.resblocks."),
            },
        }
    except (KeyError, IndexError, ZeroDivisionError) as error:
        raise ValueError(f"it holds no weights of a CLIP (no {str(error)[:80]})") from None


def _vision_transformer(tensors: dict[str, Tensor]) -> Json:
    width, _, patch, _ = tensors["visual.conv1.weight"].shape
    grid = round((tensors["visual.positional_embedding"].shape[0] - 1) ** 0.5)
    settings: Json = {
        "layers": _count(tensors, "visual.transformer.resblocks."),
        "width": width,
        "patch_size": patch,
        "image_size": grid * patch,
    }
    ratio = tensors["visual.transformer.resblocks.0.mlp.c_fc.weight"].shape[0] / width
    if ratio != 4:
        settings["mlp_ratio"] = ratio
    if "visual.ln_pre.weight" not in tensors:
        settings["no_ln_pre"] = True
    return settings


def _resnet(tensors: dict[str, Tensor]) -> Json:
    grid = round((tensors["visual.attnpool.positional_embedding"].shape[0] - 1) ** 0.5)
    return {
        "layers": [_count(tensors, f"visual.layer{number}.") for number in (1, 2, 3, 4)],
        "width": tensors["visual.layer1.0.conv1.weight"].shape[0],
        "image_size": grid * 32,
    }


def _count(tensors: dict[str, Tensor], prefix: str) -> int:
    """How many numbered modules there are below a prefix."""
    start = len(prefix)
    return len({name[start:].split(".")[0] for name in tensors if name.startswith(prefix)})


@functools.cache
def _known_settings() -> list[tuple[str, Json]]:
    """Of each known architecture that is a plain CLIP, what its shapes would show."""
    found = []
    for name in architectures().values():
        cfg = _config(name)
        vision, text = cfg["vision_cfg"], cfg["text_cfg"]
        plain = not cfg.get("custom_text") and "hf_model_name" not in text
        if not plain or "timm_model_name" in vision or "multimodal_cfg" in cfg:
            continue
        keys = ["layers", "width", "image_size"]
        if not isinstance(vision["layers"], list):
            keys += [*("patch_size", "mlp_ratio", "no_ln_pre")]
        shown: Json = {key: vision[key] for key in keys if key in vision}
        if shown.get("mlp_ratio") == 4:
            del shown["mlp_ratio"]
        settings = {
            "embed_dim": cfg["embed_dim"],
            "vision_cfg": shown,
            "text_cfg": {
                "context_length": text.get("context_length", 77),
                "vocab_size": text.get("vocab_size", CLIP_VOCABULARY),
                "width": text["width"],
                "layers": text["layers"],
            },
        }
        found.append((name, settings))
    return found
