# SPDX-License-Identifier: Apache-2.0
"""Class texts: templates, sentences per class, prompts that a context cuts, unit rows."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from vtclip.files import printable
from vtclip.names import name_key, nearest, option

DEFAULT_TEMPLATE = "a photo of a {}."


class Tokenizer(Protocol):
    """Texts to token ids [n, context_length]."""

    context_length: int

    def __call__(self, texts: str | list[str], context_length: int | None = None) -> Tensor: ...


def resolve_templates(templates: str | Sequence[Any] | Mapping[str, Any] | None) -> list[Any]:
    """Templates for all classes, or the sentences of each class as the one item of a list.

    templates: None, one template, "imagenet7", "imagenet80", a .txt file (a template a line), a
        .json file (a list of templates, or an object of class name to sentences), such an object,
        or a list of all but the last two; an object stands alone, also in a list.
    Returned is a list of templates with one {} each, or [{class name: its sentences}].
    """
    if templates is None:
        return [DEFAULT_TEMPLATE]
    if isinstance(templates, (str, Mapping)):
        return _named_templates(templates)
    lines = [line for item in templates for line in _named_templates(item)]
    if not lines:
        raise ValueError(
            f"{option('templates')}: at least one template is needed, got an empty list"
        )
    if len(lines) > 1 and any(map(is_per_class, lines)):
        raise ValueError(f"{option('templates')}: sentences per class exclude other templates")
    return lines


def is_per_class(line: object) -> bool:
    """Whether an item of resolved templates holds the sentences of each class."""
    return isinstance(line, dict)


def templates_of(lines: Sequence[Any], class_names: Sequence[str]) -> list[Any]:
    """Resolved templates as these classes need them: of sentences per class, theirs alone.

    A class without sentences is an error; sentences of other classes are left out.
    """
    if not is_per_class(lines[0]):
        return list(lines)
    by_key = {name_key(name): sentences for name, sentences in lines[0].items()}
    absent = [name for name in class_names if name_key(name) not in by_key]
    if absent:
        shown = ", ".join(map(printable, absent[:5])) + (", ..." if len(absent) > 5 else "")
        raise ValueError(
            f"{option('templates')}: {len(absent)} of {len(class_names)} classes have no "
            f"sentences: {shown}{nearest(absent[0], lines[0])}"
        )
    return [{name: by_key[name_key(name)] for name in class_names}]


def prompts_of(lines: Sequence[Any], class_names: Sequence[str]) -> list[list[str]]:
    """The texts of each class, M for each where all are filled into the same M templates."""
    words = [name.replace("_", " ") for name in class_names]
    # replace, not format: a class name may hold braces or %
    if is_per_class(lines[0]):
        (sentences,) = templates_of(lines, class_names)
        return [
            [text.replace("{}", word) for text in sentences[name]]
            for name, word in zip(class_names, words, strict=True)
        ]
    return [[line.replace("{}", word) for line in lines] for word in words]


def read_templates(templates: str | Sequence[Any] | None) -> list[Any] | None:
    """`templates` with what files hold in place of their names, so that no run depends on them."""
    if templates is None:
        return None
    items = [templates] if isinstance(templates, (str, Mapping)) else list(templates)
    read = [
        _named_templates(item) if isinstance(item, Mapping) or _is_file_name(item) else [item]
        for item in items
    ]
    return [line for lines in read for line in lines]


def by_class_name(lines: list[Any] | None, class_names: Mapping[str, str] | None) -> Any:
    """Sentences that a file gives to ids, given to the names that stand for the ids."""
    if lines is None or class_names is None or not lines or not is_per_class(lines[0]):
        return lines
    sentences = dict(lines[0])
    known = {name_key(name) for name in sentences}
    for id_, name in class_names.items():
        if id_ in sentences and name_key(name) not in known:
            sentences[name] = sentences.pop(id_)
    return [sentences]


def _is_file_name(name: object) -> bool:
    return isinstance(name, str) and name.endswith((".txt", ".json")) and "{}" not in name


def _named_templates(name: Any) -> list[Any]:
    if isinstance(name, Mapping):
        return [_sentences(name.items(), option("templates"))]
    if not isinstance(name, str):
        raise TypeError(
            f"{option('templates')}: each template must be a str, got {type(name).__name__}"
        )
    if name in ("imagenet7", "imagenet80"):
        import open_clip

        known = (
            open_clip.SIMPLE_IMAGENET_TEMPLATES
            if name == "imagenet7"
            else open_clip.OPENAI_IMAGENET_TEMPLATES
        )
        return [template("{}") for template in known]
    if _is_file_name(name):
        return _templates_in(Path(name).expanduser())
    return [_checked_template(name)]


def _templates_in(path: Path) -> list[Any]:
    what = option("templates")
    if not path.is_file():
        raise ValueError(f"{what}: no such file: {printable(str(path))}")
    where = f"{what}: {printable(str(path))}"
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{where} is not UTF-8 text ({error.reason})") from None
    if path.suffix == ".txt":
        lines = [line.strip() for line in text.splitlines()]
        return [_checked_template(line) for line in lines if line]
    try:
        value = json.loads(text, object_pairs_hook=_Pairs)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is not valid JSON ({error})") from None
    if isinstance(value, _Pairs) and value:
        return [_sentences(value, where)]
    if isinstance(value, _Pairs) or not isinstance(value, list) or not value:
        raise ValueError(
            f"{where} must hold an object of class name to sentences, or a list of templates"
        )
    for line in value:
        if not isinstance(line, str):
            raise ValueError(f"{where}: each template must be a string, got {line!r}")
    return [_checked_template(line) for line in value]


class _Pairs(list[Any]):
    """A JSON object as its pairs: a dict would drop a name that comes twice."""


def _sentences(pairs: Iterable[tuple[Any, Any]], where: str) -> dict[str, list[str]]:
    """Sentences by class name, each class with at least one; a sentence may hold {}."""
    sentences: dict[str, list[str]] = {}
    keys: dict[str, str] = {}
    for name, texts in pairs:
        if not isinstance(name, str) or not name_key(name):
            raise ValueError(f"{where}: a class name must be a word, got {name!r}")
        if keys.setdefault(name_key(name), name) != name or name in sentences:
            raise ValueError(f"{where}: class {name!r} comes twice")
        texts = [texts] if isinstance(texts, str) else texts
        if not isinstance(texts, (list, tuple)) or isinstance(texts, _Pairs):
            kind = type(texts).__name__
            raise ValueError(f"{where}: the sentences of {name!r} must be a list, got a {kind}")
        if not texts or not all(isinstance(text, str) and text.strip() for text in texts):
            raise ValueError(f"{where}: class {name!r} must have sentences, and no empty one")
        sentences[name] = [text.strip() for text in texts]
    if not sentences:
        raise ValueError(f"{where}: at least one class must have sentences, got none")
    return sentences


def _checked_template(template: str) -> str:
    if template.count("{}") != 1:
        raise ValueError(
            f"{option('templates')}: {template!r} must hold exactly one '{{}}', got "
            f"{template.count('{}')}"
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


def say_cut(logger: logging.Logger, cut: Mapping[str, int], prompts: int, context: int) -> None:
    """A warning of the classes whose prompts did not fit, by name; `cut` has how many of each."""
    shown = ", ".join(repr(printable(name)) for name in list(cut)[:5])
    logger.warning(
        "%d of %d prompts are longer than the context of %d tokens and were cut, of %d class%s: "
        "%s%s", sum(cut.values()), prompts, context, len(cut), "" if len(cut) == 1 else "es", shown,
        ", ..." if len(cut) > 5 else "",
    )  # fmt: skip


def which_are_cut(tokenizer: Tokenizer, prompts: list[str]) -> list[bool]:
    """Whether each prompt does not fit into the context, by tokenising into twice its length."""
    context = tokenizer.context_length
    vocab = getattr(tokenizer, "vocab", None)
    try:
        if isinstance(vocab, dict):
            wide: Tokenizer = cast("Any", type(tokenizer))(vocab, 2 * context)
            long = wide([*prompts, ""])
        else:
            long = tokenizer([*prompts, ""], context_length=2 * context)
    except TypeError:  # a tokenizer of fixed length cannot tell
        return [False] * len(prompts)
    pad = long[-1, -1]
    cut: list[bool] = (long[:-1, context:] != pad).any(dim=1).tolist()
    return cut
