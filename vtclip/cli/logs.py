# SPDX-License-Identifier: Apache-2.0
"""Log records and crashes on stderr: one printable line each, whatever a name in them holds."""

from __future__ import annotations

import logging
import sys
import traceback
from types import TracebackType

from vtclip.cli.colours import paint
from vtclip.cli.parsing import above_bars, note
from vtclip.files import printable


class Handler(logging.StreamHandler):  # type: ignore[type-arg]
    """Lines on stderr, above progress bars."""

    def emit(self, record: logging.LogRecord) -> None:
        with above_bars():
            super().emit(record)


class Lines(logging.Formatter):
    """LEVEL: message, with controls and line ends as escapes; a traceback keeps its lines."""

    def format(self, record: logging.LogRecord) -> str:
        how = "red" if record.levelno >= logging.ERROR else "yellow"
        return paint(super().format(record), how, sys.stderr)

    def formatMessage(self, record: logging.LogRecord) -> str:
        return printable(super().formatMessage(record))

    def formatException(self, ei: object) -> str:
        text = super().formatException(ei)  # type: ignore[arg-type]
        return "\n".join(map(printable, text.split("\n")))


def log_lines() -> None:
    """Warnings of every library on stderr, unless somebody set up logging before."""
    handler = Handler()
    handler.setFormatter(Lines("%(levelname)s: %(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])


def print_crash(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    """An error that is nobody's input, with its traceback, as `sys.excepthook`."""
    for block in traceback.TracebackException(kind, error, trace).format():
        whole, frame = block.strip("\n"), block.startswith(("  ", "Traceback"))
        for line in whole.split("\n") if frame else [whole]:
            note(line)
