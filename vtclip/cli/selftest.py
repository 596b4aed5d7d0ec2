# SPDX-License-Identifier: Apache-2.0
"""`vtclip selftest`: every kernel on the device at hand against the reference, and a record."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

from vtclip.cli.parsing import Parser, emit, emit_json, note, on_terminal, one_of, several

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
    from vtclip.backends import record
    from vtclip.machine import choose_device
    from vtclip.testing import selftest

    device = choose_device(args.device)
    if args.json not in (None, "-") and not Path(args.json).expanduser().parent.is_dir():
        raise ValueError(f"--json {args.json!a}: its folder does not exist")
    start = time.monotonic()
    note(f"testing every operator on {device}; on a GPU the first time compiles, for minutes")
    rows = selftest.run(str(device), args.impl or IMPLS, tell=_progress)
    seconds, counts = time.monotonic() - start, selftest.counts(rows)
    path = record.write(device, rows)
    value: dict[str, Any] = {
        "record": str(path), "seconds": round(seconds, 1), "identity": record.identity(device),
        "counts": counts, "rows": rows,
    }  # fmt: skip
    if args.json == "-":
        emit_json(value)
    else:
        if args.json is not None:
            from vtclip.files import to_json, write_atomic

            write_atomic(Path(args.json).expanduser(), to_json(value))
        emit(selftest.table(rows))
        summed = ", ".join(f"{count} {kind}" for kind, count in counts.items())
        emit(f"{summed}, in {seconds:.0f} s")
        emit(record.standing(device).line)
    return 1 if any(counts[kind] for kind in record.BAD) else 0


def _progress(done: int, of: int) -> None:
    """A line that is written over, where somebody watches."""
    if on_terminal():
        sys.stderr.write(f"\r{done} of {of} " + ("\n" if done == of else ""))
