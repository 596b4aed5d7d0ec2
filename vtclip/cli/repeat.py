# SPDX-License-Identifier: Apache-2.0
"""`vtclip repeat`: its arguments, and the comparison of a run with its repetition as a table."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping
from typing import Any

from vtclip.cli.parsing import emit, emit_json, existing

MEANING = {
    "MATCH": "the adapter is equal byte for byte",
    "CLOSE": "the same source and split, and numbers as near as can be expected",
    "DIFFERENT": "not the result that was written down",
}


def add_arguments(repeat: Any) -> None:
    repeat.add_argument("folder", metavar="RUN")
    repeat.add_argument("--out", metavar="RUN2", help="keep the second run there")
    repeat.add_argument("--cache-dir", metavar="DIR", help="where features are kept")
    repeat.add_argument("--json", action="store_true", help="print JSON")


def run_repeat(args: argparse.Namespace) -> int:
    """0 where the repetition matches or is close, 1 where it is different."""
    folder = existing("RUN", args.folder)
    from vtclip.repeat_run import DIFFERENT, repeat

    found = repeat(
        folder,
        out=args.out,
        cache_dir=args.cache_dir,
        progress=sys.stderr is not None and sys.stderr.isatty(),
    )
    if args.json:
        emit_json(found)
    else:
        for line in lines(found):
            emit(line)
    return int(found["verdict"] == DIFFERENT)


def lines(found: Mapping[str, Any]) -> Iterator[str]:
    yield f"{found['method']} on {found['source']}, {found['shots']} shots, seed {found['seed']}"
    digests = {**found["inputs"], "split": found["split"]}
    digests |= {name: found[name] for name in ("split_new", "encoders") if name in found}
    for name, row in digests.items():
        yield f"{name:<22} {_digests(row)}"
    for name, row in found["metrics"].items():
        gap = row["difference"]
        note = "equal" if gap == 0 else "not in both" if gap is None else f"differs by {gap:+.3g}"
        yield f"{name:<22} {_number(row['then']):>10} {_number(row['now']):>10}  {note}"
    most = found["adapter"].get("largest_difference")
    note = "" if most is None else f", values by at most {most:.3g}"
    yield f"{'adapter':<22} {_digests(found['adapter'])}{note}"
    for name, (then, now) in found["differs"].items():
        yield f"{name:<22} {then} then, {now} now"
    seconds = found["seconds"]
    yield f"{'seconds':<22} {seconds['then']:.1f} then, {seconds['now']:.1f} now"
    yield f"{found['verdict']}: {MEANING[found['verdict']]}"


def _digests(row: Mapping[str, Any]) -> str:
    if row["equal"]:
        return "equal"
    return f"differs: {str(row['then'])[:12]} then, {str(row['now'])[:12]} now"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.6f}"
