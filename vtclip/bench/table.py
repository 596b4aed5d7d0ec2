# SPDX-License-Identifier: Apache-2.0
"""What the rows of a benchmark say together: means over seeds with intervals, Markdown and CSV.

One seed, or a method that learns nothing from the shots, has no spread over seeds: its interval is
Wilson's of the test set (metrics.wilson_interval).
"""

from __future__ import annotations

import csv
import io
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from vtclip.files import write_atomic
from vtclip.fit_command import METHODS
from vtclip.heads import HEADS
from vtclip.methods import takes_images
from vtclip.metrics import wilson_interval

from .intervals import seed_interval
from .rows import is_finished

ZERO_SHOT = "zeroshot"
MEAN = "mean of sources"
# cell's name -> where a row has it
NUMBERS = {
    "nll": ("adapted", "nll"),
    "ece": ("adapted", "ece"),
    "nll_scaled": ("adapted", "nll_scaled"),
    "ece_scaled": ("adapted", "ece_scaled"),
    "train_seconds": ("seconds", "train"),
    "peak_memory_mb": ("peak_memory_mb",),
}
DETAILS: dict[str, tuple[str, Callable[[float], str]]] = {
    "nll": ("NLL", "{:.4f}".format),
    "ece": ("ECE", "{:.4f}".format),
    "nll_scaled": ("NLL at T", "{:.4f}".format),
    "ece_scaled": ("ECE at T", "{:.4f}".format),
    "train_seconds": ("train s", "{:.2f}".format),
    "peak_memory_mb": ("MB", "{:.0f}".format),
}
CSV_COLUMNS = (
    "source", "method", "shots", "seeds", "accuracy", "low", "high", "interval", "best",
    *NUMBERS, "test_images", "missing",
)  # fmt: skip


def summarise(rows: Sequence[Mapping[str, Any]], sources: Sequence[str] = ()) -> dict[str, Any]:
    """Cells (source x method x shots) and their means over sources; JSON-able.

    A cell has the CSV's columns; accuracy None where no run finished, and `missing` says why runs
    are not there. sources: those that come first.
    """
    known = {**dict.fromkeys(sources), **dict.fromkeys(str(row["source"]) for row in rows)}
    cells = []
    for source in known:
        here = [row for row in rows if row["source"] == source]
        methods = sorted({ZERO_SHOT, *(str(row["method"]) for row in here)}, key=_method_order)
        for shots in sorted({int(row["shots"]) for row in here}):
            at = [row for row in here if row["shots"] == shots]
            column = [_cell(source, method, shots, at) for method in methods]
            _mark_best(column)
            cells += column
    return {"cells": cells, "means": _means(rows, cells)}


def _method_order(method: str) -> tuple[bool, bool, int, str]:
    place = METHODS.index(method) if method in METHODS else len(METHODS)
    return method != ZERO_SHOT, method == "auto", place, method


def _cell(
    source: str, method: str, shots: int, rows: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """One cell from all rows of a source and a number of shots."""
    own = [row for row in rows if row["method"] == method]
    runs: Sequence[Mapping[str, Any]] = [row for row in own if is_finished(row)]
    if method == ZERO_SHOT and not runs:
        runs = _zero_shot_runs(rows)
    runs = sorted(runs, key=lambda row: int(row["seed"]))
    missing = _reasons(own)
    seeds = {int(row["seed"]) for row in rows} - {int(row["seed"]) for row in (*own, *runs)}
    asked = own or method != ZERO_SHOT
    if asked and seeds and any(is_finished(row) for row in rows):
        missing.append("not run yet")
    cell = {"source": source, "method": method, "shots": shots}
    cell |= _values(method, runs)
    return {**cell, "missing": missing}


def _reasons(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Why runs are not there, each reason once, with the seeds where it is not of all."""
    found: dict[str, list[int]] = {}
    for row in rows:
        if not is_finished(row):
            kind = "failed" if "failed" in row else "skipped"
            found.setdefault(f"{kind}: {row.get(kind)}", []).append(int(row["seed"]))
    return [
        text
        if len(seeds) == len(rows)
        else f"seed{'s' * (len(seeds) > 1)} {', '.join(map(str, sorted(seeds)))} {text}"
        for text, seeds in found.items()
    ]


def _zero_shot_runs(rows: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What the runs of other methods say of the zero-shot decision on the same test images."""
    found: dict[int, dict[str, Any]] = {}
    for row in rows:
        if is_finished(row):
            values = row["zero_shot"]
            one = {"seed": row["seed"], "adapted": values, "accuracy": values["accuracy"]}
            found.setdefault(int(row["seed"]), one)
    return list(found.values())


def _values(method: str, runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    accuracy = [float(row["accuracy"]) for row in runs]
    cell: dict[str, Any] = {"seeds": [int(row["seed"]) for row in runs]}
    cell |= dict.fromkeys(("accuracy", "low", "high", "interval"))
    cell |= {"best": False, "test_images": None}
    if runs:
        cell["accuracy"] = statistics.fmean(accuracy)
        cell["test_images"] = int(runs[0]["adapted"]["count"])
        if len(runs) > 1 and _draws(method):
            cell["interval"], bounds = "seeds", seed_interval(accuracy)
        else:
            bounds = wilson_interval(cell["accuracy"], cell["test_images"])
            cell["interval"] = "test set"
        cell["low"], cell["high"] = bounds
    for name, path in NUMBERS.items():
        values = [value for row in runs if (value := _at(row, path)) is not None]
        cell[name] = statistics.fmean(values) if values else None
    return cell


def _at(row: Mapping[str, Any], path: Sequence[str]) -> float | None:
    value: Any = row
    for name in path:
        value = value.get(name) if isinstance(value, Mapping) else None
    return None if value is None else float(value)


def _draws(method: str) -> bool:
    """Whether another draw of the shots may change the method's accuracy."""
    return method not in HEADS or takes_images(method)


def _mark_best(cells: Sequence[dict[str, Any]]) -> None:
    best = max((cell["accuracy"] for cell in cells if cell["accuracy"] is not None), default=None)
    for cell in cells:
        cell["best"] = best is not None and cell["accuracy"] == best


def _means(
    rows: Sequence[Mapping[str, Any]], cells: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """Per shots, over the sources with finished runs there; a method needs all of them.

    The interval is over seeds, each seed's value being its mean over the sources.
    """
    found: list[dict[str, Any]] = []
    for shots in sorted({cell["shots"] for cell in cells} - {0}):
        here = [cell for cell in cells if cell["shots"] == shots]
        sources = [name for name in dict.fromkeys(cell["source"] for cell in here)
                   if any(cell["seeds"] for cell in here if cell["source"] == name)]  # fmt: skip
        if len(sources) < 2:
            continue
        column = []
        for method in sorted({cell["method"] for cell in here}, key=_method_order):
            of = [cell for cell in here if cell["method"] == method and cell["source"] in sources]
            column.append(_mean_cell(method, shots, sources, of, rows))
        _mark_best(column)
        found += column
    return found


def _mean_cell(
    method: str,
    shots: int,
    sources: Sequence[str],
    cells: Sequence[Mapping[str, Any]],
    rows: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:
    mean: dict[str, Any] = {"source": MEAN, "method": method, "shots": shots, "seeds": []}
    mean |= dict.fromkeys(("accuracy", "low", "high", "interval", "test_images", *NUMBERS))
    mean |= {"best": False, "missing": []}
    have = {cell["source"] for cell in cells if cell["accuracy"] is not None}
    absent = [name for name in sources if name not in have]
    if absent:
        return {**mean, "missing": [f"{method} has no result on {', '.join(absent)}"]}
    common = set.intersection(*(set(cell["seeds"]) for cell in cells))
    if any(set(cell["seeds"]) != common for cell in cells):
        return {**mean, "missing": [f"{method} has not the same seeds on all sources"]}
    mean["seeds"] = sorted(common)
    mean["accuracy"] = statistics.fmean(cell["accuracy"] for cell in cells)
    mean["test_images"] = sum(cell["test_images"] for cell in cells)
    for name in NUMBERS:
        if all(cell[name] is not None for cell in cells):
            mean[name] = statistics.fmean(cell[name] for cell in cells)
    if len(common) > 1 and _draws(method):
        per_seed = [
            statistics.fmean(
                row["accuracy"]
                for row in rows
                if is_finished(row)
                and (row["method"], row["shots"], row["seed"]) == (method, shots, seed)
                and row["source"] in sources
            )
            for seed in mean["seeds"]
        ]
        mean["interval"], (mean["low"], mean["high"]) = "seeds", seed_interval(per_seed)
    return mean


def write_tables(
    out: Path, rows: Sequence[Mapping[str, Any]], sources: Sequence[str] = ()
) -> dict[str, Any]:
    """table.md, table.csv and results.csv in `out`; answers `summarise` of the rows."""
    found = summarise(rows, sources)
    write_atomic(out / "table.md", markdown(found, rows).encode("utf-8"))
    write_atomic(out / "table.csv", _csv(CSV_COLUMNS, map(_csv_cell, _all_cells(found))))
    flat = [flat_row(row) for row in rows]
    columns = list(dict.fromkeys(name for row in flat for name in row))
    write_atomic(out / "results.csv", _csv(columns, flat))
    return found


def _all_cells(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [*found["cells"], *found["means"]]


def _csv_cell(cell: Mapping[str, Any]) -> dict[str, Any]:
    seeds, missing = " ".join(map(str, cell["seeds"])), "; ".join(cell["missing"])
    return {**cell, "seeds": seeds, "missing": missing, "best": int(cell["best"])}


def flat_row(row: Mapping[str, Any]) -> dict[str, Any]:
    """The scalars of a row with dotted names; per-class numbers and lists are in its run."""
    found: dict[str, Any] = {}
    for name, value in row.items():
        if name == "interval95":
            found |= {"interval95.low": value[0], "interval95.high": value[1]}
        elif isinstance(value, Mapping) and name != "per_class":
            found |= {f"{name}.{inner}": one for inner, one in flat_row(value).items()}
        elif value is None or isinstance(value, str | int | float):
            found[name] = value
    return found


def _csv(columns: Iterable[str], rows: Iterable[Mapping[str, Any]]) -> bytes:
    text = io.StringIO()
    writer = csv.DictWriter(
        text, list(columns), restval="", extrasaction="ignore", lineterminator="\n"
    )
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode("utf-8", "backslashreplace")


def markdown(found: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> str:
    """The tables as text: accuracy of each source and of their mean, what is missing, the rest."""
    notes: dict[str, int] = {}
    accuracy, details = [_head(found, rows)], ["# Calibration, time and memory"]
    for source in dict.fromkeys(cell["source"] for cell in _all_cells(found)):
        cells = [cell for cell in _all_cells(found) if cell["source"] == source]
        images = {cell["test_images"] for cell in cells} - {None}
        counted = f", {max(images)} test images" if images else ""
        accuracy += [f"## {_printable(source)}{counted}", _accuracy_table(cells, notes)]
        if images:
            details += [f"## {_printable(source)}", _details_table(cells)]
    if notes:
        numbered = (f"[{number}] {_printable(text)}  " for text, number in notes.items())
        accuracy.append("\n".join(numbered))
    return "\n\n".join([*accuracy, *(details if len(details) > 1 else [])]) + "\n"


def _head(found: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> str:
    seeds = sorted({seed for cell in found["cells"] for seed in cell["seeds"]})
    runs = [row for row in rows if is_finished(row)]
    made = sorted({f"{row['device']}, {_revision(row)}" for row in runs})
    lines = [
        "# Few-shot results",
        "",
        f"Accuracy on test images in percent, mean over seeds {', '.join(map(str, seeds))}; +- half"
        " of the 95 % interval over seeds (Student t). A dagger: of the test set (Wilson), for one"
        " seed or a method that learns nothing from the shots. Bold: best of its column. T: the"
        " temperature fitted on validation images; seconds and memory of training on the machine"
        " below, means over seeds.",
        "",
        f"{len(runs)} runs; {'; '.join(made)}",
    ]
    return "\n".join(lines)


def _revision(row: Mapping[str, Any]) -> str:
    commit, _, dirty = str(row.get("revision") or "").partition("-")
    mark = f" (revision {commit[:12]}{'-' * bool(dirty)}{dirty})" if commit else ""
    return f"vtclip {row.get('versions', {}).get('vtclip')}{mark}"


def _accuracy_table(cells: Sequence[Mapping[str, Any]], notes: dict[str, int]) -> str:
    shots = sorted({cell["shots"] for cell in cells})
    methods = list(dict.fromkeys(cell["method"] for cell in cells))
    at = {(cell["method"], cell["shots"]): cell for cell in cells}
    lines = [["method", *(f"{n} shot{'' if n == 1 else 's'}" for n in shots)]]
    for method in methods:
        one = [at.get((method, number)) for number in shots]
        lines.append([method, *(_accuracy(cell, notes) for cell in one)])
    return _table(lines)


def _accuracy(cell: Mapping[str, Any] | None, notes: dict[str, int]) -> str:
    if cell is None:
        return "-"
    marks = "".join(f" [{notes.setdefault(text, len(notes) + 1)}]" for text in cell["missing"])
    if cell["accuracy"] is None:
        return "-" + marks
    text = f"{100 * cell['accuracy']:.2f}"
    text = f"**{text}**" if cell["best"] else text
    if cell["low"] is not None:
        text += f" +- {50 * (cell['high'] - cell['low']):.2f}"
    return text + ("†" if cell["interval"] == "test set" else "") + marks


def _details_table(cells: Sequence[Mapping[str, Any]]) -> str:
    lines = [["method", "shots", *(title for title, _ in DETAILS.values())]]
    order = list(dict.fromkeys(cell["method"] for cell in cells))
    for cell in sorted(cells, key=lambda cell: (order.index(cell["method"]), cell["shots"])):
        if cell["accuracy"] is not None:
            values = [
                "-" if cell[name] is None else show(cell[name])
                for name, (_, show) in DETAILS.items()
            ]
            lines.append([cell["method"], str(cell["shots"]), *values])
    return _table(lines)


def _table(lines: Sequence[Sequence[str]]) -> str:
    """Markdown with aligned columns, the first to the left, the others to the right."""
    lines = [[cell.replace("|", "\\|") for cell in line] for line in lines]
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    text = []
    for number, line in enumerate(lines):
        first = line[0].ljust(widths[0])
        rest = [cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True)]
        text.append(f"| {' | '.join([first, *rest])} |")
        if number == 0:
            rules = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
            text.append(f"| {' | '.join(rules)} |")
    return "\n".join(text)


def _printable(text: str) -> str:
    return "".join(letter if letter.isprintable() else f"\\x{ord(letter):02x}" for letter in text)
