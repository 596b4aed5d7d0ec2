# SPDX-License-Identifier: Apache-2.0
"""`vtclip evaluate`: its arguments, its call of `vtclip.evaluate` and what it prints."""

from __future__ import annotations

import argparse
from typing import Any

from vtclip.cli.parsing import (
    Parser,
    emit,
    emit_headline,
    emit_json,
    emit_table,
    existing,
    number,
    on_terminal,
    options_of,
    seed,
    source_path,
)
from vtclip.environment import is_first
from vtclip.files import several

TTT_OPTIONS = {
    "views": "--views",
    "keep": "--keep",
    "steps": "--steps",
    "lr": "--ttt-lr",
    "seed": "--ttt-seed",
}


def add_arguments(parser: Parser) -> None:
    parser.add_argument("folder", metavar="RUN", help="folder of a run")
    parser.add_argument(
        "source",
        metavar="SOURCE",
        nargs="?",
        help="images to measure on (default: the run's test images)",
    )
    parser.add_argument("--data", metavar="ROOT", help="data sets: SOURCE is the name of one")
    parser.add_argument(
        "--ttt", action="store_true", help="train on every unlabelled image first, and compare"
    )
    ttt = parser.add_argument_group("with --ttt")
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
    ttt.add_argument("--ttt-seed", type=seed, metavar="SEED", help="draws the views (default: 0)")
    parser.add_model_of_run()
    parser.add_shared("--follow-links", "--encoder-batch-size")
    parser.add_argument(
        "--predictions", metavar="FILE", help="write a CSV with a line for each counted image"
    )
    parser.add_shared("--cache-dir", "--device", "--threads", "--json")


def run(args: argparse.Namespace) -> int:
    folder = existing("RUN", args.folder)
    source = None if args.source is None else source_path(args.source, args.data)
    settings = ttt_settings(args)
    import vtclip
    from vtclip.machine import doing
    from vtclip.train.ttt import TTT

    with doing("evaluating", on_terminal() and is_first()):
        values = vtclip.evaluate(
            folder,
            source,
            ttt=TTT(**settings) if args.ttt else None,
            progress=on_terminal(),
            **options_of(args, "data", "model", "follow_links", "encoder_batch_size"),
            **options_of(args, "predictions", "device", "threads", "cache_dir"),
        )
    if not is_first():
        return 0
    if args.json:
        emit_json("evaluate", values)
    else:
        print_metrics(values, args.ttt)
    return 0


def ttt_settings(args: argparse.Namespace) -> dict[str, Any]:
    """The fields of TTT that options name; an error where --ttt itself is missing."""
    values = {
        field: getattr(args, option[2:].replace("-", "_")) for field, option in TTT_OPTIONS.items()
    }
    values = {field: value for field, value in values.items() if value is not None}
    if values and not args.ttt:
        raise ValueError(f"{TTT_OPTIONS[next(iter(values))]} needs --ttt")
    return values


def headline(values: dict[str, Any]) -> str:
    """The number that matters, in one sentence."""
    if "harmonic_mean" in values:
        return f"{_percent(values['harmonic_mean'])} harmonic mean of base and new classes"
    images = several(values["count"], "image")
    if "map" in values:
        return f"{_percent(values['map'])} mean average precision on {images}"
    low, high = values["interval95"]
    interval = f"(95 % interval {100 * low:.1f}-{100 * high:.1f} %)"
    return f"{_percent(values['accuracy'])} right on {images} {interval}"


def _percent(share: float | None) -> str:
    """A share that has no value where no image counts."""
    return "-" if share is None else f"{100 * share:.1f} %"


def print_metrics(values: dict[str, Any], ttt: bool) -> None:
    from vtclip.runs.counted import sentences
    from vtclip.runs.result import metrics_table
    from vtclip.runs.ttt_report import ttt_table

    images = several(values["test"]["images"], "image")
    if not ttt:
        emit_headline(headline(values))
    emit(f"{values['method']} on {values['source']}: {images}")
    for sentence in sentences(values["test"]["images"], values["left_out"]):
        emit(sentence)
    if ttt:
        emit_table(ttt_table(values))
        return
    halves = {str(half): values[half] for half in ("base", "new") if half in values}
    emit_table(metrics_table(halves or {values["method"]: values}))
