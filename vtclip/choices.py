# SPDX-License-Identifier: Apache-2.0
"""Unknown names are answered with the nearest known one."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence


def nearest(name: str, known: Iterable[str]) -> str:
    """ "; did you mean X?" or, where nothing is near, the first few choices."""
    choices = list(known)
    near = difflib.get_close_matches(name, choices, n=1, cutoff=0.5)
    if near:
        return f"; did you mean {near[0]!r}?"
    shown = ", ".join(choices[:8])
    return f"; choices: {shown}" + (", ..." if len(choices) > 8 else "")


def pick(what: str, name: str, known: Iterable[str]) -> str:
    """`name`, or a ValueError if it is none of `known`."""
    choices = list(known)
    if name not in choices:
        raise ValueError(f"unknown {what} {name!r}{nearest(name, choices)}")
    return name


def index_of(name: str, class_names: Sequence[str]) -> int:
    return list(class_names).index(pick("class", name, class_names))
