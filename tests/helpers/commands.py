# SPDX-License-Identifier: Apache-2.0
"""Commands run in the process of the tests, and fresh interpreters."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import vtclip
from vtclip.cli import main


def call(*words: Any) -> int:
    """Exit status of one command."""
    try:
        return main([str(word) for word in words])
    except SystemExit as done:
        return int(done.code or 0)


def refused(capsys: pytest.CaptureFixture[str], *words: Any, status: int = 2) -> str:
    """The one line that a refused command writes."""
    capsys.readouterr()
    assert call(*words) == status
    seen = capsys.readouterr()
    assert seen.out == ""
    assert seen.err.count("\n") == 1, seen.err
    assert "Traceback" not in seen.err
    return seen.err


def json_of(capsys: pytest.CaptureFixture[str], *words: Any, status: int = 0) -> Any:
    """What a command prints with --json."""
    capsys.readouterr()
    assert call(*words, "--json") == status
    return json.loads(capsys.readouterr().out)


def environment(**more: str) -> dict[str, str]:
    """For an interpreter with one thread that imports this package."""
    here = str(Path(vtclip.__file__).parents[1])
    return {**os.environ, "PYTHONPATH": here, "OMP_NUM_THREADS": "1", **more}


def python(*words: Any, **options: Any) -> subprocess.CompletedProcess[str]:
    """A fresh interpreter, its output captured."""
    options = {"env": environment(), "timeout": 300, **options}
    command = [sys.executable, *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, **options)
