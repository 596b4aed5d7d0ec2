# SPDX-License-Identifier: Apache-2.0
"""The notebooks of docs/examples run, and are committed with what their cells print."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

EXAMPLES = Path(__file__).parents[2] / "docs" / "examples"
NOTEBOOKS = sorted(EXAMPLES.glob("*.ipynb"))


def cells(path: Path) -> list[dict[str, Any]]:
    notebook = json.loads(path.read_text(encoding="utf-8"))
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def printed(path: Path) -> list[str]:
    """Lines that the cells print, as they are committed."""
    outputs = [one for cell in cells(path) for one in cell["outputs"]]
    return "".join("".join(one.get("text", "")) for one in outputs).splitlines()


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_and_prints_as_many_lines(path, tmp_path):
    code = "\n".join("".join(cell["source"]) for cell in cells(path))
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == len(printed(path))
    assert printed(path)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_executed_and_small(path):
    assert len(NOTEBOOKS) == 2
    assert [cell["execution_count"] for cell in cells(path)] == [
        number + 1 for number in range(len(cells(path)))
    ]
    assert path.stat().st_size < 300_000
    assert "Error" not in path.read_text(encoding="utf-8")
