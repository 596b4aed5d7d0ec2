# SPDX-License-Identifier: Apache-2.0
"""The scripts of docs/examples, as a reader starts them."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "docs" / "examples"


def run(name: str, *words: str) -> str:
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / name), *words], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.name)
def test_an_example_fits_on_a_page(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) < 80


@pytest.mark.slow
def test_a_method_of_ones_own_is_fitted_loaded_and_compared(tmp_path):
    said = run("own_method.py", str(tmp_path / "out"))
    fitted, again = re.search(r"centroid: ([\d.]+), loaded again: ([\d.]+)", said).groups()
    assert fitted == again
    lines = [line.split("|") for line in said.splitlines() if line.startswith("| ")]
    means = {cells[1].strip() for cells in lines if "±" in cells[2]}
    assert {"zeroshot", "proker", "centroid"} <= means
    assert float(fitted) > 0.6  # zero-shot has 0.34 there


@pytest.mark.slow
def test_a_data_set_of_ones_own_is_used_by_its_name(tmp_path):
    said = run("own_data_set.py", str(tmp_path / "out"))
    assert re.search(r"shapes +usable +train 24, val 12, test 30; 3 classes", said)
    assert "note:" not in said  # the lists have the counts that were registered
    assert re.search(r"(?m)^proker +\d", said)


@pytest.mark.slow
def test_a_folder_becomes_a_classifier(tmp_path):
    said = run("my_folder.py", str(tmp_path / "out"))
    table = {
        line.split()[0]: line for line in said.splitlines() if line.startswith(("zero", "auto"))
    }
    accuracy = {name: float(line.split()[1]) for name, line in table.items()}
    assert accuracy["auto"] > accuracy["zero-shot"]
    assert len(re.findall(r"^ *\d+\.\d %  \w+ \w+$", said, re.MULTILINE)) == 3
    (wrong,) = re.findall(r"(\d+) test images are wrong", said)
    assert int(wrong) == round(144 * (1 - accuracy["auto"] / 100))
