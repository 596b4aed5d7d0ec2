# SPDX-License-Identifier: Apache-2.0
"""The one line of an error, in the words of the command that was typed. No torch."""

from __future__ import annotations

import argparse
import os
from pathlib import Path


def line_of(error: BaseException, args: argparse.Namespace) -> str:
    """What the user reads of `error`: the argument by its typed name, the path, the reason."""
    if isinstance(error, OSError) and error.strerror:
        return _of_system(error, args)
    # functions name themselves, and the command is called like them
    line = str(error).removeprefix(f"{args.command}: ")
    if line.startswith("not a vtclip ") and "folder" in _actions(args):
        return f"{_typed_name('folder', args)}: {line}"
    # the floor of the package, which knows of no command, begins with Python's name
    first, space, rest = line.partition(" ")
    word = first.removesuffix(":")
    if space and _typed(word, args):
        return f"{_typed_name(word, args)}{first[len(word) :]} {rest}"
    return line


def _of_system(error: OSError, args: argparse.Namespace) -> str:
    """An error of the file system: the argument that led to the path, where one did."""
    reason = str(error.strerror)
    if error.filename is None:
        return reason
    path = os.fsdecode(error.filename) if isinstance(error.filename, bytes) else error.filename
    text = reason if f"{path}: " in reason else f"{path}: {reason}"
    name = _argument_of(str(path), args)
    return f"{name}: {text}" if name else text


def _argument_of(path: str, args: argparse.Namespace) -> str:
    """The typed name of the argument whose value is `path` or the nearest folder above it."""
    place = Path(os.path.realpath(path))
    found: dict[str, int] = {}
    for dest, value in vars(args).items():
        for word in value if isinstance(value, list) else [value]:
            if not isinstance(word, str) or not word or not _typed(dest, args):
                continue
            real = Path(os.path.realpath(os.path.expanduser(word)))
            # a missing or closed folder above an argument is its fault, too
            if place == real or real in place.parents or place in real.parents:
                found[dest] = len(os.path.commonpath((real, place)))
    if not found:
        return ""
    return _typed_name(max(found, key=lambda dest: found[dest]), args)


def _actions(args: argparse.Namespace) -> dict[str, argparse.Action]:
    actions: dict[str, argparse.Action] = args.parser.actions
    return actions


def _typed(dest: str, args: argparse.Namespace) -> bool:
    """Whether the user gave a value to the argument, and not its default."""
    action = _actions(args).get(dest)
    value = getattr(args, dest, None)
    return action is not None and value is not None and value != action.default


def _typed_name(dest: str, args: argparse.Namespace) -> str:
    """ "--out" or "SOURCE"; "" of an argument that the command does not have."""
    action = _actions(args).get(dest)
    if action is None:
        return ""
    return action.option_strings[0] if action.option_strings else str(action.metavar)
