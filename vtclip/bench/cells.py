# SPDX-License-Identifier: Apache-2.0
"""Rows of a benchmark in groups, lines and cells: sources, methods, shots, with seeds in each cell.

A group is a source under one model, prompt and set of test images: one panel, one table. Rows that
differ in anything else that decides a number are never averaged with each other: the method then
has one line per setting, named by what differs. Needs no torch.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

from vtclip.bench.intervals import seed_interval
from vtclip.bench.published import read_published
from vtclip.bench.rows import Row
from vtclip.names import in_order as methods_in_order

CLASS_PARTS = ("base", "new", "harmonic mean")
METRICS = ("nll", "ece", "nll_scaled", "ece_scaled", "temperature")
FEATURES = ("model", "prompt", "templates", "test_fraction", "base_to_new")
SAME = 1e-9  # less than one image of any test set: accuracies that differ by rounding only


@dataclass(frozen=True)
class Cell:
    """One method on one group at one number of shots.

    accuracy: by seed, as shares. metrics: means over seeds, None where a seed has none.
    values: the metrics of each seed's evaluation. rows: the runs whose time and memory count here.
    interval: 95 % bounds of one seed's test set, where they are known.
    missing: seeds of the source that have no number here. docs/statistics.md has the rules.
    """

    accuracy: Mapping[int, float]
    rows: tuple[Row, ...] = ()
    metrics: Mapping[str, float | None] = field(default_factory=dict)
    interval: tuple[float, float] | None = None
    values: tuple[Mapping[str, Any], ...] = ()
    missing: tuple[int, ...] = ()

    @property
    def mean(self) -> float:
        return fmean(self.accuracy.values())

    @property
    def seeds_differ(self) -> bool:
        """Whether the seeds differ, by more than rounding: then the interval is one over seeds."""
        return max(self.accuracy.values()) - min(self.accuracy.values()) > SAME

    @property
    def shortfall(self) -> str:
        """How many of the seeds the mean is over; empty where it is over all of them."""
        count = len(self.accuracy)
        return f"{count} of {count + len(self.missing)} seeds" if self.missing else ""

    @property
    def bounds(self) -> tuple[float, float] | None:
        """The 95 % interval within 0..1, over seeds where they differ, else of the test set."""
        whole = self._whole
        return None if whole is None else (max(0.0, whole[0]), min(1.0, whole[1]))

    @property
    def is_clipped(self) -> bool:
        """Whether mean ± half leaves 0..1, so that `bounds` says more."""
        whole = self._whole
        return whole is not None and (whole[0] < -SAME or whole[1] > 1 + SAME)

    @property
    def _whole(self) -> tuple[float, float] | None:
        """The interval as its formula gives it, which may leave 0..1."""
        return seed_interval(list(self.accuracy.values())) if self.seeds_differ else self.interval

    @property
    def interval_kind(self) -> str | None:
        """What `bounds` is an interval over, where there is one."""
        if self.bounds is None:
            return None
        return "seeds" if self.seeds_differ else "test set"

    @property
    def half(self) -> float | None:
        """Half of the length of the interval, before it is cut to 0..1."""
        whole = self._whole
        return None if whole is None else (whole[1] - whole[0]) / 2


@dataclass(frozen=True)
class Group:
    """One source under one model.

    name, backbone: of a data set of the protocol with its official lists and OpenAI's weights.
    templates: "one" or the name that was given. part: of base-to-new.
    lines: method, with the settings that differ -> shots -> Cell; zero-shot is always among them.
    """

    title: str
    source: str
    name: str | None
    backbone: str | None
    part: str | None
    lines: Mapping[str, Mapping[int, Cell]]
    templates: str = "one"

    @property
    def shots(self) -> list[int]:
        return sorted({number for line in self.lines.values() for number in line})

    @property
    def test_images(self) -> int | None:
        """The number of test images, where the rows have it."""
        cells = (cell for line in self.lines.values() for cell in line.values())
        counts = [value["count"] for cell in cells for value in cell.values if value.get("count")]
        return max(counts, default=None)

    def best(self, shots: int) -> set[str]:
        """The lines that are the best at `shots`, as far as two decimals of a percent show.

        A mean over some of the column's seeds is another quantity and is not compared.
        """
        column = {line: cells[shots] for line, cells in self.lines.items() if shots in cells}
        seeds = {seed for cell in column.values() for seed in cell.accuracy}
        values = {
            line: round(100 * cell.mean, 2)
            for line, cell in column.items()
            if set(cell.accuracy) == seeds
        }
        return {line for line, value in values.items() if value == max(values.values())}


def method_of(line: str) -> str:
    """The method of a line, which may be named "method (what differs)"."""
    return line.partition(" (")[0]


def in_order(lines: Iterable[str]) -> list[str]:
    """Lines in the usual order of their methods, unknown methods last."""

    listed = list(lines)
    methods = methods_in_order({method_of(line) for line in listed})
    return sorted(listed, key=lambda line: (methods.index(method_of(line)), line))


def group_by(rows: Iterable[Row], key: Callable[[Row], Any]) -> dict[Any, list[Row]]:
    """Rows with equal keys together, in the order in which the keys came."""
    groups: dict[Any, list[Row]] = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    return groups


def backbone_of(row: Row) -> tuple[str | None, str | None]:
    """Architecture as published tables name it, and a remark.

    None where the weights are known not to be OpenAI's, or where nothing says what they are.
    """
    model = str(row["config"].get("model"))
    name, _, tag = model.partition(":")
    if name in ("local-dir", "hf-hub"):
        return None, None
    name = name.removesuffix("-quickgelu")
    if tag == "openai":
        return name, None
    if "/" in tag or "\\" in tag or tag.endswith((".pt", ".safetensors", ".bin")):
        return name, f"{model} is taken for OpenAI's weights in the comparison."
    return None, None


def as_text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, list):
        return " | ".join(map(str, value))
    return "default" if value is None else str(value)


def group_key(row: Row) -> tuple[tuple[str, str], ...]:
    """What the rows of one group share besides the source's name, as (what, value)."""
    config, digests = row["config"], row.get("digests") or {}
    pairs = {name: as_text(config.get(name)) for name in FEATURES}
    pairs["official split"] = str(config.get("data") is not None)
    pairs["weights"] = as_text(digests.get("weights"))[:8]
    # every draw of a data set has training images of its own, and test images in common
    pairs["images"] = as_text(digests.get("test_images") or digests.get("images"))[:8]
    return tuple(pairs.items())


def differing_entries(keys: Sequence[Mapping[str, str]]) -> list[str]:
    """For each of several settings the entries in which not all agree, in words."""
    names = [name for name in keys[0] if len({key[name] for key in keys}) > 1]
    return [", ".join(f"{name} {key[name]}" for name in names) for key in keys]


def settings_of(row: Row, revision: bool) -> dict[str, str]:
    """What decides a row's number beyond group, method, shots and seed."""
    config = row["config"]
    flat = {name: as_text(config.get(name)) for name in ("spatial", "augment_passes")}
    for name, value in (config.get("fit") or {}).items():
        flat[name] = (
            json.dumps(value, sort_keys=True) if isinstance(value, dict) else as_text(value)
        )
    if revision:
        flat["revision"] = as_text(row.get("revision"))[:12]
    return flat


def lines_of(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """The rows of each method, apart where settings differ at the same number of shots.

    Two rows of one seed that differ in the revision only are kept apart by it.
    """
    lines: dict[str, list[Row]] = {}
    for method, method_rows in group_by(rows, lambda row: row["method"]).items():
        jobs = group_by(
            method_rows, lambda row: (row["shots"], row["seed"], str(settings_of(row, False)))
        )
        repeated = any(len(alike) > 1 for alike in jobs.values())
        names: set[str] = set()
        for alike in group_by(method_rows, lambda row: row["shots"]).values():
            every = [settings_of(row, repeated) for row in alike]
            names |= {
                name
                for name in {name for settings in every for name in settings}
                if len({settings.get(name) for settings in every}) > 1
            }
        for row in method_rows:
            flat = settings_of(row, repeated)
            tag = ", ".join(f"{name} {flat.get(name, 'default')}" for name in sorted(names))
            lines.setdefault(f"{method} ({tag})" if tag else method, []).append(row)
    return lines


def values_of(row: Row, key: str, part: str | None) -> Mapping[str, Any]:
    """The metrics of "adapted" or "zero_shot"; of base-to-new those of one part."""
    if part is None:
        return row[key]  # type: ignore[no-any-return]
    if part == "harmonic mean":
        return {"accuracy": row["harmonic_mean"][key]}
    return row[part][key]  # type: ignore[no-any-return]


def cell_of(
    rows: Sequence[Row], key: str, part: str | None, seeds: frozenset[int] = frozenset()
) -> Cell:
    """The rows of one line and number of shots; of one seed the last counts. seeds: wanted ones."""
    by_seed = {row["seed"]: row for row in sorted(rows, key=lambda row: int(row["seed"]))}
    values = {seed: values_of(row, key, part) for seed, row in by_seed.items()}
    metrics: dict[str, float | None] = {}
    for name in METRICS:
        numbers = [value[name] for value in values.values() if value.get(name) is not None]
        metrics[name] = fmean(numbers) if len(numbers) == len(values) else None
    interval = next(iter(values.values())).get("interval95")
    return Cell(
        {seed: float(value["accuracy"]) for seed, value in values.items()},
        tuple(by_seed.values()) if key == "adapted" else (),
        metrics,
        None if interval is None else (float(interval[0]), float(interval[1])),
        tuple(values.values()),
        tuple(sorted(seeds - by_seed.keys())),
    )


def group_of(title: str, rows: Sequence[Row], part: str | None, seeds: frozenset[int]) -> Group:
    """seeds: every seed that was asked for on this source."""
    lines: dict[str, dict[int, Cell]] = {}
    for line, line_rows in lines_of(rows).items():
        lines[line] = {
            shots: cell_of(cell_rows, "adapted", part, seeds)
            for shots, cell_rows in group_by(line_rows, lambda row: row["shots"]).items()
        }
    zero = lines.setdefault("zeroshot", {})
    for shots, cell_rows in group_by(rows, lambda row: row["shots"]).items():
        if shots not in zero:
            zero[shots] = cell_of(cell_rows, "zero_shot", part)
    config, source = rows[0]["config"], rows[0]["source"]
    known = config.get("data") is not None and source in read_published().sets
    return Group(
        title,
        source,
        source if known else None,
        backbone_of(rows[0])[0] if known else None,
        part,
        {line: dict(sorted(lines[line].items())) for line in in_order(lines)},
        as_text(config.get("templates") or "one"),
    )


def groups_of(rows: Sequence[Row], missed: Sequence[Row] = ()) -> list[Group]:
    """One group for each source and model, data sets first, base-to-new last in its three parts.

    missed: rows of jobs that were skipped or failed, whose seeds were asked for as well.
    """
    titles = read_published().sets
    groups = []
    for source, source_rows in group_by(rows, lambda row: row["source"]).items():
        keyed = group_by(source_rows, group_key)
        # of several groups nothing says to which a missed job belongs
        lost = [row["seed"] for row in missed if row.get("source") == source and "seed" in row]
        for tag, group_rows in zip(
            differing_entries([dict(key) for key in keyed]), keyed.values(), strict=True
        ):
            official = group_rows[0]["config"].get("data") is not None
            title = titles.get(source, source) if official else source
            title = f"{title} ({tag})" if tag else title
            seeds = frozenset(
                [*(row["seed"] for row in group_rows), *(lost if len(keyed) == 1 else ())]
            )
            if "harmonic_mean" in group_rows[0]:
                groups += [
                    group_of(f"{title}: {part}", group_rows, part, seeds) for part in CLASS_PARTS
                ]
            else:
                groups.append(group_of(title, group_rows, None, seeds))
    order = list(titles)

    def place(group: Group) -> tuple[bool, int]:
        return group.part is not None, order.index(group.name) if group.name else len(order)

    return sorted(groups, key=place)


def average_of(groups: Sequence[Group]) -> tuple[Group | None, list[str]]:
    """Mean over groups for each seed, and a note on everything that it leaves out.

    A line needs all groups at a number of shots, and seeds that all of them have: only these count.
    The interval is over the seeds' means; where they agree there is none, since sources may share
    test images and the errors of their test sets then do not cancel. Sets of test images only,
    which have no shots, stay out.
    """
    groups = [group for group in groups if group.part is None]
    fixed = [group.title for group in groups if group.shots == [0]]
    groups = [group for group in groups if group.shots != [0]]
    if len(groups) < 2:
        return None, []
    title = f"Mean of {len(groups)} sources"
    notes = [f"{title}: {', '.join(fixed)} left out, a set of test images only."] if fixed else []
    common = set.intersection(*(set(group.shots) for group in groups))
    for shots in sorted({number for group in groups for number in group.shots} - common):
        absent = ", ".join(group.title for group in groups if shots not in group.shots)
        notes.append(f"{title}: no mean at {shots} shots, which {absent} lacks.")
    lines: dict[str, dict[int, Cell]] = {}
    reasons: dict[tuple[str, str], list[str]] = {}
    for line in in_order({line for group in groups for line in group.lines}):
        for shots in sorted(common):
            cells = [cells[shots] for g in groups if shots in (cells := g.lines.get(line, {}))]
            absent = ", ".join(g.title for g in groups if shots not in g.lines.get(line, {}))
            mean = None if absent else mean_cell(cells)
            if mean is None:
                why = f"no result on {absent}" if absent else "no seed that all sources have"
                reasons.setdefault((line, why), []).append(str(shots))
            else:
                lines.setdefault(line, {})[shots] = mean
    notes += [
        f"{title}: no mean of {line} at {', '.join(at)} shots, {why}."
        for (line, why), at in reasons.items()
    ]
    if not lines:
        return None, notes
    backbones = {group.backbone for group in groups}
    backbone = backbones.pop() if len(backbones) == 1 else None
    return Group(title, title, None, backbone, None, lines, groups[0].templates), notes


def mean_cell(cells: Sequence[Cell]) -> Cell | None:
    """The mean of several sources' cells over the seeds that all have; None without such a seed."""
    common = set.intersection(*(set(cell.accuracy) for cell in cells))
    if not common:
        return None
    wanted = {seed for cell in cells if cell.rows for seed in (*cell.accuracy, *cell.missing)}
    accuracy = {seed: fmean(cell.accuracy[seed] for cell in cells) for seed in sorted(common)}
    return Cell(accuracy, missing=tuple(sorted(wanted - common)))
