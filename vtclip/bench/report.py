# SPDX-License-Identifier: Apache-2.0
"""What a benchmark's folder says: its rows read, checked and grouped, with published numbers.

Rows of differing settings, revisions or machines stay separate, or have a note.
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
    as_text,
    average_of,
    backbone_of,
    group_by,
    groups_of,
    in_order,
    method_of,
)
from vtclip.bench.published import Published, matching, read_published
from vtclip.bench.rows import Row, is_finished, place_of, read_lines, time_of
from vtclip.names import nearest
from vtclip.schemas import (
    by_name,
    check,
    maybe,
    number,
    obj,
    rows,
    share,
    table,
    text,
    tuple_of,
    whole,
)

_measured = ("nll", "ece", "nll_scaled", "ece_scaled", "temperature")
_bins = maybe(rows(tuple_of(maybe(number()), maybe(number()), whole())))
_metrics = table(
    {
        **{f"{name}?": maybe(number()) for name in _measured},
        "interval95?": maybe(tuple_of(share, share)),
        "count?": maybe(whole()),
        "per_class?": maybe(by_name(maybe(share))),
        "reliability?": maybe(table({"raw?": _bins, "scaled?": _bins})),
    }
)
_both = {"zero_shot?": _metrics, "adapted?": _metrics}
# what tables and pages read of a row, beside what `check_row` asks for by itself
_SCHEMA = table(
    {
        **_both,
        "config?": table({"fit?": maybe(obj)}),
        "base?": maybe(table(_both)),
        "new?": maybe(table(_both)),
        "seconds?": maybe(by_name(number())),
        "memory_mb?": maybe(by_name(maybe(number()))),
        "peak_memory_mb?": maybe(number()),
        **{f"{name}?": maybe(obj) for name in ("versions", "digests", "environment")},
        **{f"{name}?": maybe(text) for name in ("key", "skipped", "failed", "split", "revision")},
    }
)


@dataclass(frozen=True)
class Comparison:
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
class BenchReport:
    """groups: sources, the protocol's data sets first; average: over them, where there are several.

    missed: rows of jobs that were skipped or failed. comparisons: None where it was not asked for.
    """

    groups: tuple[Group, ...]
    average: Group | None
    rows: tuple[Row, ...]
    missed: tuple[Row, ...]
    notes: tuple[str, ...]
    comparisons: tuple[Comparison, ...] | None

    @property
    def tables(self) -> list[Group]:
        """The average, where there is one, and all groups."""
        return [*([] if self.average is None else [self.average]), *self.groups]

    @property
    def lines(self) -> list[str]:
        return in_order({name for group in self.groups for name in group.lines})


def read_benchmark(folder: str | Path, strict: bool = True) -> tuple[list[Row], list[str]]:
    """The rows of all results*.jsonl in `folder`, and a note on each line that is not one.

    A broken line is left out. A whole row with impossible values is a ValueError, or a note too
    where `strict` is False.
    """
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise ValueError(f"OUT must be a folder of vtclip bench, got {str(folder)!a}")
    rows: list[Row] = []
    notes = []
    for where, row in read_lines(folder):
        if row is None:
            notes.append(f"{where}: cut off or broken, not counted.")
            continue
        if isinstance(row, ValueError):
            notes.append(f"{where}: damaged after it was written, not counted.")
            continue
        try:
            rows.append(check_row(row, where))
        except ValueError as error:
            if strict:
                raise
            notes.append(f"{error}; not counted.")
    return rows, notes


def check_finished(folder: Path, report: BenchReport) -> None:
    """Refuse a folder without a finished run, saying what it does hold."""
    if report.rows:
        return
    if report.missed:
        raise ValueError(f"OUT holds no finished run: {len(report.missed)} were skipped or failed")
    what = "no whole row in its results*.jsonl"
    if not any(folder.glob("results*.jsonl")):
        what = "no results*.jsonl"
    raise ValueError(f"OUT {str(folder)!a} holds {what}; vtclip bench writes them")


def check_row(row: Any, where: str) -> Row:
    """`row`, or a ValueError that says where it is and what is wrong with it."""
    if not isinstance(row, dict):
        raise ValueError(f"{where}: a row must be an object, got {type(row).__name__}")
    kinds: dict[str, type] = {"source": str, "method": str, "shots": int, "seed": int}
    if is_finished(row):
        kinds |= {"zero_shot": dict, "adapted": dict, "config": dict}
    for name, kind in kinds.items():
        value = row.get(name)
        if isinstance(value, kind) and not isinstance(value, bool):
            continue
        if name in row or is_finished(row):
            got = type(value).__name__
            raise ValueError(f"{where}: {name} must be of type {kind.__name__}, got {got}")
    check(row, _SCHEMA, where)
    if not is_finished(row):
        return row
    accuracies = {part: row[part].get("accuracy") for part in ("zero_shot", "adapted")}
    mean = row.get("harmonic_mean")
    if mean is not None:
        for part in ("base", "new"):
            for key in ("zero_shot", "adapted"):
                accuracies[f"{part} {key}"] = _at(row, part, key, "accuracy")
        accuracies |= {f"harmonic_mean {key}": _at(mean, key) for key in ("zero_shot", "adapted")}
    for name, value in accuracies.items():
        if isinstance(value, bool) or not isinstance(value, float | int) or not 0 <= value <= 1:
            raise ValueError(f"{where}: accuracy of {name} must lie in 0..1, got {value!a}")
    return row


def _at(value: Any, *names: str) -> Any:
    for name in names:
        value = value.get(name) if isinstance(value, dict) else None
    return value


def latest(rows: Iterable[Row]) -> tuple[list[Row], int]:
    """One row for each job, settings and revision, the one written last; how many were replaced.

    A job that was skipped or failed and has a finished row is not counted as missed.
    """
    by_job: dict[str, Row] = {}
    ordered = sorted(rows, key=time_of)
    for row in ordered:
        job = [row.get(name) for name in ("key", "job", "config", "revision")]
        by_job[json.dumps([place_of(row), is_finished(row), job], sort_keys=True)] = row
    done = {place_of(row) for row in by_job.values() if is_finished(row)}
    rows_kept = [row for row in by_job.values() if is_finished(row) or place_of(row) not in done]
    return rows_kept, len(ordered) - len(by_job)


def mixture_notes(rows: Sequence[Row]) -> list[str]:
    """A note for each thing that rows of one benchmark should share and do not."""

    def version(name: str) -> list[str]:
        return [as_text((row.get("versions") or {}).get(name)) for row in rows]

    shared = {
        "revisions": [as_text(row.get("revision"))[:12] for row in rows],
        "kinds of device": [as_text(row.get("device")) for row in rows],
        "versions of vtclip": version("vtclip"),
        "versions of torch": version("torch"),
    }
    notes = []
    for what, values in shared.items():
        counts = {value: values.count(value) for value in dict.fromkeys(values)}
        if len(counts) > 1:
            listed = ", ".join(f"{value} ({count} rows)" for value, count in counts.items())
            notes.append(f"The rows are of {len(counts)} {what}: {listed}.")
    dirty = sum(str(row.get("revision") or "").endswith("-dirty") for row in rows)
    if dirty:
        notes.append(f"{dirty} rows come from code with changes that no revision holds.")
    return notes


def missing_seed_notes(groups: Sequence[Group]) -> list[str]:
    """A note on every line whose cells have not all the seeds of its source."""
    notes = []
    for group in groups:
        for line, cells in group.lines.items():
            few = ", ".join(str(shots) for shots, cell in cells.items() if cell.missing)
            if few:
                notes.append(f"{group.title}, {line}: seeds are missing at {few} shots.")
    return notes


def compared_with_published(groups: Sequence[Group]) -> list[Comparison]:
    """Our numbers with the published ones, for the sets that tables are published of.

    Only numbers of the same set, backbone, number of shots and part of the classes are put next to
    each other. Zero-shot is there once.
    """
    comparisons = []
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
                comparisons.append(Comparison(group, line, number, cell, tuple(known)))
    return comparisons


def make_report(
    rows: Sequence[Row],
    notes: Sequence[str] = (),
    methods: Sequence[str] | None = None,
    published: bool = False,
) -> BenchReport:
    """Groups, their average, the comparison and what to know of the rows.

    methods: keep only these and zero-shot. A method without rows is a ValueError.
    """
    current, replaced = latest(rows)
    known = sorted({row["method"] for row in current if "method" in row})
    for method in methods or ():
        if method not in (*known, "zeroshot"):
            raise ValueError(f"--method: no row is of {method!a}{nearest(method, known)}")
    if methods:
        current = [row for row in current if row.get("method") in (*methods, "zeroshot")]
    done = [row for row in current if is_finished(row)]
    lost = [row for row in current if not is_finished(row)]
    groups = groups_of(done, lost)
    average, left_out = average_of(groups)
    remarks = [*notes]
    if replaced:
        remarks.append(f"{replaced} rows were replaced by later rows of the same jobs.")
    remarks += mixture_notes(done)
    whole = [group for group in groups if group.part in (None, "base")]
    named = any("(" in line for group in groups for line in group.lines)
    if named or len(whole) > len(group_by(done, lambda row: row["source"])):
        remarks.append("Rows of differing settings are kept apart; brackets say what differs.")
    remarks += [*missing_seed_notes(groups), *left_out]
    if published:
        files = {backbone_of(row)[1] for row in done if row["source"] in read_published().sets}
        remarks += sorted(text for text in files if text is not None)
    return BenchReport(
        tuple(groups),
        average,
        tuple(done),
        tuple(lost),
        tuple(remarks),
        tuple(compared_with_published(groups)) if published else None,
    )
