# SPDX-License-Identifier: Apache-2.0
"""What the kernels are to reach on one H200 in bfloat16, and the table that says what they reach.

    python benchmarks/targets.py                    # rewrites results/gpu/targets.csv: not measured
    python benchmarks/targets.py RESULTS.csv        # prints the table with those rows filled in

RESULTS.csv is what `pytest benchmarks/ --benchmark-only --bench-device cuda` leaves. Times are
medians between CUDA events with a cold L2 cache; `graph` means the replay of a captured call.
"""

from __future__ import annotations

import csv
import sys
from pathlib import Path
from typing import NamedTuple, TextIO

CSV = Path(__file__).parent / "results" / "gpu" / "targets.csv"
NOT_MEASURED = "not measured"


class Target(NamedTuple):
    """One row. `what` is a column of the results, or "A / B", a ratio of two medians."""

    case: str
    mode: str
    what: str
    at_most: float
    graph: bool = False
    note: str = ""


def _times(case: str, forward: float, both: float, graph: bool = False, note: str = ""):
    yield Target(case, "forward", "median_ms", forward, graph, note)
    yield Target(case, "forward+backward", "median_ms", both, graph, note)


def _kernels(case: str, forward: tuple[int, int], both: tuple[int, int]):
    # what is traced, and matrix products, for each of which cuBLAS may launch a split-K reduction
    for mode, (traced, products) in {"forward": forward, "forward+backward": both}.items():
        note = f"{traced} traced, the penalty's sum among them; {products} products may be split"
        yield Target(case, mode, "kernels", traced + products, True, note)


def _heads():
    rada = "RAda[B32,K{},D512,H8,bfloat16]"
    yield from _times(rada.format(1000), 0.6, 1.9)
    yield from _times(rada.format(500), 0.2, 0.6)
    yield from _times(rada.format(50), 0.040, 0.120, graph=True)
    yield from _kernels(rada.format(50), (7, 3), (20, 8))
    # 0.9 and 2.8 ms, 1.35 and 4.2 ms were less than the matrix products alone take at cuBLAS's rate
    products = "matrix products alone: about 1.0 ms forward, 2.5 to 2.9 ms with the backward"
    yield from _times("VTCLIP[B32,K1000,C1024,L49,F4096,bfloat16]", 1.15, 3.6, note=products)
    products = "products of 0.87 and 2.6 ms at the peak rate, at cuBLAS's rate more"
    yield from _times("VTCLIP[B128,K1000,C512,L196,F2048,bfloat16]", 1.6, 5.0, note=products)
    yield from _times("VTCLIP[B32,K100,C1024,L49,F4096,bfloat16]", 0.15, 0.45, graph=True)


def _attention():
    for L in (49, 100, 196, 256, 576):
        case = f"cross_attn[B32,H8,K1000,L{L},d128,bfloat16]"
        for mode in ("forward", "forward+backward"):
            yield Target(case, mode, "vtclip / best sdpa", 1.0)
            yield Target(case, mode, "vtclip, impl=cuda / vtclip", 3.0)
        # the query's gradient of every image, [B, H, K, d] in bfloat16
        batch_mib = 32 * 8 * 1000 * 128 * 2 / 2**20
        returned_mib = 2 * 32 * 8 * L * 128 * 2 / 2**20  # gradients of key and value
        if returned_mib < batch_mib:
            note = "below the gradient of an expanded query"
            yield Target(case, "forward+backward", "backward_mib", batch_mib, False, note)
        else:
            note = f"{returned_mib:g} MiB of it are the gradients of key and value"
            at_most = returned_mib + batch_mib
            yield Target(case, "forward+backward", "backward_mib", at_most, False, note)


TARGETS = (*_heads(), *_attention())
FROM_RUN = ("provider", "p20_ms", "p80_ms", "error", "rounds", "device", "driver", "torch")
FROM_RUN = (*FROM_RUN, "triton", "commit", "date")
COLUMNS = ("case", "mode", "what", "graph", "at_most", "measured", "reached", *FROM_RUN, "note")
Rows = dict[tuple[str, str, str], dict[str, str]]


def _number(row: dict[str, str] | None, column: str) -> float | None:
    text = "" if row is None else str(row.get(column) or "")
    return float(text) if text else None


def _median(rows: Rows, target: Target, provider: str) -> float | None:
    if provider != "best sdpa":
        return _number(rows.get((target.case, target.mode, provider)), "median_ms")
    found = (
        _number(row, "median_ms")
        for (case, mode, name), row in rows.items()
        if (case, mode) == (target.case, target.mode) and name.startswith("sdpa ")
    )
    return min((ms for ms in found if ms is not None), default=None)


def measured(rows: Rows, target: Target) -> float | None:
    """What a run says about a target, if it does."""
    if " / " not in target.what:
        return _number(rows.get((target.case, target.mode, "vtclip")), target.what)
    top, bottom = (_median(rows, target, name) for name in target.what.split(" / "))
    return None if top is None or bottom is None else top / bottom


def table(results: list[dict[str, str]]) -> list[dict[str, str]]:
    """One row for every target; `measured` holds "not measured" where the results lack it."""
    rows = {(row["case"], row["mode"], row["provider"]): row for row in results}
    lines = []
    for target in TARGETS:
        value = measured(rows, target)
        line = dict.fromkeys(COLUMNS, "")
        line |= {"case": target.case, "mode": target.mode, "what": target.what}
        line |= {"graph": "yes" if target.graph else "no", "note": target.note}
        line |= {"at_most": f"{target.at_most:g}", "measured": NOT_MEASURED}
        if value is not None:
            reached = "yes" if value <= target.at_most else "no"
            line |= {"measured": f"{value:.4g}", "reached": reached}
            row = rows.get((target.case, target.mode, target.what.split(" / ")[0]))
            row = row or rows[target.case, target.mode, "vtclip"]
            line |= {name: str(row.get(name, "")) for name in FROM_RUN}
        lines.append(line)
    return lines


def read(path: Path) -> list[dict[str, str]]:
    """Rows of a results file; none where there is no file."""
    if not path.is_file():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def write(path: Path, lines: list[dict[str, str]]) -> None:
    """The table as CSV."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        _write_csv(file, lines)


def _write_csv(file: TextIO, lines: list[dict[str, str]]) -> None:
    writer = csv.DictWriter(file, fieldnames=COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)


def main(arguments: list[str]) -> None:
    if not arguments:
        return write(CSV, table([]))
    _write_csv(sys.stdout, table(read(Path(arguments[0]))))


if __name__ == "__main__":
    main(sys.argv[1:])
