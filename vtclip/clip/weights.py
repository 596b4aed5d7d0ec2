# SPDX-License-Identifier: Apache-2.0
"""Files of weights: what their tensors are called in open_clip, and what else they tell.

Read are safetensors, torch's checkpoints (weights_only: no object but tensors and plain values is
ever built), OpenAI's TorchScript archives (see archives.py) and state dicts in transformers' names
(see transformers_keys.py). A state dict may lie under "state_dict" or another usual key, and its
names may have a prefix of a wrapper.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import logging
import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vtclip.clip.archives import is_torchscript, read_torchscript
from vtclip.clip.names import say_once
from vtclip.clip.transformers_keys import is_transformers, to_open_clip
from vtclip.files import Json

logger = logging.getLogger(__name__)

METADATA = "vtclip"  # the key of safetensors' metadata under which `vtclip convert` writes
# what OpenAI's state dicts hold beside weights
OPENAI_KEYS = ("input_resolution", "context_length", "vocab_size")
_WRAPPERS = ("state_dict", "model_state_dict", "model", "module", "net", "ema", "params")
_PREFIXES = ("module.", "_orig_mod.", "model.", "clip_model.", "clip.")
# buffers that a model makes itself; a file may or may not hold them
_MADE = ("attn_mask", "position_ids")


@dataclasses.dataclass
class Weights:
    """The tensors of a file, under open_clip's names where they had transformers'.

    openai: whether the file has the extra entries of OpenAI's state dicts.
    facts: what `vtclip convert` wrote about them, else nothing.
    """

    path: Path
    tensors: dict[str, Tensor]
    openai: bool = False
    facts: Json = dataclasses.field(default_factory=dict)

    @functools.cached_property
    def sha256(self) -> str:
        """Of the file's bytes."""
        return sha256_of(self.path)


def sha256_of(path: Path) -> str:
    total = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            total.update(block)
    return total.hexdigest()


def read_weights(path: Path, *, rename: bool = True) -> Weights:
    """The weights in a file, or a ValueError with the reason in one line. Runs nothing of it.

    rename: transformers' names become open_clip's; not for a part of a model.
    """
    if path.stat().st_size == 0:
        raise ValueError("the file is empty (0 bytes)")
    facts: Json = {}
    numbers: dict[str, Any] = {}
    try:
        if path.suffix == ".safetensors":
            loaded, facts = _read_safetensors(path)
        elif is_torchscript(path):
            loaded, numbers = read_torchscript(path)
        else:
            loaded = _unwrapped(
                torch.load(
                    path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path)
                )
            )
    except Exception as error:
        reason = " ".join(str(error).split())[:240] or type(error).__name__
        if isinstance(error, pickle.UnpicklingError) or "weights_only" in reason:
            # torch's own message proposes to switch its check off
            reason = "not a file of tensors alone; other objects are never loaded"
        elif isinstance(error, LookupError | EOFError | TypeError | AttributeError):
            # a pickle's reader stumbles over any other file, and its message says nothing of that
            reason = "not a file of weights"
        raise ValueError(reason) from None
    tensors = _without_prefix({k: v for k, v in loaded.items() if isinstance(v, Tensor)})
    if not tensors:
        raise ValueError("it holds no tensors")
    for name, tensor in tensors.items():
        if tensor.layout != torch.strided or tensor.is_quantized:
            kind = "quantised" if tensor.is_quantized else f"of layout {tensor.layout}"
            raise ValueError(f"{name} must be a dense tensor, it is {kind}")
    entries = {*tensors, *loaded, *numbers}
    openai = any(key in entries for key in OPENAI_KEYS) or "openai" in facts
    for key in OPENAI_KEYS:
        tensors.pop(key, None)
    if rename and is_transformers(tensors):
        tensors = to_open_clip(tensors)
    return Weights(path, tensors, openai, facts)


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], Json]:
    from safetensors import safe_open
    from safetensors.torch import load_file

    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
    facts = json.loads(metadata.get(METADATA, "{}"))
    return load_file(path), facts if isinstance(facts, dict) else {}


def _unwrapped(loaded: object) -> dict[str, Any]:
    """The innermost state dict of a checkpoint of training."""
    for _ in range(len(_WRAPPERS)):
        if not isinstance(loaded, dict):
            break
        inner = [loaded[key] for key in _WRAPPERS if isinstance(loaded.get(key), dict)]
        if not inner:
            break
        loaded = inner[0]
    if not isinstance(loaded, dict):
        raise ValueError(f"it holds a {type(loaded).__name__}, not tensors with names")
    return {str(key): value for key, value in loaded.items()}


def _without_prefix(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Names without the prefix that a wrapper put before all of them."""
    while tensors:
        for prefix in _PREFIXES:
            if all(name.startswith(prefix) for name in tensors):
                tensors = {name.removeprefix(prefix): item for name, item in tensors.items()}
                break
        else:
            break
    return tensors


def load_into(model: nn.Module, weights: Weights) -> None:
    """Copy the weights into an open_clip model; ValueError, in one line, where they do not fit.

    Positional embeddings of another length are interpolated as open_clip does, which is said.
    """
    from open_clip.convert import convert_state_dict
    from open_clip.model import (
        convert_to_custom_text_state_dict,
        resize_pos_embed,
        resize_text_pos_embed,
    )

    state = convert_state_dict(model, dict(weights.tensors))
    wanted = model.state_dict()
    if "positional_embedding" in state and "positional_embedding" not in wanted:
        state = convert_to_custom_text_state_dict(state)
    for name in ("logit_scale", "logit_bias"):  # a number or a vector of one
        if name in state and name in wanted and state[name].numel() == 1:
            state[name] = state[name].reshape(wanted[name].shape)
    if "logit_bias" in wanted and "logit_bias" not in state:
        state["logit_bias"] = torch.zeros_like(wanted["logit_bias"])
    state = {
        name: value
        for name, value in state.items()
        if name in wanted or name.rpartition(".")[2] not in _MADE
    }
    before = {name: value.shape for name, value in state.items()}
    try:
        resize_pos_embed(state, model)
        resize_text_pos_embed(state, model)
    except Exception:  # of other widths: what does not fit is said below
        logger.debug("positional embeddings of %a cannot be interpolated", str(weights.path))
    for name, shape in before.items():
        if name in state and state[name].shape != shape:
            say_once(
                f"{weights.path}: {name} {list(shape)} is interpolated to "
                f"{list(state[name].shape)}, for the architecture's size"
            )
    problem = _misfit(state, wanted)
    if problem:
        raise ValueError(problem)
    model.load_state_dict(state)


def _misfit(state: dict[str, Tensor], wanted: dict[str, Tensor]) -> str:
    """What keeps `state` from being the weights `wanted`, or nothing."""
    missing, extra = [sorted(set(a) - set(b)) for a, b in ((wanted, state), (state, wanted))]
    if missing or extra:
        parts = [
            f"{word} {len(names)} ({', '.join(names[:2])}{', ...' if len(names) > 2 else ''})"
            for word, names in (("it lacks", missing), ("it has more:", extra))
            if names
        ]
        hint = ""
        if not any(
            name in state for name in ("token_embedding.weight", "text_projection")
        ) and not (any(name.startswith("text.") for name in state)):
            hint = "; it holds no text encoder"
        return f"of {len(wanted)} tensors {' and '.join(parts)}{hint}"
    for name, value in state.items():
        if value.shape != wanted[name].shape:
            return f"{name} must be {list(wanted[name].shape)}, got {list(value.shape)}"
    return ""
