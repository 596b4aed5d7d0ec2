# SPDX-License-Identifier: Apache-2.0
"""What `--model` can name: open_clip's architectures, their published weights, and which are here.

Nothing is fetched and no weights are read. Architectures are built on meta tensors, which have
shapes and no memory, to count their parameters.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any, NamedTuple

import torch

from vtclip.clip.architecture import build_clip
from vtclip.clip.hub import is_cached
from vtclip.clip.loading import DEMO_ASSETS, WEIGHT_NAMES
from vtclip.clip.names import CONFIG_NAME, architectures, tags_of
from vtclip.clip.provenance import tag_config
from vtclip.clip.spatial import spatial_widths, visual_kind
from vtclip.files import Json, parse_json

URL_CACHE = "~/.cache/clip"  # where open_clip puts files that are in no repository of the hub


class Listed(NamedTuple):
    """An architecture; sizes in pixels, widths in numbers per feature."""

    name: str
    size: int | list[int]
    width: int
    tower: str  # ResNet, ViT, or the name that timm has for it
    text_tower: str  # the repository of transformers that it is of, else empty
    tags: tuple[str, ...]
    cached: tuple[str, ...]  # those of `tags` whose weights are on this machine


class Built(NamedTuple):
    """What only the network itself shows."""

    image_parameters: int
    text_parameters: int
    spatial: dict[str, int]  # option of --spatial -> width Cs


def listed(pattern: str = "") -> list[Listed]:
    """Architectures whose name or tag holds `pattern`, the demo model first; case does not matter.

    Those with cached weights come before the others.
    """
    import open_clip

    found = [_demo()]
    for name in architectures().values():
        tags = tuple(tags_of(name))
        cached = tuple(tag for tag in tags if tag_is_cached(name, tag))
        found.append(_of_config(name, open_clip.get_model_config(name), tags, cached))
    wanted = pattern.lower()
    found = [
        one
        for one in found
        if any(
            wanted in text.lower() for text in (one.name, *(f"{one.name}:{t}" for t in one.tags))
        )
    ]
    return sorted(found, key=lambda one: (one.name != "demo", not one.cached))


def tag_is_cached(arch: str, tag: str) -> bool:
    """Whether the weights of ARCHITECTURE:TAG are on this machine; asks no network."""
    config = tag_config(arch, tag)
    repo, _, filename = str(config.get("hf_hub", "")).rpartition("/")
    if repo:
        return any(is_cached(repo, name) for name in ([filename] if filename else WEIGHT_NAMES))
    url = str(config.get("url", ""))
    return bool(url) and (Path(URL_CACHE).expanduser() / url.rpartition("/")[2]).is_file()


def build_on_meta(name: str) -> Any:
    """An architecture's network without memory for its weights; ValueError where it needs more."""
    import open_clip

    config = _demo_config() if name == "demo" else {"model_cfg": open_clip.get_model_config(name)}
    try:
        with torch.device("meta"):
            return build_clip(config)
    except (RuntimeError, OSError, ImportError) as error:
        reason = " ".join(str(error).split())[:160]
        raise ValueError(f"{name} cannot be built here: {reason}") from None


@functools.cache
def built(name: str) -> Built:
    """Counts and spatial options of an architecture; ValueError where it cannot be built here."""
    import open_clip

    model = build_on_meta(name)
    image = sum(one.numel() for one in model.visual.parameters())
    whole = sum(one.numel() for one in model.parameters())
    width = _demo().width if name == "demo" else open_clip.get_model_config(name)["embed_dim"]
    kind = visual_kind(model.visual, open_clip)
    return Built(image, whole - image, spatial_widths(kind, model.visual, int(width)))


def _demo_config() -> Json:
    config: Json = parse_json((DEMO_ASSETS / CONFIG_NAME).read_text(encoding="utf-8"))
    return config


def _demo() -> Listed:
    return _of_config("demo", _demo_config()["model_cfg"], ("bundled",), ("bundled",))


def _of_config(name: str, config: Json, tags: tuple[str, ...], cached: tuple[str, ...]) -> Listed:
    vision = config["vision_cfg"]
    tower = "ResNet" if isinstance(vision.get("layers"), list) else "ViT"
    tower = vision.get("timm_model_name", tower)
    text = config.get("text_cfg", {}).get("hf_model_name", "")
    size = vision.get("image_size", 224)
    return Listed(name, size, int(config["embed_dim"]), tower, text, tags, cached)
