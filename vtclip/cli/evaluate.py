# SPDX-License-Identifier: Apache-2.0
"""`vtclip evaluate`: its arguments, its call of `vtclip.api.evaluate` and what it prints."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from vtclip.cli.parsing import emit, emit_json, existing, fail, number, source_path

TTT_OPTIONS = {
    "views": "--views",
    "keep": "--keep",
    "steps": "--steps",
    "lr": "--ttt-lr",
    "seed": "--ttt-seed",
}


def add_arguments(evaluate: Any) -> None:
    evaluate.add_argument("folder", metavar="RUN")
    evaluate.add_argument("source", metavar="SOURCE", nargs="?")
    evaluate.add_argument("--data", metavar="ROOT", help="data sets: SOURCE is the name of one")
    evaluate.add_argument(
        "--ttt", action="store_true", help="train on every unlabelled image first, and compare"
    )
    ttt = evaluate.add_argument_group("with --ttt")
    ttt.add_argument(
        "--views", type=number(int, 1, 100_000), metavar="N", help="views per image (default: 64)"
    )
    ttt.add_argument(
        "--keep",
        type=number(float, 0, 1, above=True),
        metavar="SHARE",
        help="share of the views that train, those of lowest entropy (default: 0.1)",
    )
    ttt.add_argument(
        "--steps", type=number(int, 1, 10_000), metavar="N", help="steps per image (default: 1)"
    )
    ttt.add_argument(
        "--ttt-lr",
        type=number(float, 0, 1000, above=True),
        metavar="LR",
        help="step size of AdamW (default: 0.005)",
    )
    ttt.add_argument(
        "--ttt-seed",
        type=number(int, 0, 2**32 - 1),
        metavar="SEED",
        help="draws the views (default: 0)",
    )


def run_evaluate(args: argparse.Namespace) -> int:
    folder = existing("RUN", args.folder)
    source = None if args.source is None else source_path(args.source, args.data)
    given = {
        field: getattr(args, option[2:].replace("-", "_")) for field, option in TTT_OPTIONS.items()
    }
    given = {field: value for field, value in given.items() if value is not None}
    if given and not args.ttt:
        fail(f"vtclip evaluate: {TTT_OPTIONS[next(iter(given))]} needs --ttt")
    from vtclip import api
    from vtclip.result import rows_table
    from vtclip.ttt import TTT
    from vtclip.ttt_report import ttt_table

    values = api.evaluate(
        folder,
        source,
        data=args.data,
        device=args.device,
        threads=args.threads,
        cache_dir=args.cache_dir,
        ttt=TTT(**given) if args.ttt else None,
        progress=sys.stderr is not None and sys.stderr.isatty(),
    )
    if args.json:
        emit_json(values)
        return 0
    emit(f"{values['method']} on {values['source']}: {values['test']['images']} images")
    if args.ttt:
        emit(ttt_table(values))
        return 0
    parts = {str(part): values[part] for part in ("base", "new") if part in values}
    emit(rows_table(parts or {values["method"]: values}))
    if "harmonic_mean" in values:
        emit(f"harmonic mean of base and new accuracy: {100 * values['harmonic_mean']:.2f} %")
    return 0
