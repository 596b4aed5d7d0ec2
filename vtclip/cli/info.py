# SPDX-License-Identifier: Apache-2.0
"""`vtclip info`: what `python -m vtclip.info` prints."""

from __future__ import annotations

import argparse

from vtclip.cli.parsing import Parser


def add_arguments(parser: Parser) -> None:
    """None."""


def run(args: argparse.Namespace) -> int:
    from vtclip import info

    return info.main()
