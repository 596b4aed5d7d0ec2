# SPDX-License-Identifier: Apache-2.0
"""A report's cells and a benchmark's runs as CSV, and the cells as JSON for `bench --json`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from vtclip.bench.cells import Cell, Group, group_by, method_of
from vtclip.bench.published import read_published
from vtclip.bench.report import BenchReport, Comparison
from vtclip.bench.rows import PLACE, Row, reason_of
from vtclip.bench.tables import METRIC_TITLES, mean_of
from vtclip.files import csv_lines

CSV_HEAD = [
    *("source", "set", "backbone", "part", "method", "shots", "seeds", "accuracy", "half_interval"),
    *(
        "low",
        "high",
        "interval",
        "nll",
        "ece",
        "nll_scaled",
        "ece_scaled",
        "temperature",
        "train_seconds",
    ),
    *("total_seconds", "peak_memory_mb", "published", "difference", "published_in", "caveat"),
]
COST = {"train_seconds": ("seconds", "train"), "peak_memory_mb": ("peak_memory_mb",)}
METRIC_COLUMNS = ("nll", "ece", "nll_scaled", "ece_scaled")
TABLE_HEAD = (
    *("source", "method", "shots", "seeds", "accuracy", "low", "high", "interval", "best"),
    *(*METRIC_COLUMNS, *COST, "test_images", "missing"),
)


def csv_text(columns: Iterable[str], rows: Iterable[Mapping[str, Any]]) -> str:
    """Rows by column; what a row lacks is empty, and what has no column is left out."""
    head = list(columns)
    return csv_lines([head, *([row.get(name) for name in head] for row in rows)])


def _percent(share: float | None) -> str | None:
    return None if share is None else f"{100 * share:.4f}"


def report_csv(report: BenchReport) -> str:
    """Every cell as a line, with what was published where it was compared."""
    rows = []
    comparisons = {
        (id(comparison.group), comparison.line, comparison.shots): comparison
        for comparison in report.comparisons or ()
    }
    for group in report.tables:
        for line, cells in group.lines.items():
            for shots, cell in cells.items():
                number = 0 if method_of(line) == "zeroshot" else shots
                compared = comparisons.get((id(group), line, number))
                rows.append(_csv_row(group, line, shots, cell, compared))
    return csv_text(CSV_HEAD, rows)


def _csv_row(
    group: Group, line: str, shots: int, cell: Cell, compared: Comparison | None
) -> dict[str, Any]:
    row: dict[str, Any] = {
        "source": group.title,
        "set": group.name,
        "backbone": group.backbone,
        "part": group.part,
        "method": line,
        "shots": shots,
        "seeds": " ".join(map(str, cell.accuracy)),
        "accuracy": _percent(cell.mean),
        "half_interval": _percent(cell.half),
        **dict(zip(("low", "high"), map(_percent, cell.bounds or (None, None)), strict=True)),
        "interval": cell.interval_kind,
        **{name: cell.metrics.get(name) for name in METRIC_TITLES},
        "train_seconds": mean_of(cell.rows, "seconds", "train"),
        "total_seconds": mean_of(cell.rows, "seconds", "total"),
        "peak_memory_mb": mean_of(cell.rows, "peak_memory_mb"),
    }
    if compared is not None and compared.published:
        first = compared.published[0]
        row |= {"published": first.accuracy, "difference": f"{compared.difference:.4f}"}
        row |= {"published_in": read_published().sources[first.source]["where"]}
        row |= {"caveat": first.caveat}
    return row


def summary_of(report: BenchReport) -> dict[str, Any]:
    """Cells (source x method x shots), their means over sources and the notes; JSON-able.

    A cell has the columns TABLE_HEAD, numbers as shares. Where no run finished its accuracy is
    None; `missing` says why seeds are not there.
    """
    lost = group_by(report.missed, lambda row: tuple(map(row.get, PLACE[:3])))
    cells, groups = [], {group.source: group for group in report.groups}
    for group in report.groups:
        cells += _group_cells(group, group.source, lost)
    for (source, method, shots), rows in lost.items():
        known = groups[source].lines.get(method, {}) if source in groups else {}
        if shots not in known:
            cells.append(_summary_cell(source, method, shots, None, False, _reasons(rows)))
    means = [] if report.average is None else _group_cells(report.average, report.average.title, {})
    return {"cells": cells, "means": means, "notes": list(report.notes)}


def _group_cells(
    group: Group, source: str, lost: Mapping[tuple[Any, ...], Sequence[Row]]
) -> list[dict[str, Any]]:
    summary = []
    for shots in group.shots:
        best = group.best(shots)
        for line, cells in group.lines.items():
            if shots in cells:
                why = _reasons(lost.get((source, method_of(line), shots), ()))
                if cells[shots].missing and not why:
                    why = [f"{cells[shots].shortfall}; the others have not run"]
                row = _summary_cell(source, line, shots, cells[shots], line in best, why)
                summary.append({**row, "test_images": group.test_images})
    return summary


def _summary_cell(
    source: str, method: str, shots: int, cell: Cell | None, best: bool, missing: Sequence[str]
) -> dict[str, Any]:
    row: dict[str, Any] = {**dict.fromkeys(TABLE_HEAD), "source": source, "method": method}
    row |= {"shots": shots, "seeds": [], "best": best, "missing": list(missing)}
    if cell is None:
        return row
    row |= {"seeds": list(cell.accuracy), "accuracy": cell.mean}
    if (bounds := cell.bounds) is not None:
        row["low"], row["high"] = bounds
        row["interval"] = cell.interval_kind
    row |= {name: cell.metrics.get(name) for name in METRIC_COLUMNS}
    return row | {name: mean_of(cell.rows, *path) for name, path in COST.items()}


def _reasons(rows: Iterable[Row]) -> list[str]:
    """Why jobs have no numbers, each reason once with its seeds."""
    seeds: dict[str, list[int]] = {}
    for row in rows:
        seeds.setdefault(reason_of(row), []).append(int(row.get("seed", 0)))
    return [
        f"seed{'s' * (len(numbers) > 1)} {', '.join(map(str, sorted(numbers)))} {reason}"
        for reason, numbers in seeds.items()
    ]


def summary_csv(summary: Mapping[str, Any]) -> str:
    """table.csv: every cell and mean as a line, accuracy and its interval in percent."""
    rows = []
    for cell in (*summary["cells"], *summary["means"]):
        joined = {"seeds": " ".join(map(str, cell["seeds"])), "missing": "; ".join(cell["missing"])}
        shares = {name: _percent(cell[name]) for name in ("accuracy", "low", "high")}
        rows.append({**cell, **joined, **shares, "best": int(cell["best"])})
    return csv_text(TABLE_HEAD, rows)


def runs_csv(rows: Iterable[Row]) -> str:
    """results.csv: every run's scalars, in the columns that any run has."""
    flat = [flat_row(row) for row in rows]
    return csv_text(dict.fromkeys(name for row in flat for name in row), flat)


def flat_row(row: Mapping[str, Any]) -> dict[str, Any]:
    """The scalars of a row with dotted names; per-class numbers and lists are in its run."""
    flat: dict[str, Any] = {}
    for name, value in row.items():
        if name == "interval95":
            flat |= {"interval95.low": value[0], "interval95.high": value[1]}
        elif isinstance(value, Mapping) and name != "per_class":
            flat |= {f"{name}.{inner}": scalar for inner, scalar in flat_row(value).items()}
        elif value is None or isinstance(value, str | int | float):
            flat[name] = value
    return flat
