# SPDX-License-Identifier: Apache-2.0
"""The page: whole by itself, harmless whatever names it shows, and its tables say what rows say."""

from __future__ import annotations

import csv
import io
import re
from html.parser import HTMLParser
from typing import Any

import bench_rows as made
import pytest

from vtclip.bench.cells import Group
from vtclip.bench.csv_files import CSV_HEAD, report_csv
from vtclip.bench.page import draw, html_page, markdown_page
from vtclip.bench.report import BenchReport, make_report
from vtclip.bench.tables import (
    accuracy_table,
    command_of,
    comparison_tables,
    details_tables,
    facts_table,
    hardest_classes,
    markdown_table,
)

EMPTY = {"meta", "link", "br", "img", "input", "hr"}


class Reader(HTMLParser):
    """Tags, attributes and the text of every element; unbalanced tags are an error."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.texts: list[tuple[str, str]] = []
        self._open: list[str] = []
        self.feed(page)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag not in EMPTY:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if data.strip():
            self.texts.append((self._open[-1] if self._open else "", data.strip()))


def page_of(report: BenchReport, title: str = "T", command: str = "vtclip report OUT") -> str:
    return html_page(report, title, command, draw(report))


EVIL = "<script>alert(1)</script>"
TWO = "\"'><img src=x onerror=alert(2)>"


@pytest.fixture(scope="module")
def evil() -> str:
    rows = made.grid(sources=(EVIL, TWO), methods=("rada", EVIL), classes=(EVIL, TWO, "cat"))
    rows[0]["device"] = rows[0]["revision"] = EVIL
    rows[1]["versions"] = {EVIL: TWO}
    rows.append({"source": EVIL, "method": TWO, "shots": 1, "seed": 1, "failed": EVIL})
    report = make_report(rows, [f"results-{EVIL}.jsonl"], published=True)
    return page_of(report, EVIL, f"vtclip report '{TWO}'")


def test_names_with_markup_are_shown_and_do_nothing(evil: str) -> None:
    found = Reader(evil)
    assert not {"script", "img", "iframe", "object", "embed", "a", "form"} & set(found.tags)
    assert not [name for name, _ in found.attributes if name.startswith("on")]
    places = {place for place, text in found.texts if EVIL in text}
    assert {"h1", "title", "h3", "span", "li", "summary", "td", "pre"} <= places
    assert "<script" not in evil.lower()
    assert "<img" not in evil.lower()


def test_the_page_needs_nothing_from_outside(evil: str) -> None:
    found = Reader(evil)
    outside = {"src", "href", "xlink:href", "srcset", "poster", "action", "data", "background"}
    assert not [pair for pair in found.attributes if pair[0] in outside]
    assert "@import" not in evil
    assert "url(" not in evil
    assert "//" not in re.sub(r"<pre>.*?</pre>", "", evil, flags=re.DOTALL)
    assert "default-src 'none'" in evil
    assert found.tags.count("style") == 1


def test_the_page_has_both_themes_and_fits_a_phone(evil: str) -> None:
    assert evil.startswith("<!DOCTYPE html>")
    assert '<meta charset="utf-8">' in evil
    assert "width=device-width" in evil
    assert "prefers-color-scheme:dark" in evil
    assert re.search(r"th:first-child\{position:sticky;left:0", evil)
    assert "tabular-nums" in evil
    assert "overflow-x:auto" in evil
    light, dark = (re.search(f"--ground:#({c}\\w+)", evil) for c in ("f", "1"))
    assert light
    assert dark
    used, known = set(re.findall(r"var\((--\w+)\)", evil)), set(re.findall(r"(--\w+):#", evil))
    assert used <= known


def test_every_picture_is_drawn_and_named() -> None:
    rows = made.grid(sources=("a", "b"))
    report = make_report(rows)
    pictures = draw(report)
    assert len(pictures.panels) == 3  # the average and two sources
    assert {name: len(several) for name, several in pictures.diagrams.items()} == {
        "a, 16 shots": 3,
        "b, 16 shots": 3,
    }
    assert list(pictures.legend) == ["zeroshot", "proker", "rada"]
    assert set(pictures.files()) == {"report-shots.svg", "report-reliability.svg"}
    page = page_of(report)
    assert page.count('class="title"') == 3 + 6
    assert "Dashed" not in page
    for row in rows:
        del row["adapted"]["reliability"], row["zero_shot"]["reliability"]
    bare = make_report(rows)
    assert list(draw(bare).files()) == ["report-shots.svg"]
    assert "Reliability" not in page_of(bare)


def test_dashed_lines_are_explained_where_they_are() -> None:
    rows = made.grid(("dtd",), ("clip-adapter",), data="/x")
    with_them, without = (make_report(rows, published=said) for said in (True, False))
    assert "Dashed: published" in page_of(with_them)
    assert 'class="published"' in page_of(with_them)
    assert 'class="published"' not in page_of(without)
    assert "Beside published" not in page_of(without)


def best_of(table: Any, column: int) -> list[str]:
    return [row[0].text for row in table.rows if row[column].best]


def test_the_best_of_each_column_is_bold() -> None:
    rows = [
        made.make_row(method=method, shots=shots, accuracy=accuracy)
        for method, shots, accuracy in [
            ("rada", 1, 0.7), ("rada", 4, 0.80001), ("proker", 1, 0.5), ("proker", 4, 0.80004),
        ]
    ]  # fmt: skip
    report = make_report(rows)
    table = accuracy_table(report.groups[0])
    assert list(table.head) == ["method", "1 shot", "4 shots"]
    assert best_of(table, 1) == ["rada"]
    assert best_of(table, 2) == ["proker", "rada"]  # equal in what is shown
    assert "<b>70.00</b> <small>± 5.00†</small>" in page_of(report)
    assert "| rada     | **70.00** ± 5.00† | **80.00** ± 5.00† |" in markdown_table(table)


def test_the_lowest_calibration_error_is_bold() -> None:
    report = make_report(made.grid(seeds=(1,)))
    for table in details_tables(report.groups[0]):
        for column, name in enumerate(table.head):
            numbers = {row[0].text: row[column].text for row in table.rows}
            if name.startswith(("NLL", "ECE")):
                lowest = min(numbers.values(), key=float)
                assert lowest in {numbers[line] for line in best_of(table, column)}
            elif name != "accuracy":
                assert best_of(table, column) == []


def test_the_details_hold_what_the_rows_hold() -> None:
    rows = made.grid(methods=("rada",), shots=(4,), seeds=(1, 2))
    (table,) = details_tables(make_report(rows).groups[0])
    found = dict(zip(table.head, table.rows[1], strict=True))
    for title, name in {"NLL": "nll", "ECE at T": "ece_scaled", "T": "temperature"}.items():
        mean = sum(row["adapted"][name] for row in rows) / 2
        assert float(found[title].text) == pytest.approx(mean, abs=5e-5)
    train = sum(row["seconds"]["train"] for row in rows) / 2
    assert float(found["train s"].text) == pytest.approx(train, abs=5e-3)
    assert (found["total s"].text, found["train MB"].text) == ("3.00", "300")
    assert found["peak MB"].text == "502"  # the mean of 501 and 502, even half
    zero = dict(zip(table.head, table.rows[0], strict=True))
    assert (zero["method"].text, zero["train s"].text) == ("zeroshot", "–")


def test_no_published_number_leaves_its_cells_blank() -> None:
    rows = made.grid(("dtd",), ("vtclip",), (4, 16), (1,), data="/x")
    report = make_report(rows, published=True)
    (table,), remarks = comparison_tables(report.comparisons or ())
    lines = {(row[0].text, row[1].text): [one.text for one in row[3:]] for row in table.rows}
    assert lines[("vtclip", "4")] == ["", "", "", ""]
    published, difference, place, also = lines[("vtclip", "16")]
    assert (published, also) == ("65.72", "")
    ours = next(100 * row["accuracy"] for row in rows if row["shots"] == 16)
    assert float(difference.replace("−", "-")) == pytest.approx(ours - 65.72, abs=0.0051)
    number = int(re.fullmatch(r"VT-CLIP \[(\d+)\]", place)[1])  # type: ignore[index]
    assert remarks[number - 1].startswith("VT-CLIP: arXiv 2112.02399")


def test_own_sources_have_no_comparison() -> None:
    page = page_of(make_report(made.grid(), published=True))
    assert "nothing to compare with" in page
    assert "also published" not in page


def test_hardest_classes_are_the_lowest_of_the_best_method() -> None:
    classes = [f"class {number:02d}" for number in range(30)]
    rows = [
        made.make_row(method="rada", accuracy=0.9, classes=classes),
        made.make_row(method="proker", accuracy=0.8, classes=classes),
    ]
    rows[0]["adapted"]["per_class"]["class 07"] = None  # no test images
    table = hardest_classes(make_report(rows).groups[0])
    assert table is not None
    assert list(table.head) == ["class", "zero-shot", "rada", "difference"]
    values = rows[0]["adapted"]["per_class"]
    wanted = sorted((n for n in classes if values[n] is not None), key=lambda n: values[n])
    assert [row[0].text for row in table.rows] == wanted[:10]
    first = table.rows[0]
    before = rows[0]["zero_shot"]["per_class"][wanted[0]]
    assert float(first[1].text) == pytest.approx(100 * before, abs=0.051)
    assert float(first[3].text.replace("−", "-")) == pytest.approx(
        100 * (values[wanted[0]] - before), abs=0.051
    )


def test_what_has_no_number_says_why() -> None:
    lost = [
        {"source": "a", "method": "coop", "shots": shots, "seed": 1, "skipped": "no text encoder"}
        for shots in (4, 16)
    ]
    page = page_of(make_report([*made.grid(("a",)), *lost]))
    texts = [text for place, text in Reader(page).texts if place in ("td", "span")]
    start = texts.index("skipped: no text encoder")
    assert texts[start - 5 : start] == ["a", "coop", "4, 16", "1", "2"]


def test_provenance_is_on_the_page() -> None:
    rows = made.grid(("dtd",), ("rada",), data="/sets", config={"templates": ["imagenet7"]})
    page = page_of(make_report(rows), command="vtclip report OUT --html p.html")
    for text in (
        "0123456789abcdef0123",
        "cpu (1 threads)",
        "1.2.3",
        "2.15.0",
        "RN50:openai",
        "a1" * 32,
        f"16 shots, seed 3: {1603:064x}"[:34],
        "vtclip report OUT --html p.html",
        "vtclip fit dtd --data /sets --method rada --shots 16 --seed 1 --model RN50:openai "
        "--templates imagenet7",
    ):
        assert text in page, text


@pytest.mark.parametrize(
    ("change", "wanted"),
    [
        ({}, "–"),
        ({"digests": {"weights": "cd" * 32}}, "RN50:openai"),
        ({"data": "/x"}, "RN50:openai"),
    ],
)
def test_features_without_an_encoder_name_no_model(change: dict[str, Any], wanted: str) -> None:
    table = facts_table([made.make_row(**change)])
    assert dict([one.text for one in row] for row in table.rows)["model"] == wanted


def test_commands_quote_what_a_shell_would_take() -> None:
    row = made.make_row(source="x", config={"source": "/my images; rm -rf ~", "prompt": "a $b"})
    words = command_of(row)
    assert "'/my images; rm -rf ~'" in words
    assert "--prompt 'a $b'" in words
    assert "--base-to-new" not in words
    assert command_of(made.make_row(config={"base_to_new": True})).endswith("--base-to-new")


@pytest.mark.parametrize("name", ["a|b", "<b>x</b>", "*x*", "[x](y)", "`x`", "x\ny", "&lt;"])
def test_names_are_text_in_markdown(name: str) -> None:
    report = make_report([made.make_row(source="s", method=name)])
    line = markdown_table(accuracy_table(report.groups[0])).splitlines()[-1]
    bars = re.findall(r"(?<!\\)\|", line)
    assert len(bars) == 3
    assert "<" not in line
    plain = re.sub(r"\\([\\`*_\[\]|])", r"\1", line.split(" | ")[0][2:].rstrip())
    shown = plain.replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&")
    assert shown == name.replace("\n", "\\n")


def test_markdown_and_csv_hold_every_cell() -> None:
    rows = made.grid(("dtd", "eurosat"), ("clip-adapter", "vtclip"), (4, 16), data="/x")
    report = make_report(rows, published=True)
    text = markdown_page(report, "T", "vtclip report OUT", ["shots.svg"])
    assert text.startswith("<!-- vtclip report -->\n")
    assert "![shots.svg](shots.svg)" in text
    lines = list(csv.DictReader(io.StringIO(report_csv(report))))
    assert list(lines[0]) == CSV_HEAD
    groups: dict[str, Group] = {group.title: group for group in report.tables}
    assert len(lines) == 3 * 3 * 2
    for line in lines:
        cell = groups[line["source"]].lines[line["method"]][int(line["shots"])]
        assert float(line["accuracy"]) == pytest.approx(100 * cell.mean, abs=5.1e-5)
        assert f"{100 * cell.mean:.2f}" in text
        if line["published"]:
            wanted = float(line["accuracy"]) - float(line["published"])
            assert float(line["difference"]) == pytest.approx(wanted, abs=1e-3)
            assert line["published_in"]
    known = {(line["source"], line["method"], line["shots"]) for line in lines if line["published"]}
    assert ("DTD", "vtclip", "16") in known
    assert ("EuroSAT", "vtclip", "16") not in known
    assert ("DTD", "clip-adapter", "4") in known
