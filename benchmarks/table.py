# SPDX-License-Identifier: Apache-2.0
"""The README's speed table, made from the committed CSV files: `python benchmarks/table.py`."""

from __future__ import annotations

import csv
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

RESULTS = Path(__file__).parent / "results" / "cpu"
MODES = ("forward", "forward+backward")
Row = dict[str, str]


def load(name: str) -> dict[tuple[str, str, str], Row]:
    """(case, mode, provider) -> row of one CSV, in the order of the file."""
    with (RESULTS / name).open(newline="") as file:
        return {(r["case"], r["mode"], r["provider"]): r for r in csv.DictReader(file)}


def ratios(rows: dict[tuple[str, str, str], Row], case: str, provider: str) -> str:
    """Baseline over ours, forward / forward+backward."""
    modes = [rows.get((case, mode, provider)) for mode in MODES]
    return " / ".join(f"{float(row['times_ours']):.2f}x" if row else "-" for row in modes)


def markdown(head: Sequence[str], rows: Iterable[Sequence[object]]) -> list[str]:
    """The lines of a Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return [f"| {' | '.join(map(str, line))} |" for line in lines]


def table() -> str:
    """Markdown, one row for each case and baseline."""
    widest, avx2 = load("avx512.csv"), load("avx2.csv")
    head = [
        "case (float32 unless named)",
        "ours, ms",
        "baseline",
        "baseline / ours, AVX-512",
        "AVX2",
    ]
    lines = []
    seen: set[str] = set()
    for case, mode, provider in widest:
        if mode != MODES[0] or provider == "vtclip":
            continue
        title = ours = ""
        if case not in seen:
            seen.add(case)
            title = case.replace(",float32", "").replace("[", " (").replace("]", ")")
            title = title.replace(",", ", ")
            times = (widest[case, m, "vtclip"]["median_ms"] for m in MODES)
            ours = " / ".join(f"{float(t):.1f}" for t in times)
        ratios_of = (ratios(rows, case, provider) for rows in (widest, avx2))
        lines.append([title, ours, provider, *ratios_of])
    return "\n".join(markdown(head, lines))


if __name__ == "__main__":
    sys.stdout.write(table() + "\n")
