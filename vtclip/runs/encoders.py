# SPDX-License-Identifier: Apache-2.0
"""Tuned encoders on disk: `encoders.safetensors` next to the adapter that was trained with them, or
`lora.safetensors`, which holds the low-rank change of their weights alone.

The adapter's config names the digest of the file and of the weights it holds, so that a missing,
cut, changed or foreign file is refused by name. Architecture, transform and tokenizer come from the
model that the run started from; its weights are replaced by the file's, or the file's are added.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import save as save_bytes
from torch import Tensor

from vtclip.clip.low_rank import LowRank, add_low_rank
from vtclip.files import Json, NewFiles, read_safetensors, tensors_digest
from vtclip.runs.adapter import (
    CONFIG,
    Adapter,
    add_adapter,
    check_same_model,
)

if TYPE_CHECKING:
    from vtclip.clip import Clip

ENCODERS, LORA = "encoders.safetensors", "lora.safetensors"
WHAT = "the tuned encoders of a vtclip run"


def with_weights(clip: Clip, state: dict[str, Tensor] | None = None) -> Clip:
    """`clip` with the weights `state` (by default as they now are), frozen, with a new digest."""
    from vtclip.clip import Clip

    if state is not None:
        clip.model.load_state_dict(state)
    return Clip(clip.model, clip.tokenizer, clip.config, name=clip.name, device=clip.device)


def with_low_rank(clip: Clip, change: LowRank) -> Clip:
    """`clip` with the change added to its weights, in place, and kept for a save."""
    add_low_rank(clip, change)
    changed = with_weights(clip)
    changed.low_rank = change
    return changed


def tuned_features(clip: Clip, digest: str, base_weights: str) -> Json:
    """What an adapter says of tuned encoders that were saved under `digest`."""
    said: Json = {"file": ENCODERS, "digest": digest, "base_weights": base_weights}
    if clip.low_rank is not None:
        said |= {"file": LORA, "scale": clip.low_rank.scale}
    return said


def load_encoders(
    folder: str | Path, adapter: Adapter, model: str | Path | None, device: torch.device
) -> Clip:
    """The image encoder of an adapter: the model it names, with the tuned weights where it has any.

    `model` names another place of the same model (see vtclip.clip). One that differs in weights,
    architecture, preprocessing or tokenizer is a ValueError that names the field.
    """
    tuned = adapter.features.get("encoders")
    if tuned is None:
        return load_base(adapter.features, model, device)
    state = _read(Path(folder).expanduser(), tuned)
    clip = load_base(adapter.features, model, device)
    if tuned["file"] == LORA:
        return with_low_rank(clip, LowRank(state, tuned["scale"]))
    wanted = clip.model.state_dict()
    differ = sorted(set(wanted) ^ set(state))
    differ += [key for key in wanted if key in state and wanted[key].shape != state[key].shape]
    if differ:
        raise ValueError(f"{Path(folder) / ENCODERS} does not fit {clip.name!r}: {differ[0]}")
    return with_weights(clip, state)


def load_base(features: Json, model: str | Path | None, device: torch.device) -> Clip:
    """The checked model that an adapter of these features started from, before any tuning."""
    from vtclip.clip import ClipNotFound, load_clip

    tuned = features.get("encoders")
    if tuned is not None:
        features = {**features, "weights_digest": tuned["base_weights"]}
    place = features.get("model") if model is None else model
    if place is None:
        raise ValueError("the run names no model of its features; name one with --model")
    try:
        clip = load_clip(place, device)
    except ClipNotFound as error:
        if model is not None:
            raise
        raise ClipNotFound(
            f"{error}. The run was fitted with this model; name its present place with --model"
        ) from None
    other = "the one at that place" if model is None else "--model"
    began = "of the run" if tuned is None else "that the run started from"
    what = f"model {clip.name!r} is not the model {began}"
    check_same_model(features, clip.weights_digest, clip.config, what, other)
    return clip


def _read(folder: Path, tuned: Json) -> dict[str, Tensor]:
    path, digest = folder / tuned["file"], tuned["digest"]
    tensors, metadata = read_safetensors(path, WHAT)
    saved = metadata["digest"]
    if saved != digest:
        raise ValueError(
            f"not {WHAT}: {path} has digest {saved[:12]}, {CONFIG} wants {digest[:12]}"
        )
    return tensors


def add_encoders(new: NewFiles, clip: Clip) -> str:
    """The weights of `clip` among other files of a run, in place of those of the run before.

    Returns their digest, which the adapter of the run names (`tuned_features`).
    """
    name = ENCODERS if clip.low_rank is None else LORA
    weights = clip.model.state_dict() if clip.low_rank is None else clip.low_rank.factors
    state = {key: value.detach().cpu().clone().contiguous() for key, value in weights.items()}
    digest = tensors_digest(state)
    new.write(name, save_bytes(state, {"digest": digest}))
    new.remove(*({ENCODERS, LORA} - {name}))
    return digest


def add_with_encoders(new: NewFiles, adapter: Adapter, clip: Callable[[], Clip]) -> str:
    """`add_adapter`, with the weights of `clip` where the adapter belongs to tuned encoders."""
    if adapter.features.get("encoders") is not None:
        add_encoders(new, clip())
    return add_adapter(new, adapter)


def save_with_encoders(folder: Path, adapter: Adapter, clip: Callable[[], Clip]) -> str:
    """`save_adapter`, with the weights of `clip` where the adapter belongs to tuned encoders."""
    with NewFiles(folder) as new:
        digest = add_with_encoders(new, adapter, clip)
        new.commit()
    return digest
