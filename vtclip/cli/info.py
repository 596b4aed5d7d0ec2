# SPDX-License-Identifier: Apache-2.0
"""`vtclip info`: what `python -m vtclip.info` prints."""

from __future__ import annotations

import argparse

from vtclip.cli.parsing import Parser, emit_json


def add_arguments(parser: Parser) -> None:
    parser.add_shared("--json")


def run(args: argparse.Namespace) -> int:
    from vtclip import info

    if args.json:
        emit_json("info", info.report())
        return 0
    return info.main()
