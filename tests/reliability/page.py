# SPDX-License-Identifier: Apache-2.0
"""Writes docs/reliability.md of catalogue.toml: `python tests/reliability/page.py`.

Test functions are found in their files' syntax; nothing of the package or of a test is imported.
"""

from __future__ import annotations

import ast
import sys
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # which pytest brings along

ROOT = Path(__file__).parents[2]
CATALOGUE = Path(__file__).with_name("catalogue.toml")
PAGE = ROOT / "docs" / "reliability.md"
ROWS = {"A": 34, "B": 13, "C": 34, "D": 13, "E": 17, "F": 14, "G": 9, "H": 12}
PROMISES = 10
PROVED, PART, ON_GPU = "proved", "in part", "on a GPU only"
STATES = ("does not apply", "not tested", "open")
ORDER = (PROVED, PART, ON_GPU, *STATES)
KEYS = {"id", "fault", "does", "tests", "gpu", "beyond", "state", "reason"}

Entry = dict[str, Any]


def load(path: Path = CATALOGUE) -> Entry:
    with open(path, "rb") as file:
        return tomllib.load(file)


def state(row: Entry) -> str:
    """What the tests of a row show."""
    if "state" in row:
        return str(row["state"])
    if "tests" not in row:
        return ON_GPU
    return PART if "beyond" in row else PROVED


@cache
def functions(path: Path) -> dict[str, str]:
    """The test functions of a file, methods as Class::name, and how each is never run, if so."""
    found = {}
    tree = ast.parse(path.read_text(encoding="utf-8"))
    module = next(filter(None, map(never, assigned(tree, "pytestmark"))), "")
    for node in tree.body:
        inner = [node] if not isinstance(node, ast.ClassDef) else node.body
        for function in inner:
            if isinstance(function, ast.FunctionDef) and function.name.startswith("test_"):
                name = function.name if function is node else f"{node.name}::{function.name}"
                marks = [*function.decorator_list, *getattr(node, "decorator_list", [])]
                reasons = [module, *map(never, marks), *map(first_call, [function])]
                found[name] = next(filter(None, reasons), "")
    return found


def assigned(tree: ast.Module, name: str) -> Iterator[ast.expr]:
    """The values, or the parts of a list of them, that a module gives to `name`."""
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == name:
            yield from node.value.elts if isinstance(node.value, ast.List) else [node.value]


def never(mark: ast.expr) -> str:
    """The mark where it takes a test out of every run: a skip or xfail without a condition."""
    name = ast.unparse(mark.func if isinstance(mark, ast.Call) else mark)
    if name == "pytest.mark.skip":
        return "skip"
    if name in ("pytest.mark.xfail", "pytest.mark.skipif"):
        condition = mark.args[0] if isinstance(mark, ast.Call) and mark.args else None
        always = condition is None and name.endswith("xfail")
        if always or isinstance(condition, ast.Constant) and condition.value:
            return name.rpartition(".")[2]
    return ""


def first_call(function: ast.FunctionDef) -> str:
    """`pytest.skip` where a function begins with it."""
    body = function.body[1:] if ast.get_docstring(function) else function.body
    text = ast.unparse(body[0]) if body else ""
    return "skip" if text.startswith(("pytest.skip(", "pytest.xfail(")) else ""


def faults_of_tests(what: str, tests: list[str]) -> Iterator[str]:
    for test in tests:
        file, _, name = test.partition("::")
        path = ROOT / file
        if not path.is_file() or not file.startswith("tests/"):
            yield f"{what}: there is no {file}"
        elif name not in functions(path):
            yield f"{what}: {file} has no {name}"
        elif functions(path)[name]:
            yield f"{what}: {test} is marked {functions(path)[name]}"
    for test, count in Counter(tests).items():
        if count > 1:
            yield f"{what}: {test} is named twice"


def faults(catalogue: Entry) -> list[str]:
    """What is wrong with a catalogue, one line each."""
    wanted = [f"{group}{n}" for group, count in ROWS.items() for n in range(1, count + 1)]
    counts = Counter(str(row.get("id")) for row in catalogue["row"])
    found = [f"{name}: missing" for name in wanted if name not in counts]
    found += [f"{name}: no such row" for name in counts if name not in wanted]
    found += [f"{name}: listed {count} times" for name, count in counts.items() if count > 1]
    if [*catalogue["groups"]] != [*ROWS]:
        found.append(f"groups must be {', '.join(ROWS)}")
    if len(catalogue["promise"]) != PROMISES:
        found.append(f"{PROMISES} promises are made, got {len(catalogue['promise'])}")
    for row in catalogue["row"]:
        what = str(row.get("id"))
        found += [f"{what}: unknown {key}" for key in row.keys() - KEYS]
        if "fault" not in row or ("does" in row) == ("state" in row):
            found.append(f"{what}: says fault and does, or fault, state and reason")
        if "state" in row and (row["state"] not in STATES or "reason" not in row):
            found.append(f"{what}: state must be one of {', '.join(STATES)}, with a reason")
        if "state" not in row and not row.get("tests") and not row.get("gpu"):
            found.append(f"{what}: names no test")
        found += faults_of_tests(what, [*row.get("tests", []), *row.get("gpu", [])])
    for number, promise in enumerate(catalogue["promise"], 1):
        if not promise.get("tests"):
            found.append(f"promise {number}: names no test")
        found += faults_of_tests(f"promise {number}", promise.get("tests", []))
        found += faults_of_tests(f"promise {number}", promise.get("gpu", []))
    return found


def links(entry: Entry) -> str:
    """The tests of a row, by file."""
    said = []
    for key, after in ("tests", ""), ("gpu", " (needs a GPU)"):
        files: dict[str, list[str]] = {}
        for test in entry.get(key, []):
            file, _, name = test.partition("::")
            files.setdefault(file, []).append(name.rpartition("::")[2].removeprefix("test_"))
        for file, names in files.items():
            short = file.removeprefix("tests/")
            listed = ", ".join(f"`{name}`" for name in names)
            said.append(f"[{short}](../{file}){after}: {listed}")
    return "<br>".join(said)


def line(row: Entry) -> str:
    kind = state(row)
    what = row.get("does") or f"**{kind}**: {row['reason']}"
    if "beyond" in row:
        what += f"; **not tested**: {row['beyond']}"
    return f"| {row['id']} | {row['fault']} | {what} | {links(row)} |"


def counted(rows: list[Entry]) -> list[int]:
    counts = Counter(map(state, rows))
    return [counts[kind] for kind in ORDER]


def page(catalogue: Entry) -> str:
    """docs/reliability.md."""
    rows = {
        group: [row for row in catalogue["row"] if row["id"][0] == group]
        for group in catalogue["groups"]
    }
    lines = [
        "# Reliability",
        "",
        "What can go wrong, what vtclip then does, and the tests that hold it to that. The page is",
        "made of [catalogue.toml](../tests/reliability/catalogue.toml) by",
        "`python tests/reliability/page.py`; a test fails where it is not current, where a row",
        "is missing, or where a test that is named does not exist or is never run. What files of",
        "others can do, and what is trusted, is in [SECURITY.md](../SECURITY.md).",
        "",
        "| group | rows | " + " | ".join(ORDER) + " |",
        "| --- |" + " ---: |" * (1 + len(ORDER)),
    ]
    for group, title in catalogue["groups"].items():
        numbers = [len(rows[group]), *counted(rows[group])]
        lines.append(f"| {group}. {title} | " + " | ".join(map(str, numbers)) + " |")
    total = [len(catalogue["row"]), *counted(catalogue["row"])]
    lines.append("| all | " + " | ".join(map(str, total)) + " |")
    lines += [
        "",
        "*In part*: the tests leave out what the row says is not tested. *On a GPU only*: the",
        "tests are skipped where there is none; `benchmarks/gpu_suite.sh` runs them where one is.",
        "",
        "To run the tests of one row, give their names to pytest, with `test_` in front:",
        "",
        "```",
        "pytest tests/train/test_engine.py::test_what_is_not_finite_leaves_the_last_checkpoint",
        "python tests/reliability/page.py F1 H7 | xargs pytest    # of these rows",
        "pytest tests/reliability                                 # whether this page is true",
        "```",
        "",
        "## Promises",
        "",
        "| # | promise | tests |",
        "| ---: | --- | --- |",
    ]
    for number, promise in enumerate(catalogue["promise"], 1):
        lines.append(f"| {number} | {promise['says']} | {links(promise)} |")
    for group, title in catalogue["groups"].items():
        lines += ["", f"## {group}. {title}", "", "| # | fault | what happens | tests |"]
        lines.append("| --- | --- | --- | --- |")
        lines += map(line, rows[group])
    return "\n".join(lines) + "\n"


def main(words: list[str]) -> int:
    """Writes the page; or prints the tests of the rows that are named."""
    catalogue = load()
    wrong = faults(catalogue)
    if wrong:
        sys.stderr.write("\n".join(wrong) + "\n")
        return 1
    if words:
        known = {row["id"]: row for row in catalogue["row"]}
        if unknown := [word for word in words if word not in known]:
            sys.stderr.write(f"no such row: {', '.join(unknown)}\n")
            return 2
        named = [t for w in words for key in ("tests", "gpu") for t in known[w].get(key, [])]
        sys.stdout.write("".join(f"{test}\n" for test in dict.fromkeys(named)))
        return 0
    PAGE.write_text(page(catalogue), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
