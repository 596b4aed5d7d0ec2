# SPDX-License-Identifier: Apache-2.0
"""A file of weights as safetensors that says what it is: architecture, activation, preprocessing.

The new file's metadata holds, as JSON under "vtclip": format_version, architecture (a known name or
""), model_cfg with the activation, preprocess_cfg, source (the name of the file it was made of),
source_sha256, and "openai" where the source had the extra entries of OpenAI's state dicts. A
tokenizer is not part of it: CLIP's own is known, another one is looked for beside the file.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch
from torch import Tensor

from vtclip.clip.architecture import build_clip
from vtclip.clip.hub import ClipNotFound
from vtclip.clip.loading import config_of_file
from vtclip.clip.names import resolve_architecture
from vtclip.clip.transformers_folders import is_transformers_folder, read_model
from vtclip.clip.weights import METADATA, Weights, load_into, read_weights
from vtclip.files import Json, replacing


def convert_file(
    source: str | Path,
    out: str | Path | None = None,
    *,
    model: str | None = None,
    overwrite: bool = False,
) -> tuple[Path, Json]:
    """Write the weights of `source` as safetensors; returns the new file and its facts.

    source: OpenAI's TorchScript archive (its program never runs), a state dict or a checkpoint of
        training (.pt, .pth, .bin; tensors and plain values only), safetensors, or a folder of
        transformers' CLIPModel or SiglipModel.
    out: a .safetensors file, by default `source` with that suffix; it must not exist, or
        overwrite. It is written in one step.
    model: ARCHITECTURE or ARCHITECTURE:TAG, where shapes and contents do not tell enough.

    Values, dtypes and, but for transformers', names stay as they are. ValueError or ClipNotFound,
    in one line, before anything is written.
    """
    path = Path(source).expanduser()
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist")
    target = _target(path, out, overwrite)
    arch, tag = resolve_architecture(model) if model else ("", "")
    if path.is_dir():
        if model:
            raise ValueError(
                f"--model {model} is for a file; {path} is a folder with its own config"
            )
        if not is_transformers_folder(path):
            raise ValueError(
                f"source: {path} must be a file, or a folder with config.json of transformers"
            )
        config, weights = read_model(path)
    else:
        weights = _read(path)
        try:
            arch, config = config_of_file(weights, arch, tag)
        except ValueError as error:
            raise ClipNotFound(f"{path}: {error}") from None
    _check(config, weights)
    facts: Json = {
        "format_version": 1,
        "architecture": arch,
        "model_cfg": config["model_cfg"],
        "preprocess_cfg": {
            key: value
            for key, value in (config.get("preprocess_cfg") or {}).items()
            if key in ("mean", "std", "interpolation", "resize_mode", "fill_color")
        },
        "source": path.resolve().name,
        "source_sha256": weights.sha256,
    }
    if weights.openai:
        facts["openai"] = True
    _write(target, weights, facts)
    return target, facts


def _target(path: Path, out: str | Path | None, overwrite: bool) -> Path:
    if out is not None:
        target = Path(out).expanduser()
    elif path.is_dir():
        target = path / ".." / f"{path.resolve().name}.safetensors"
        target = Path(os.path.normpath(target))
    else:
        target = path.with_suffix(".safetensors")
    if target.suffix != ".safetensors":
        raise ValueError(f"--out {target} must end in .safetensors")
    if target.exists() and path.exists() and os.path.samefile(target, path):
        raise ValueError(f"--out: {target} is the file itself; name another one by --out")
    if target.is_dir():
        raise ValueError(f"--out {target} is a folder")
    if target.exists() and not overwrite:
        raise FileExistsError(f"--out: {target} exists already; add --overwrite to replace it")
    if not target.parent.is_dir():
        raise FileNotFoundError(f"--out: no folder {target.parent}")
    return target


def _read(path: Path) -> Weights:
    try:
        return read_weights(path)
    except ValueError as error:
        raise ClipNotFound(f"{path} holds no weights that can be read: {error}") from None


def _check(config: Json, weights: Weights) -> None:
    """Refuse weights that do not fit the architecture, or that are not numbers."""
    with torch.random.fork_rng(devices=[]):
        model = build_clip(config)
    try:
        load_into(model, weights)
    except ValueError as error:
        raise ClipNotFound(f"{weights.path} does not fit its architecture: {error}") from None
    for name, value in weights.tensors.items():
        if value.is_floating_point() and not value.isfinite().all():
            raise ClipNotFound(f"{weights.path} holds non-finite weights, e.g. {name}")


def _write(target: Path, weights: Weights, facts: Json) -> None:
    from safetensors.torch import save_file

    tensors: dict[str, Tensor] = {}
    places: set[int] = set()
    for name, value in weights.tensors.items():  # safetensors refuses two names for one place
        whole = value.contiguous()
        place = whole.untyped_storage().data_ptr()
        tensors[name] = whole.clone() if place in places else whole
        places.add(place)
    try:
        with replacing(target) as fresh:
            mode = fresh.stat().st_mode
            save_file(tensors, fresh, metadata={"format": "pt", METADATA: json.dumps(facts)})
            fresh.chmod(mode)  # the library's own is for the owner alone
    except Exception as error:
        reason = " ".join(str(error).split())[:160]
        raise OSError(f"cannot write {target}: {reason}") from error
