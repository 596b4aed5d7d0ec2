# SPDX-License-Identifier: Apache-2.0
"""The data file of published accuracies: ranges, names, sources, means and harmonic means."""

from __future__ import annotations

from collections import Counter

import pytest

from vtclip.bench.published import Published, matching, mean_over, read_published
from vtclip.data.sets import SETS

TABLES = read_published()
RECORDS = TABLES.records
BACKBONES = {"RN50", "RN101", "ViT-B-32", "ViT-B-16"}
SETTINGS = {
    "zero-shot": {0},
    "few-shot": {1, 2, 4, 8, 16},
    "ablation": {16},
    "base-to-new": {16},
    "cross-data-set": {0, 16},
    "domain-generalisation": {16},
    "test-time": {0, 16},
    "fine-tuned": {0, None},
}
SHOTS = (1, 2, 4, 8, 16)
ELEVEN = TABLES.averages["average_11"]


def group(record: Published) -> tuple[object, ...]:
    """What the records of one mean or harmonic mean have in common."""
    return (record.method, record.backbone, record.shots, record.setting, record.variant)


def test_every_record_is_in_range_of_a_known_set_and_has_a_source() -> None:
    known = {*TABLES.sets, *TABLES.averages}
    assert len(RECORDS) > 900
    for record in RECORDS:
        assert 5 < record.accuracy < 100, record
        assert round(record.accuracy, 2) == record.accuracy, record
        assert record.set in known, record
        assert record.backbone in BACKBONES, record
        assert record.shots in SETTINGS[record.setting], record
        assert record.source in TABLES.sources, record
        assert (record.part is not None) == (record.setting == "base-to-new"), record
        assert record.recomputed is None or record.caveat, record
    assert {record.source for record in RECORDS} == set(TABLES.sources)
    assert all(source["title"] and source["where"] for source in TABLES.sources.values())


def test_sets_are_those_of_the_data_table() -> None:
    titles = {name: spec.title for name, spec in SETS.items()}
    assert {name: title for name, title in TABLES.sets.items() if name != "objectnet"} == titles
    assert list(ELEVEN) == list(SETS)[:11]
    assert all(set(names) <= set(TABLES.sets) for names in TABLES.averages.values())


def test_no_number_is_there_twice() -> None:
    places = Counter(
        (*group(r), r.set, r.part, r.source, r.templates) for r in RECORDS
    )  # two numbers of one source differ in their templates
    assert [place for place, count in places.items() if count > 1] == []


def members(record: Published) -> list[float]:
    """The numbers behind a mean: those of its own source, for base-to-new of any."""
    found = []
    for name in TABLES.averages[record.set]:
        rows = [r for r in RECORDS if (r.set, r.part) == (name, record.part)]
        rows = [r for r in rows if group(r) == group(record)]
        own = [r for r in rows if r.source == record.source]
        if record.setting == "base-to-new":
            own = own or rows
        found += [r.accuracy for r in own[:1]]
    return found


MEANS = [
    record
    for record in RECORDS
    if record.set in TABLES.averages
    and record.part != "harmonic mean"
    and len(members(record)) == len(TABLES.averages[record.set])
]


def test_most_means_can_be_recomputed() -> None:
    by_setting = Counter(record.setting for record in MEANS)
    wanted = {"base-to-new": 12, "test-time": 8, "fine-tuned": 10}
    assert by_setting == wanted | {"cross-data-set": 6, "domain-generalisation": 3}


@pytest.mark.parametrize("record", MEANS, ids=lambda r: f"{r.method}-{r.set}-{r.part}-{r.variant}")
def test_printed_means_follow_from_the_printed_entries(record: Published) -> None:
    entries = members(record)
    mean = sum(entries) / len(entries)
    # half of the last printed digit, which is the first of the fine-tuning table, and rounding
    allowed = 0.0505 if record.setting == "fine-tuned" else 0.0055
    wanted = record.accuracy if record.recomputed is None else record.recomputed
    assert mean == pytest.approx(wanted, abs=allowed)
    if record.recomputed is not None:
        assert abs(mean - record.accuracy) > allowed  # the remark is needed


def triples() -> dict[tuple[object, ...], dict[str | None, Published]]:
    found: dict[tuple[object, ...], dict[str | None, Published]] = {}
    for record in RECORDS:
        if record.setting == "base-to-new":
            place = (*group(record), record.set, record.source)
            found.setdefault(place, {})[record.part] = record
    return found


def test_harmonic_means_follow_from_their_parts() -> None:
    found = triples()
    assert len(found) == 12 + 1 + 7 + 66
    for place, parts in found.items():
        base, new = parts["base"].accuracy, parts["new"].accuracy
        mean, printed = 2 * base * new / (base + new), parts["harmonic mean"]
        wanted = printed.accuracy if printed.recomputed is None else printed.recomputed
        assert mean == pytest.approx(wanted, abs=0.0125), place  # parts are rounded themselves
        if printed.recomputed is not None:
            assert abs(mean - printed.accuracy) > 0.0125


# means over the eleven sets of the log's entries at 1, 2, 4, 8, 16 shots, summed independently
CHECK = {
    "clip-adapter": (62.67, 65.55, 68.61, 71.40, 74.44),
    "tip-adapter": (62.33, 64.62, 66.54, 68.50, 70.32),
    "tip-adapter-f": (64.60, 66.65, 69.67, 72.45, 75.83),
    "coop": (59.59, 62.32, 66.77, 69.89, 73.42),
    "gda": (62.19, 66.19, 69.77, 73.31, 76.05),
    "tip-x": (62.87, 65.29, 67.64, 69.37, 71.40),
}
SOURCES = {"coop": {"cafo-figure", "cafo"}, "gda": {"gda-log"}, "tip-x": {"gda-log"}}


@pytest.mark.parametrize("method", CHECK)
def test_few_shot_tables_add_up(method: str) -> None:
    source = SOURCES.get(method, {"tip-adapter-log"})
    for shots, wanted in zip(SHOTS, CHECK[method], strict=True):
        rows = {
            r.set: r.accuracy
            for r in RECORDS
            if (r.method, r.shots, r.setting, r.backbone) == (method, shots, "few-shot", "RN50")
            and r.source in source
        }
        assert sorted(rows) == sorted(ELEVEN)
        assert sum(rows.values()) / 11 == pytest.approx(wanted, abs=0.0055)


def test_the_first_match_is_the_one_to_compare_with() -> None:
    first, *others = matching("coop", "caltech101", "RN50", 16)
    assert (first.accuracy, first.source) == (91.83, "cafo-figure")
    assert [one.accuracy for one in others] == [92.07, 92.0]
    assert matching("vtclip", "dtd", "RN50", 16)[0].accuracy == 65.72
    assert matching("vtclip", "dtd", "ViT-B-16", 16) == []
    assert matching("vtclip", "dtd", "RN50", 8) == []
    assert matching("zeroshot", "dtd", "RN50", 0)[0].accuracy == 42.20
    assert matching("rada-adapters", "dtd", "ViT-B-16", 16, part="new")[0].accuracy == 67.15
    assert matching("zeroshot", "dtd", "ViT-B-16", 0, part="base")[0].accuracy == 53.24


def test_imagenet_is_compared_under_its_own_templates() -> None:
    assert matching("zeroshot", "imagenet", "RN50", 0)[0].accuracy == 58.24
    seven = matching("zeroshot", "imagenet", "RN50", 0, templates="imagenet7")
    assert seven[0].accuracy == 60.33
    assert matching("tip-adapter-f", "imagenet", "RN50", 16)[0].accuracy == 65.03


def test_a_mean_needs_all_of_its_sets() -> None:
    assert mean_over("clip-adapter", ["dtd", "eurosat"], "RN50", 16) == pytest.approx(
        (65.96 + 84.43) / 2
    )
    assert mean_over("vtclip", ["dtd", "caltech101"], "RN50", 16) == pytest.approx(79.41)
    assert mean_over("vtclip", ["dtd", "eurosat"], "RN50", 16) is None
    assert mean_over("vtclip", [], "RN50", 16) is None
