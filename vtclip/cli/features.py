# SPDX-License-Identifier: Apache-2.0
"""`vtclip features`: the features of an image folder in a folder of their own."""

from __future__ import annotations

import argparse
from typing import Any

from vtclip.cli.parsing import (
    Parser,
    demo_model_noted,
    emit,
    emit_json,
    existing,
    on_terminal,
)
from vtclip.environment import is_first
from vtclip.files import several


def add_arguments(parser: Parser) -> None:
    parser.add_argument("source", metavar="SOURCE", help="images, as for vtclip fit")
    parser.add_argument("--out", metavar="DIR", required=True, help="folder to write")
    parser.add_argument(
        "--spatial",
        metavar="OPT",
        default="default",
        help="default, none (image vectors alone), or a kind of the encoder",
    )
    parser.add_shared("--templates")
    parser.add_batch_size("--encoder-batch-size", "--batch-size")
    parser.add_shared("--class-names", "--follow-links")
    parser.add_shared("--augment-passes", "--model", "--cache-dir", "--device", "--threads")
    parser.add_shared("--json")


def run(args: argparse.Namespace) -> int:
    source = existing("SOURCE", args.source)
    from vtclip.data.extract import write_features

    with demo_model_noted(args.model == "demo"):
        records = write_features(
            source,
            args.out,
            model=args.model,
            spatial=None if args.spatial == "none" else args.spatial,
            templates=None if args.templates is None else [args.templates],
            augment_passes=args.augment_passes,
            batch_size=args.encoder_batch_size,
            class_names=args.class_names,
            follow_links=args.follow_links,
            device=args.device,
            threads=args.threads,
            progress=on_terminal(),
        )
    if not is_first():
        return 0
    if args.json:
        emit_json("features", about(args.out, records))
    else:
        emit(f"{args.out}: {in_words(records)}")
    return 0


def about(out: str, records: Any) -> dict[str, Any]:
    """What the folder holds; `spatial` is [tokens, width], or null without spatial features."""
    spatial = [records.spatial_tokens, records.spatial_width] if records.has_spatial else None
    return {
        "out": out,
        "images": len(records),
        "classes": records.class_names,
        "width": records.width,
        "spatial": spatial,
        "passes": records.num_passes,
    }


def in_words(records: Any) -> str:
    """The same in one line."""
    images = several(len(records), "image")
    line = f"{images} of {several(len(records.class_names), 'class', 'classes')}"
    line += f", vectors of width {records.width}"
    if records.has_spatial:
        line += f", {records.spatial_tokens} spatial tokens of width {records.spatial_width}"
    if records.num_passes:
        line += f", {several(records.num_passes, 'augmentation pass', 'augmentation passes')}"
    return line
