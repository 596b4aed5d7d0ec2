# SPDX-License-Identifier: Apache-2.0
"""What the values of a file must be: one table for each kind of file, from key to check.

    SHARD = table({"file": text, "bytes": whole(), "rows": whole(), "sha256?": maybe(text)})
    check(value, SHARD, "not a features folder: FOLDER/manifest.json")

A key that ends in "?" may be missing. A check takes a value and its name and raises a ValueError in
one line, `WHERE: shards[3].rows must be a whole number, got 'x'`; keys that no table names pass.
Python's bool is no number here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

Check = Callable[[Any, str], None]
LARGEST = 2**53  # the whole numbers up to it are exact in every reader of JSON


def check(value: object, wanted: Check, where: str) -> None:
    """ValueError that begins with `where`, unless `value` is what `wanted` asks for."""
    try:
        wanted(value, "")
    except RecursionError:
        raise ValueError(f"{where}: it is nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def _refuse(name: str, wish: str, value: object) -> None:
    raise ValueError(f"{name or 'the contents'} must be {wish}, got {shown(value)}")


def shown(value: object) -> str:
    """`value` on one short line, or its type where it holds others."""
    if isinstance(value, dict | list | tuple):
        return f"{type(value).__name__} of {len(value)}"
    if isinstance(value, int) and abs(value) > LARGEST:  # printing it takes quadratic time
        return "a huge number"
    line = ascii(value[:60] if isinstance(value, str | bytes) else value)
    return line if len(line) <= 60 else line[:57] + "..."


def text(value: object, name: str) -> None:
    if not isinstance(value, str):
        _refuse(name, "a text", value)


def yes_or_no(value: object, name: str) -> None:
    if not isinstance(value, bool):
        _refuse(name, "true or false", value)


def anything(value: object, name: str) -> None:
    """No check: nothing depends on it but what is printed."""


def whole(low: int = 0, high: int = LARGEST) -> Check:
    """A whole number low..high."""

    def wanted(value: object, name: str) -> None:
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            limit = "" if high == LARGEST else f" to {high}"
            _refuse(name, f"a whole number from {low}{limit}", value)

    return wanted


def number(low: float = -math.inf, high: float = math.inf, *, above: bool = False) -> Check:
    """A finite number low..high; with `above` it must be larger than `low`."""

    def wanted(value: object, name: str) -> None:
        right = isinstance(value, int | float) and not isinstance(value, bool)
        if right and isinstance(value, int | float):
            right = abs(value) <= 1.7e308 and low <= value <= high and not (above and value == low)
        if not right:
            limits = {"above" if above else "at least": low, "at most": high}
            limits = {word: limit for word, limit in limits.items() if math.isfinite(limit)}
            words = [f"{word} {limit:g}" for word, limit in limits.items()]
            _refuse(name, " ".join(["a finite number", " and ".join(words)]).strip(), value)

    return wanted


share = number(0, 1)


def one_of(*values: object) -> Check:
    def wanted(value: object, name: str) -> None:
        if not any(type(value) is type(known) and value == known for known in values):
            _refuse(name, f"one of {', '.join(map(ascii, values))}", value)

    return wanted


def either(*checks: Check) -> Check:
    """What any of the checks takes; the error is that of the first."""

    def wanted(value: object, name: str) -> None:
        errors = []
        for each in checks:
            try:
                return each(value, name)
            except ValueError as error:
                errors.append(error)
        raise errors[0]

    return wanted


def maybe(inner: Check) -> Check:
    """null, or what `inner` takes."""

    def wanted(value: object, name: str) -> None:
        if value is not None:
            inner(value, name)

    return wanted


def rows(inner: Check, *, least: int = 0) -> Check:
    """A list of at least `least` values."""

    def wanted(value: object, name: str) -> None:
        if not isinstance(value, list) or len(value) < least:
            _refuse(name, f"a list of at least {least}" if least else "a list", value)
        elif inner is not anything:
            for number_, item in enumerate(value):
                inner(item, f"{name}[{number_}]")

    return wanted


def tuple_of(*checks: Check) -> Check:
    """A list with one value for each check."""

    def wanted(value: object, name: str) -> None:
        if not isinstance(value, list) or len(value) != len(checks):
            _refuse(name, f"a list of {len(checks)}", value)
        else:
            for number_, (inner, item) in enumerate(zip(checks, value, strict=True)):
                inner(item, f"{name}[{number_}]")

    return wanted


def by_name(inner: Check) -> Check:
    """An object with any keys and values of one kind."""

    def wanted(value: object, name: str) -> None:
        if not isinstance(value, dict):
            _refuse(name, "an object", value)
        elif inner is not anything:
            for key, item in value.items():
                inner(item, f"{name}[{shown(key)}]")

    return wanted


obj = by_name(anything)


def table(keys: Mapping[str, Check]) -> Check:
    """An object with these keys; those that end in "?" may be missing."""

    def wanted(value: object, name: str) -> None:
        if not isinstance(value, dict):
            return _refuse(name, "an object", value)
        for key, inner in keys.items():
            plain = key.removesuffix("?")
            full = f"{name}.{plain}" if name else plain
            if plain in value:
                inner(value[plain], full)
            elif plain == key:
                raise ValueError(f"{full} is missing")
        return None

    return wanted
