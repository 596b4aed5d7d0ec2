# SPDX-License-Identifier: Apache-2.0
"""The mutation check counts what it should, on a small project and with changes written here."""

from __future__ import annotations

import csv
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
_spec = importlib.util.spec_from_file_location("mutation_changes", HERE / "changes.py")
changes = importlib.util.module_from_spec(_spec)
sys.modules[_spec.name] = changes  # where dataclasses and named tuples look for their module
_spec.loader.exec_module(changes)

SOURCE = '''"""A module."""

def larger(a: int, b: int) -> int:
    """The larger of two."""
    if a < 0 and b < 0:
        raise ValueError(f"both below 0: {a}")
    return a if a >= b else b  # a comment
'''
TEST = """from small.numbers import larger


def test_larger():
    assert larger(1, 2) == 2
    assert larger(2, 1) == 2
"""
DROPPED = ("text", "syntax", "compile", "import", "object")
TABLE = """[room.small]
share = 1
files = ["small/numbers.py"]
all = ["tests/test_numbers.py"]
"""
# line, what it becomes -> what the check must say of it
CHANGES = [
    (4, '    """The smaller of two."""\n', "dropped: text"),
    (5, "    if a < 0 or b < 0:\n", "survived"),
    (6, '        raise ValueError("")\n', "dropped: text"),
    (7, "    return a if a <= b else b\n", "killed"),
]
MUTATOR = "def mutants_regexp(source, rules, ignorePatterns):\n    return {}\n"


@pytest.mark.parametrize(
    ("line", "after", "why"),
    [
        *((line, after, why) for line, after, why in CHANGES if why == "dropped: text"),
        (3, "def larger(a: str, b: int) -> str:\n", "text"),
        (7, "    return a if a >= b else b\n", "text"),
        (7, "    return a if a > b else b\n", ""),
        (3, "def larger(b: int, a: int) -> int:\n", ""),
        (1, "pass\n", "text"),
        (2, "pass\n", "text"),
        (7, "    pass\n", ""),
        (7, "    break\n", "syntax"),
        (3, "pass\n", "syntax"),
    ],
)
def test_what_nobody_can_notice_is_dropped(line, after, why):
    before = SOURCE.splitlines(keepends=True)[line - 1]
    change = changes.Change("small/numbers.py", line, before, after)
    assert changes.Judge(SOURCE, ".py").why_not(change) == why.removeprefix("dropped: ")


def test_an_import_for_annotations_alone_is_dropped():
    text = "from a import B, c\n\ndef f(b: B) -> B:\n    return c(b)\n"
    judge = changes.Judge(text, ".py")
    for after, why in (("from a import c\n", "text"), ("from a import B\n", "")):
        change = changes.Change("f.py", 1, text.splitlines(keepends=True)[0], after)
        assert judge.why_not(change) == why


@pytest.mark.parametrize(
    ("after", "why"),
    [
        ('  check(n > 0, "other");  // why\n', "text"),
        ('  check(n > 0, "text");\n', "text"),
        ('  check(n >= 0, "text");\n', ""),
        ('  check(n > 0, "a // b", 1);\n', ""),
    ],
)
def test_words_of_cpp_are_dropped(after, why):
    text = 'void f(int n) {\n  check(n > 0, "text");  // because\n}\n'
    change = changes.Change("f.cpp", 2, text.splitlines(keepends=True)[1], after)
    assert changes.Judge(text, ".cpp").why_not(change) == why


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A repository of one module and one test, and a universalmutator that proposes CHANGES."""
    if shutil.which("git") is None or not hasattr(os, "fork"):
        pytest.skip("the check needs git and fork")
    root, library = tmp_path / "root", tmp_path / "library"
    files = {
        root / "small" / "__init__.py": "",
        root / "small" / "numbers.py": SOURCE,
        root / "tests" / "test_numbers.py": TEST,
        root / "pyproject.toml": '[tool.pytest.ini_options]\naddopts = "--import-mode=importlib"\n',
        tmp_path / "table.toml": TABLE,
        library / "universalmutator" / "__init__.py": "",
        library / "universalmutator" / "mutator.py": MUTATOR.format(
            [(line, after, "rule") for line, after, _ in CHANGES]
        ),
        library / "universalmutator-0.dist-info" / "METADATA": "Version: 0\n",
    }
    for path, text in files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    subprocess.run(["git", "init", "-q"], cwd=root, check=True)
    return tmp_path


def check(project: Path, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(HERE / "check.py"), "--root", str(project / "root"), *words]
    command += ["--table", str(project / "table.toml"), "--out", str(project / "results.csv")]
    env = {**os.environ, "PYTHONPATH": str(project / "library"), "TMPDIR": str(project)}
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)


def results(project: Path) -> dict[int, dict[str, str]]:
    with open(project / "results.csv", newline="") as file:
        return {int(row["line"]): row for row in csv.DictReader(file)}


def test_a_noticed_change_is_killed_and_another_survives(project):
    done = check(project, "--count", "4")
    assert done.returncode == 0, done.stderr
    found = results(project)
    assert {line: row["result"] for line, row in found.items()} == {
        line: result for line, _, result in CHANGES
    }
    assert found[7]["by"] == "tests/test_numbers.py::test_larger"
    assert (project / "root" / "small" / "numbers.py").read_text() == SOURCE
    assert not list(project.glob("mutation-*"))

    more = TEST + "    assert larger(-1, 5) == 5\n"
    (project / "root" / "tests" / "test_numbers.py").write_text(more)
    done = check(project, "--count", "4", "--retry")
    assert done.returncode == 0, done.stderr
    assert results(project)[5]["result"] == "killed"
    assert results(project)[7] == found[7]


def test_tests_that_fail_unchanged_end_the_check(project):
    (project / "root" / "tests" / "test_numbers.py").write_text(TEST + "    assert False\n")
    done = check(project, "--count", "4")
    assert done.returncode == 1
    assert "unchanged, its tests fail" in done.stderr
    assert not list(project.glob("mutation-*"))


def test_without_the_library_one_line_says_what_to_install(project):
    (project / "library" / "universalmutator" / "__init__.py").write_text("raise ImportError\n")
    done = check(project)
    assert done.returncode == 1
    assert done.stderr == changes.MISSING + "\n"


def test_the_page_has_the_counts_of_the_results():
    page = (HERE.parents[1] / "docs" / "mutation.md").read_text(encoding="utf-8")
    with (HERE / "results.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    rooms = list(dict.fromkeys(row["room"] for row in rows))
    shown = {}
    for line in page.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) == 10 and cells[0] in (*rooms, "all"):
            shown[cells[0]] = [int(cell) for cell in (*cells[1:5], *cells[6:])]
    kinds = ("killed", "timeout", "survived", *(f"dropped: {why}" for why in DROPPED))
    counted = {}
    for room in (*rooms, "all"):
        found = [row["result"] for row in rows if room in ("all", row["room"])]
        counts = [sum(result == kind for result in found) for kind in kinds]
        counts[4:6] = [counts[4] + counts[5]]  # a syntax error does not compile either
        counted[room] = [sum(counts[:3]), *counts]
    assert shown == counted
