# SPDX-License-Identifier: Apache-2.0
"""What `vtclip fit --method NAME --help` says of the method, and `--set NAME=VALUE`.

The options are those of the head's constructor with their defaults, their meaning is that of its
docstring: methods that other packages register are shown in the same way. Torch is imported for
that call alone.
"""

from __future__ import annotations

import argparse
import inspect
import json
import re
import sys
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from vtclip.cli.parsing import a_method, others_line
from vtclip.names import METHODS

FROM_THE_FIT = ("text", "logit_scale", "num_support", "spatial_dim", "members")  # it sets them
RECIPE = ("epochs", "lr", "optimizer", "weight_decay", "batch_size", "label_smoothing", "loss")
SHOTS, WIDTH = 16, 96
PREFIX = re.compile(r"([\w-]+): ")


def method_in(words: Sequence[str]) -> str | None:
    """The value of --method among the words of a command line, if there is one."""
    for word, after in zip(words, [*words[1:], ""], strict=True):
        name, has_value, value = word.partition("=")
        if name == "--method":
            return value if has_value else after or None
    return None


def of_another_method(action: argparse.Action, method: str | None) -> bool:
    """Whether an option belongs to one method, which its help begins with, and not to `method`."""
    found = PREFIX.match(action.help or "")
    owned = found is not None and found[1] in METHODS
    return method is not None and owned and found is not None and found[1] != method


def more_help(method: str | None) -> str:
    """The end of the help: of a named method its options, else how to see them."""
    if method is None:
        others = others_line()
        return "vtclip fit --method NAME --help lists the options of one method" + (
            f"\n{others}" if others else ""
        )
    try:
        return "\n".join(_about(a_method()(method)))
    except (argparse.ArgumentTypeError, ValueError, ImportError) as error:
        return f"--method: {error}"


def _about(method: str) -> list[str]:
    from vtclip.heads import HEADS

    head = HEADS[method]
    recipe = head.recipe(SHOTS)
    words = inspect.cleandoc(head.__doc__ or "")
    about = sys.modules[head.__module__].__doc__ if method in METHODS else words
    lines = [f"method {method}: {(about or '').partition(chr(10))[0]}", ""]
    if recipe.epochs:
        values = ", ".join(f"{name} {getattr(recipe, name)}" for name in RECIPE)
        lines += [f"its recipe for {SHOTS} images per class:", f"  {values}", ""]
    else:
        lines += ["no training by gradients: --epochs, --lr and the like do not apply", ""]
    options = settable(head)
    if method == "auto" or not options:
        return [*lines, f"no options of its own are set by --set with method {method}"]
    meanings = meanings_of(words)
    lines.append("its options, --set NAME=VALUE (in Python overrides={'head': {NAME: VALUE}}):")
    for name, default in {**options, **recipe.head}.items():
        shown = "chosen by the method" if default is None else json.dumps(default, default=str)
        lines.append(f"  {name}={shown}")
        lines += textwrap.wrap(
            meanings.get(name, ""), WIDTH, initial_indent="      ", subsequent_indent="      "
        )
    return lines


def settable(head: Any) -> dict[str, Any]:
    """The options of a head's constructor that a user may set, with their defaults."""
    parameters = inspect.signature(head).parameters.items()
    return {name: one.default for name, one in parameters if name not in FROM_THE_FIT}


def meanings_of(words: str) -> dict[str, str]:
    """From the name of an option to the paragraph of a docstring that begins "name: "."""
    found: dict[str, str] = {}
    names: list[str] = []
    for line in words.split("\n"):
        begins = re.match(r"([a-z_]\w*(?:(?:, | and )[a-z_]\w*)*): (.*)", line)
        if begins is not None:
            names = re.split(r", | and ", begins[1])
            found |= dict.fromkeys(names, begins[2])
        elif not line.strip():
            names = []
        else:
            for name in names:
                found[name] += f" {line.strip()}"
    return found


def setting(text: str) -> tuple[str, Any]:
    """NAME=VALUE as a name and a value: of JSON, or the text itself."""
    name, equals, value = text.partition("=")
    if not equals or not name.isidentifier():
        raise argparse.ArgumentTypeError(f"must be NAME=VALUE, got {text!r}")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


def check_settings(
    settings: Iterable[tuple[str, Any]], head: Mapping[str, Any], method: str | None
) -> dict[str, Any]:
    """The settings by name; a ValueError where one is given twice or the method has it not."""
    found: dict[str, Any] = {}
    for name, value in settings:
        if name in found or name in head:
            raise ValueError(f"--set: {name} is given twice")
        found[name] = value
    if not found:
        return found
    from vtclip.heads import HEADS
    from vtclip.names import nearest

    if method in (None, "auto"):
        raise ValueError("--set needs one method; name it by --method")
    known = settable(HEADS[str(method)])
    for name in found:
        if name not in known:
            hint = nearest(name, known)
            wish = f"; it has {', '.join(known)}" if known and not hint else hint
            raise ValueError(f"--set: method {method} has no option {name!r}{wish}")
    return found
