# SPDX-License-Identifier: Apache-2.0
"""Settings of a model folder that would run code of the folder's, or of a repository's.

open_clip passes parts of open_clip_config.json on to transformers, whose loaders import Python
files of a folder or repository where they are told to trust it; timm fetches whatever a name with a
place in it points to. None of that is wanted for weights and a tokenizer, so it is refused,
whichever way the config came: a folder, the hub's cache, a file's own metadata.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from vtclip.files import Json, parse_json

# what tells transformers to run a folder's Python, under any of its names
CODE_KEYS = frozenset(
    ("trust_remote_code", "auto_map", "custom_pipelines", "code_revision", "custom_generate")
)
# the only settings that open_clip's own tokenizers take
_TOKENIZER_KEYS = (
    *("clean", "strip_sep_token", "language", "additional_special_tokens", "reduction_mask"),
)
CONFIG_FILES = (
    *("config.json", "tokenizer_config.json", "preprocessor_config.json", "processor_config.json"),
    "generation_config.json",
)


def check_no_code(config: object, place: str | Path) -> None:
    """ValueError, in one line, that names the setting of `config` by which code would run."""
    for path, key, value in _entries(config):
        if key in CODE_KEYS and value not in (None, False, {}, []):
            raise ValueError(
                f"{place}: {path} asks to run code that comes with the model, which is never done"
            )
    if not isinstance(config, dict):
        return
    cfg = config.get("model_cfg", config)
    cfg = cfg if isinstance(cfg, dict) else {}
    text, vision = (_part(cfg, name, place) for name in ("text_cfg", "vision_cfg"))
    kwargs = text.get("tokenizer_kwargs") or {}
    if not isinstance(kwargs, dict):
        raise ValueError(f"{place}: text_cfg.tokenizer_kwargs must be an object")
    for key in kwargs:
        if key not in _TOKENIZER_KEYS:
            raise ValueError(
                f"{place}: text_cfg.tokenizer_kwargs.{key} is passed on to other libraries and may "
                f"run code; allowed are {', '.join(_TOKENIZER_KEYS)}"
            )
    for name in ("hf_model_name", "hf_tokenizer_name"):
        _check_repository(text.get(name), f"text_cfg.{name}", place)
    timm = vision.get("timm_model_name")
    if timm is not None and not (isinstance(timm, str) and re.fullmatch(r"[\w.\-]+", timm)):
        raise ValueError(
            f"{place}: vision_cfg.timm_model_name must be the name of one of timm's models, got "
            f"{ascii(timm)[:80]}"
        )


def check_folder(folder: Path) -> None:
    """The same for transformers' own files in `folder`, which its loaders read by themselves."""
    for name in CONFIG_FILES:
        path = folder / name
        if not path.is_file():
            continue
        try:
            config = parse_json(path.read_bytes())
        except ValueError:
            continue  # who reads it says so
        for where, key, value in _entries(config):
            if key in CODE_KEYS and value not in (None, False, {}, []):
                raise ValueError(
                    f"{path}: {where} asks to run code that comes with the model, which is never "
                    "done"
                )


def _check_repository(value: object, key: str, place: str | Path) -> None:
    """A repository of the hub, by its name: a path would name a folder with code of its own."""
    if value in (None, ""):
        return
    if not isinstance(value, str) or not re.fullmatch(r"[\w\-][\w.\-]*(/[\w\-][\w.\-]*)?", value):
        raise ValueError(
            f"{place}: {key} must be the name of a repository, as bert-base-uncased or "
            f"google/siglip, got {ascii(value)[:80]}"
        )
    if Path(value).exists():  # transformers would take the folder, not the repository
        raise ValueError(
            f"{place}: {key} {value!r} is a folder here, which may hold code of its own; start in "
            "another working directory"
        )


def _part(cfg: Json, name: str, place: str | Path) -> Json:
    part = cfg.get(name) or {}
    if not isinstance(part, dict):
        raise ValueError(f"{place}: {name} must be an object, got {type(part).__name__}")
    return part


def _entries(value: object, path: str = "") -> Iterator[tuple[str, str, object]]:
    """Every key of an object within others: its path, itself and its value."""
    if isinstance(value, dict):
        for key, item in value.items():
            here = f"{path}.{key}" if path else str(key)
            yield here, str(key), item
            yield from _entries(item, here)
    elif isinstance(value, list):
        for item in value:
            yield from _entries(item, path)
