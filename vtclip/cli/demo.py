# SPDX-License-Identifier: Apache-2.0
"""`vtclip demo`: the whole way on bundled data."""

from __future__ import annotations

import argparse

from vtclip.cli.parsing import Parser, emit, emit_json, emit_table, on_terminal


def add_arguments(parser: Parser) -> None:
    parser.add_argument(
        "--out", metavar="DIR", default="vtclip-demo", help="folder to write (default: vtclip-demo)"
    )
    parser.add_shared("--device", "--threads", "--json")


def run(args: argparse.Namespace) -> int:
    from vtclip.demo.run import run_demo

    summary = run_demo(args.out, threads=args.threads, device=args.device, progress=on_terminal())
    if args.json:
        emit_json("demo", {**summary, "out": args.out})
        return 0
    emit_table(summary["table"])
    emit(f"{args.out}: table.txt, result.json, heat_maps.png, shots.png, images and runs")
    return 0
