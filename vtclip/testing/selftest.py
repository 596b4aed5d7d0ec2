# SPDX-License-Identifier: Apache-2.0
"""Every operator, implementation and dtype on the device at hand, against the float64 reference.

Children do the work (`selftest_worker`), because a fault of one kernel on a GPU makes every later
call of its process fail. A child that crashes or hangs is ended, the item it was at is "failed",
and another child goes on behind it.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import vtclip
from vtclip.backends import record
from vtclip.testing.problems import OPS

DTYPES = ("float16", "bfloat16", "float32", "float64")
IMPLS = ("cpu", "triton", "cuda", "reference")
WORKER = (sys.executable, "-m", "vtclip.testing.selftest_worker")
# limits: of one operator, implementation and dtype, most of it the compiler's; of a child's start
ITEM_S, START_S = 180.0, 180.0
TRITON_LANES = 4  # processes that compile Triton kernels side by side

Item = tuple[str, str, str]
Row = dict[str, Any]
"""op, impl, dtype, status (`record.RIGHT`, ...), reason; of what ran: cases, and under "forward"
and "backward" the worst part with its error and budget."""


def items(impls: Sequence[str] = IMPLS) -> list[Item]:
    """What is tested, in the order of the table."""
    return [(op, impl, dtype) for op in OPS for impl in impls for dtype in DTYPES]


@dataclass
class Lane:
    """One child at a time, through `waiting`; `rows` are what they found."""

    waiting: list[Item]
    device: str
    folder: Path
    rows: list[Row] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.child: subprocess.Popen[bytes] | None = None
        self.attempt = 0

    def start(self) -> None:
        """A child for what is waiting."""
        self.attempt += 1
        self.place = self.folder / str(self.attempt)
        self.place.mkdir(parents=True)
        work = {"device": self.device, "items": self.waiting}
        (self.place / "work.json").write_text(json.dumps(work))
        (self.place / "lines").touch()
        package = str(Path(vtclip.__file__).parents[1])
        paths = os.pathsep.join(filter(None, (package, os.environ.get("PYTHONPATH", ""))))
        command = [*WORKER, str(self.place / "work.json"), str(self.place / "lines")]
        with (self.place / "said").open("wb") as said:
            self.child = subprocess.Popen(
                command, env={**os.environ, "PYTHONPATH": paths}, stdout=said, stderr=said
            )
        self.read, self.begun, self.since = 0, False, time.monotonic()

    def look(self) -> bool:
        """Takes in what the child has written; whether there is anything left to wait for."""
        if self.child is None:
            if not self.waiting:
                return False
            self.start()
        code = self.child.poll() if self.child is not None else None
        self._read_lines()
        if code is not None:
            self._ended(code)
        else:
            limit = ITEM_S if self.begun else START_S
            if time.monotonic() - self.since > limit:
                self.stop()
                self._give_up(f"did not end within {limit:g} s")
        return bool(self.waiting) or self.child is not None

    def stop(self) -> None:
        """Ends the child, if there is one."""
        if self.child is not None:
            self.child.kill()
            self.child.wait()
            self.child = None

    def _read_lines(self) -> None:
        text = (self.place / "lines").read_text()
        for line in text[self.read : text.rfind("\n") + 1].splitlines():
            row = json.loads(line)
            self.since = time.monotonic()
            self.begun = row["status"] == "begun"
            if not self.begun:
                self.rows.append(row)
                self.waiting.pop(0)
        self.read = text.rfind("\n") + 1

    def _ended(self, code: int) -> None:
        self.child = None
        if not self.waiting or (not self.begun and self.read):
            return  # done, or ended behind an item: the next child takes the rest
        said = (self.place / "said").read_text(errors="replace").strip().splitlines()
        last = f": {said[-1][:200]}" if said else ""
        self._give_up(f"its process ended with {_exit_words(code)}{last}")

    def _give_up(self, reason: str) -> None:
        """The item at hand has failed; where no item was begun, all have: no child can start."""
        count = 1 if self.begun else len(self.waiting)
        for op, impl, dtype in self.waiting[:count]:
            row = {"op": op, "impl": impl, "dtype": dtype, "status": record.FAILED}
            self.rows.append({**row, "reason": reason})
        del self.waiting[:count]


def _exit_words(code: int) -> str:
    if code >= 0:
        return f"exit code {code}"
    try:
        return signal.Signals(-code).name
    except ValueError:
        return f"signal {-code}"


def lanes_of(chosen: list[Item], device: str, folder: Path) -> list[Lane]:
    """Items shared out: one child per implementation, several for Triton, which compiles."""
    cores = os.cpu_count() or 1
    groups: dict[tuple[str, int], list[Item]] = {}
    ops = list(dict.fromkeys(op for op, _, _ in chosen))
    for item in chosen:
        op, impl, _ = item
        compiles = impl == "triton" and device != "cpu"
        part = ops.index(op) % min(TRITON_LANES, max(1, cores // 2)) if compiles else 0
        groups.setdefault((impl, part), []).append(item)
    return [Lane(mine, device, folder / f"{impl}-{part}") for (impl, part), mine in groups.items()]


def run(
    device: str,
    impls: Sequence[str] = IMPLS,
    *,
    tell: Callable[[list[Row], int], object] = lambda rows, of: None,
) -> list[Row]:
    """Rows of everything that is tested; `tell` hears those that are done, of how many."""
    chosen = items(impls)
    with tempfile.TemporaryDirectory(prefix="vtclip-selftest-") as name:
        lanes = lanes_of(chosen, device, Path(name))
        try:
            while [lane for lane in lanes if lane.look()]:
                tell(_rows(lanes), len(chosen))
                time.sleep(0.05)
        finally:
            for lane in lanes:
                lane.stop()
    tell(_rows(lanes), len(chosen))
    return _rows(lanes)


def _rows(lanes: Sequence[Lane]) -> list[Row]:
    """All that the lanes have found, in the order of `items`."""
    order = {item: i for i, item in enumerate(items())}
    rows = [row for lane in lanes for row in lane.rows]
    return sorted(rows, key=lambda row: order[row["op"], row["impl"], row["dtype"]])


def counts(rows: Sequence[Row]) -> dict[str, int]:
    """How many rows have which status; all of them are named."""
    found = Counter(row["status"] for row in rows)
    kinds = (record.RIGHT, record.WRONG, record.FAILED, record.UNAVAILABLE)
    return {kind: found[kind] for kind in kinds}


def table(rows: Sequence[Row]) -> str:
    """A line per operator and implementation; then what is wrong, then what is not available.

    A cell holds the larger of the forward's and the backward's share of the budget: at most 100 %
    is right.
    """
    cells: dict[tuple[str, str], dict[str, str]] = {}
    for row in rows:
        cells.setdefault((row["op"], row["impl"]), {})[row["dtype"]] = _cell(row)
    width = max((len(op) for op, _ in cells), default=2)
    lines = [f"{'':{width}} {'':9}" + "".join(f" {dtype:>12}" for dtype in DTYPES)]
    for (op, impl), by_dtype in cells.items():
        if set(by_dtype.values()) == {"-"}:
            continue
        shown = "".join(f" {by_dtype.get(dtype, '-'):>12}" for dtype in DTYPES)
        lines.append(f"{op:{width}} {impl:9}{shown}")
    bad = [row for row in rows if row["status"] in record.BAD]
    lines += [f"{r['status']}: {r['op']} {r['impl']} {r['dtype']}: {r['reason']}" for r in bad]
    refused = Counter(
        (row["impl"], row["reason"]) for row in rows if row["status"] == record.UNAVAILABLE
    )
    lines += [
        f"not available: {impl}: {reason} ({count} of {sum(r['impl'] == impl for r in rows)})"
        for (impl, reason), count in refused.items()
    ]
    return "\n".join(lines)


def _cell(row: Row) -> str:
    if row["status"] == record.UNAVAILABLE:
        return "-"
    if row["status"] != record.RIGHT:
        return str(row["status"]).upper()
    parts = (row["forward"], row["backward"])
    share = max(p["error"] / p["budget"] if p["budget"] else 0.0 for p in parts)
    return f"right {100 * share:.0f} %"
