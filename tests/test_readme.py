# SPDX-License-Identifier: Apache-2.0
"""The README says what the committed results and the code say."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from vtclip import ops

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_speed_table_is_the_one_made_from_the_results():
    script = ROOT / "benchmarks" / "table.py"
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() in README


def test_the_operator_example_runs():
    (example,) = re.findall(r"```python\n(import torch\n.*?)```", README, re.DOTALL)
    scope: dict[str, object] = {}
    exec(compile(example, "README.md", "exec"), scope)
    assert scope["query"].grad.shape == (1, 8, 100, 128)
    assert scope["maps"].shape == (32, 8, 100, 49)


def test_every_operator_is_listed_and_every_picture_exists():
    for name in ops.__all__:
        if name.islower():
            assert f"`{name}`" in README
    pictures = re.findall(r"!\[[^\]]*\]\(([^)]+)\)", README)
    assert pictures
    assert all((ROOT / picture).is_file() for picture in pictures)
