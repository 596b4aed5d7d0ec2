# SPDX-License-Identifier: Apache-2.0
"""The tables of a report, for every kind of page: what stands in each cell, and what is best."""

from __future__ import annotations

import math
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

from vtclip.bench.cells import Cell, Group, as_text, group_by, group_key, method_of
from vtclip.bench.published import Published, read_published
from vtclip.bench.report import Comparison
from vtclip.bench.rows import Row, reason_of
from vtclip.files import printable

NO_NUMBER = ""  # where nothing is published
METRIC_TITLES = {
    "nll": "NLL",
    "ece": "ECE",
    "nll_scaled": "NLL at T",
    "ece_scaled": "ECE at T",
    "temperature": "T",
}
COSTS = {  # title -> where a row has it, decimals
    "train s": (("seconds", "train"), 2),
    "total s": (("seconds", "total"), 2),
    "train MB": (("memory_mb", "train"), 0),
    "peak MB": (("peak_memory_mb",), 0),
}


@dataclass(frozen=True)
class Entry:
    """One cell: its text, what follows in small letters, and whether it is the column's best."""

    text: str
    small: str = ""
    best: bool = False


@dataclass(frozen=True)
class Table:
    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[Entry]]
    words: frozenset[int] = field(default_factory=frozenset)  # columns of text other than the first


def plural(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"


def margin_of(cell: Cell) -> str:
    """ "± 4.17" in percent, "[64.99, 100.00]" where that leaves 0..100; †: of the test set."""
    if cell.half is None or cell.bounds is None:
        return ""
    mark = "" if cell.seeds_differ else "†"
    if cell.is_clipped:
        low, high = cell.bounds
        return f"[{100 * low:.2f}, {100 * high:.2f}]{mark}"
    return f"± {100 * cell.half:.2f}{mark}"


def entry(cell: Cell | None, best: bool = False) -> Entry:
    if cell is None:
        return Entry("–")
    small = [margin] if (margin := margin_of(cell)) else []
    if cell.missing:
        small.append(cell.shortfall)
    return Entry(f"{100 * cell.mean:.2f}", ", ".join(small), best)


def accuracy_table(group: Group) -> Table:
    """A line per method, a column per number of shots."""
    best = {shots: group.best(shots) for shots in group.shots}
    rows = [
        [Entry(line), *(entry(cells.get(n), line in best[n]) for n in group.shots)]
        for line, cells in group.lines.items()
    ]
    head = ["method", *(plural(n, "shot") for n in group.shots)]
    images = group.test_images
    return Table(group.title + (f", {images} test images" if images else ""), head, rows)


def decimals(value: float | None, digits: int = 4) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def mean_of(rows: Sequence[Row], *names: str) -> float | None:
    """Mean over rows of a number that lies under `names`; None where a row has none."""
    numbers = []
    for row in rows:
        value: Any = row
        for name in names:
            value = value.get(name) if isinstance(value, Mapping) else None
        if value is not None:
            numbers.append(float(value))
    return fmean(numbers) if numbers and len(numbers) == len(rows) else None


def details_tables(group: Group) -> list[Table]:
    """Calibration and cost, a table for each number of shots."""
    tables = []
    for shots in group.shots:
        cells = {line: of[shots] for line, of in group.lines.items() if shots in of}
        lowest = {
            name: min(
                (v for c in cells.values() if (v := c.metrics.get(name)) is not None), default=0
            )
            for name in METRIC_TITLES
            if name != "temperature"
        }
        rows = []
        for line, cell in cells.items():
            values = {name: cell.metrics.get(name) for name in METRIC_TITLES}
            metrics = [
                Entry(decimals(v), best=v is not None and v == lowest.get(name))
                for name, v in values.items()
            ]
            cost = [Entry(decimals(mean_of(cell.rows, *path), n)) for path, n in COSTS.values()]
            rows.append([Entry(line), entry(cell, line in group.best(shots)), *metrics, *cost])
        head = ["method", "accuracy", *METRIC_TITLES.values(), *COSTS]
        tables.append(Table(plural(shots, "shot"), head, rows))
    return tables


def comparison_tables(comparisons: Sequence[Comparison]) -> tuple[list[Table], list[str]]:
    """Our numbers with published ones, a table for each group, and the remarks they point to."""
    tables = []
    remarks: dict[str, int] = {}
    for group in dict.fromkeys(id(comparison.group) for comparison in comparisons):
        members = [comparison for comparison in comparisons if id(comparison.group) == group]
        title = f"{members[0].group.title}, {members[0].group.backbone}"
        head = ["method", "shots", "ours", "published", "difference", "from", "also published"]
        rows = [_comparison_row(comparison, remarks) for comparison in members]
        tables.append(Table(title, head, rows, frozenset({5, 6})))
    return tables, list(remarks)


def _comparison_row(comparison: Comparison, remarks: dict[str, int]) -> list[Entry]:
    ours = [Entry(comparison.line), Entry(str(comparison.shots)), entry(comparison.cell)]
    if not comparison.published:
        return [*ours, *(Entry(NO_NUMBER) for _ in range(4))]
    first, *others = comparison.published
    place = _place(first, remarks)
    also = [f"{other.accuracy:.2f} {_place(other, remarks)}" for other in others]
    return [
        *ours,
        Entry(f"{first.accuracy:.2f}"),
        Entry(signed(comparison.difference or 0.0, 2)),
        Entry(place),
        Entry("; ".join(also)),
    ]


def signed(value: float, digits: int) -> str:
    return f"{value:+.{digits}f}".replace("-", "−")


def _place(record: Published, remarks: dict[str, int]) -> str:
    """Where a number was printed, with the number of each remark on it."""
    source = read_published().sources[record.source]
    statements = [f"{source['title']}: {source['where']}."]
    if record.templates is not None:
        count = "one template" if record.templates == "one" else "the mean of seven templates"
        statements.append(f"Class texts of {count}.")
    if record.caveat:
        statements.append(f"{record.caveat[:1].upper()}{record.caveat[1:]}.")
    numbers = [remarks.setdefault(text, len(remarks) + 1) for text in statements]
    return f"{source['title']} [{', '.join(map(str, numbers))}]"


def hardest_classes(group: Group, count: int = 10) -> Table | None:
    """The classes on which the best method at most shots is weakest, compared with zero-shot."""
    shots = group.shots[-1]
    candidates = {
        line: cells[shots]
        for line, cells in group.lines.items()
        if method_of(line) != "zeroshot" and shots in cells and group.part is None
    }
    if not candidates:
        return None
    line = max(candidates, key=lambda name: candidates[name].mean)
    rows = candidates[line].rows
    ours, zero = (_per_class(rows, key) for key in ("adapted", "zero_shot"))
    worst = sorted(ours, key=lambda name: ours[name])[:count]
    if not worst:
        return None
    head = ["class", "zero-shot", line, "difference"]
    lines = []
    for name in worst:
        before, change = "–", "–"
        if name in zero:
            before = decimals(100 * zero[name], 1)
            change = signed(100 * (ours[name] - zero[name]), 1)
        lines.append(list(map(Entry, (name, before, decimals(100 * ours[name], 1), change))))
    return Table(f"{group.title}, {shots} shots", head, lines)


def _per_class(rows: Sequence[Row], key: str) -> dict[str, float]:
    by_class: dict[str, list[float]] = {}
    for row in rows:
        shares = row[key].get("per_class")
        for name, value in shares.items() if isinstance(shares, Mapping) else ():
            if value is not None and math.isfinite(value):
                by_class.setdefault(name, []).append(float(value))
    return {name: fmean(values) for name, values in by_class.items()}


def missed_table(rows: Sequence[Row]) -> Table | None:
    """Jobs without numbers and why, those of one reason together."""
    if not rows:
        return None

    def key(row: Row) -> tuple[str, str, str]:
        return str(row.get("source")), str(row.get("method")), reason_of(row)

    lines = []
    for (source, method, reason), alike in group_by(rows, key).items():
        places = [
            ", ".join(sorted({str(row.get(name, "–")) for row in alike}, key=lambda n: (len(n), n)))
            for name in ("shots", "seed")
        ]
        cells = [source, method, *places, str(len(alike)), reason]
        lines.append([Entry(text) for text in cells])
    head = ["source", "method", "shots", "seeds", "jobs", "why"]
    return Table("Without a number", head, lines, frozenset({1, 2, 3, 5}))


def _model(row: Row) -> Any:
    """The encoder's name; features that name no weights were not made by the option's model."""
    known = (row.get("digests") or {}).get("weights") is not None or row["config"].get("data")
    return row["config"].get("model") if known else None


def facts_table(rows: Sequence[Row]) -> Table:
    """What made the rows; of values that differ each with the number of rows."""
    names = sorted({name for row in rows for name in row.get("versions") or {}})
    order = ["vtclip", "torch", *(name for name in names if name not in ("vtclip", "torch"))]
    reads: dict[str, Callable[[Row], Any]] = {
        "revision": lambda row: row.get("revision"),
        "device": lambda row: row.get("device"),
        "processor": lambda row: (row.get("environment") or {}).get("name"),
        "model": _model,
        "templates": lambda row: row["config"].get("templates"),
        "weights digest": lambda row: (row.get("digests") or {}).get("weights"),
    }

    def version(name: str) -> Callable[[Row], Any]:
        return lambda row: (row.get("versions") or {}).get(name)

    reads |= {f"{name} version": version(name) for name in order if name in names}
    lines = []
    for what, read in reads.items():
        values = [as_text(value) if (value := read(row)) is not None else "–" for row in rows]
        counts = {value: values.count(value) for value in dict.fromkeys(values)}
        text = "; ".join(v if len(counts) == 1 else f"{v} ({n} rows)" for v, n in counts.items())
        lines.append([Entry(what), Entry(text)])
    return Table("How the rows were made", ["what", "value"], lines, frozenset({1}))


def sources_table(rows: Sequence[Row]) -> Table:
    """What each source held: classes, test images, digests of images and splits by seed."""
    lines = []
    for source_rows in group_by(rows, lambda row: (row["source"], group_key(row))).values():
        first, digests = source_rows[0], source_rows[0].get("digests") or {}
        splits = {
            f"{row['shots']} shots, seed {row['seed']}: {str(row['split'])[:16]}"
            for row in source_rows
            if row.get("split")
        }
        images = digests.get("test_images") or digests.get("images")
        tested = mean_of(source_rows, "test", "images")
        classes = str(len(first.get("classes") or []))
        digest = "–" if images is None else str(images)
        split = "; ".join(sorted(splits, key=lambda text: (len(text), text)))
        texts = str(first["source"]), classes, decimals(tested, 0), digest, split
        lines.append(list(map(Entry, texts)))
    head = ["source", "classes", "test images", "images digest", "split digests"]
    return Table("What was tested on", head, lines, frozenset({3, 4}))


def commands(rows: Sequence[Row]) -> list[str]:
    """The command of each source, method and number of shots, for its first seed."""
    fits = group_by(rows, lambda row: (row["source"], row["method"], row["shots"]))
    return [command_of(rows_of_fit[0]) for rows_of_fit in fits.values()]


OPTIONS = ("model", "spatial", "prompt", "templates", "test_fraction", "augment_passes")
USUAL = {"model": "demo", "test_fraction": 0.5, "augment_passes": 0}


def command_of(row: Row) -> str:
    """The `vtclip fit` that makes a row whose recipe is the method's own."""
    config = row["config"]
    data = config.get("data")
    words = ["vtclip", "fit", row["source"] if data else str(config.get("source", row["source"]))]
    words += ["--data", str(data)] if data else []
    words += ["--method", row["method"], "--shots", str(row["shots"]), "--seed", str(row["seed"])]
    for name in OPTIONS:
        value = config.get(name)
        if value is None or value == USUAL.get(name):
            continue
        first = value[0] if isinstance(value, list) and value else value
        words += [f"--{name.replace('_', '-')}", as_text(first)]
    words += ["--base-to-new"] if config.get("base_to_new") else []
    return shlex.join(words)


def plain(text: str) -> str:
    """One line of Markdown in which names stay names."""
    line = printable(text)
    for letter in "\\`*_[]|":
        line = line.replace(letter, "\\" + letter)
    return line.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def markdown_table(table: Table) -> str:
    """A table in Markdown, columns of numbers aligned to the right, the best of a column bold."""
    lines = [[plain(name) for name in table.head]]
    lines += [[_markdown_cell(cell) for cell in row] for row in table.rows]
    columns = [
        _aligned(column, n, table.words) for n, column in enumerate(zip(*lines, strict=True))
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in zip(*columns, strict=True))


def _aligned(column: Sequence[str], number: int, words: frozenset[int]) -> list[str]:
    """A column with the rule below its head; columns of words, which may be long, as they are."""
    head, *cells = column
    if number in words:
        return [head, "---", *cells]
    width = max(3, *map(len, column))
    if number == 0:
        return [text.ljust(width) for text in (head, "-" * width, *cells)]
    return [text.rjust(width) for text in (head, "-" * (width - 1) + ":", *cells)]


def _markdown_cell(cell: Entry) -> str:
    text = f"**{plain(cell.text)}**" if cell.best else plain(cell.text)
    return f"{text} {cell.small}" if cell.small else text
