# SPDX-License-Identifier: Apache-2.0
"""The README's speed table, made from the committed CSV files: `python benchmarks/table.py`."""

from __future__ import annotations

import csv
import sys
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
    found = [rows.get((case, mode, provider)) for mode in MODES]
    return " / ".join(f"{float(row['times_ours']):.2f}x" if row else "-" for row in found)


def table() -> str:
    """Markdown, one row for each case and baseline."""
    widest, avx2 = load("avx512.csv"), load("avx2.csv")
    lines = [
        "| case (float32 unless named) | ours, ms | baseline | baseline / ours, AVX-512 | AVX2 |",
        "| --- | --- | --- | --- | --- |",
    ]
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
        both = ratios(widest, case, provider), ratios(avx2, case, provider)
        lines.append(f"| {title} | {ours} | {provider} | {both[0]} | {both[1]} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.stdout.write(table() + "\n")
