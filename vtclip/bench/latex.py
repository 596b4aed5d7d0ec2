# SPDX-License-Identifier: Apache-2.0
"""Methods x data sets at one number of shots as a LaTeX table, as papers print it (booktabs)."""

from __future__ import annotations

from vtclip.bench.cells import Cell, Group, in_order
from vtclip.bench.report import BenchReport
from vtclip.bench.tables import margin_of
from vtclip.files import printable, several

SIGN = "% vtclip report"
_ESCAPED = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    '"': r"\textquotedbl{}",
    **{letter: f"\\{letter}" for letter in "{}$&#_%"},
}


def escaped(text: str) -> str:
    """`text` as LaTeX prints it, on one line."""
    return "".join(_ESCAPED.get(letter, letter) for letter in printable(text))


def latex_table(report: BenchReport, shots: int, command: str) -> str:
    r"""A `table` with \toprule, \midrule, \bottomrule: a row per method, a column per data set.

    Accuracy in percent, mean over seeds, with its 95 % interval; the best of each column is bold.
    Of several data sets the last column is their mean. Parts of base-to-new runs are left out.
    A number of shots that no data set has is a ValueError.
    """
    whole = [group for group in report.groups if group.part is None]
    groups = [group for group in whole if shots in group.shots]
    if not groups:
        known = sorted({number for group in whole for number in group.shots})
        have = ", ".join(map(str, known)) or "none"
        raise ValueError(f"--shots: no data set has results at {shots}, there are {have}")
    left_out = [group.title for group in whole if shots not in group.shots]
    average = report.average
    columns = groups if average is None or shots not in average.shots else [*groups, average]
    lines = in_order({line for g in columns for line in g.lines if shots in g.lines[line]})
    titles = [escaped(group.title) for group in columns]
    body = [_row([escaped(line), *(_cell(group, line, shots) for group in columns)])
            for line in lines]  # fmt: skip
    notes = [f"% left out, without {several(shots, 'shot')}: {printable(title)}"
             for title in left_out]  # fmt: skip
    return "\n".join(
        [
            SIGN,
            f"% {printable(command)}",
            *notes,
            r"% \usepackage{booktabs} in the preamble",
            r"\begin{table}[t]",
            r"\centering",
            rf"\caption{{{_caption(shots, columns)}}}",
            rf"\begin{{tabular}}{{l{'r' * len(columns)}}}",
            r"\toprule",
            _row(["method", *titles]),
            r"\midrule",
            *body,
            r"\bottomrule",
            r"\end{tabular}",
            r"\end{table}",
            "",
        ]
    )


def _caption(shots: int, columns: list[Group]) -> str:
    cells = [cells[shots] for g in columns for cells in g.lines.values() if shots in cells]
    text = f"Accuracy in percent with {several(shots, 'training image')} per class, mean over seeds"
    text += r" $\pm$ half of the 95\,\% interval over seeds"
    if any(cell.half is not None and not cell.seeds_differ for cell in cells):
        text += r" ($^\dagger$: of the test set)"
    if any(cell.is_clipped for cell in cells):
        text += "; in brackets, the interval where it reaches 0 or 100"
    if any(cell.missing for cell in cells):
        text += r"; $^\ast$: some seeds are missing"
    return f"{text}. Bold: the best of its column."


def _row(cells: list[str]) -> str:
    return f"{' & '.join(cells)} \\\\"


def _cell(group: Group, line: str, shots: int) -> str:
    cell = group.lines.get(line, {}).get(shots)
    if cell is None:
        return "--"
    mean = f"{100 * cell.mean:.2f}"
    bold = rf"\textbf{{{mean}}}" if line in group.best(shots) else mean
    return bold + (r"$^\ast$" if cell.missing else "") + _margin(cell)


def _margin(cell: Cell) -> str:
    text = margin_of(cell)
    if not text:
        return ""
    text = text.replace("±", r"$\pm$").replace("†", r"$^\dagger$").replace("–", "--")
    return rf" {{\scriptsize {text}}}"
