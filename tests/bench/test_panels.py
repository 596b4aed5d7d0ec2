# SPDX-License-Identifier: Apache-2.0
"""Pictures: what a curve, a bar and a column show is read back from the SVG they are drawn as."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from typing import Any

import bench_rows as made
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vtclip.bench import panels
from vtclip.bench.cells import Cell, Group
from vtclip.bench.published import mean_over, read_published
from vtclip.bench.report import make_report


def parsed(picture: str) -> ET.Element:
    return ET.fromstring(picture)


def points(element: ET.Element) -> list[tuple[float, float]]:
    pairs = (pair.split(",") for pair in element.get("points", "").split())
    return [(float(x), float(y)) for x, y in pairs]


def scale_of(root: ET.Element) -> Any:
    """Percent at a height, from the labels of the vertical axis alone."""
    labels = [
        (float(text.get("y", "")) - 4, float(text.text or ""))
        for text in root.iter("text")
        if text.get("text-anchor") == "end"
    ]
    (y0, low), (y1, high) = labels[0], labels[-1]
    return lambda y: low + (y - y0) * (high - low) / (y1 - y0)


def of_class(root: ET.Element, name: str, tag: str = "polyline") -> list[ET.Element]:
    return [one for one in root.iter(tag) if one.get("class") == name]


def drawn(rows: list[dict[str, Any]], published: Any = None) -> tuple[Group, ET.Element]:
    report = make_report(rows)
    group = report.groups[0]
    styles = panels.styles_of(report.lines)
    return group, parsed(panels.shots_panel(group, styles, published))


def test_a_curve_shows_means_and_its_bars_show_intervals() -> None:
    group, root = drawn(made.grid())
    percent = scale_of(root)
    curves = of_class(root, "line")
    assert len(curves) == 2
    bars = of_class(root, "error", "path")
    assert len(bars) == 6
    cells = [cell for line in ("proker", "rada") for cell in group.lines[line].values()]
    heights = [y for curve in curves for _, y in points(curve)]
    for cell, y, bar in zip(cells, heights, bars, strict=True):
        assert percent(y) == pytest.approx(100 * cell.mean, abs=0.05)
        top, foot = re.match(r"M[\d.]+ ([\d.]+)V([\d.]+)", bar.get("d", "")).groups()  # type: ignore[union-attr]
        assert cell.half is not None
        # an interval may reach beyond 100 %, the axis does not
        wanted = [min(100.0, 100 * (cell.mean + side * cell.half)) for side in (1, -1)]
        assert [percent(float(top)), percent(float(foot))] == pytest.approx(wanted, abs=0.1)


def test_shots_stand_on_a_logarithmic_axis() -> None:
    _, root = drawn(made.grid(methods=("rada",), shots=(1, 2, 4, 16)))
    x = [x for x, _ in points(of_class(root, "line")[0])]
    assert x[1] - x[0] == pytest.approx(x[2] - x[1], abs=0.2)
    assert x[3] - x[2] == pytest.approx(2 * (x[1] - x[0]), abs=0.2)


def test_zero_shot_is_a_level_line_at_its_accuracy() -> None:
    _, root = drawn(made.grid())
    (zero,) = of_class(root, "zero", "line")
    assert zero.get("y1") == zero.get("y2")
    assert scale_of(root)(float(zero.get("y1", ""))) == pytest.approx(60, abs=0.05)


def test_published_lines_are_dashed_in_the_colour_of_their_method() -> None:
    printed = {"proker": {1: 61.0, 4: 72.5, 16: 80.0}, "rada": {16: 75.0}}
    _, root = drawn(made.grid(), printed)
    percent = scale_of(root)
    curve, single = of_class(root, "published")
    assert [percent(y) for _, y in points(curve)] == pytest.approx([61, 72.5, 80], abs=0.05)
    assert [percent(y) for _, y in points(single)] == pytest.approx([75, 75], abs=0.05)
    colours = [one.get("stroke") for one in of_class(root, "line")]
    assert [curve.get("stroke"), single.get("stroke")] == colours
    assert ".published{" in panels.THEME
    assert "stroke-dasharray" in panels.THEME.partition(".published{")[2].partition("}")[0]


@pytest.mark.parametrize("accuracy", [0.0, 1.0, 0.5])
def test_one_number_alone_can_be_drawn(accuracy: float) -> None:
    row = made.make_row(accuracy=accuracy, zero_shot=accuracy)
    _, root = drawn([row])
    y = points(of_class(root, "line")[0])[0][1]
    assert panels.TOP <= y <= panels.BOTTOM
    assert scale_of(root)(y) == pytest.approx(100 * accuracy, abs=0.05)


def test_rows_without_shots_draw_zero_shot_only() -> None:
    _, root = drawn([made.make_row(method="zeroshot", shots=0)])
    assert of_class(root, "line") == []
    assert len(of_class(root, "zero", "line")) == 1


@given(st.floats(0, 99), st.floats(1, 100))
def test_ticks_are_round_even_and_within(low: float, span: float) -> None:
    high = min(100.0, low + span)
    if high - low < 0.9:
        return
    found = panels.ticks(low, high)
    assert 2 <= len(found) <= 7
    assert low - 1e-6 <= found[0] <= found[-1] <= high + 1e-6
    steps = [b - a for a, b in zip(found, found[1:], strict=False)]
    assert max(steps) - min(steps) < 1e-9
    assert round(steps[0], 9) in {0.1, 0.2, 0.5, 1, 2, 5, 10, 20}


def test_every_line_has_a_look_of_its_own() -> None:
    lines = ["zeroshot", *(f"method{number}" for number in range(14)), "auto"]
    styles = panels.styles_of(lines)
    assert list(styles) == lines[1:]
    assert len(set(styles.values())) == len(styles)
    assert styles["auto"][0] == "var(--ink)"
    known = set(re.findall(r"--(s\d)", panels.THEME))
    colours = {"var(--ink)", *(f"var(--{one})" for one in known)}
    assert {style[0] for style in styles.values()} == colours


NAMES = ["<script>alert(1)</script>", "a & b", "$x_1$", 'say "hi"']
NAMES += ["\x00\x1b[31m", "\ud800", "日本"]


@pytest.mark.parametrize("name", NAMES)
def test_names_are_text(name: str) -> None:
    _, root = drawn([made.make_row(source=name, method=name)])
    assert "script" not in {element.tag for element in root.iter()}
    shown = [text.text for text in root.iter("text") if text.get("class") == "title"]
    printable = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in name)
    assert shown == [printable.encode("utf-8", "backslashreplace").decode()]


def test_bins_of_all_seeds_are_pooled_by_count() -> None:
    rows = [made.make_row(seed=seed) for seed in (1, 2)]
    cell = make_report(rows).groups[0].lines["rada"][4]
    found = panels.pooled_bins(cell, "raw")
    assert found is not None
    parts = [row["adapted"]["reliability"]["raw"] for row in rows]
    for number, one in enumerate(found):
        counts = [part[number][2] for part in parts]
        if not sum(counts):
            assert one is None
            continue
        assert one is not None
        hits = sum(part[number][1] * part[number][2] for part in parts)
        assert one[1] == pytest.approx(hits / sum(counts))
        assert one[0] == pytest.approx((number + 0.5) / 15)
        assert one[2] == sum(counts)
    del rows[1]["adapted"]["reliability"]
    assert panels.pooled_bins(make_report(rows).groups[0].lines["rada"][4], "raw") is None


def test_columns_are_as_high_as_their_accuracy() -> None:
    raw: list[Any] = [None] * 15
    raw[7], raw[14] = (0.5, 0.25, 30), (0.98, 0.9, 70)
    scaled: list[Any] = [None] * 15
    scaled[10] = (0.7, 0.66, 100)
    root = parsed(panels.reliability("rada", raw, scaled))
    side = float(of_class(root, "frame", "rect")[0].get("height", ""))
    columns = [one for one in root.iter("rect") if one.get("class") is None]
    heights = [float(one.get("height", "")) / side for one in columns]
    assert heights == pytest.approx([0.25, 0.9], abs=0.001)
    assert float(columns[0].get("opacity", "")) < float(columns[1].get("opacity", ""))
    (dot,) = root.iter("circle")
    frame = of_class(root, "frame", "rect")[0]
    x = (float(dot.get("cx", "")) - float(frame.get("x", ""))) / side
    y = 1 - (float(dot.get("cy", "")) - float(frame.get("y", ""))) / side
    assert (x, y) == (pytest.approx(0.7, abs=0.001), pytest.approx(0.66, abs=0.001))
    # 0.3 * |0.25 - 0.5| + 0.7 * |0.9 - 0.98| = 0.131
    assert "ECE 0.131, at T 0.040" in [text.text for text in root.iter("text")]


def test_a_sheet_places_pictures_in_rows_and_is_one_file() -> None:
    report = make_report(made.grid(sources=("a", "b", "c", "d", "e")))
    styles = panels.styles_of(report.lines)
    pictures = [panels.shots_panel(group, styles) for group in report.groups]
    legend = {line: panels.swatch(style) for line, style in styles.items()}
    text = panels.sheet(pictures, 4, panels.PANEL, legend)
    assert text.startswith('<svg xmlns="http://www.w3.org/2000/svg"')
    root = parsed(text)
    tag = "{http://www.w3.org/2000/svg}"
    placed = [one for one in root.findall(f"{tag}svg") if one.get("role") == "img"]
    places = [(float(one.get("x", "")), float(one.get("y", ""))) for one in placed]
    width, height = panels.PANEL
    assert places == [(n % 4 * width, n // 4 * height) for n in range(5)]
    below = [float(one.get("y", "")) for one in root.findall(f"{tag}text")]
    assert len(below) == len(legend)
    assert min(below) > 2 * height
    assert max(below) < float(root.get("height", ""))


def test_published_numbers_of_a_panel() -> None:
    names = read_published().averages["average_11"]
    rows = made.grid(names, ("tip-adapter-f", "vtclip"), (16,), (1,), data="/x")
    report = make_report(rows)
    dtd = next(group for group in report.groups if group.name == "dtd")
    found = panels.published_of(dtd, "tip-adapter-f", report.groups)
    assert found == {1: 49.65, 2: 53.72, 4: 57.39, 8: 62.71, 16: 66.55}
    assert panels.published_of(dtd, "vtclip", report.groups) == {16: 65.72}
    assert report.average is not None
    mean = panels.published_of(report.average, "tip-adapter-f", report.groups)
    assert mean[16] == mean_over("tip-adapter-f", names, "RN50", 16)
    assert panels.published_of(report.average, "vtclip", report.groups) == {}
    own = make_report(made.grid(("dtd",), ("tip-adapter-f",)))
    assert panels.published_of(own.groups[0], "tip-adapter-f", own.groups) == {}


def test_an_average_that_is_printed_as_such_is_taken() -> None:
    names = read_published().averages["average_11"]
    rows = made.grid(names, ("proker",), (16,), (1,), data="/x", model="ViT-B-16:openai")
    report = make_report(rows)
    assert report.average is not None
    printed = {1: 71.32, 2: 73.74, 4: 76.23, 8: 79.84, 16: 82.01}
    assert panels.published_of(report.average, "proker", report.groups) == printed
    fewer = make_report([row for row in rows if row["source"] != "dtd"])
    assert fewer.average is not None
    assert panels.published_of(fewer.average, "proker", fewer.groups) == {}


def test_cells_without_an_interval_have_no_bar() -> None:
    group = Group("g", "g", None, None, None, {"rada": {4: Cell({1: 0.5})}})
    root = parsed(panels.shots_panel(group, panels.styles_of(["rada"])))
    assert of_class(root, "error", "path") == []
    assert len(of_class(root, "line")) == 1
