# SPDX-License-Identifier: Apache-2.0
"""What decides a feature, field by field, and where two models differ in it.

A model's `config` (see Clip) says which network, which preprocessing and which tokenizer it has.
Two configs may be written differently and mean the same: a default that is spelled out, a list for
a tuple, 1.0 for 1, settings that only training reads. `differences` compares what they mean.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from vtclip.files import Json, json_digest

# settings that change no feature of loaded weights: of training and of initial values
_UNREAD = frozenset(
    [
        *("custom_text", "init_logit_scale", "init_logit_bias", "nonscalar_logit_scale"),
        *("output_dict", "cast_dtype", "vision_cfg.patch_dropout", "vision_cfg.output_tokens"),
        *("vision_cfg.timm_model_pretrained", "vision_cfg.timm_drop", "vision_cfg.timm_drop_path"),
        *("text_cfg.output_tokens", "text_cfg.hf_model_pretrained"),
    ]
)
# how a tokenizer is found: another place may hold the same one, so one that names none is no other
_OF_TOKENIZER = {
    *("text_cfg.hf_tokenizer_name", "text_cfg.tokenizer_kwargs", "text_cfg.tokenizer_mode")
}
_WORDS = {
    "quick_gelu": "quick_gelu",
    "embed_dim": "feature width (embed_dim)",
    "vision_cfg": "image encoder's",
    "text_cfg": "text encoder's",
}


def identity_of(config: Json, weights: str) -> Json:
    """What decides a feature of a model with this `config` and this digest of its weights.

    Returns weights (the digest), architecture (the network's settings with defaults filled in, JSON
    object), architecture_digest, activation ("QuickGELU" or "GELU"; other activations are in
    architecture), preprocessing (size, mean, std, interpolation, resize_mode, ...) and tokenizer.
    Equal identities have equal features; `differences` says in words where two are not.
    """
    architecture = _network(config.get("model_cfg"))
    return {
        "weights": weights,
        "architecture": architecture,
        "architecture_digest": json_digest(architecture),
        "activation": "QuickGELU" if architecture.get("quick_gelu") else "GELU",
        "preprocessing": _plain(config.get("preprocess_cfg") or {}),
        "tokenizer": _plain(config.get("tokenizer") or {}),
    }


def differences(
    a_config: Mapping[str, Any] | None, b_config: Mapping[str, Any] | None
) -> list[str]:
    """The fields in which two configs (`Clip.config`, as runs record it) mean different features.

    Each is one phrase that names the field and both values, "preprocess mean [0.48, 0.45, 0.40] vs
    [0, 0, 0]", first that of `a_config`. Empty where both mean the same. A digest of the weights is
    compared where both hold one as "weights". None stands for a source that names no model. What
    one of them does not record of its tokenizer is not compared.
    """
    if a_config is None or b_config is None:
        if a_config is b_config:
            return []
        return [f"image encoder {_presence(a_config)} vs {_presence(b_config)}"]
    found = []
    a_weights, b_weights = a_config.get("weights"), b_config.get("weights")
    if a_weights and b_weights and a_weights != b_weights:
        found.append(f"weights {str(a_weights)[:12]} vs {str(b_weights)[:12]}")
    one, two = _network(a_config.get("model_cfg")), _network(b_config.get("model_cfg"))
    found += [
        f"{_named(key)} {_shown(one.get(key))} vs {_shown(two.get(key))}"
        for key in [*one, *(key for key in two if key not in one)]
        if one.get(key) != two.get(key)
        and not (key in _OF_TOKENIZER and (key not in one or key not in two))
    ]
    found += _of_section(a_config, b_config, "preprocess_cfg", "preprocess")
    found += _of_section(a_config, b_config, "tokenizer", "tokenizer", both=True)
    return found


def _of_section(
    a_config: Mapping[str, Any],
    b_config: Mapping[str, Any],
    key: str,
    word: str,
    both: bool = False,
) -> list[str]:
    """Differences within one section; `both`: only of fields that both record."""
    one, two = (_plain(config.get(key) or {}) for config in (a_config, b_config))
    if not isinstance(one, dict) or not isinstance(two, dict):
        return [] if one == two else [f"{word} {_shown(one)} vs {_shown(two)}"]
    names = [*one, *(name for name in two if name not in one)]
    return [
        f"{word} {name} {_shown(one.get(name))} vs {_shown(two.get(name))}"
        for name in names
        if one.get(name) != two.get(name) and not (both and (name not in one or name not in two))
    ]


def _network(model_cfg: object) -> dict[str, Any]:
    """A model_cfg as dotted settings with open_clip's defaults, without those that none reads."""
    if not isinstance(model_cfg, Mapping):
        return {} if model_cfg is None else {"model_cfg": _plain(model_cfg)}
    from open_clip.model import CLIPTextCfg, CLIPVisionCfg

    flat: dict[str, Any] = {"quick_gelu": False}
    for key, value in model_cfg.items():
        if not isinstance(value, Mapping):
            flat[key] = _plain(value)
            continue
        kind = {"vision_cfg": CLIPVisionCfg, "text_cfg": CLIPTextCfg}.get(key)
        settings = dict(dataclasses.asdict(kind()) if kind else {}, **value)
        if settings.get("timm_model_name"):  # then open_clip does not read the plain tower's
            settings = {
                name: item
                for name, item in settings.items()
                if name.startswith("timm_") or name == "image_size"
            }
        flat |= {f"{key}.{name}": _plain(item) for name, item in settings.items()}
    if flat.get("vision_cfg.image_size") is not None:
        flat["vision_cfg.image_size"] = _one_size(flat["vision_cfg.image_size"])
    flat["quick_gelu"] = bool(flat["quick_gelu"])
    return {key: flat[key] for key in flat if key not in _UNREAD and flat[key] is not None}


def _plain(value: Any) -> Any:
    """`value` as JSON reads it back, with one form for equal numbers."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value


def _one_size(size: Any) -> Any:
    return size[0] if isinstance(size, list) and len(set(size)) == 1 else size


def _named(key: str) -> str:
    section, _, name = key.partition(".")
    if not name:
        return _WORDS.get(section, section)
    return f"{_WORDS.get(section, section)} {name}"


def _presence(config: object) -> str:
    return "none" if config is None else "a model"


def _shown(value: object) -> str:
    """Short for people: digests and long values are cut, floats keep what tells them apart."""
    if isinstance(value, list):
        return f"[{', '.join(_shown(item) for item in value)}]"
    if value is None:
        return "none"
    text = str(value)
    if len(text) == 64 and all(letter in "0123456789abcdef" for letter in text):
        return text[:12]
    return text if len(text) <= 80 else f"{text[:77]}..."
