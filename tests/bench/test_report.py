# SPDX-License-Identifier: Apache-2.0
"""Rows in groups, lines and cells: means, intervals, what is kept apart, what is compared."""

from __future__ import annotations

import math
import statistics
from typing import Any

import bench_rows as made
import pytest

from vtclip.bench.cells import backbone_of
from vtclip.bench.published import mean_over, read_published
from vtclip.bench.report import BenchReport, make_report, read_benchmark
from vtclip.bench.tables import COSTS


def only(report: BenchReport, title: str) -> Any:
    found = [group for group in report.groups if group.title == title]
    assert len(found) == 1
    return found[0]


def test_cells_hold_means_and_intervals_over_seeds():
    rows = made.grid()
    group = only(make_report(rows), "animals")
    assert list(group.lines) == ["zeroshot", "proker", "rada"]
    assert group.shots == [1, 4, 16]
    for method in ("proker", "rada"):
        for shots, cell in group.lines[method].items():
            own = [r["accuracy"] for r in rows if (r["method"], r["shots"]) == (method, shots)]
            assert len(own) == 3
            assert cell.mean == pytest.approx(statistics.fmean(own), abs=1e-12)
            # 4.3027 is the 97.5 % quantile of t with 2 degrees of freedom
            half = 4.30265273 * statistics.stdev(own) / math.sqrt(3)
            assert cell.half == pytest.approx(half, rel=1e-6)
            assert cell.seeds_differ


def test_one_seed_has_the_interval_of_its_test_set():
    group = only(make_report([made.make_row()]), "animals")
    cell = group.lines["rada"][4]
    assert not cell.seeds_differ
    assert cell.half == pytest.approx(0.05)  # of 0.66 to 0.76
    zero = group.lines["zeroshot"][4]
    assert (zero.mean, zero.rows) == (0.6, ())
    assert zero.half == pytest.approx(0.05)


def test_seeds_that_all_agree_have_the_interval_of_the_test_set():
    rows = [made.make_row(method="calip", seed=seed, accuracy=0.62) for seed in (1, 2, 3)]
    cell = make_report(rows).groups[0].lines["calip"][4]
    assert len(cell.accuracy) == 3
    assert cell.half == pytest.approx(0.05)
    assert not cell.seeds_differ


def test_the_average_needs_all_sources_and_takes_common_seeds():
    rows = made.grid(sources=("animals", "plants"), seeds=(1, 2))
    rows = [
        row
        for row in rows
        if (row["source"], row["method"], row["shots"]) != ("plants", "proker", 4)
        and (row["source"], row["shots"], row["seed"]) != ("plants", 16, 2)
    ]
    report = make_report(rows)
    assert report.average is not None
    lines = report.average.lines
    assert sorted(lines["proker"]) == [1, 16]
    assert list(lines["rada"][16].accuracy) == [1]
    one = [row["accuracy"] for row in rows if (row["method"], row["shots"]) == ("rada", 1)]
    assert lines["rada"][1].mean == pytest.approx(statistics.fmean(one))
    assert any("plants, rada: seeds are missing at 16 shots" in note for note in report.notes)
    assert make_report(made.grid()).average is None


def test_rows_of_differing_settings_are_never_averaged():
    rows = [made.make_row(seed=seed, accuracy=0.7) for seed in (1, 2)]
    rows += [
        made.make_row(
            seed=seed, accuracy=0.8, key=f"long{seed}", config={"fit": {"epochs": 99, "lr": 0.001}}
        )
        for seed in (1, 2)
    ]
    report = make_report(rows)
    group = only(report, "animals")
    assert {line: cells[4].mean for line, cells in group.lines.items()} == {
        "zeroshot": pytest.approx(0.6),
        "rada (epochs 40)": pytest.approx(0.7),
        "rada (epochs 99)": pytest.approx(0.8),
    }
    assert any("kept apart" in note for note in report.notes)


def test_recipes_that_depend_on_shots_are_one_line():
    group = only(make_report(made.grid(methods=("rada",))), "animals")
    assert list(group.lines) == ["zeroshot", "rada"]


@pytest.mark.parametrize(
    ("change", "tag"),
    [
        ({"config": {"model": "ViT-B-32:openai"}}, "model"),
        ({"config": {"prompt": "a photo"}}, "prompt"),
        ({"config": {"templates": ["imagenet7"]}}, "templates"),
        ({"config": {"test_fraction": 0.3}}, "test_fraction"),
        ({"digests": {"images": "ff" * 32}}, "images"),
    ],
)
def test_sources_of_one_name_that_differ_are_groups_apart(change, tag):
    report = make_report([made.make_row(), made.make_row(seed=2, accuracy=0.9, **change)])
    assert len(report.groups) == 2
    assert all(group.title.startswith(f"animals ({tag} ") for group in report.groups)
    assert {group.lines["rada"][4].mean for group in report.groups} == {0.7, 0.9}


def test_two_revisions_are_said_and_repeated_jobs_kept_apart():
    rows = [made.make_row(seed=1), made.make_row(seed=2, revision="f" * 40)]
    report = make_report(rows)
    said = "The rows are of 2 revisions: 0123456789ab (1 rows), ffffffffffff (1 rows)."
    assert said in report.notes
    assert list(only(report, "animals").lines) == ["zeroshot", "rada"]
    rows.append(made.make_row(seed=1, accuracy=0.9, revision="f" * 40))
    lines = only(make_report(rows), "animals").lines
    assert list(lines["rada (revision 0123456789ab)"][4].accuracy.values()) == [0.7]
    assert list(lines["rada (revision ffffffffffff)"][4].accuracy) == [1, 2]
    dirty = make_report([made.make_row(revision="0123-dirty")])
    assert any("no revision holds" in note for note in dirty.notes)


def test_devices_and_versions_that_differ_are_said():
    rows = [made.make_row(), made.make_row(seed=2, device="cuda:0", versions={"torch": "2.11"})]
    notes = " ".join(make_report(rows).notes)
    assert "2 kinds of device: cpu (1 threads) (1 rows), cuda:0 (1 rows)" in notes
    assert "2 versions of torch: 2.15.0 (1 rows), 2.11 (1 rows)" in notes
    assert make_report(made.grid()).notes == ()


def test_a_later_row_of_a_job_replaces_the_earlier():
    rows = [made.make_row(accuracy=0.9, time=2000.0), made.make_row(accuracy=0.7, time=1000.0)]
    report = make_report(rows)
    assert only(report, "animals").lines["rada"][4].mean == 0.9
    assert "1 rows were replaced by later rows of the same jobs." in report.notes


def test_a_job_that_failed_and_then_finished_is_not_missed():
    place = {"source": "animals", "method": "rada", "shots": 4, "key": "k"}
    failed = [{**place, "seed": seed, "failed": "boom", "time": 5000.0} for seed in (1, 2)]
    report = make_report([made.make_row(), *failed])
    assert [row["seed"] for row in report.missed] == [2]
    assert len(report.rows) == 1


def test_methods_can_be_chosen():
    report = make_report(made.grid(), methods=["proker"])
    assert report.lines == ["zeroshot", "proker"]
    with pytest.raises(ValueError, match="no row is of 'proke'; did you mean 'proker'"):
        make_report(made.grid(), methods=["proke"])


@pytest.mark.parametrize(
    ("model", "wanted"),
    [
        ("RN50:openai", "RN50"),
        ("ViT-B-16-quickgelu:openai", "ViT-B-16"),
        ("ViT-B-16:/weights/b16.pt", "ViT-B-16"),
        ("ViT-B-16:laion2b_s34b_b88k", None),
        ("local-dir:/weights", None),
        ("hf-hub:someone/model", None),
        ("demo", None),
    ],
)
def test_backbones_with_foreign_weights_have_no_published_name(model, wanted):
    name, remark = backbone_of(made.make_row(model=model))
    assert name == wanted
    assert (remark is not None) == ("b16.pt" in model)


def beside(rows: list[dict[str, Any]]) -> dict[tuple[str, int], tuple[float | None, float | None]]:
    found = make_report(rows, published=True).comparisons
    assert found is not None
    return {
        (one.line, one.shots): (
            one.published[0].accuracy if one.published else None,
            one.difference,
        )
        for one in found
    }


def test_published_numbers_stand_beside_the_same_set_backbone_and_shots():
    rows = made.grid(
        sources=("dtd",), methods=("vtclip", "clip-adapter"), shots=(4, 16), seeds=(1,), data="/x"
    )
    found = beside(rows)
    ours = {(row["method"], row["shots"]): 100 * row["accuracy"] for row in rows}
    assert found[("vtclip", 16)] == (65.72, pytest.approx(ours[("vtclip", 16)] - 65.72))
    assert found[("vtclip", 4)] == (None, None)
    assert found[("clip-adapter", 4)] == (56.86, pytest.approx(ours["clip-adapter", 4] - 56.86))
    assert found[("zeroshot", 0)] == (42.20, pytest.approx(60 - 42.20))
    assert len(found) == 5


def test_other_backbones_are_not_compared_with():
    rows = made.grid(sources=("dtd",), methods=("clip-adapter",), data="/x", model="RN101:openai")
    assert set(beside(rows).values()) == {(None, None)}


@pytest.mark.parametrize(
    "change",
    [{"data": None}, {"model": "RN50:yfcc15m"}, {"source": "animals"}],
    ids=["own folder called dtd", "other weights", "own set"],
)
def test_what_is_not_the_published_set_is_not_compared(change):
    given = {"source": "dtd", "method": "clip-adapter", "data": "/x", **change}
    assert beside([made.make_row(**given)]) == {}


def halves(accuracy: tuple[float, float, float], **more: Any) -> dict[str, Any]:
    base, new, mean = accuracy
    parts = {
        part: {"zero_shot": {"accuracy": value / 2}, "adapted": {"accuracy": value}}
        for part, value in (("base", base), ("new", new))
    }
    given = {"source": "dtd", "shots": 16, "data": "/x", "model": "ViT-B-16:openai", **more}
    row: dict[str, Any] = made.make_row(config={"base_to_new": True}, **given)
    return {**row, **parts, "harmonic_mean": {"zero_shot": mean / 2, "adapted": mean}}


def test_base_to_new_has_three_parts_and_no_share_in_the_average():
    row = halves((0.8, 0.6, 0.6857), method="clip-adapter")
    report = make_report([row, made.make_row()], published=True)
    titles = ["animals", "DTD: base", "DTD: new", "DTD: harmonic mean"]
    assert [group.title for group in report.groups] == titles
    means = [group.lines["clip-adapter"][16].mean for group in report.groups[1:]]
    assert means == [0.8, 0.6, 0.6857]
    assert report.average is None
    found = {(one.group.part, one.line): one.published for one in report.comparisons or ()}
    assert found[("base", "clip-adapter")] == ()
    assert [found[(part, "zeroshot")][0].accuracy for part in ("base", "new")] == [53.24, 59.90]


def test_reading_takes_every_shard_and_passes_over_torn_lines(tmp_path):
    made.write(tmp_path, made.grid(seeds=(1,)))
    text = (tmp_path / "results.jsonl").read_text()
    (tmp_path / "results-2-of-2.jsonl").write_text('{"source": "anim\n' + text[:-20])
    rows, notes = read_benchmark(tmp_path)
    assert len(rows) == 6 + 5
    assert len(notes) == 2
    assert notes[0].startswith("results-2-of-2.jsonl, line 1: cut off or broken")
    assert notes[1].startswith("results-2-of-2.jsonl, line 7:")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"adapted": {"accuracy": 1.5}}, "accuracy of adapted must lie in 0..1, got 1.5"),
        ({"adapted": {"accuracy": None}}, "accuracy of adapted must lie in 0..1, got None"),
        ({"zero_shot": {"accuracy": True}}, "accuracy of zero_shot"),
        ({"shots": "4"}, "shots must be of type int, got str"),
        ({"seed": True}, "seed must be of type int, got bool"),
        ({"config": []}, "config must be of type dict, got list"),
        ({"method": None}, "method must be of type str, got NoneType"),
        ({"harmonic_mean": {}}, "accuracy of base zero_shot must lie in 0..1, got None"),
    ],
)
def test_impossible_rows_are_refused_by_line(tmp_path, change, message):
    row = {**made.make_row(), **change}
    made.write(tmp_path, [made.make_row(), row])
    with pytest.raises(ValueError, match="results.jsonl, line 2") as error:
        read_benchmark(tmp_path)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("path", [path for path, _ in COSTS.values()], ids=".".join)
def test_a_cost_that_is_no_float_is_refused_by_line(tmp_path, path):
    row = made.make_row()
    place = row
    for name in path[:-1]:
        place = place.setdefault(name, {})
    place[path[-1]] = 10**400
    made.write(tmp_path, [made.make_row(), row])
    with pytest.raises(ValueError, match=r"results.jsonl, line 2.*finite number"):
        read_benchmark(tmp_path)


def test_an_object_is_wanted_on_every_line(tmp_path):
    made.write(tmp_path, [], "[1, 2]\n")
    with pytest.raises(ValueError, match="line 1: a row must be an object, got list"):
        read_benchmark(tmp_path)


def test_the_average_of_the_eleven_sets_has_the_published_mean():
    names = read_published().averages["average_11"]
    rows = made.grid(names, ("tip-adapter-f",), (16,), (1,), data="/x")
    report = make_report(rows, published=True)
    assert [group.name for group in report.groups] == list(names)
    assert report.average is not None
    assert (report.average.title, report.average.backbone) == ("Mean of 11 sources", "RN50")
    # on ImageNet the number for one template, 65.03, in place of 65.51
    assert mean_over("tip-adapter-f", names, "RN50", 16) == pytest.approx(
        75.83 + (65.03 - 65.51) / 11, abs=0.006
    )
