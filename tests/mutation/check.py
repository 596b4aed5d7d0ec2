# SPDX-License-Identifier: Apache-2.0
"""How many small changes of the sources the tests notice: docs/mutation.md.

python tests/mutation/check.py [--count N] [--only GLOB] [--out FILE]    the same sample every time
python tests/mutation/check.py --retry [--only GLOB] [--out FILE]        what survived in it, again
python tests/mutation/check.py --list [--count N] [--only GLOB]          how many lines of each file

universalmutator proposes changes of one line; targets.toml says which tests must notice those of a
file. Of a line at most one change is tried. FILE (results.csv) is written after every change.
"""

from __future__ import annotations

import argparse
import csv
import fnmatch
import os
import platform
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # which pytest brings along

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
from changes import Change, Judge, proposals  # noqa: E402
from copy_of import Copy, Verdict, preload  # noqa: E402
from extension import Extension  # noqa: E402

ROOT = HERE.parents[1]
COUNT, SEED, TRIED = 211, 0, 3  # TRIED: changes of a line before the next line
COLUMNS = ("room", "file", "line", "before", "after", "result", "by", "seconds", "commit", "tools")
RAN = ("killed", "timeout", "survived")
BASE_LIMIT, TIMES = 20.0, 3.0  # seconds, and times what the tests take unchanged


class Target(NamedTuple):
    """A source, and pytest's arguments that must notice a change of it."""

    room: str
    file: str
    tests: tuple[str, ...]
    options: tuple[str, ...]


def load(path: Path) -> dict[str, Any]:
    with open(path, "rb") as file:
        return tomllib.load(file)


def targets(table: dict[str, Any], root: Path) -> Iterator[Target]:
    """own: the tests of a file by its name, else the room's `pattern`; then the room's `all`."""
    for name, room in table.items():
        files = sorted({p for glob in room["files"] for p in root.glob(glob)})
        for path in files:
            file = path.relative_to(root).as_posix()
            if file in room.get("without", {}):
                continue
            own = room.get("own", {}).get(path.name)
            if own is None:
                by_name = room.get("pattern", "").format(path.stem)
                own = [by_name] if by_name and (root / by_name).is_file() else []
            tests = [*own, *(t for t in room.get("all", []) if t not in own)]
            yield Target(name, file, tuple(tests), tuple(room.get("options", [])))


def shares(sizes: dict[str, int], count: int) -> dict[str, int]:
    """`count` in proportion to sizes, by largest remainders, ties by name."""
    total = sum(sizes.values())
    exact = {name: count * size / total for name, size in sizes.items()} if total else {}
    given = {name: int(share) for name, share in exact.items()}
    rest = sorted(exact, key=lambda name: (given[name] - exact[name], name))
    for name in rest[: count - sum(given.values())]:
        given[name] += 1
    return given


def drawn(changes: list[Change], seed: int) -> list[list[Change]]:
    """The lines in random order, and of each up to TRIED changes, of which one is to be run."""
    draw = random.Random(f"{seed} {changes[0].file}") if changes else random.Random(0)
    by_line: dict[int, list[Change]] = {}
    for change in changes:
        by_line.setdefault(change.line, []).append(change)
    lines = [draw.sample(of_line, min(TRIED, len(of_line))) for of_line in by_line.values()]
    draw.shuffle(lines)
    return lines


class Sample(NamedTuple):
    """wanted: of how many of the lines one change is to be run, taken in order."""

    target: Target
    lines: list[list[Change]]
    wanted: int


def sample(table: dict[str, Any], root: Path, count: int, seed: int, only: str) -> list[Sample]:
    """What is drawn of every file, rooms by their shares and files by their lines."""
    chosen: list[Sample] = []
    of_room = shares({name: room["share"] for name, room in table.items()}, count)
    everything = list(targets(table, root))
    for name in table:
        members = [t for t in everything if t.room == name]
        if not any(fnmatch.fnmatch(t.file, only) for t in members):
            continue
        lines = {t.file: drawn(proposals(root / t.file, t.file), seed) for t in members}
        wanted = shares({file: len(found) for file, found in lines.items()}, of_room[name])
        for target in members:
            if wanted[target.file] and fnmatch.fnmatch(target.file, only):
                chosen.append(Sample(target, lines[target.file], wanted[target.file]))
    return chosen


def run_change(copy: Copy, extension: Extension | None, target: Target, change: Change,
               limit: float) -> Verdict:  # fmt: skip
    """The verdict about one change; the copy is as before at the end."""
    path = copy.tree / change.file
    before = path.read_text(encoding="utf-8")
    begun = time.monotonic()
    path.write_text(change.applied(before), encoding="utf-8")
    try:
        if extension is not None:
            why = extension.changed(path)
            if why:
                return Verdict(f"dropped: {why}", "", time.monotonic() - begun)
        verdict = copy.test([*target.tests, *target.options], limit)
        if verdict.by.startswith("pytest's exit") and extension is None:
            module = change.file.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
            if not copy.imports(module):
                verdict = verdict._replace(result="dropped: import", by="")
    finally:
        path.write_text(before, encoding="utf-8")
        if extension is not None:
            extension.link({})
    return verdict._replace(seconds=time.monotonic() - begun)


class Results:
    """The rows of a CSV file, one per change; written again whenever one is added."""

    def __init__(self, path: Path, root: Path) -> None:
        self.path, self.rows = path, dict[tuple[str, str, str], dict[str, str]]()
        if path.is_file():
            with open(path, newline="", encoding="utf-8") as file:
                self.rows = {self.key(row): row for row in csv.DictReader(file)}
        git = ["git", "rev-parse", "--short=10", "HEAD"]
        done = subprocess.run(git, cwd=root, capture_output=True, text=True)
        self.commit = done.stdout.strip()

    @staticmethod
    def key(row: dict[str, str]) -> tuple[str, str, str]:
        return row["file"], row["line"], row["after"]

    def find(self, change: Change) -> dict[str, str] | None:
        return self.rows.get((change.file, str(change.line), change.shown[1]))

    def add(self, target: Target, change: Change, verdict: Verdict) -> dict[str, str]:
        cells = (target.room, change.file, str(change.line), *change.shown, verdict.result,
                 verdict.by, f"{verdict.seconds:.1f}", self.commit, tools())  # fmt: skip
        row = dict(zip(COLUMNS, cells, strict=True))
        self.rows[self.key(row)] = row
        fresh = self.path.with_suffix(".new")
        with open(fresh, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            writer.writeheader()
            ordered = sorted(self.rows.values(), key=lambda r: (r["file"], int(r["line"])))
            writer.writerows(ordered)
        os.replace(fresh, self.path)
        return row


def tools() -> str:
    names = ("torch", "pytest", "universalmutator")
    versions = [f"{name} {metadata.version(name)}" for name in names]
    return ", ".join([f"python {platform.python_version()}", *versions])


class Run:
    """The sample against one copy."""

    def __init__(self, copy: Copy, results: Results, fixed: float | None) -> None:
        self.copy, self.results, self.fixed = copy, results, fixed
        self.unchanged: dict[tuple[str, tuple[str, ...]], float] = {}
        self.extension: Extension | None = None

    def sample(self, target: Target, lines: list[list[Change]], wanted: int) -> None:
        """Changes of `wanted` lines, those with a row in the results among them."""
        judge = self.judge(target)
        ran = 0
        for line in lines:
            if ran == wanted:
                break
            for change in line:
                known = self.results.find(change)
                if known is None:
                    known = self.note(target, change, self.judged(judge, target, change))
                if known["result"] in RAN:
                    ran += 1
                    break

    def again(self, target: Target, lines: list[list[Change]]) -> None:
        """What survived of them, once more."""
        judge = self.judge(target)
        for change in (change for line in lines for change in line):
            row = self.results.find(change)
            if row is not None and row["result"] == "survived":
                self.note(target, change, self.judged(judge, target, change))

    def judge(self, target: Target) -> Judge:
        path = self.copy.tree / target.file
        return Judge(path.read_text(encoding="utf-8"), path.suffix)

    def judged(self, judge: Judge, target: Target, change: Change) -> Verdict:
        why = judge.why_not(change)
        return Verdict(f"dropped: {why}", "", 0.0) if why else self.one(target, change)

    def one(self, target: Target, change: Change) -> Verdict:
        of_cpp = target.file.startswith("csrc/")
        if of_cpp and self.extension is None:
            self.extension = Extension(self.copy.tree)
        extension = self.extension if of_cpp else None
        verdict = run_change(self.copy, extension, target, change, self.limit(target))
        if verdict.result == "no test":
            raise SystemExit(f"{target.file}: its tests choose no test")
        return verdict

    def limit(self, target: Target) -> float:
        """Seconds for the tests of a change; ends the program where one fails unchanged."""
        if self.fixed is not None:
            return self.fixed
        for test in target.tests:
            if (test, target.options) in self.unchanged:
                continue
            verdict = self.copy.test([test, *target.options], 600.0)
            if verdict.result not in ("survived", "no test"):
                sys.stderr.write(self.copy.output()[-4000:])
                raise SystemExit(f"{target.file}: unchanged, its tests fail: {verdict}")
            sys.stdout.write(f"{test}: unchanged {verdict.seconds:.1f} s\n")
            self.unchanged[test, target.options] = verdict.seconds
        return BASE_LIMIT + TIMES * sum(self.unchanged[t, target.options] for t in target.tests)

    def note(self, target: Target, change: Change, verdict: Verdict) -> dict[str, str]:
        row = self.results.add(target, change, verdict)
        said = [row[name] for name in ("file", "line", "after", "result", "by")]
        sys.stdout.write(f"{verdict.seconds:5.1f} s  {'  '.join(said)}\n")
        sys.stdout.flush()
        return row


def summary(results: Results) -> str:
    """Counts of each room."""
    kinds = (
        *RAN,
        *(f"dropped: {why}" for why in ("syntax", "text", "import", "compile", "object")),
    )
    names = sorted({row["room"] for row in results.rows.values()})
    lines = [f"{'room':12}" + "".join(f"{kind:>18}" for kind in kinds)]
    for name in [*names, "all"]:
        counts = Counter(r["result"] for r in results.rows.values() if name in ("all", r["room"]))
        lines.append(f"{name:12}" + "".join(f"{counts[kind]:18}" for kind in kinds))
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--count", type=int, default=COUNT)
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--only", default="*", metavar="GLOB", help="of the sources' paths")
    parser.add_argument("--out", type=Path, default=HERE / "results.csv")
    parser.add_argument("--root", type=Path, default=ROOT)
    parser.add_argument("--table", type=Path, default=HERE / "targets.toml")
    parser.add_argument("--limit", type=float, help="seconds of a run; the tests are not timed")
    parser.add_argument("--retry", action="store_true")
    parser.add_argument("--list", action="store_true")
    given = parser.parse_args()
    table = load(given.table)
    chosen = sample(table["room"], given.root, given.count, given.seed, given.only)
    if given.list:
        for target, lines, wanted in chosen:
            sys.stdout.write(f"{target.file}: {wanted} of {len(lines)} lines\n")
        return
    preload(table.get("preload", []))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended"))  # the copy goes
    results = Results(given.out, given.root)
    with tempfile.TemporaryDirectory(prefix="mutation-") as folder:
        run = Run(Copy(given.root.resolve(), Path(folder)), results, given.limit)
        for target, lines, wanted in chosen:
            if given.retry:
                run.again(target, lines)
            else:
                run.sample(target, lines, wanted)
    sys.stdout.write(summary(results))


if __name__ == "__main__":
    main()
