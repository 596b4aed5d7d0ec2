# SPDX-License-Identifier: Apache-2.0
"""`vtclip completion SHELL`: a script that completes commands, options, names and files."""

from __future__ import annotations

import argparse
import importlib.util
import sys

from vtclip.cli.parsing import Parser, one_of
from vtclip.names import LOSSES, METHODS, OPTIMIZERS, PENALTIES, POSITIONS, PRECISIONS

SHELLS = ("bash", "zsh", "tcsh")
INSTALL = "pip install 'vtclip[completion]'"
VALUES = {  # option -> what it takes
    "--method": METHODS,
    "--optimizer": OPTIMIZERS,
    "--loss": LOSSES,
    "--penalty": PENALTIES,
    "--precision": PRECISIONS,
    "--class-position": POSITIONS,
    "--device": ("cpu", "cuda"),
}
FOLDERS = ("RUN", "RUN2", "DIR", "ROOT", "FOLDER", "FOLDER|test")
FILES = ("SOURCE", "IMAGE", "FILE", "FILE.pt2", "PNG", "NAME|FILE", "OUT", "OUT.safetensors")


def add_arguments(parser: Parser) -> None:
    parser.add_argument(
        "shell", metavar="SHELL", type=one_of(*SHELLS), help="bash, zsh or tcsh: "
        'eval "$(vtclip completion bash)" in ~/.bashrc',
    )  # fmt: skip


def run(args: argparse.Namespace) -> int:
    if importlib.util.find_spec("shtab") is None:
        raise ValueError(f"shtab not found; {INSTALL} brings it")
    import shtab  # type: ignore[import-not-found,unused-ignore]

    parser = completable(args.whole, shtab.FILE, shtab.DIRECTORY)
    sys.stdout.write(shtab.complete(parser, args.shell) + "\n")  # a program: no character escaped
    return 0


def completable(
    parser: argparse.ArgumentParser, file: object, folder: object
) -> argparse.ArgumentParser:
    """The parser with what each argument's value may be, as shtab reads it."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                completable(command, file, folder)
        options = [name for name in action.option_strings if name in VALUES]
        if options:
            action.choices = VALUES[options[0]]
        elif action.metavar in FOLDERS:
            action.complete = folder  # type: ignore[attr-defined]
        elif action.metavar in FILES:
            action.complete = file  # type: ignore[attr-defined]
    return parser
