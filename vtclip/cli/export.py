# SPDX-License-Identifier: Apache-2.0
"""`vtclip export`: its arguments, its call of `vtclip.export` and what it prints."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

from vtclip.cli.parsing import (
    Parser,
    count,
    emit,
    emit_headline,
    emit_json,
    existing,
    on_terminal,
    options_of,
)


def add_arguments(parser: Parser) -> None:
    parser.add_argument("folder", metavar="RUN", help="folder of a run")
    parser.add_argument("--out", metavar="FILE.pt2", help="a program of torch.export")
    parser.add_argument("--onnx", metavar="FILE.onnx", help="an ONNX model, instead or as well")
    parser.add_argument(
        "--features", action="store_true", help="from features to logits, without the encoder"
    )
    batch = parser.add_mutually_exclusive_group()
    batch.add_argument("--dynamic-batch", action="store_true", help="any batch size (default)")
    batch.add_argument("--fixed-batch", type=count, metavar="N", help="this batch size only")
    parser.add_argument(
        "--portable",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="plain torch operators, which need no vtclip (default), or vtclip's own",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace the files")
    parser.add_model_of_run()
    parser.add_shared("--cache-dir", "--threads", "--json")


def run(args: argparse.Namespace) -> int:
    folder = existing("RUN", args.folder)
    if args.out is None and args.onnx is None:
        raise ValueError("--out FILE.pt2 or --onnx FILE.onnx must be given")
    from vtclip.machine import doing
    from vtclip.runs.export import export

    with doing("exporting, and comparing with the run", on_terminal()):
        about = export(
            folder,
            args.out,
            kind="features" if args.features else "image",
            **options_of(args, "onnx", "portable", "fixed_batch", "overwrite"),
            **options_of(args, "model", "threads", "cache_dir"),
        )
    if args.json:
        emit_json("export", about)
    else:
        print_export(about)
    return 0


def print_export(about: Mapping[str, Any]) -> None:
    """The files, inputs and output, and the errors against the run."""
    files = ", ".join(about["files"])
    emit_headline(f"written: {files}, each with a .json file next to it")
    shapes = ", ".join(f"{name} {entry['shape']}" for name, entry in about["inputs"].items())
    output = about["output"]
    emit(f"{about['method']}: {shapes} -> {output['name']} {output['shape']}")
    for kind, entry in about["parity"].items():
        cases = ", ".join(f"{name} {error:.1e}" for name, error in entry["cases"].items())
        emit(f"{kind}: largest error {entry['max_error']:.1e} of {entry['tolerance']:g} ({cases})")
