# SPDX-License-Identifier: Apache-2.0
"""A report as one HTML page, that needs neither network nor scripts, and as Markdown.

The page follows the reader's light or dark setting; its tables keep their first column in sight
and scroll by themselves on a narrow screen. Every name is escaped.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from vtclip.bench import panels, tables
from vtclip.bench.cells import Group
from vtclip.bench.panels import escape
from vtclip.bench.report import BenchReport
from vtclip.bench.tables import Entry, Table, plain, plural
from vtclip.files import printable

MARK = '<meta name="generator" content="vtclip report">'
INTERVALS = (
    "Accuracy on test images in percent, mean over seeds, ± half of the 95 % interval over seeds "
    "(Student's t): other draws of the shots, the same test images. †: of the test set (Wilson), "
    "for one seed or where all seeds agree. [a, b]: the interval where ± would leave 0..100. “2 of "
    "3 seeds”: the others have no result, or not on "
    "every source of an average, and do not count. Bold: the best of its column, among the means "
    "over all of the column's seeds."
)
CALIBRATION = (
    "NLL in nats; ECE over 15 bins; T is the temperature fitted on validation images, and “at T” "
    "says what it changes. Seconds and memory are means over seeds, on the machine named below."
)
COMPARED = (
    "Published numbers of the same set, backbone and shots; an empty cell says that none is known. "
    "Difference: ours less the published one, in points. Other code, other draws and other rules "
    "for choosing hyper-parameters lie behind them, so that a point more or less says little. "
    "Numbers in brackets point to the remarks below."
)
DASHED = "Dashed: published for the same backbone."
RELIABILITY = (
    "Share of right predictions against confidence, all seeds together. Columns: as the head gives "
    "it, the darker the more images. Dots: at the temperature fitted on validation images, their "
    "area the share of images. On the dotted diagonal confidence is what it says."
)
STYLE = """
*{box-sizing:border-box}
body{margin:0;background:var(--ground);color:var(--ink);font:16px/1.5 system-ui,sans-serif}
main{max-width:1280px;margin:0 auto;padding:20px 16px 60px}
h1{font-size:1.7rem;line-height:1.2;margin:.4em 0}
h2{font-size:1.25rem;margin:2.2em 0 .4em;padding-top:.5em;border-top:1px solid var(--rule)}
h3{font-size:1rem;margin:1.4em 0 .4em;overflow-wrap:anywhere}
h4{font-size:.9rem;margin:1em 0 .3em;color:var(--soft)}
p{max-width:75ch;margin:.4em 0}
p.note,li{color:var(--soft);font-size:.9rem;max-width:85ch;overflow-wrap:anywhere}
ul,ol{padding-left:1.6em;margin:.5em 0}
.grid-of{display:grid;gap:14px 18px;
  grid-template-columns:repeat(auto-fill,minmax(min(100%,270px),1fr))}
.small-of{display:grid;gap:10px;grid-template-columns:repeat(auto-fill,minmax(150px,1fr))}
.grid-of svg,.small-of svg{width:100%;height:auto;display:block}
.small-of svg .title{font-size:12px}
.legend{display:flex;flex-wrap:wrap;gap:4px 16px;margin:.8em 0;font-size:.88rem}
.legend span{display:inline-flex;align-items:center;gap:6px;overflow-wrap:anywhere}
.swatch{flex:none}
.scroll{overflow-x:auto;max-width:100%;margin:.3em 0 1em;border:1px solid var(--rule);
  border-radius:6px;width:fit-content}
table{border-collapse:separate;border-spacing:0;font-size:14px;line-height:21px;
  font-variant-numeric:tabular-nums}
th,td{padding:5px 11px;text-align:right;white-space:nowrap;border-bottom:1px solid var(--rule)}
tbody tr:last-child>*{border-bottom:0}
.tables{display:grid;gap:0 24px;grid-template-columns:repeat(auto-fill,minmax(min(100%,590px),1fr))}
.tables>*{min-width:0}
thead th{background:var(--panel);font-weight:600}
th:first-child{position:sticky;left:0;z-index:1;text-align:left;background:var(--panel);
  background-clip:padding-box;border-right:1px solid var(--rule)}
tbody th{font-weight:500}
th:first-child span{display:inline-block;width:max-content;max-width:min(40vw,22em);
  white-space:normal;overflow-wrap:anywhere;vertical-align:top}
td.words{text-align:left;white-space:normal;max-width:34em;overflow-wrap:anywhere}
td.long{min-width:22em}
th.words{text-align:left}
td b{font-weight:700}
td small{color:var(--soft);font-size:12px;line-height:1}
details{margin:.5em 0;border:1px solid var(--rule);border-radius:6px;padding:.4em .8em}
summary{cursor:pointer;font-weight:600;overflow-wrap:anywhere}
pre{overflow-x:auto;background:var(--panel);padding:.7em .9em;border-radius:6px;font-size:.82rem}
"""


@dataclass(frozen=True)
class Pictures:
    """The drawings of a report: shots curves, and reliability by group."""

    panels: list[str]
    legend: dict[str, str]
    diagrams: dict[str, list[str]]
    dashed: bool

    def files(self) -> dict[str, str]:
        """Each kind of picture as an SVG file of its own."""
        files = {"report-shots.svg": panels.sheet(self.panels, 4, panels.PANEL, self.legend)}
        diagrams = list(itertools.chain.from_iterable(self.diagrams.values()))
        if diagrams:
            files["report-reliability.svg"] = panels.sheet(diagrams, 7, panels.DIAGRAM, {})
        return files


def draw(report: BenchReport) -> Pictures:
    styles = panels.styles_of(report.lines)
    shots_panels, dashed = [], False
    for group in report.tables:
        printed = {}
        if report.comparisons is not None:
            named = {line: panels.published_of(group, line, report.groups) for line in styles}
            printed = {line: values for line, values in named.items() if values}
        dashed = dashed or bool(printed)
        if group.part is None:
            shots_panels.append(panels.shots_panel(group, styles, printed))
    legend = {
        "zeroshot": panels.swatch(None),
        **{line: panels.swatch(style) for line, style in styles.items()},
    }
    diagrams = {
        f"{group.title}, {group.shots[-1]} shots": drawn
        for group in report.groups
        if group.part is None and (drawn := diagrams_of(group))
    }
    return Pictures(shots_panels, legend, diagrams, dashed)


def diagrams_of(group: Group) -> list[str]:
    """A diagram for each line at its most shots, where its rows hold bins."""
    diagrams = []
    for line, cells in group.lines.items():
        shots = max(cells)
        raw = panels.pooled_bins(cells[shots], "raw")
        if raw is not None:
            title = line if shots == group.shots[-1] else f"{line}, {shots} shots"
            scaled = panels.pooled_bins(cells[shots], "scaled")
            diagrams.append(panels.reliability(title, raw, scaled))
    return diagrams


def html_page(report: BenchReport, title: str, command: str, pictures: Pictures) -> str:
    """The whole page. title: of the benchmark; command: that made the page."""
    parts = [f"<h1>{escape(title)}</h1>", f"<p>{escape(summary(report))}</p>"]
    if report.notes:
        parts.append(_list(report.notes))
    if pictures.panels:
        parts += ["<h2>Accuracy against shots</h2>", _legend(pictures)]
        parts.append(f'<div class="grid-of">{"".join(pictures.panels)}</div>')
    parts += ["<h2>Accuracy</h2>", f'<p class="note">{escape(INTERVALS)}</p>']
    parts.append(_html_tables(tables.accuracy_table(group) for group in report.tables))
    if report.comparisons is not None:
        parts += ["<h2>Beside published numbers</h2>", *_published_section(report)]
    parts += ["<h2>Calibration and cost</h2>", f'<p class="note">{escape(CALIBRATION)}</p>']
    for group in report.groups:
        parts.append(
            _details(group.title, _html_tables(tables.details_tables(group), "h4", "wide"))
        )
    if pictures.diagrams:
        parts += ["<h2>Reliability</h2>", f'<p class="note">{escape(RELIABILITY)}</p>']
        for name, several in pictures.diagrams.items():
            inner = f'<div class="small-of">{"".join(several)}</div>'
            parts.append(_details(name, inner, True))
    weak = [
        table for group in report.groups if (table := tables.hardest_classes(group)) is not None
    ]
    if weak:
        parts.append("<h2>Hardest classes of the best method</h2>")
        parts += [_details(table.title, _html_table(table)) for table in weak]
    missed = tables.missed_table(report.missed)
    if missed is not None:
        parts += [f"<h2>{missed.title}</h2>", _html_table(missed)]
    parts += ["<h2>Provenance</h2>", *_provenance(report, command)]
    body = "\n".join(parts)
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n{MARK}\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; '
        "style-src 'unsafe-inline'\">\n"
        f"<title>{escape(title)}</title>\n<style>{panels.THEME}{STYLE}</style>\n</head>\n"
        f"<body><main>\n{body}\n</main></body>\n</html>\n"
    )


def summary(report: BenchReport) -> str:
    seeds = sorted({int(row["seed"]) for row in report.rows})
    counts = [
        f"{len(report.rows)} runs",
        plural(len({row["source"] for row in report.rows}), "source"),
        plural(len({row["method"] for row in report.rows}), "method"),
        f"seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}" if seeds else "no seed",
    ]
    return ", ".join(counts) + "."


def _list(lines: Iterable[str]) -> str:
    return f"<ul>{''.join(f'<li>{escape(line)}</li>' for line in lines)}</ul>"


def _legend(pictures: Pictures) -> str:
    items = [f"<span>{sample}{escape(name)}</span>" for name, sample in pictures.legend.items()]
    note = f'<p class="note">{DASHED}</p>' if pictures.dashed else ""
    return f'<div class="legend">{"".join(items)}</div>{note}'


def _details(title: str, inner: str, opened: bool = False) -> str:
    return (
        f"<details{' open' if opened else ''}><summary>{escape(title)}</summary>{inner}</details>"
    )


def _html_tables(content: Iterable[Table], tag: str = "h3", layout: str = "tables") -> str:
    """Tables under their titles, side by side where there is room ("tables"), or not ("wide")."""
    parts = [
        f"<div><{tag}>{escape(table.title)}</{tag}>{_html_table(table)}</div>" for table in content
    ]
    return f'<div class="{layout}">{"".join(parts)}</div>'


def _html_table(table: Table) -> str:
    head = "".join(
        f'<th scope="col"{_words_class(table, n)}>{escape(name)}</th>'
        for n, name in enumerate(table.head)
    )
    rows = []
    for row in table.rows:
        first, *others = row
        cells = [
            f"<td{_words_class(table, n)}>{_html_cell(entry)}</td>"
            for n, entry in enumerate(others, 1)
        ]
        name = f"<span>{_html_cell(first)}</span>"
        rows.append(f'<tr><th scope="row">{name}</th>{"".join(cells)}</tr>')
    # a box that scrolls must be reachable by the keyboard
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(table.title)}">'
        f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
    )


def _words_class(table: Table, column: int) -> str:
    if column not in table.words:
        return ""
    long = any(len(row[column].text) > 24 for row in table.rows)
    return ' class="words long"' if long else ' class="words"'


def _html_cell(entry: Entry) -> str:
    text = f"<b>{escape(entry.text)}</b>" if entry.best else escape(entry.text)
    return f"{text} <small>{escape(entry.small)}</small>" if entry.small else text


def _published_section(report: BenchReport) -> Iterable[str]:
    compared, remarks = tables.comparison_tables(report.comparisons or ())
    if not compared:
        yield f'<p class="note">{escape(_nothing_published())}</p>'
        return
    yield f'<p class="note">{escape(COMPARED)}</p>'
    yield _html_tables(compared, layout="wide")
    if remarks:
        yield f"<ol>{''.join(f'<li>{escape(remark)}</li>' for remark in remarks)}</ol>"


def _nothing_published() -> str:
    return (
        "No source is a data set that tables are published of, with its official split and a "
        "backbone of OpenAI's weights: there is nothing to compare with."
    )


def _provenance(report: BenchReport, command: str) -> Iterable[str]:
    facts, tested = tables.facts_table(report.rows), tables.sources_table(report.rows)
    yield _html_table(facts)
    yield _details(tested.title, _html_table(tested))
    lines = "\n".join(escape(line) for line in tables.commands(report.rows))
    hint = '<p class="note">With the first seed of each, by the recipes of that revision.</p>'
    yield _details("One run of each by itself", f"{hint}<pre>{lines}</pre>")
    yield f"<p>This page:</p><pre>{escape(command)}</pre>"


def markdown_page(
    report: BenchReport, title: str, command: str | None, pictures: Sequence[str] = ()
) -> str:
    """The same in Markdown. pictures: names of the SVG files next to it.

    command None: a benchmark's own table.md, without the sign by which `vtclip report` knows the
    files that it may replace, and without digests.
    """
    parts = [] if command is None else ["<!-- vtclip report -->"]
    parts += [f"# {plain(title)}", plain(summary(report))]
    parts += ["\n".join(f"- {plain(note)}" for note in report.notes)] if report.notes else []
    parts += [f"![{name}]({name})" for name in pictures]
    parts += ["## Accuracy", INTERVALS]
    for group in report.tables:
        table = tables.accuracy_table(group)
        parts += [f"### {plain(table.title)}", tables.markdown_table(table)]
    if report.comparisons is not None:
        compared, remarks = tables.comparison_tables(report.comparisons)
        parts += ["## Beside published numbers", COMPARED if compared else _nothing_published()]
        for table in compared:
            parts += [f"### {plain(table.title)}", tables.markdown_table(table)]
        parts += ["\n".join(f"{n}. {plain(remark)}" for n, remark in enumerate(remarks, 1))]
    parts += ["## Calibration and cost", CALIBRATION]
    for group in report.groups:
        for table in tables.details_tables(group):
            parts += [
                f"### {plain(group.title)}, {plain(table.title)}",
                tables.markdown_table(table),
            ]
    missed = tables.missed_table(report.missed)
    if missed is not None:
        parts += [f"## {missed.title}", tables.markdown_table(missed)]
    parts += ["## Provenance", tables.markdown_table(tables.facts_table(report.rows))]
    if command is not None:
        parts += [
            tables.markdown_table(tables.sources_table(report.rows)),
            "This page:",
            f"    {printable(command)}",
        ]
    return "\n\n".join(part for part in parts if part) + "\n"
