# SPDX-License-Identifier: Apache-2.0
"""Single files that a command writes where it is told, and what they must not replace."""

from __future__ import annotations

from pathlib import Path

from vtclip.names import option
from vtclip.runs.result import RESULT

HEAD = 1000  # bytes in which a sign stands


def check_target(name: str, path: Path, sign: bytes | None = None) -> None:
    """Refuse a file in no folder, a folder, a file of a run, and a file of another kind.

    name: the option that names the file.
    sign: what the first bytes of such a file hold, so that an earlier one is replaced and nothing
        else is. None: whether any file is replaced was asked already.
    """
    typed, place = option(name), f"{str(path)!a}"
    odd = path.exists() and not path.is_file()  # a pipe or a device, whose reading may never end
    if odd or not path.parent.is_dir():
        fact = "in a folder that does not exist"
        if odd:
            fact = "a folder" if path.is_dir() else "which is not a file"
        raise ValueError(f"{typed} must be a file to write, got {place}, {fact}")
    if _is_of_a_run(path):
        raise ValueError(f"{typed} must not be a file of a run itself, got {place}")
    if sign is None or not path.exists():
        return
    with open(path, "rb") as file:
        head = file.read(HEAD)
    if head and sign not in head:
        raise FileExistsError(
            f"{typed}: {place} exists and is not such a file; remove it, or give another name"
        )


def _is_of_a_run(path: Path) -> bool:
    if not (path.parent / RESULT).exists():
        return False
    from vtclip.runs.folder import RUN_FILES  # needs what `vtclip selftest` does without

    return path.name in RUN_FILES
