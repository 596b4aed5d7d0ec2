# SPDX-License-Identifier: Apache-2.0
"""The `vtclip` command: one file per command with its options and what it prints.

Exit status: 0 done, 1 the work failed, 2 bad input, 128 + n stopped by signal n. A user's error is
one line on stderr. Torch is imported only by the commands that compute, when they run.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from typing import Any, NoReturn, Protocol

from vtclip import __version__
from vtclip.cli import (
    bench,
    completion,
    convert,
    data,
    demo,
    evaluate,
    explain,
    export,
    extend,
    features,
    fit,
    info,
    models,
    predict,
    repeat,
    report,
    selftest,
    serve,
    tune,
)
from vtclip.cli.errors import line_of
from vtclip.cli.logs import log_lines, print_crash
from vtclip.cli.parsing import Parser, fail, note
from vtclip.environment import VARIABLES, check_launcher, num_processes, unknown_variables
from vtclip.names import as_typed, nearest


class Command(Protocol):
    """What a file of this folder has."""

    def add_arguments(self, parser: Parser) -> None: ...

    def run(self, args: argparse.Namespace) -> int: ...


COMMANDS: tuple[tuple[str, Command, str], ...] = (
    ("fit", fit, "train a classifier on images, and test it on others"),
    ("evaluate", evaluate, "measure a run on its test images, or on SOURCE"),
    ("predict", predict, "classify images"),
    ("explain", explain, "show which training images, or which part of the image, decided"),
    ("serve", serve, "serve a run: a web page and a JSON endpoint on this machine"),
    ("features", features, "extract the features of SOURCE into a folder"),
    ("extend", extend, "add classes to a run"),
    ("repeat", repeat, "fit a run again, and say whether it matches"),
    ("report", report, "tables and a page of benchmark results"),
    ("export", export, "export a run to .pt2 or ONNX"),
    ("convert", convert, "convert a file of weights to safetensors"),
    ("data", data, "check which of the field's data sets are in ROOT"),
    ("bench", bench, "benchmark methods over sources, shots and seeds"),
    ("models", models, "list the models that --model can name, and which are on this machine"),
    ("tune", tune, "time tiles of the GPU kernels, and keep the best"),
    ("demo", demo, "run the full pipeline on bundled data (offline)"),
    ("selftest", selftest, "prove every kernel on this device against the reference"),
    ("completion", completion, "print a script that completes commands in a shell"),
    ("info", info, "show what is installed, which kernels run, and why others do not"),
)
TOGETHER = ("fit", "evaluate", "features", "bench", "info")  # of which torchrun may start several
BAD_INPUT = (
    ValueError,
    TypeError,
    NotImplementedError,
    IndexError,
    FileNotFoundError,
    FileExistsError,
    NotADirectoryError,
    IsADirectoryError,
    PermissionError,
)


class Terminated(BaseException):
    """SIGTERM outside of a training, which saves its state first; as KeyboardInterrupt is one."""


def build_parser() -> Parser:
    parser = Parser(
        prog="vtclip",
        description="Few-shot classifiers on CLIP: train on a few images per class, in seconds.",
    )
    parser.add_argument("--version", action="version", version=f"vtclip {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", parser_class=Parser)
    for name, module, summary in COMMANDS:
        command = commands.add_parser(name, help=summary, description=summary)
        module.add_arguments(command)
        command.set_defaults(run=module.run, parser=command, whole=parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    for stream in (sys.stdout, sys.stderr):
        if stream is not None and hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    log_lines()
    if argv is None:  # the process is the command's
        sys.excepthook = print_crash
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        with as_typed():
            return _run(build_parser(), words)
    except BrokenPipeError:
        # the reader has gone: keep the interpreter from flushing into the closed pipe at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        note("interrupted")
        return 128 + signal.SIGINT
    except Terminated:
        note("terminated")
        return 128 + signal.SIGTERM


def _run(parser: Parser, words: list[str]) -> int:
    known = [name for name, _, _ in COMMANDS]
    if words and not words[0].startswith("-") and words[0] not in known:
        fail(f"vtclip: unknown command {words[0]!r}{nearest(words[0], known)}")
    args = parser.parse(words)
    if args.command is None:
        parser.print_help()
        return 2
    name = f"vtclip {args.command}"
    stop = signal.signal(signal.SIGTERM, _terminated)
    try:
        check_launcher()
        if num_processes() > 1 and args.command not in TOGETHER:
            fail(
                f"{name}: runs in one process, but WORLD_SIZE is {num_processes()}; start it "
                "without torchrun"
            )
        for other in unknown_variables():
            note(f"note: {other} is set, and nothing reads it{nearest(other, VARIABLES)}")
        status: int = args.run(args)
        if sys.stdout is not None:
            sys.stdout.flush()
        return status
    except BrokenPipeError:
        raise
    except BAD_INPUT as error:
        fail(f"{name}: {line_of(error, args)}")
    except (OSError, FloatingPointError) as error:
        fail(f"{name}: {line_of(error, args)}", status=1)
    except Exception as error:
        signum = getattr(error, "signum", None)  # checkpoint.Interrupted, without importing torch
        if signum is None:
            _fail_without_memory(name, error, args.parser)
            raise
        fail(f"{name}: {error}; go on with --resume", status=128 + signum)
    finally:
        signal.signal(signal.SIGTERM, stop)


def _fail_without_memory(name: str, error: Exception, parser: Parser) -> None:
    """One line, with the options of the command that take less, where memory ran out."""
    from vtclip.machine import OutOfMemory, why_out_of_memory  # torch is imported, if it raised

    full = why_out_of_memory(error)
    if not full:
        return
    sizes = () if isinstance(error, OutOfMemory) else ("--batch-size", "--encoder-batch-size")
    remedies = [f"a smaller {option}" for option in sizes if option in parser.options]
    remedies += [f"fewer {option}" for option in ("--threads",) if option in parser.options]
    remedies += [f"another {option}" for option in ("--device",) if option in parser.options]
    hint = f"; try {', '.join(remedies)} or a smaller model" if remedies else ""
    fail(f"{name}: out of memory: {full}{hint}", status=1)


def _terminated(_signum: int, _frame: Any) -> NoReturn:
    raise Terminated
