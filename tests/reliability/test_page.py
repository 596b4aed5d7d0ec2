# SPDX-License-Identifier: Apache-2.0
"""The catalogue of faults: every row once, every test of it there and run, its page current."""

from __future__ import annotations

import copy
import importlib.util
import re
from pathlib import Path

import pytest

HERE = Path(__file__).parent
_spec = importlib.util.spec_from_file_location("reliability_page", HERE / "page.py")
page = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(page)
# row -> what would bring its fault into the package
ABSENT = {
    "C16": r"\b(tarfile|extractall|unpack_archive)\b",
    "C33": r"\b(multiprocessing|num_workers|DataLoader)\b",
    "C34": r"\byaml\.|import yaml",
    "F10": r"\bGradScaler\b",
    "F14": r"\b(os\.fork|multiprocessing|ProcessPoolExecutor)\b",
    "G7": r"\b(configparser|tomllib)\b|\"--config\"",
}


@pytest.fixture
def catalogue():
    return copy.deepcopy(page.load())


def test_every_row_is_there_once_with_tests_that_exist_and_run(catalogue):
    assert page.faults(catalogue) == []


def test_the_page_is_current(catalogue):
    assert page.PAGE.read_text(encoding="utf-8") == page.page(catalogue), (
        "run python tests/reliability/page.py"
    )


def test_links_lead_to_files(catalogue):
    text = page.page(catalogue)
    targets = set(re.findall(r"\]\(\.\./([^)]+)\)", text))
    assert len(targets) > 50
    assert not [target for target in targets if not (page.ROOT / target).is_file()]
    assert "docs/reliability.md" in (page.ROOT / "SECURITY.md").read_text(encoding="utf-8")


def test_counts_are_those_of_the_rows(catalogue):
    assert sum(page.counted(catalogue["row"])) == len(catalogue["row"]) == 146
    assert page.counted([{"id": "A1", "tests": [], "beyond": "x"}, {"id": "A2", "gpu": []}]) == [
        *(0, 1, 1), *[0] * len(page.STATES),
    ]  # fmt: skip


@pytest.mark.parametrize("row", ABSENT)
def test_what_does_not_apply_is_not_in_the_package(row, catalogue):
    (entry,) = (entry for entry in catalogue["row"] if entry["id"] == row)
    assert entry["state"] == "does not apply"
    for path in (page.ROOT / "vtclip").rglob("*.py"):
        assert not re.search(ABSENT[row], path.read_text(encoding="utf-8")), path


def test_rows_that_do_not_apply_are_held_so(catalogue):
    outside = {row["id"] for row in catalogue["row"] if page.state(row) == "does not apply"}
    assert outside == set(ABSENT)


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (lambda rows: rows.pop(3), "A4: missing"),
        (lambda rows: rows.append(rows[0]), "A1: listed 2 times"),
        (lambda rows: rows[0].update(id="A99"), "A99: no such row"),
        (lambda rows: rows[0].update(tests=[]), "A1: names no test"),
        (lambda rows: rows[0].update(test=[]), "A1: unknown test"),
        (lambda rows: rows[0].pop("does"), "A1: says fault and does"),
        (lambda rows: rows[0].update(tests=["tests/nothing.py::test_x"]), "A1: there is no tests/"),
        (lambda rows: rows[0]["tests"].append("tests/test_names.py::test_x"), "has no test_x"),
        (lambda rows: rows[0]["tests"].append(rows[0]["tests"][0]), "is named twice"),
        (lambda rows: rows[0].update(state="fine"), "A1: state must be one of"),
    ],
)
def test_a_wrong_catalogue_is_named(catalogue, change, fault):
    change(catalogue["row"])
    assert any(fault in one for one in page.faults(catalogue))


CODE = '''
import pytest
@pytest.mark.skip(reason="later")
def test_skipped(): ...
@pytest.mark.skip
def test_skipped_too(): ...
@pytest.mark.xfail(reason="wrong")
def test_expected_to_fail(): ...
@pytest.mark.skipif(True, reason="always")
def test_skipped_always(): ...
def test_skips_itself():
    """Says nothing."""
    pytest.skip("later")
@pytest.mark.skipif(condition, reason="there")
@pytest.mark.parametrize("x", [1])
def test_runs(x): ...
def test_runs_too():
    if condition:
        pytest.skip("there")
class TestThem:
    def test_inside(self): ...
'''


def test_tests_that_are_never_run_are_seen(tmp_path):
    path = tmp_path / "test_x.py"
    path.write_text(CODE)
    found = page.functions(path)
    assert {name for name, how in found.items() if not how} == {
        *("test_runs", "test_runs_too", "TestThem::test_inside")
    }
    assert len(found) == 8
    module = tmp_path / "test_y.py"
    module.write_text(f"pytestmark = [pytest.mark.slow, pytest.mark.skip(reason='x')]\n{CODE}")
    assert all(page.functions(module).values())
