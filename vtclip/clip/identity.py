# SPDX-License-Identifier: Apache-2.0
"""Whether two models give the same features, and names of models that hold wherever one works.

A model is its weights and its `Clip.config`: architecture (activation included), preprocessing and
tokenizer. Equal weights under another of these give other features.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path

from vtclip.files import Json

PARTS = {"model_cfg": "model", "preprocess_cfg": "preprocess", "tokenizer": "tokenizer"}
FOLDER = "local-dir:"


def differences(a_config: Json, b_config: Json) -> list[str]:
    """What differs between two `Clip.config`s: "preprocess mean: [0.48, ...], not [0, 0, 0]".

    A field that one of them lacks counts as false, 0 or empty there: configurations of the same
    model name those or leave them out.
    """
    found = []
    for part, title in PARTS.items():
        if part not in a_config or part not in b_config:
            continue
        a, b = (dict(_flat(config[part], title)) for config in (a_config, b_config))
        for name in {**a, **b}:
            one, other = a.get(name), b.get(name)
            if one != other and (one or other):
                found.append(f"{name}: {_brief(one)}, not {_brief(other)}")
    return found


def _flat(value: object, name: str) -> Iterator[tuple[str, object]]:
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _flat(item, f"{name} {key}")
    else:
        yield name, list(value) if isinstance(value, tuple) else value


def _brief(value: object) -> str:
    text = "nothing" if value is None else str(value)
    return text if len(text) <= 48 else f"{text[:45]}..."


def absolute_name(model: str | Path) -> str:
    """The name of a model (see vtclip.clip) with the path in it, if there is one, made absolute."""
    name = str(model)
    if name.startswith(FOLDER):
        return FOLDER + _absolute(name.removeprefix(FOLDER))
    if name == "demo" or name.startswith("hf-hub:"):
        return name
    if Path(name).expanduser().exists():
        return _absolute(name)
    arch, colon, rest = name.partition(":")
    if colon and ("/" in rest or os.sep in rest or Path(rest).expanduser().is_file()):
        return f"{arch}:{_absolute(rest)}"
    return name


def _absolute(path: str) -> str:
    return os.path.abspath(Path(path).expanduser())
