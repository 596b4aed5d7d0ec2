# SPDX-License-Identifier: Apache-2.0
"""What Windows refuses, on another system: enough of it to run the commands as they would there."""

from __future__ import annotations

import builtins
import os
import re
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

import vtclip.machine
import vtclip.writing

TEXT_MODE = 0x8000_0000  # stands for O_BINARY, which other systems lack
# of the letter of a drive the colon is part of the path
BAD_NAME = re.compile(r'[<>:"|?*\x00-\x1f]|[ .]$|^(con|prn|aux|nul|com\d|lpt\d)(\.|$)', re.I)


def in_use(path: Any) -> bool:
    """Whether this process has a file open or mapped."""
    real = os.path.realpath(path)
    maps = Path("/proc/self/maps").read_text(errors="replace")
    if any(line.endswith(f" {real}") for line in maps.splitlines()):
        return True
    for link in Path("/proc/self/fd").iterdir():
        try:
            if os.readlink(link) == real:
                return True
        except OSError:  # of this very listing
            continue
    return False


def as_windows(patch: pytest.MonkeyPatch) -> None:
    """No folder is opened, no file in use is replaced or removed, no name has a colon.

    Modules and functions of POSIX alone are missing. Until `patch` ends.
    """
    real = {name: getattr(os, name) for name in ("open", "replace", "rename", "unlink", "remove")}
    mkdir, builtin_open = os.mkdir, builtins.open

    def name_checked(path: Any) -> None:
        if isinstance(path, (str, bytes, os.PathLike)) and BAD_NAME.search(
            os.path.basename(os.fsdecode(path))
        ):
            raise OSError(22, "The filename, directory name, or volume label syntax is incorrect")

    def open_(path: Any, flags: int, *args: Any, **kwargs: Any) -> int:
        if os.path.isdir(path):
            raise PermissionError(13, "Permission denied", str(path))
        if flags & os.O_CREAT:
            name_checked(path)
            if not flags & (TEXT_MODE | os.O_EXCL):  # tempfile chose its flags when it was imported
                raise AssertionError(f"{path}: line ends would be translated")
        handle: int = real["open"](path, flags & ~TEXT_MODE, *args, **kwargs)
        return handle

    def moved(name: str) -> Any:
        def move(source: Any, target: Any, **kwargs: Any) -> None:
            name_checked(target)
            for path in (source, target):
                if in_use(path):
                    raise PermissionError(32, "The process cannot access the file", str(path))
            real[name](source, target, **kwargs)

        return move

    def removed(name: str) -> Any:
        def remove(path: Any, **kwargs: Any) -> None:
            # the temporary files of other systems are removed while they are open
            if in_use(path) and not os.path.basename(path).startswith("tmp"):
                raise PermissionError(32, "The process cannot access the file", str(path))
            real[name](path, **kwargs)

        return remove

    def make(path: Any, *args: Any, **kwargs: Any) -> None:
        name_checked(path)
        mkdir(path, *args, **kwargs)

    def opened(path: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        if str(path).startswith("/proc/self/"):
            return builtin_open(path, mode, *args, **kwargs)
        if str(path).startswith("/proc"):
            raise FileNotFoundError(2, "No such file or directory", str(path))
        if set(mode) & set("wxa"):
            name_checked(path)
        return builtin_open(path, mode, *args, **kwargs)

    patch.setattr(os, "O_BINARY", TEXT_MODE, raising=False)
    patch.setattr(os, "open", open_)
    for name in ("replace", "rename"):
        patch.setattr(os, name, moved(name))
    for name in ("unlink", "remove"):
        patch.setattr(os, name, removed(name))
    patch.setattr(os, "mkdir", make)
    patch.setattr(builtins, "open", opened)
    patch.setattr(vtclip.writing, "fcntl", None)
    patch.setattr(vtclip.machine, "STATM", Path("/proc/none/statm"))
    patch.setattr(vtclip.machine, "CLEAR_REFS", Path("/proc/none/clear_refs"))
    patch.setitem(sys.modules, "resource", None)
    for name in ("fork", "getuid", "geteuid", "sched_getaffinity", "sysconf", "uname"):
        patch.delattr(os, name, raising=False)
    for name in ("SIGKILL", "SIGHUP", "SIGALRM", "SIGUSR1", "SIGQUIT"):
        patch.delattr(signal, name, raising=False)
