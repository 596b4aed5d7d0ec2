# SPDX-License-Identifier: Apache-2.0
"""Means, intervals, bold, footnotes, CSV: against numbers worked out in another way."""

from __future__ import annotations

import csv
import json
import math
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vtclip.bench.intervals import seed_interval, t_quantile
from vtclip.bench.table import MEAN, flat_row, markdown, summarise, write_tables
from vtclip.metrics import wilson_interval


def row(
    source: str = "pets",
    method: str = "rada",
    shots: int = 1,
    seed: int = 1,
    accuracy: float = 0.8,
    zero: float = 0.6,
    **more: Any,
) -> dict[str, Any]:
    """A finished row with the keys of a result."""

    def part(value: float) -> dict[str, Any]:
        return {
            "accuracy": value,
            "interval95": list(wilson_interval(value, 200)),
            "nll": 1 - value,
            "ece": value / 10,
            "nll_scaled": 0.9 - value,
            "ece_scaled": None if method == "uncalibrated" else value / 20,
            "count": 200,
            "per_class": {"a": value},
        }

    found = {"source": source, "method": method, "shots": shots, "seed": seed, "key": "k"}
    found |= {"zero_shot": part(zero), "adapted": part(accuracy), "accuracy": accuracy}
    found |= {"seconds": {"train": seed / 2}, "peak_memory_mb": 100.0 * seed, "device": "cpu"}
    return {**found, "versions": {"vtclip": "1"}, "revision": None, **more}


def missing(kind: str, reason: str, **place: Any) -> dict[str, Any]:
    kept = {name: row(**place)[name] for name in ("source", "method", "shots", "seed", "key")}
    return {**kept, kind: reason}


def cell_of(found: dict[str, Any], source: str, method: str, shots: int = 1) -> dict[str, Any]:
    rows = found["means" if source == MEAN else "cells"]
    place = (source, method, shots)
    (one,) = [c for c in rows if (c["source"], c["method"], c["shots"]) == place]
    return one


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


def test_a_cell_is_the_mean_over_seeds():
    shares = [0.7, 0.9, 0.8]
    found = summarise([row(seed=n + 1, accuracy=a) for n, a in enumerate(shares)])
    cell = cell_of(found, "pets", "rada")
    half = 4.302653 * np.std(shares, ddof=1) / math.sqrt(3)
    assert cell["accuracy"] == pytest.approx(0.8)
    assert (cell["low"], cell["high"]) == pytest.approx((0.8 - half, 0.8 + half), abs=1e-6)
    assert cell["interval"] == "seeds"
    assert cell["seeds"] == [1, 2, 3]
    assert cell["nll"] == pytest.approx(0.2)
    assert cell["ece"] == pytest.approx(0.08)
    assert cell["ece_scaled"] == pytest.approx(0.04)
    assert cell["train_seconds"] == 1.0
    assert cell["peak_memory_mb"] == 200.0
    assert cell["missing"] == []


def test_one_seed_has_the_interval_of_the_test_set():
    cell = cell_of(summarise([row(accuracy=0.8)]), "pets", "rada")
    assert (cell["low"], cell["high"]) == wilson_interval(0.8, 200)
    assert cell["interval"] == "test set"


def test_zero_shot_is_there_without_its_own_runs_and_has_no_spread_over_seeds():
    found = summarise([row(seed=1), row(seed=2), row(seed=2, method="tip-adapter")])
    zero = cell_of(found, "pets", "zeroshot")
    assert zero["accuracy"] == 0.6
    assert zero["seeds"] == [1, 2]
    assert (zero["low"], zero["high"]) == wilson_interval(0.6, 200)
    assert zero["interval"] == "test set"
    assert zero["train_seconds"] is None
    own = summarise([row(), row(method="zeroshot", accuracy=0.61, seed=1)])
    assert cell_of(own, "pets", "zeroshot")["accuracy"] == 0.61


def test_the_best_of_each_source_and_shots_is_marked():
    rows = [row(accuracy=0.5), row(method="proker", accuracy=0.7)]
    rows += [row(shots=4, accuracy=0.9), row(method="proker", shots=4, accuracy=0.7)]
    rows += [row("cars", accuracy=0.3, zero=0.4), row("cars", "proker", accuracy=0.4, zero=0.4)]
    best = {(c["source"], c["method"], c["shots"]) for c in summarise(rows)["cells"] if c["best"]}
    assert best == {
        ("pets", "proker", 1),
        ("pets", "rada", 4),
        ("cars", "proker", 1),
        ("cars", "zeroshot", 1),
    }


def test_mean_over_sources_takes_the_spread_of_the_seeds_means():
    table = {"pets": [0.7, 0.9], "cars": [0.5, 0.3]}
    rows = [row(s, seed=n + 1, accuracy=a) for s, two in table.items() for n, a in enumerate(two)]
    mean = cell_of(summarise(rows), MEAN, "rada")
    assert mean["accuracy"] == pytest.approx(0.6)
    assert mean["low"] == pytest.approx(0.6)  # both seeds' means are 0.6: no spread is left
    assert mean["high"] == pytest.approx(0.6)
    rows[-1] = row("cars", seed=2, accuracy=0.5)
    mean = cell_of(summarise(rows), MEAN, "rada")
    assert (mean["low"], mean["high"]) == pytest.approx(seed_interval([0.6, 0.7]))
    assert cell_of(summarise(rows), MEAN, "zeroshot")["interval"] is None


def test_a_mean_over_some_of_the_sources_is_not_given():
    rows = [row("pets"), row("cars"), row("pets", "vtclip")]
    found = summarise(rows)
    mean = cell_of(found, MEAN, "vtclip")
    assert mean["accuracy"] is None
    assert mean["missing"] == ["vtclip has no result on cars"]
    assert cell_of(found, MEAN, "rada")["best"]
    uneven = cell_of(summarise([row("pets"), row("pets", seed=2), row("cars")]), MEAN, "rada")
    assert uneven["accuracy"] is None
    assert summarise([row("pets"), row("pets", seed=2)])["means"] == []


def test_what_is_missing_has_a_footnote_with_its_reason():
    rows = [
        row(seed=1),
        missing("failed", "loss is not finite", seed=2),
        missing("skipped", "no spatial features", method="vtclip", seed=1),
        missing("skipped", "no spatial features", method="vtclip", seed=2),
        row(method="proker", seed=1),
    ]
    text = markdown(summarise(rows), rows).partition("# Calibration")[0]
    mark = {
        line[4:].strip(): line[:3]
        for line in text.splitlines()
        if line[:1] == "[" and line[2] == "]"
    }
    assert set(mark) == {
        "skipped: no spatial features",
        "seed 2 failed: loss is not finite",
        "not run yet",
    }
    lines = {line.split("|")[1].strip(): line for line in text.splitlines() if line[:1] == "|"}
    assert lines["vtclip"].split("|")[2].strip() == f"- {mark['skipped: no spatial features']}"
    assert "80.00" in lines["rada"]
    assert lines["rada"].endswith(f"{mark['seed 2 failed: loss is not finite']} |")
    assert lines["proker"].endswith(f"{mark['not run yet']} |")
    assert "[" not in lines["zeroshot"]


def test_markdown_shows_percent_bold_and_which_interval():
    rows = [row(seed=n, accuracy=a) for n, a in ((1, 0.7), (2, 0.9))]
    text = markdown(summarise(rows, ["pets"]), rows)
    low, high = seed_interval([0.7, 0.9])
    assert f"| **80.00** +- {50 * (high - low):.2f} |" in text
    low, high = wilson_interval(0.6, 200)
    assert f"60.00 +- {50 * (high - low):.2f}† |" in text
    assert "## pets, 200 test images" in text
    rules = [line for line in text.splitlines() if set(line) == set("|-: ")]
    assert len(rules) == 2
    tables = [line for line in text.splitlines() if line.startswith("|")]
    assert {line.count("|") for line in tables} == {3, 9}


def test_names_of_sources_cannot_break_the_table():
    bad = row(source="a|b\n| c")
    text = markdown(summarise([bad]), [bad])
    assert "a|b\\x0a| c" in text
    assert "\n| c" not in text


def test_files_hold_what_the_summary_says(tmp_path: Path):
    rows = [row(seed=1), row(seed=2, accuracy=0.9), row("cars", "uncalibrated", seed=1)]
    rows.append(missing("skipped", "too few, alas", shots=4))
    found = write_tables(tmp_path, rows, ["cars", "pets"])
    assert json.loads(json.dumps(found)) == found
    assert [c["source"] for c in found["cells"]][0] == "cars"
    with open(tmp_path / "table.csv", newline="", encoding="utf-8") as file:
        cells = list(csv.DictReader(file))
    assert len(cells) == len(found["cells"]) + len(found["means"])
    (one,) = [c for c in cells if (c["source"], c["method"], c["shots"]) == ("pets", "rada", "1")]
    assert float(one["accuracy"]) == pytest.approx(0.85)
    assert one["seeds"] == "1 2"
    (skipped,) = [c for c in cells if c["shots"] == "4" and c["method"] == "rada"]
    assert skipped["accuracy"] == ""
    assert skipped["missing"] == "skipped: too few, alas"
    (bare,) = [c for c in cells if c["method"] == "uncalibrated" and c["source"] == "cars"]
    assert bare["ece_scaled"] == ""
    with open(tmp_path / "results.csv", newline="", encoding="utf-8") as file:
        runs = list(csv.DictReader(file))
    assert [run["adapted.accuracy"] for run in runs] == ["0.8", "0.9", "0.8", ""]
    assert runs[0]["zero_shot.interval95.low"] == str(wilson_interval(0.6, 200)[0])
    assert runs[3]["skipped"] == "too few, alas"
    assert (tmp_path / "table.md").read_text("utf-8") == markdown(found, rows)


def test_flat_rows_keep_scalars_only():
    flat = flat_row({"a": {"b": 1, "per_class": {"x": 2}, "list": [1]}, "c": None, "d": "e"})
    assert flat == {"a.b": 1, "c": None, "d": "e"}


def test_no_rows_no_numbers():
    found = summarise([missing("failed", "no memory")])
    assert cell_of(found, "pets", "rada")["accuracy"] is None
    assert not any(cell["best"] for cell in found["cells"])
    assert "[1] failed: no memory" in markdown(found, [])
