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
from vtclip.names import METHODS

Row = dict[str, Any]
PARTS = ("base", "new", "harmonic mean")
METRICS = ("nll", "ece", "nll_scaled", "ece_scaled", "temperature")
FEATURES = ("model", "prompt", "templates", "test_fraction", "base_to_new")


@dataclass(frozen=True)
class Cell:
    """One method on one group at one number of shots.

    accuracy: by seed, as shares. metrics: means over seeds, None where a seed has none.
    values: what each seed's evaluation said. rows: those it took time and memory to make.
    interval: 95 % bounds of one seed's test set, where they are known.
    """

    accuracy: Mapping[int, float]
    rows: tuple[Row, ...] = ()
    metrics: Mapping[str, float | None] = field(default_factory=dict)
    interval: tuple[float, float] | None = None
    values: tuple[Mapping[str, Any], ...] = ()

    @property
    def mean(self) -> float:
        return fmean(self.accuracy.values())

    @property
    def over_seeds(self) -> bool:
        """Whether the interval is one over seeds, else it is of the test set."""
        return len(set(self.accuracy.values())) > 1

    @property
    def half(self) -> float | None:
        """Half of the 95 % interval, over seeds where they differ, else of the test set."""
        if self.over_seeds:
            low, high = seed_interval(list(self.accuracy.values()))
        elif self.interval is not None:
            low, high = self.interval
        else:
            return None
        return (high - low) / 2


@dataclass(frozen=True)
class Group:
    """One source under one model.

    name, backbone: of a data set of the protocol with its official lists and OpenAI's weights.
    templates: "one" or the name that was given. part: of base-to-new.
    lines: method, with what sets it apart -> shots -> Cell; zero-shot is always among them.
    """

    title: str
    name: str | None
    backbone: str | None
    part: str | None
    lines: Mapping[str, Mapping[int, Cell]]
    templates: str = "one"

    @property
    def shots(self) -> list[int]:
        return sorted({number for line in self.lines.values() for number in line})

    def best(self, shots: int) -> set[str]:
        """The lines that are the best at `shots`, as far as two decimals of a percent show."""
        values = {
            line: round(100 * cells[shots].mean, 2)
            for line, cells in self.lines.items()
            if shots in cells
        }
        return {line for line, value in values.items() if value == max(values.values())}


def method_of(line: str) -> str:
    """The method of a line, which may be named "method (what differs)"."""
    return line.partition(" (")[0]


def in_order(lines: Iterable[str]) -> list[str]:
    """Lines in the usual order of their methods, unknown methods last."""

    def place(line: str) -> tuple[int, str]:
        method = method_of(line)
        return (METHODS.index(method) if method in METHODS else len(METHODS), line)

    return sorted(lines, key=place)


def by(rows: Iterable[Row], key: Callable[[Row], Any]) -> dict[Any, list[Row]]:
    """Rows with equal keys together, in the order in which the keys came."""
    found: dict[Any, list[Row]] = {}
    for row in rows:
        found.setdefault(key(row), []).append(row)
    return found


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


def printable(text: str) -> str:
    """One line of text: control characters, line ends and the like are spelled out."""
    return "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in text)


def shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, list):
        return " | ".join(map(str, value))
    return "default" if value is None else str(value)


def group_key(row: Row) -> tuple[tuple[str, str], ...]:
    """What the rows of one group share besides the source's name, as (what, value)."""
    config, digests = row["config"], row.get("digests") or {}
    pairs = {name: shown(config.get(name)) for name in FEATURES}
    pairs["official split"] = str(config.get("data") is not None)
    pairs["weights"] = shown(digests.get("weights"))[:8]
    # every draw of a data set has training images of its own, and test images in common
    pairs["images"] = shown(digests.get("test_images") or digests.get("images"))[:8]
    return tuple(pairs.items())


def apart(keys: Sequence[Mapping[str, str]]) -> list[str]:
    """For each of several settings the entries in which not all agree, in words."""
    names = [name for name in keys[0] if len({key[name] for key in keys}) > 1]
    return [", ".join(f"{name} {key[name]}" for name in names) for key in keys]


def settings_of(row: Row, revision: bool) -> dict[str, str]:
    """What decides a row's number beyond group, method, shots and seed."""
    config = row["config"]
    flat = {name: shown(config.get(name)) for name in ("spatial", "augment_passes")}
    for name, value in (config.get("fit") or {}).items():
        flat[name] = json.dumps(value, sort_keys=True) if isinstance(value, dict) else shown(value)
    if revision:
        flat["revision"] = shown(row.get("revision"))[:12]
    return flat


def lines_of(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """The rows of each method, apart where settings differ at the same number of shots.

    Two rows of one seed that differ in the revision only are kept apart by it.
    """
    found: dict[str, list[Row]] = {}
    for method, own in by(rows, lambda row: row["method"]).items():
        jobs = by(own, lambda row: (row["shots"], row["seed"], str(settings_of(row, False))))
        repeated = any(len(some) > 1 for some in jobs.values())
        names: set[str] = set()
        for some in by(own, lambda row: row["shots"]).values():
            every = [settings_of(row, repeated) for row in some]
            names |= {
                name
                for name in {name for one in every for name in one}
                if len({one.get(name) for one in every}) > 1
            }
        for row in own:
            flat = settings_of(row, repeated)
            tag = ", ".join(f"{name} {flat.get(name, 'default')}" for name in sorted(names))
            found.setdefault(f"{method} ({tag})" if tag else method, []).append(row)
    return found


def values_of(row: Row, key: str, part: str | None) -> Mapping[str, Any]:
    """The metrics of "adapted" or "zero_shot"; of base-to-new those of one part."""
    if part is None:
        return row[key]  # type: ignore[no-any-return]
    if part == "harmonic mean":
        return {"accuracy": row["harmonic_mean"][key]}
    return row[part][key]  # type: ignore[no-any-return]


def cell_of(rows: Sequence[Row], key: str, part: str | None) -> Cell:
    """The rows of one line and number of shots; of one seed the last counts."""
    own = {row["seed"]: row for row in sorted(rows, key=lambda row: int(row["seed"]))}
    values = {seed: values_of(row, key, part) for seed, row in own.items()}
    metrics: dict[str, float | None] = {}
    for name in METRICS:
        numbers = [value[name] for value in values.values() if value.get(name) is not None]
        metrics[name] = fmean(numbers) if len(numbers) == len(values) else None
    interval = next(iter(values.values())).get("interval95")
    return Cell(
        {seed: float(value["accuracy"]) for seed, value in values.items()},
        tuple(own.values()) if key == "adapted" else (),
        metrics,
        None if interval is None else (float(interval[0]), float(interval[1])),
        tuple(values.values()),
    )


def group_of(title: str, rows: Sequence[Row], part: str | None) -> Group:
    lines: dict[str, dict[int, Cell]] = {}
    for line, own in lines_of(rows).items():
        lines[line] = {
            shots: cell_of(some, "adapted", part)
            for shots, some in by(own, lambda row: row["shots"]).items()
        }
    zero = lines.setdefault("zeroshot", {})
    for shots, some in by(rows, lambda row: row["shots"]).items():
        if shots not in zero:
            zero[shots] = cell_of(some, "zero_shot", part)
    config, source = rows[0]["config"], rows[0]["source"]
    known = config.get("data") is not None and source in read_published().sets
    return Group(
        title,
        source if known else None,
        backbone_of(rows[0])[0] if known else None,
        part,
        {line: dict(sorted(lines[line].items())) for line in in_order(lines)},
        shown(config.get("templates") or "one"),
    )


def groups_of(rows: Sequence[Row]) -> list[Group]:
    """One group for each source and model, data sets first, base-to-new last in its three parts."""
    titles = read_published().sets
    found = []
    for source, own in by(rows, lambda row: row["source"]).items():
        keyed = by(own, group_key)
        for tag, some in zip(apart([dict(key) for key in keyed]), keyed.values(), strict=True):
            official = some[0]["config"].get("data") is not None
            title = titles.get(source, source) if official else source
            title = f"{title} ({tag})" if tag else title
            if "harmonic_mean" in some[0]:
                found += [group_of(f"{title}: {part}", some, part) for part in PARTS]
            else:
                found.append(group_of(title, some, None))
    order = list(titles)

    def place(group: Group) -> tuple[bool, int]:
        return group.part is not None, order.index(group.name) if group.name else len(order)

    return sorted(found, key=place)


def average_of(groups: Sequence[Group]) -> Group | None:
    """Mean over groups for each seed, of the lines that all groups have at that number of shots."""
    groups = [group for group in groups if group.part is None]
    lines: dict[str, dict[int, Cell]] = {}
    for line, cells in groups[0].lines.items() if len(groups) > 1 else ():
        for shots in cells:
            own = [
                group.lines[line][shots] for group in groups if shots in group.lines.get(line, {})
            ]
            seeds = set.intersection(*(set(cell.accuracy) for cell in own))
            if len(own) == len(groups) and seeds:
                values = {
                    seed: fmean(cell.accuracy[seed] for cell in own) for seed in sorted(seeds)
                }
                lines.setdefault(line, {})[shots] = Cell(values)
    if not lines:
        return None
    backbones = {group.backbone for group in groups}
    backbone = backbones.pop() if len(backbones) == 1 else None
    templates = groups[0].templates
    return Group(f"Average of {len(groups)}", None, backbone, None, lines, templates)
