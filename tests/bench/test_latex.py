# SPDX-License-Identifier: Apache-2.0
"""`vtclip report --latex`: a table that LaTeX reads, with what the report says of the same rows."""

from __future__ import annotations

import re
from typing import Any

import bench_rows as made
import pytest

from vtclip.bench.latex import escaped, latex_table
from vtclip.bench.report import make_report
from vtclip.cli import main

COMMANDS = {
    *("usepackage", "begin", "end", "centering", "caption", "toprule", "midrule", "bottomrule"),
    *("textbf", "scriptsize", "pm", "dagger", "ast", "textbackslash", "textasciitilde"),
    *("textasciicircum", "textless", "textgreater", "textbar", "textquotedbl"),
}


def parse(text: str) -> list[list[str]]:
    """The cells of the tabular; an AssertionError where LaTeX would stop."""
    source = "\n".join(line for line in text.splitlines() if not line.startswith("%"))
    depth, maths, opened, k = 0, False, list[str](), 0
    while k < len(source):
        letter = source[k]
        if letter == "\\":
            name = re.match(r"[A-Za-z]+|.", source[k + 1 :], re.DOTALL)[0]
            assert name in COMMANDS or name in "\\{}$&#_%,", f"unknown \\{name}"
            if name in ("begin", "end"):
                what = re.match(r"\{(\w+)\}", source[k + 1 + len(name) :])[1]
                opened.append(what) if name == "begin" else None
                assert name == "begin" or opened.pop() == what
            k += 1 + len(name)
            continue
        assert letter not in '#%~<>|"', f"unescaped {letter}"
        assert letter not in "^_" or maths, f"{letter} outside of mathematics"
        assert letter != "&" or opened[-1] == "tabular"
        depth += {"{": 1, "}": -1}.get(letter, 0)
        maths ^= letter == "$"
        assert depth >= 0
        k += 1
    assert (depth, maths, opened) == (0, False, [])
    body = source[source.index(r"\toprule") : source.index(r"\bottomrule")]
    rows = re.sub(r"\\(toprule|midrule)", "", body).strip().removesuffix(r"\\").split(r"\\" + "\n")
    cells = [[cell.strip() for cell in re.split(r"(?<!\\)&", row)] for row in rows]
    columns = re.search(r"\\begin\{tabular\}\{(\w+)\}", source)[1]
    assert {len(row) for row in cells} == {len(columns)}
    return cells


def rows_of(source: str, method: str, accuracy: list[float], **more: Any) -> list[dict[str, Any]]:
    return [made.make_row(source, method, 16, seed, value, **more)
            for seed, value in enumerate(accuracy, 1)]  # fmt: skip


@pytest.fixture
def rows() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for source, lift in (("a_b & 50% $#~^\\{x}", 0.0), ("plants", 0.02)):
        found += rows_of(source, "rada", [0.70 + lift, 0.71 + lift, 0.72 + lift])
        found += rows_of(source, "proker", [0.80 + lift, 0.81 + lift, 0.82 + lift])
    return [*found, made.make_row("plants", "rada", 4)]


def test_the_parser_of_this_test_refuses_what_latex_refuses(rows):
    good = latex_table(make_report(rows), 16, "vtclip report x")
    for wrong, right in (("a_b", r"a\_b"), ("{", r"\{"), ("%", r"\%"), (r"\foo", r"\toprule")):
        with pytest.raises(AssertionError):
            parse(good.replace(right, wrong, 1))
    with pytest.raises(AssertionError):
        parse(good.replace(r"\end{tabular}", ""))


def test_methods_by_sources_with_the_best_bold_and_intervals(rows):
    report = make_report(rows)
    head, *body = parse(latex_table(report, 16, "vtclip report x"))
    name = r"a\_b \& 50\% \$\#\textasciitilde{}\textasciicircum{}\textbackslash{}\{x\}"
    assert head == ["method", name, "plants", "Mean of 2 sources"]
    assert [row[0] for row in body] == ["zeroshot", "proker", "rada"]
    lines = {row[0]: row[1:] for row in body}
    half = 2.48  # t(0.975, 2) * 0.01 / sqrt(3) in percent
    assert lines["proker"][0] == rf"\textbf{{81.00}} {{\scriptsize $\pm$ {half}}}"
    assert lines["rada"][1] == rf"73.00 {{\scriptsize $\pm$ {half}}}"
    assert lines["zeroshot"][0] == r"60.00 {\scriptsize $\pm$ 5.00$^\dagger$}"
    assert lines["proker"][2] == rf"\textbf{{82.00}} {{\scriptsize $\pm$ {half}}}"


def test_intervals_stay_within_0_and_100_and_missing_cells_are_dashes():
    rows = rows_of("animals", "rada", [0.80, 0.99]) + rows_of("plants", "proker", [0.7])
    text = latex_table(make_report(rows), 16, "x")
    lines = {row[0]: row[1:] for row in parse(text)[1:]}
    assert lines["rada"][0] == r"\textbf{89.50} {\scriptsize [0.00, 100.00]}"
    assert lines["rada"][1] == "--"
    assert "in brackets" in text


def test_a_number_of_shots_that_nobody_has_is_refused(rows):
    with pytest.raises(ValueError, match="no data set has results at 8, there are 4, 16"):
        latex_table(make_report(rows), 8, "x")
    text = latex_table(make_report(rows), 4, "x")
    assert "left out, without 4 shots: a_b" in text
    assert parse(text)[0] == ["method", "plants"]


def test_every_special_letter_is_escaped():
    assert escaped("a_b") == r"a\_b"
    for letter in '\\{}$&#^_%~<>|"':
        assert escaped(letter) != letter
    assert "\n" not in escaped("a\nb")


def test_the_command_writes_it_and_replaces_its_own_only(rows, tmp_path, capsys):
    out, place = made.write(tmp_path / "out", rows), tmp_path / "paper" / "table.tex"
    words = ["report", str(tmp_path / "out"), "--latex", str(place)]
    for _ in range(2):
        assert main(words) == 0
    assert str(place) in capsys.readouterr().out
    text = place.read_text(encoding="utf-8")
    assert parse(text)[0][0] == "method"
    assert f"--latex {place}" in text.splitlines()[1]
    place.write_text("mine")
    for more, message in (
        ([], "is not a report; --overwrite replaces it"),
        (["--overwrite", "--shots", "3"], "--shots: no data set has results at 3"),
    ):
        with pytest.raises(SystemExit):
            main([*words, *more])
        assert message in capsys.readouterr().err
        assert place.read_text() == "mine"
    for bad in (["--latex", "x.txt"], ["--shots", "4"]):
        with pytest.raises(SystemExit):
            main(["report", str(tmp_path / "out"), *bad])
        assert capsys.readouterr().err.count("\n") == 1
    assert out is not None
