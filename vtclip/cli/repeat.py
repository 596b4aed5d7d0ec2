# SPDX-License-Identifier: Apache-2.0
"""`vtclip repeat`: its arguments, and the comparison of a run with its repetition as a table."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from typing import Any

from vtclip.cli.parsing import (
    Parser,
    emit,
    emit_headline,
    emit_json,
    existing,
    on_terminal,
    options_of,
)

MEANING = {
    "MATCH": "the adapter is equal byte for byte",
    "CLOSE": "the same source and split, and numbers as near as can be expected",
    "DIFFERENT": "not the result that was written down",
}


def add_arguments(parser: Parser) -> None:
    parser.add_argument("folder", metavar="RUN", help="folder of a run")
    parser.add_argument("--out", metavar="RUN2", help="keep the second run there")
    parser.add_model_of_run()
    parser.add_shared("--encoder-batch-size", "--cache-dir", "--json")


def run(args: argparse.Namespace) -> int:
    """0 where the repetition matches or is close, 1 where it is different."""
    folder = existing("RUN", args.folder)
    from vtclip.runs.repeat import DIFFERENT, repeat

    comparison = repeat(
        folder,
        progress=on_terminal(),
        **options_of(args, "out", "model", "encoder_batch_size", "cache_dir"),
    )
    if args.json:
        emit_json("repeat", comparison)
    else:
        verdict, *rest = lines(comparison)
        emit_headline(verdict)
        for line in rest:
            emit(line)
    return int(comparison["verdict"] == DIFFERENT)


def lines(comparison: Mapping[str, Any]) -> Iterator[str]:
    yield f"{comparison['verdict']}: {MEANING[comparison['verdict']]}"
    shots, seed = comparison["shots"], comparison["seed"]
    yield f"{comparison['method']} on {comparison['source']}, {shots} shots, seed {seed}"
    digests = {**comparison["inputs"], "split": comparison["split"]}
    digests |= {name: comparison[name] for name in ("split_new", "encoders") if name in comparison}
    for name, row in digests.items():
        yield f"{name:<22} {_digests(row)}"
    for name, row in comparison["metrics"].items():
        gap = row["difference"]
        note = "equal" if gap == 0 else "not in both" if gap is None else f"differs by {gap:+.3g}"
        yield f"{name:<22} {_number(row['then']):>10} {_number(row['now']):>10}  {note}"
    most = comparison["adapter"].get("largest_difference")
    note = "" if most is None else f", values by at most {most:.3g}"
    yield f"{'adapter':<22} {_digests(comparison['adapter'])}{note}"
    for name, (then, now) in comparison["differs"].items():
        yield f"{name:<22} {then} then, {now} now"
    seconds = comparison["seconds"]
    yield f"{'seconds':<22} {seconds['then']:.1f} then, {seconds['now']:.1f} now"


def _digests(row: Mapping[str, Any]) -> str:
    if row["equal"]:
        return "equal"
    return f"differs: {str(row['then'])[:12]} then, {str(row['now'])[:12]} now"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.6f}"
