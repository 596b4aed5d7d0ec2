# SPDX-License-Identifier: Apache-2.0
"""Which activation and preprocessing a file of weights needs: by what it tells, else said aloud.

Weights do not show the activation they were trained with, and wrong ones give worse features
without an error. In this order it is decided by

    the tag in ARCHITECTURE:TAG:FILE
    the digest of the file, where it is that of published weights
    open_clip_config.json beside the file, for a model of the same sizes
    what `vtclip convert` wrote into the file
    the extra entries of OpenAI's state dicts
    an architecture whose name says it (-quickgelu)

and where nothing decides and the architecture's published weights differ, by the architecture's own
default, with a warning that names the choices.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from vtclip.clip.names import CONFIG_NAME, say_once, tags_of
from vtclip.clip.weights import Weights
from vtclip.files import Json

_PREPROCESS = ("mean", "std", "interpolation", "resize_mode")


def decide(model_cfg: Json, weights: Weights, *, arch: str, tag: str = "") -> Json:
    """{model_cfg, preprocess_cfg} for a file: `model_cfg` with the activation that is decided.

    arch: a known architecture, or "" where the file has none; tag: as the user gave it. Says in
    one warning what nothing decided, and how to choose.
    """
    beside = _beside(weights.path)
    decided, why = _activation(model_cfg, weights, arch, tag, beside)
    tag = tag or (why if why in tags_of(arch) else "")
    preprocess = _preprocess(weights, arch, tag, beside)
    own = bool(model_cfg.get("quick_gelu", False))
    open_fields = []
    if decided is None:
        gelus = _activations(arch)
        decided = own if len(gelus) != 1 else next(iter(gelus))
        if {own, *gelus} != {own}:
            open_fields.append("activation")
    elif decided != own:
        source = f"the tag {why}" if why in tags_of(arch) else why
        say_once(f"model {arch}: quick_gelu={decided} for {weights.path}, by {source}")
    if preprocess is None:
        preprocess, differ = _shared_preprocess(arch)
        if differ:
            open_fields.append("preprocessing")
    if open_fields:
        say_once(_undecided(weights.path, arch, decided, open_fields))
    model_cfg = {**model_cfg}
    if decided or "quick_gelu" in model_cfg:
        model_cfg["quick_gelu"] = decided
    return {"model_cfg": model_cfg, "preprocess_cfg": preprocess}


def _activation(
    model_cfg: Json, weights: Weights, arch: str, tag: str, beside: Json
) -> tuple[bool | None, str]:
    """Whether it is QuickGELU (None: nothing tells), and what tells; a tag by its name."""
    if tag:
        return _quick(arch, tag), tag
    if not _differs(arch, model_cfg) and not weights.facts:
        return None, ""
    known = _tag_by_digest(weights, arch)
    if known:
        return _quick(arch, known), known
    other = beside.get("model_cfg")
    if isinstance(other, dict) and _same_sizes(other, model_cfg):
        return bool(other.get("quick_gelu", False)), f"{CONFIG_NAME} beside it"
    written = weights.facts.get("model_cfg")
    if isinstance(written, dict):
        return bool(written.get("quick_gelu", False)), "what vtclip convert wrote"
    if weights.openai:
        return True, "openai" if "openai" in tags_of(arch) else "OpenAI's extra entries in it"
    if arch.endswith("-quickgelu"):
        return True, "its name"
    return None, ""


def _differs(arch: str, model_cfg: Json) -> bool:
    """Whether an architecture's published weights, or its own default, differ in activation."""
    return not arch or len({*_activations(arch), bool(model_cfg.get("quick_gelu", False))}) > 1


def _activations(arch: str) -> set[bool]:
    return {_quick(arch, tag) for tag in tags_of(arch)}


def _quick(arch: str, tag: str) -> bool:
    return bool(tag_config(arch, tag).get("quick_gelu", False))


def tag_config(arch: str, tag: str) -> Json:
    """What open_clip knows of published weights."""
    from open_clip import pretrained

    return dict(pretrained.get_pretrained_cfg(arch, tag))


def _tag_by_digest(weights: Weights, arch: str) -> str:
    """The tag of the published file that this is, or nothing."""
    found = weights.facts.get("source_sha256")
    known = _published(arch)
    if not known or (found is None and weights.path.suffix == ".safetensors"):
        return ""  # none of the files with a known digest is one of safetensors
    digest = str(found) if found else weights.sha256
    return next((tag for start, tag in known.items() if digest.startswith(start)), "")


@functools.cache
def _published(arch: str) -> dict[str, str]:
    """Tag by sha256, or its first eight digits, as publishers put it into files' addresses."""
    found = {}
    for tag in tags_of(arch):
        address = str(tag_config(arch, tag).get("url", ""))
        whole = re.search(r"/([0-9a-f]{64})/", address)
        start = re.search(r"-([0-9a-f]{8})\.pth?$", address)
        if whole or start:
            found[(whole or start)[1]] = tag  # type: ignore[index]
    return found


def _beside(path: Path) -> Json:
    config = path.parent / CONFIG_NAME
    if not config.is_file():
        return {}
    try:
        value = json.loads(config.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())[:160]
        raise ValueError(f"{config} is not JSON: {reason}") from None
    return value if isinstance(value, dict) else {}


def _same_sizes(one: Json, two: Json) -> bool:
    """Whether two model_cfgs have the same widths and depths, whatever their activation."""

    def sizes(cfg: Json) -> list[Any]:
        vision, text = cfg.get("vision_cfg") or {}, cfg.get("text_cfg") or {}
        return [
            cfg.get("embed_dim"),
            *(vision.get(key) for key in ("width", "layers", "timm_model_name")),
            *(text.get(key) for key in ("width", "layers")),
        ]

    return sizes(one) == sizes(two)


def _preprocess(weights: Weights, arch: str, tag: str, beside: Json) -> Json | None:
    """Preprocessing that something decides: a config beside the file, a tag, `vtclip convert`."""
    if beside.get("preprocess_cfg"):
        return dict(beside["preprocess_cfg"])
    if tag:
        config = _full_preprocess(arch, tag)
        return {key: config[key] for key in _PREPROCESS}
    written = weights.facts.get("preprocess_cfg")
    return dict(written) if isinstance(written, dict) else None


def _full_preprocess(arch: str, tag: str) -> Json:
    from open_clip.transform import PreprocessCfg, merge_preprocess_dict

    return dict(merge_preprocess_dict(PreprocessCfg(), tag_config(arch, tag)))


def _shared_preprocess(arch: str) -> tuple[Json, bool]:
    """The preprocessing of the first tag, and whether other tags have another one."""
    known = [_full_preprocess(arch, tag) for tag in tags_of(arch)]
    shown = {json.dumps([config[key] for key in _PREPROCESS]) for config in known}
    return ({key: known[0][key] for key in _PREPROCESS} if known else {}), len(shown) > 1


def _undecided(path: Path, arch: str, quick: bool, fields: list[str]) -> str:
    """The warning: what is assumed, which published weights need what, how to choose."""
    tags = tags_of(arch)
    parts = [f"model {arch}: {path} does not tell the {' and '.join(fields)} of its weights"]
    if "activation" in fields:
        with_quick = [tag for tag in tags if _quick(arch, tag)]
        without = [tag for tag in tags if tag not in with_quick]
        parts.append(
            f"{'QuickGELU' if quick else 'GELU'} is assumed (known weights: QuickGELU "
            f"{_few(with_quick)}; GELU {_few(without)})"
        )
    if "preprocessing" in fields:
        parts.append(
            f"known weights of this architecture differ in preprocessing; that of {tags[0]} is used"
        )
    parts.append(f"to choose, give {arch}:TAG:{path}, or put {CONFIG_NAME} next to the weights")
    return ". ".join(part[0].upper() + part[1:] if n else part for n, part in enumerate(parts))


def _few(tags: Iterable[str]) -> str:
    names = list(tags)
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "") if names else "none"
