# SPDX-License-Identifier: Apache-2.0
"""Intervals, missing seeds and the files of a benchmark: against numbers worked out in another way.

docs/statistics.md has the rules that these tests hold.
"""

from __future__ import annotations

import csv
import math
import statistics
from pathlib import Path
from typing import Any

import bench_rows as made
import numpy as np
import pytest

from vtclip.bench.csv_files import TABLE_HEAD, flat_row, summary_of
from vtclip.bench.intervals import seed_interval, t_quantile
from vtclip.bench.page import markdown_page
from vtclip.bench.report import make_report
from vtclip.bench.run import write_tables
from vtclip.cli import main


def runs(source: str, method: str, accuracy: list[float], **more: Any) -> list[dict[str, Any]]:
    """A finished run for each accuracy, of seeds 1, 2, ..."""
    return [made.make_row(source, method, seed=n, accuracy=a, **more)
            for n, a in enumerate(accuracy, 1)]  # fmt: skip


def missed(kind: str, reason: str, **place: Any) -> dict[str, Any]:
    row = {"source": "animals", "method": "rada", "shots": 4, "seed": 1, **place}
    return {**row, "key": "-".join(map(str, row.values())), kind: reason}


def cells_of(text: str) -> dict[str, dict[str, list[str]]]:
    """Title -> method -> the cells of the accuracy tables of a Markdown page."""
    tables: dict[str, dict[str, list[str]]] = {}
    for line in text.partition("## Calibration")[0].splitlines():
        if line.startswith("### "):
            table = tables.setdefault(line[4:], {})
        elif line.startswith("| ") and not line.startswith(("| ---", "| method")):
            name, *cells = (cell.strip() for cell in line.strip("|").split("|"))
            table[name] = cells
    return tables


def text_of(rows: list[dict[str, Any]]) -> str:
    return markdown_page(make_report(rows), "T", None)


def test_both_files_of_a_benchmark_show_the_same_cells(tmp_path: Path) -> None:
    """Three equal seeds; seeds 1-3 on one source and 1-2 on the other; the order of methods."""
    rows = runs("animals", "rada", [0.8, 0.82, 0.9]) + runs("plants", "rada", [0.82, 0.82])
    rows += runs("animals", "proker", [0.8, 0.8, 0.8]) + runs("plants", "proker", [0.7, 0.8, 0.9])
    rows += [missed("failed", "loss is not finite", source="plants", seed=3)]
    out = made.write(tmp_path / "bench", rows)
    summary = write_tables(out)
    assert main(["report", str(out)]) == 0
    mine, theirs = ((out / name).read_text("utf-8") for name in ("table.md", "report.md"))
    assert cells_of(mine) == cells_of(theirs)
    assert [list(table) for table in cells_of(mine).values()] == [
        ["zeroshot", "proker", "rada"]
    ] * 3
    assert list(cells_of(mine)) == [
        "Mean of 2 sources", "animals, 200 test images", "plants, 200 test images",
    ]  # fmt: skip
    average, animals, plants = cells_of(mine).values()
    low, high = seed_interval([0.81, 0.82])
    assert average["rada"] == [f"81.50 ± {50 * (high - low):.2f}, 2 of 3 seeds"]
    assert animals["proker"] == ["80.00 ± 5.00†"]
    assert plants["rada"] == ["82.00 ± 5.00†, 2 of 3 seeds"]
    assert average["zeroshot"] == ["60.00"]
    for text in (mine, theirs):
        assert "plants, rada: seeds are missing at 4 shots." in text
        assert "failed: loss is not finite" in text
    with open(out / "report.csv", newline="", encoding="utf-8") as file:
        shown = {(row["source"], row["method"]): row["accuracy"] for row in csv.DictReader(file)}
    for cell in (*summary["cells"], *summary["means"]):
        assert shown[cell["source"], cell["method"]] == f"{100 * cell['accuracy']:.4f}"


def integrated(t: float, df: int) -> float:
    """P(T <= t) by the midpoint rule over the density."""
    scale = math.exp(math.lgamma((df + 1) / 2) - math.lgamma(df / 2)) / math.sqrt(df * math.pi)
    x = (np.arange(200_000) + 0.5) * t / 200_000
    return 0.5 + float((scale * (1 + x * x / df) ** (-(df + 1) / 2)).sum()) * t / 200_000


@pytest.mark.parametrize("df", [1, 2, 3, 4, 5, 9, 10, 29, 30, 100])
@pytest.mark.parametrize("share", [0.6, 0.975, 0.995])
def test_t_quantiles_invert_the_distribution(df, share):
    assert integrated(t_quantile(share, df), df) == pytest.approx(share, abs=1e-8)


@pytest.mark.parametrize(
    ("df", "printed"), [(1, 12.706), (2, 4.303), (3, 3.182), (4, 2.776), (9, 2.262), (30, 2.042)]
)
def test_t_quantiles_as_printed_in_tables(df, printed):
    assert round(t_quantile(0.975, df), 3) == printed


def test_t_quantile_refuses_what_has_none():
    assert t_quantile(0.5, 3) == pytest.approx(0, abs=1e-12)
    for share, df in ((0.975, 0), (1.0, 3), (0.2, 3), (math.nan, 3)):
        with pytest.raises(ValueError, match="t_quantile"):
            t_quantile(share, df)


def test_interval_holds_the_mean_of_normal_draws_95_times_in_100():
    draws = np.random.default_rng(0).normal(3, 2, (4000, 3))
    held = [low <= 3 <= high for low, high in map(seed_interval, draws.tolist())]
    assert 0.94 < statistics.fmean(held) < 0.96


def test_equal_seeds_are_not_an_interval_of_zero() -> None:
    """Also where means over sources agree, and differ by the last bit of a sum only."""
    equal = make_report(runs("animals", "proker", [0.8, 0.8, 0.8])).groups[0].lines["proker"][4]
    assert not equal.seeds_differ
    assert equal.half == pytest.approx(0.05)  # of the test set: 0.76 to 0.86
    rows = runs("animals", "rada", [0.1, 0.3]) + runs("plants", "rada", [0.2, 0.0])
    average = make_report(rows).average
    assert average is not None
    mean = average.lines["rada"][4]
    assert len(set(mean.accuracy.values())) == 2  # by rounding
    assert mean.half is None


def test_a_mean_over_sources_is_over_their_common_seeds() -> None:
    rows = runs("animals", "rada", [0.7, 0.9, 0.1]) + runs("plants", "rada", [0.5, 0.5])
    rows += runs("animals", "proker", [0.6, 0.6, 0.7]) + runs("plants", "proker", [0.6, 0.6, 0.7])
    average = make_report(rows).average
    assert average is not None
    mean = average.lines["rada"][4]
    assert mean.mean == pytest.approx(0.65)  # not of 0.5667 and 0.5
    low, high = seed_interval([0.6, 0.7])
    assert (low, mean.bounds) == (pytest.approx(0.0147, abs=1e-4), (low, 1.0))
    assert (mean.half, mean.is_clipped) == (pytest.approx((high - low) / 2), True)
    assert (mean.missing, mean.shortfall) == ((3,), "2 of 3 seeds")
    assert average.best(4) == {"proker"}  # rada's 65.00 lacks its worst seed


def test_a_mean_over_fewer_seeds_is_never_the_best() -> None:
    rows = [*runs("animals", "rada", [0.95]), *runs("animals", "proker", [0.8, 0.7])]
    rows += [missed("failed", "boom", seed=2)]
    group = make_report(rows).groups[0]
    assert group.best(4) == {"proker"}
    assert cells_of(text_of(rows))["animals, 200 test images"]["rada"] == [
        "95.00 [91.00, 100.00]†, 1 of 2 seeds"
    ]


def test_a_seed_that_failed_for_every_method_is_counted() -> None:
    rows = [*runs("animals", "rada", [0.7, 0.8]), missed("failed", "boom", seed=3)]
    cells = make_report(rows).groups[0].lines
    assert cells["rada"][4].shortfall == "2 of 3 seeds"
    assert cells["zeroshot"][4].shortfall == ""  # it is not drawn, and no run of it failed


def test_what_an_average_leaves_out_is_said() -> None:
    rows = runs("animals", "rada", [0.7]) + runs("plants", "rada", [0.6])
    rows += runs("animals", "vtclip", [0.9]) + runs("animals", "rada", [0.9], shots=16)
    rows += [made.make_row("animals", "proker", seed=1), made.make_row("plants", "proker", seed=2)]
    fixed = made.make_row("sketches", "zeroshot", shots=0)
    report = make_report([*rows, fixed])
    assert report.average is not None
    assert list(report.average.lines) == ["zeroshot", "rada"]
    assert [note for note in report.notes if note.startswith("Mean of")] == [
        "Mean of 2 sources: sketches left out, a set of test images only.",
        "Mean of 2 sources: no mean at 16 shots, which plants lacks.",
        "Mean of 2 sources: no mean of proker at 4 shots, no seed that all sources have.",
        "Mean of 2 sources: no mean of vtclip at 4 shots, no result on plants.",
    ]


def test_the_summary_has_the_cells_and_what_is_missing() -> None:
    rows = runs("animals", "rada", [0.7, 0.9]) + [
        missed("failed", "loss is not finite", seed=3),
        *(missed("skipped", "no spatial features", method="vtclip", seed=n) for n in (1, 2, 3)),
        made.make_row(method="proker", seed=1),
    ]
    found = summary_of(make_report(rows))
    assert found["means"] == []
    cells = {cell["method"]: cell for cell in found["cells"]}
    assert all(tuple(cell) == TABLE_HEAD for cell in cells.values())
    rada = cells["rada"]
    assert (rada["accuracy"], rada["seeds"]) == (pytest.approx(0.8), [1, 2])
    assert (rada["low"], rada["high"]) == (0, 1)  # two seeds say nothing more
    assert (rada["interval"], rada["test_images"]) == ("seeds", 200)
    own = [row for row in rows if row["method"] == "rada" and "adapted" in row]
    for name in ("nll", "ece", "nll_scaled", "ece_scaled"):
        assert rada[name] == pytest.approx(statistics.fmean(row["adapted"][name] for row in own))
    assert rada["train_seconds"] == statistics.fmean(row["seconds"]["train"] for row in own)
    assert rada["peak_memory_mb"] == 501.5
    assert rada["missing"] == ["seed 3 failed: loss is not finite"]
    assert cells["proker"]["missing"] == ["1 of 3 seeds; the others have not run"]
    assert cells["vtclip"]["accuracy"] is None
    assert cells["vtclip"]["missing"] == ["seeds 1, 2, 3 skipped: no spatial features"]
    zero = cells["zeroshot"]
    assert (zero["interval"], zero["train_seconds"], zero["missing"]) == ("test set", None, [])


def test_three_files_are_written(tmp_path: Path) -> None:
    rows = runs("animals", "rada", [0.8, 0.9]) + runs("cars", "proker", [0.8])
    rows += [missed("skipped", "too few, alas", shots=16)]
    made.write(tmp_path, rows)
    summary = write_tables(tmp_path)
    with open(tmp_path / "table.csv", newline="", encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    assert list(lines[0]) == list(TABLE_HEAD)
    assert len(lines) == len(summary["cells"]) + len(summary["means"])
    cells = {(cell["source"], cell["method"], cell["shots"]): cell for cell in lines}
    rada = cells["animals", "rada", "4"]
    assert (float(rada["accuracy"]), rada["seeds"]) == (85.0, "1 2")
    skipped = cells["animals", "rada", "16"]
    assert (skipped["accuracy"], skipped["missing"]) == ("", "seed 1 skipped: too few, alas")
    assert cells["cars", "proker", "4"]["best"] == "1"
    with open(tmp_path / "results.csv", newline="", encoding="utf-8") as file:
        flat = list(csv.DictReader(file))
    assert [run["adapted.accuracy"] for run in flat] == ["0.8", "0.9", "0.8", ""]
    assert flat[0]["zero_shot.interval95.low"] == str(rows[0]["zero_shot"]["interval95"][0])
    assert flat[3]["skipped"] == "too few, alas"
    assert (tmp_path / "table.md").read_text("utf-8").startswith("# Few-shot results\n")


def test_flat_rows_keep_scalars_only() -> None:
    flat = flat_row({"a": {"b": 1, "per_class": {"x": 2}, "list": [1]}, "c": None, "d": "e"})
    assert flat == {"a.b": 1, "c": None, "d": "e"}


def test_a_benchmark_without_a_finished_run_has_its_reasons(tmp_path: Path) -> None:
    made.write(tmp_path, [missed("failed", "no memory")], "[1]\n")
    (cell,) = write_tables(tmp_path)["cells"]
    assert (cell["accuracy"], cell["best"]) == (None, False)
    text = (tmp_path / "table.md").read_text("utf-8")
    assert "failed: no memory" in text
    assert "line 2: a row must be an object, got list; not counted." in text


def test_columns_of_numbers_are_aligned() -> None:
    text = text_of(runs("animals", "rada", [0.71, 0.73]))
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert lines[:4] == [
        "| method   |           4 shots |",
        "| -------- | ----------------: |",
        "| zeroshot |     60.00 ± 5.00† |",
        "| rada     | **72.00** ± 12.71 |",
    ]
