# SPDX-License-Identifier: Apache-2.0
"""Class texts: templates, the prompts that a context cuts, unit rows and their mean."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from torch import Tensor

DEFAULT_TEMPLATE = "a photo of a {}."


class Tokenizer(Protocol):
    """Texts to token ids [n, context_length]."""

    context_length: int

    def __call__(self, texts: str | list[str], context_length: int | None = None) -> Tensor: ...


def resolve_templates(templates: str | Sequence[str] | None) -> list[str]:
    """Templates from None, one template, "imagenet7", "imagenet80", a .txt file or their list."""
    if templates is None:
        return [DEFAULT_TEMPLATE]
    if isinstance(templates, str):
        return _named_templates(templates)
    lines = [line for item in templates for line in _named_templates(item)]
    if not lines:
        raise ValueError("templates: at least one template is needed, got an empty list")
    return lines


def _named_templates(name: str) -> list[str]:
    if not isinstance(name, str):
        raise TypeError(f"templates: each template must be a str, got {type(name).__name__}")
    if name in ("imagenet7", "imagenet80"):
        import open_clip

        known = (
            open_clip.SIMPLE_IMAGENET_TEMPLATES
            if name == "imagenet7"
            else open_clip.OPENAI_IMAGENET_TEMPLATES
        )
        return [template("{}") for template in known]
    if name.endswith(".txt") and "{}" not in name:
        path = Path(name)
        if not path.is_file():
            raise ValueError(f"templates: no such file: {name}")
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
        return [_checked_template(line) for line in lines if line]
    return [_checked_template(name)]


def _checked_template(template: str) -> str:
    if template.count("{}") != 1:
        raise ValueError(
            f"templates: {template!r} must hold exactly one '{{}}', got {template.count('{}')}"
        )
    return template


def mean_text(views: Tensor, names: Sequence[str]) -> Tensor:
    """The normalised mean [K, C] over the templates of views [K, M, C]."""
    total = torch.zeros_like(views[:, 0])
    for number in range(views.shape[1]):  # added in order, so that cached texts keep their bits
        total += views[:, number]
    return unit_text(total, names)


def unit_text(rows: Tensor, names: Sequence[str]) -> Tensor:
    """Rows [K, C] divided by their norms; an error names the class of a row without direction."""
    norm = rows.norm(dim=-1)
    for index, value in enumerate(norm.tolist()):
        if not (math.isfinite(value) and value > 0):
            raise ValueError(
                f"encode_text: the text feature of class {names[index]!r} has norm {value}"
            )
    unit: Tensor = rows / norm[:, None]
    return unit


def cut_prompts(tokenizer: Tokenizer, prompts: list[str]) -> list[str]:
    """Prompts that do not fit into the context, by tokenising into twice its length."""
    context = tokenizer.context_length
    vocab = getattr(tokenizer, "vocab", None)
    try:
        if isinstance(vocab, dict):
            wide: Tokenizer = cast("Any", type(tokenizer))(vocab, 2 * context)
            long = wide([*prompts, ""])
        else:
            long = tokenizer([*prompts, ""], context_length=2 * context)
    except TypeError:  # a tokenizer of fixed length cannot tell
        return []
    pad = long[-1, -1]
    cut = (long[:-1, context:] != pad).any(dim=1).tolist()
    return [prompt for prompt, is_cut in zip(prompts, cut, strict=True) if is_cut]
