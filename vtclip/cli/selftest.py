# SPDX-License-Identifier: Apache-2.0
"""`vtclip selftest`: every kernel on the device at hand against the reference, and a record."""

from __future__ import annotations

import argparse
import contextlib
import signal
import time
from pathlib import Path
from typing import Any

from vtclip.cli.bars import Bar
from vtclip.cli.parsing import (
    Parser,
    emit,
    emit_headline,
    emit_json,
    emit_table,
    note,
    one_of,
    several,
)

IMPLS = ("cpu", "triton", "cuda", "reference")


def add_arguments(parser: Parser) -> None:
    parser.add_shared("--device")
    parser.add_argument(
        "--impl",
        type=several(one_of(*IMPLS)),
        metavar="LIST",
        help=f"of {', '.join(IMPLS)}; default: all that the device can run",
    )
    parser.add_argument(
        "--json",
        nargs="?",
        const="-",
        metavar="FILE",
        help="print JSON, or write it to FILE and print the table",
    )


def run(args: argparse.Namespace) -> int:
    """0 where all that can run is right, 1 where something is wrong or failed."""
    from vtclip.backends import record, triton
    from vtclip.files import to_json, write_atomic
    from vtclip.machine import choose_device
    from vtclip.runs.targets import check_target
    from vtclip.testing import selftest

    device = choose_device(args.device)
    if device.type == "cuda" and triton.interpreted():
        raise ValueError("TRITON_INTERPRET=1 runs no kernel on the GPU; unset it")
    if args.json not in (None, "-"):
        check_target("json", Path(args.json).expanduser(), b'"identity"')
    start = time.monotonic()
    compiles = "; the first time compiles, for minutes" if device.type == "cuda" else ""
    note(f"testing every operator on {device}{compiles}")
    progress = Progress(Bar("operators", "op"))
    with contextlib.closing(progress.bar), contextlib.suppress(KeyboardInterrupt):
        selftest.run(str(device), args.impl or IMPLS, tell=progress)
    rows, counts = progress.rows, selftest.counts(progress.rows)
    whole = len(rows) == progress.of
    value: dict[str, Any] = {
        "record": str(record.place(device)) if whole else None,
        "seconds": round(time.monotonic() - start, 1),
        "identity": record.identity(device),
        "counts": counts,
        "rows": rows,
    }
    if args.json == "-":
        emit_json("selftest", value)
    else:
        if args.json is not None:
            write_atomic(Path(args.json).expanduser(), to_json(value))
        summed = ", ".join(f"{count} {kind}" for kind, count in counts.items())
        emit_headline(f"{summed}, in {value['seconds']:.0f} s")
        emit_table(selftest.table(rows))
        emit("%: the largest error, as a share of what is allowed")
    if not whole:
        note(f"interrupted: {len(rows)} of {progress.of} tested, no record is written")
        return 128 + signal.SIGINT
    record.write(device, rows)
    note(record.standing(device).line)
    return 1 if any(counts[kind] for kind in record.BAD) else 0


class Progress:
    """The rows so far, of how many, and a bar of them."""

    def __init__(self, bar: Bar) -> None:
        self.rows: list[dict[str, Any]] = []
        self.of, self.bar = -1, bar

    def __call__(self, rows: list[dict[str, Any]], of: int) -> None:
        self.rows, self.of = list(rows), of
        self.bar.reach(len(rows), of)
