# SPDX-License-Identifier: Apache-2.0
"""The tables of docs/few_shot.md are those of the committed results."""

from __future__ import annotations

import csv
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TABLE = runpy.run_path(str(ROOT / "benchmarks" / "few_shot_table.py"))
PAGE = (ROOT / "docs" / "few_shot.md").read_text(encoding="utf-8")


def test_the_page_has_the_tables_of_the_results():
    begin, end = PAGE.index("<!-- tables -->\n"), PAGE.index("<!-- end of tables -->\n")
    assert PAGE[begin:end].split("\n", 1)[1].strip() == TABLE["tables"]().strip()


@pytest.mark.parametrize("name", ["real_texts.csv", "made_texts.csv"])
def test_every_table_has_a_title_and_every_mean_is_of_all(name):
    cells = TABLE["load"](name)
    sources = {source for source, _, _ in cells}
    assert sources <= set(TABLE["TITLES"])
    with (ROOT / "benchmarks" / "results" / "few_shot" / name).open(newline="") as file:
        means = {
            (row["method"], row["shots"]): row["accuracy"]
            for row in csv.DictReader(file)
            if row["source"].startswith("Mean of") and row["accuracy"]
        }
    listed = [source for source in TABLE["TITLES"] if source in sources]
    for method in TABLE["whole_methods"](cells, listed):
        for shots in TABLE["SHOTS"]:
            found = TABLE["mean"](cells, listed, method, shots, "accuracy")
            assert found == pytest.approx(float(means[method, shots]), abs=1e-3)
