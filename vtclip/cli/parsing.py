# SPDX-License-Identifier: Apache-2.0
"""What every command shares: one-line errors, checked values, output. No torch."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from vtclip.names import nearest


class Parser(argparse.ArgumentParser):
    """argparse with one-line errors, no abbreviations, and the nearest choice for a wrong name."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(allow_abbrev=False, **kwargs)

    def error(self, message: str) -> NoReturn:
        fail(f"{self.prog}: {message}")

    def parse(self, argv: Sequence[str]) -> argparse.Namespace:
        args, extra = self.parse_known_args(argv)
        if extra:
            known: list[str] = getattr(args, "options", [])
            hint = nearest(extra[0], known) if extra[0].startswith("-") else ""
            self.error(f"unknown argument {extra[0]!r}{hint}")
        return args


class Once(argparse.Action):
    """Stores a value, and refuses to be given twice."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option: Any = None,
    ) -> None:
        seen = vars(namespace).setdefault("seen", set())
        if self.dest in seen:
            parser.error(f"{option} is given twice")
        seen.add(self.dest)
        setattr(namespace, self.dest, values)


def fail(message: str, status: int = 2) -> NoReturn:
    line = " ".join(message.replace("\n", "\\n").split(" "))
    sys.stderr.write(f"{line}\n")
    raise SystemExit(status)


def one_of(*choices: str) -> Callable[[str], str]:
    def check(value: str) -> str:
        if value not in choices:
            raise argparse.ArgumentTypeError(f"unknown name {value!r}{nearest(value, choices)}")
        return value

    return check


def some_of(*choices: str) -> Callable[[str], list[str]]:
    """A list of names, with commas between, each at most once."""
    known = one_of(*choices)

    def check(value: str) -> list[str]:
        names = [known(name) for name in value.split(",")]
        if len(set(names)) < len(names):
            raise argparse.ArgumentTypeError(f"names must differ, got {value!r}")
        return names

    return check


def number(kind: type, low: float, high: float, above: bool = False) -> Callable[[str], Any]:
    """A number in low..high; `above`: strictly above low."""

    def check(value: str) -> Any:
        try:
            parsed = kind(value)
        except ValueError:
            word = "an integer" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"{value!r} is not {word}") from None
        if not low <= parsed <= high or (above and parsed == low):
            bounds = f"above {low:g} and at most {high:g}" if above else f"in {low:g}..{high:g}"
            raise argparse.ArgumentTypeError(f"must be {bounds}, got {value}")
        return parsed

    return check


def emit(text: str) -> None:
    print(text)


def emit_json(value: Any) -> None:
    from vtclip.files import to_json

    emit(to_json(value).decode("ascii").rstrip())


def source_path(source: str, data: str | None) -> str | Path:
    """A path that is there, or, with `data` (which is there), the name of a data set."""
    found = Path(source).expanduser()
    if data is not None or not found.exists():
        from vtclip.data.sets import find_set

        if data is not None:
            existing("--data", data)
            return find_set(source).name
        try:
            name = find_set(source).name
        except ValueError:
            existing("SOURCE", source)
        else:
            fail(f"vtclip: SOURCE {source!a} does not exist; data set {name} needs --data ROOT")
    return found


def existing(name: str, path: str) -> Path:
    """A path that is there, or exit 2 naming the argument."""
    found = Path(path).expanduser()
    if not found.exists():
        fail(f"vtclip: {name} {path!a} does not exist")
    return found
