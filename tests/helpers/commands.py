# SPDX-License-Identifier: Apache-2.0
"""Commands run in the process of the tests."""

from __future__ import annotations

from typing import Any

import pytest

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
