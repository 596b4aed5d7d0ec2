# SPDX-License-Identifier: Apache-2.0
"""What a benchmark's folder says: its rows read and checked, grouped, and beside published numbers.

Rows of differing settings, revisions or machines are shown as what they are: apart, or with a note.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vtclip.bench.cells import (
    Cell,
    Group,
    Row,
    average_of,
    backbone_of,
    by,
    groups_of,
    in_order,
    method_of,
    shown,
)
from vtclip.bench.published import Published, matching, read_published
from vtclip.names import nearest

PLACE = ("source", "method", "shots", "seed")


@dataclass(frozen=True)
class Beside:
    """One of our numbers and what was printed for the same set, backbone and shots, or nothing."""

    group: Group
    line: str
    shots: int
    cell: Cell
    published: tuple[Published, ...]

    @property
    def difference(self) -> float | None:
        """Ours less the published number, in points."""
        if not self.published:
            return None
        return 100 * self.cell.mean - self.published[0].accuracy


@dataclass(frozen=True)
class Report:
    """groups: sources, the protocol's data sets first; average: over them, where there are several.

    missed: rows of jobs that were skipped or failed. beside: None where it was not asked for.
    """

    groups: tuple[Group, ...]
    average: Group | None
    rows: tuple[Row, ...]
    missed: tuple[Row, ...]
    notes: tuple[str, ...]
    beside: tuple[Beside, ...] | None

    @property
    def tables(self) -> list[Group]:
        """The average, where there is one, and all groups."""
        return [*([] if self.average is None else [self.average]), *self.groups]

    @property
    def lines(self) -> list[str]:
        return in_order({name for group in self.groups for name in group.lines})


def read_rows(folder: str | Path) -> tuple[list[Row], list[str]]:
    """The rows of all results*.jsonl in `folder`, and a note on each line that is no row.

    A line that a kill cut off is passed over. A whole row with impossible values is a ValueError,
    and so is a folder without rows.
    """
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise ValueError(f"OUT must be a folder of vtclip bench, got {str(folder)!a}")
    rows: list[Row] = []
    notes = []
    files = sorted(folder.glob("results*.jsonl"))
    for path in files:
        for number, line in enumerate(path.read_bytes().split(b"\n"), 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                notes.append(f"{path.name}, line {number}: cut off or broken, not counted.")
                continue
            rows.append(check_row(row, f"{path.name}, line {number}"))
    if not rows:
        what = "no whole row in its results*.jsonl" if files else "no results*.jsonl"
        raise ValueError(f"OUT {str(folder)!a} holds {what}; vtclip bench writes them")
    return rows, notes


def finished(row: Row) -> bool:
    return "skipped" not in row and "failed" not in row


def check_row(row: Any, where: str) -> Row:
    """`row`, or a ValueError that says where it is and what is wrong with it."""
    if not isinstance(row, dict):
        raise ValueError(f"{where}: a row must be an object, got {type(row).__name__}")
    kinds: dict[str, type] = {"source": str, "method": str, "shots": int, "seed": int}
    if finished(row):
        kinds |= {"zero_shot": dict, "adapted": dict, "config": dict}
    for name, kind in kinds.items():
        value = row.get(name)
        if isinstance(value, kind) and not isinstance(value, bool):
            continue
        if name in row or finished(row):
            got = type(value).__name__
            raise ValueError(f"{where}: {name} must be of type {kind.__name__}, got {got}")
    if not finished(row):
        return row
    found = {part: row[part].get("accuracy") for part in ("zero_shot", "adapted")}
    mean = row.get("harmonic_mean")
    if mean is not None:
        for part in ("base", "new"):
            for key in ("zero_shot", "adapted"):
                found[f"{part} {key}"] = _at(row, part, key, "accuracy")
        found |= {f"harmonic_mean {key}": _at(mean, key) for key in ("zero_shot", "adapted")}
    for name, value in found.items():
        if isinstance(value, bool) or not isinstance(value, float | int) or not 0 <= value <= 1:
            raise ValueError(f"{where}: accuracy of {name} must lie in 0..1, got {value!a}")
    return row


def _at(value: Any, *names: str) -> Any:
    for name in names:
        value = value.get(name) if isinstance(value, dict) else None
    return value


def place_of(row: Row) -> tuple[Any, ...]:
    return tuple(row.get(name) for name in PLACE)


def latest(rows: Iterable[Row]) -> tuple[list[Row], int]:
    """One row for each job, settings and revision, the one written last; how many were replaced.

    A job that was skipped or failed and has a finished row is not counted as missed.
    """
    found: dict[str, Row] = {}
    ordered = sorted(rows, key=lambda row: float(row.get("time") or 0))
    for row in ordered:
        job = [row.get(name) for name in ("key", "job", "config", "revision")]
        found[json.dumps([place_of(row), finished(row), job], sort_keys=True)] = row
    done = {place_of(row) for row in found.values() if finished(row)}
    kept = [row for row in found.values() if finished(row) or place_of(row) not in done]
    return kept, len(ordered) - len(found)


def mixed(rows: Sequence[Row]) -> list[str]:
    """A note for each thing that rows of one benchmark should share and do not."""

    def version(name: str) -> list[str]:
        return [shown((row.get("versions") or {}).get(name)) for row in rows]

    things = {
        "revisions": [shown(row.get("revision"))[:12] for row in rows],
        "kinds of device": [shown(row.get("device")) for row in rows],
        "versions of vtclip": version("vtclip"),
        "versions of torch": version("torch"),
    }
    notes = []
    for what, values in things.items():
        counts = {value: values.count(value) for value in dict.fromkeys(values)}
        if len(counts) > 1:
            listed = ", ".join(f"{value} ({count} rows)" for value, count in counts.items())
            notes.append(f"The rows are of {len(counts)} {what}: {listed}.")
    dirty = sum(str(row.get("revision") or "").endswith("-dirty") for row in rows)
    if dirty:
        notes.append(f"{dirty} rows come from code with changes that no revision holds.")
    return notes


def uneven(groups: Sequence[Group]) -> list[str]:
    """A note on every line whose cells have not all the seeds of its group."""
    notes = []
    for group in groups:
        seeds = {
            seed for line in group.lines.values() for c in line.values() for seed in c.accuracy
        }
        for line, cells in group.lines.items():
            few = [n for n, cell in cells.items() if cell.rows and set(cell.accuracy) != seeds]
            if few:
                at = ", ".join(map(str, few))
                notes.append(f"{group.title}, {line}: seeds are missing at {at} shots.")
    return notes


def compare(groups: Sequence[Group]) -> list[Beside]:
    """Ours beside published numbers, for the sets that tables are published of.

    Only numbers of the same set, backbone, number of shots and part of the classes are put beside
    each other. Zero-shot is there once.
    """
    found = []
    for group in groups:
        if group.name is None or group.backbone is None:
            continue
        for line, cells in group.lines.items():
            zero = method_of(line) == "zeroshot"
            for shots, cell in list(cells.items())[: 1 if zero else None]:
                number = 0 if zero else shots
                known = matching(
                    method_of(line),
                    group.name,
                    group.backbone,
                    number,
                    part=group.part,
                    templates=group.templates,
                )
                found.append(Beside(group, line, number, cell, tuple(known)))
    return found


def make_report(
    rows: Sequence[Row],
    notes: Sequence[str] = (),
    methods: Sequence[str] | None = None,
    published: bool = False,
) -> Report:
    """Groups, their average, the comparison and what to know of the rows.

    methods: keep only these, beside zero-shot. A method without rows is a ValueError.
    """
    kept, replaced = latest(rows)
    known = sorted({row["method"] for row in kept if "method" in row})
    for method in methods or ():
        if method not in (*known, "zeroshot"):
            raise ValueError(f"--method: no row is of {method!a}{nearest(method, known)}")
    if methods:
        kept = [row for row in kept if row.get("method") in (*methods, "zeroshot")]
    done = [row for row in kept if finished(row)]
    if not done:
        raise ValueError(f"OUT holds no finished run: {len(kept)} were skipped or failed")
    groups = groups_of(done)
    remarks = [*notes]
    if replaced:
        remarks.append(f"{replaced} rows were replaced by later rows of the same jobs.")
    remarks += mixed(done)
    whole = [group for group in groups if group.part in (None, "base")]
    named = any("(" in line for group in groups for line in group.lines)
    if named or len(whole) > len(by(done, lambda row: row["source"])):
        remarks.append("Rows of differing settings are kept apart; brackets say what differs.")
    remarks += uneven(groups)
    if published:
        files = {backbone_of(row)[1] for row in done if row["source"] in read_published().sets}
        remarks += sorted(text for text in files if text is not None)
    return Report(
        tuple(groups),
        average_of(groups),
        tuple(done),
        tuple(row for row in kept if not finished(row)),
        tuple(remarks),
        tuple(compare(groups)) if published else None,
    )
