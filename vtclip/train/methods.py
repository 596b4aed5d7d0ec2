# SPDX-License-Identifier: Apache-2.0
"""From the name of a method to its settings and its head over a table of features."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from vtclip.clip import Clip, load_clip
from vtclip.data.records import Records
from vtclip.files import Json
from vtclip.heads import HEADS, Head
from vtclip.heads.config import FitConfig
from vtclip.names import option, pick

VOTES = "votes_per_class"  # the option of heads whose images vote


def recipe_config(method: str, shots: int, overrides: Mapping[str, object] | None) -> FitConfig:
    """The recipe's settings with `overrides` in place of some; `head` adds to the recipe's.

    Epochs that are asked for are trained, all of them. A head without a penalty takes no
    penalty_weight; where its kind is "none" the weight is 0.
    """
    config = HEADS[method].recipe(shots)
    changes: Json = {name: value for name, value in (overrides or {}).items() if value is not None}
    options = dict(changes.pop("head", None) or {})
    if method == "auto" and (changes or options):
        raise ValueError(
            "method auto fits several methods, each with its own settings; to set "
            f"{_typed([*changes, *options])}, name one by {option('method')}"
        )
    if changes and not config.epochs:
        raise ValueError(f"method {method} has no training, so {_typed(changes)} cannot be set")
    if options and not config.epochs and not HEADS[method].learns:
        raise ValueError(f"method {method} has no training, so {_typed(options)} cannot be set")
    takes = inspect.signature(HEADS[method]).parameters
    for name in options:
        if name == "text" or name not in takes:
            raise ValueError(f"method {method} has no option {option(name)}")
    for name in changes:
        pick("override", name, [field.name for field in dataclasses.fields(FitConfig)])
    weight = changes.get("penalty_weight")
    if weight and not HEADS[method].has_penalty:
        weight_name = option("penalty_weight")
        raise ValueError(f"method {method} has no penalty, so {weight_name} cannot be set")
    if {**config.head, **options}.get("penalty") == "none":
        if weight:
            wish = f"{option('penalty_weight')} must be 0 where {option('penalty')} is none"
            raise ValueError(f"{wish}, got {weight:g}")
        changes["penalty_weight"] = 0.0
    changes["head"] = {**config.head, **options}
    if "epochs" in changes:
        changes.setdefault("enough_pairs", 0)
    if changes.get("epochs", 1) < 1:
        raise ValueError(f"{option('epochs')} must be at least 1, got {changes['epochs']}")
    return dataclasses.replace(config, **changes)


def _typed(names: Iterable[str]) -> str:
    return ", ".join(map(option, names))


def build_head(method: str, records: Records, config: FitConfig, device: torch.device) -> Head:
    """The head of `method` over the records' class texts, with the recipe's options."""
    options: Json = {"logit_scale": records.logit_scale, **config.head}
    if HEADS[method].needs_spatial:
        options.setdefault("spatial_dim", records.spatial_width)
    head = HEADS[method](records.text, **options).to(device)
    head.set_text_views(records.text_views)
    return head


def balanced_votes(method: str, config: FitConfig, label: Tensor) -> FitConfig:
    """The settings of a fit to images with these labels [N] in which classes count alike.

    A head whose images vote gets the mean number of images per class for its `votes_per_class`,
    unless the settings have one.
    """
    if VOTES not in inspect.signature(HEADS[method]).parameters or VOTES in config.head:
        return config
    classes = len(set(label.tolist()))
    if not classes:
        return config
    return dataclasses.replace(config, head={**config.head, VOTES: len(label) / classes})


def fits_images(method: str) -> bool:
    """Whether a head of the method depends on training images, not on validation alone."""
    kind = HEADS[method]
    fitted = method == "auto" or kind.takes_support or kind.recipe(1).epochs > 0
    return kind.learns and fitted


def zero_shot_head(records: Records, device: torch.device) -> Head:
    return build_head("zeroshot", records, FitConfig(epochs=0), device)


def text_encoder(records: Records, device: torch.device) -> Clip:
    """The model that made the class texts of `records`, by name and by digest of its weights."""
    clip = load_clip(records.info["model_name"], device)
    wanted = records.info.get("digests", {}).get("weights")
    if clip.weights_digest != wanted:
        raise ValueError(
            f"model {clip.name!r} has weights {clip.weights_digest[:12]}, the features were made "
            f"by {str(wanted)[:12]}"
        )
    return clip


def check_text_encoder(method: str, records: Records) -> None:
    """Refuse features without a model for a method that trains through its text encoder."""
    if not HEADS[method].needs_text_encoder:
        return
    if not (records.info.get("model") and records.info.get("model_name")):
        kind = records.info.get("kind")
        what = "an .npz table" if kind == "npz" else "a table of features"
        raise ValueError(
            f"method {method} needs the text encoder, which {what} does not have; give a folder "
            "of images, a data set or a features folder"
        )
