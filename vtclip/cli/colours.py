# SPDX-License-Identifier: Apache-2.0
"""Colours and weight of text, on a terminal alone; NO_COLOR or TERM=dumb turns them off."""

from __future__ import annotations

import os
from typing import TextIO

CODES = {"bold": "1", "yellow": "33", "red": "31"}


def is_dumb() -> bool:
    """Whether the terminal does nothing but print."""
    return os.environ.get("TERM") == "dumb"


def coloured(stream: TextIO | None) -> bool:
    """Whether escapes may go to `stream`: somebody watches it and has not asked for none."""
    if stream is None or os.environ.get("NO_COLOR") or is_dumb():
        return False
    if os.name == "nt" and not os.environ.get("WT_SESSION"):  # older consoles show the codes
        return False
    return stream.isatty()


def paint(line: str, how: str, stream: TextIO | None) -> str:
    """`line`, which is printable, in a colour or bold where `stream` shows it."""
    return f"\x1b[{CODES[how]}m{line}\x1b[0m" if how and coloured(stream) else line
