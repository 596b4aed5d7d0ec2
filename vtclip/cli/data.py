# SPDX-License-Identifier: Apache-2.0
"""`vtclip data check ROOT`: which of the field's data sets are there and could be used."""

from __future__ import annotations

import argparse

from vtclip.cli.parsing import Parser, emit, emit_json, existing, on_terminal, one_of

ACTIONS = ("check",)


def add_arguments(parser: Parser) -> None:
    parser.add_argument("action", metavar="check", type=one_of(*ACTIONS), help="what to do: check")
    parser.add_argument("root", metavar="ROOT", help="the folder that holds imagenet, dtd, ...")
    parser.add_argument(
        "names", metavar="NAME", nargs="*", action="extend", help="default: those that are there"
    )
    parser.add_shared("--json")


def run(args: argparse.Namespace) -> int:
    """0 where every set asked for, or found, could be used; else 1."""
    root = existing("ROOT", args.root)
    if not root.is_dir():
        raise ValueError(f"ROOT {args.root!a} is not a folder")
    from vtclip.data.sets.check import check_lines, check_sets
    from vtclip.machine import doing

    with doing("reading the sets", on_terminal()):
        report = check_sets(root, args.names)
    if args.json:
        emit_json("data", report)
    else:
        for line in check_lines(report):
            emit(line)
    return 0 if report["usable"] else 1
