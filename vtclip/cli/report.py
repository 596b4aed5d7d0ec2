# SPDX-License-Identifier: Apache-2.0
"""`vtclip report OUT`: a benchmark's rows as Markdown, CSV and, with --html, a page with pictures.

A file is replaced only where it is a report itself, or with --overwrite; all places are looked at
before the first is written. Needs no torch.
"""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path

from vtclip.cli.parsing import Parser, count, emit, emit_json, existing, several

# how a file that this command wrote begins, or what its first bytes hold
SIGNS = {
    ".md": b"<!-- vtclip report -->",
    ".csv": b"source,set,backbone,part,method,shots,seeds,accuracy,half_interval",
    ".tex": b"% vtclip report",
    ".svg": b"<!-- vtclip report -->",
    ".html": b'<meta name="generator" content="vtclip report">',
    ".htm": b'<meta name="generator" content="vtclip report">',
}
HEAD = 1000  # bytes in which the sign stands


def add_arguments(parser: Parser) -> None:
    parser.add_argument("folder", metavar="OUT", help="a folder of vtclip bench")
    parser.add_argument("--html", metavar="PAGE", help="also write one page with pictures")
    parser.add_argument(
        "--published", action="store_true", help="put published numbers next to ours"
    )
    parser.add_argument(
        "--method",
        type=several(_name),
        metavar="LIST",
        help="only these, and zero-shot (default: all)",
    )
    parser.add_argument(
        "--latex", metavar="FILE", help="also write methods x data sets as a LaTeX table (.tex)"
    )
    parser.add_argument(
        "--shots", type=count, metavar="N", help="of --latex: images per class (default: 16)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace files of other origin")
    parser.add_shared("--json")


def _name(text: str) -> str:
    if not text:
        raise argparse.ArgumentTypeError("names must not be empty")
    return text


def run(args: argparse.Namespace) -> int:
    folder = existing("OUT", args.folder)
    page = None if args.html is None else Path(args.html).expanduser()
    if page is not None and page.suffix.lower() not in (".html", ".htm"):
        raise ValueError(f"--html must end in .html, got {args.html!a}")
    paper = None if args.latex is None else Path(args.latex).expanduser()
    if paper is not None and paper.suffix.lower() != ".tex":
        raise ValueError(f"--latex must end in .tex, got {args.latex!a}")
    if args.shots is not None and paper is None:
        raise ValueError("--shots needs --latex FILE")
    from vtclip.bench.csv_files import report_csv
    from vtclip.bench.latex import latex_table
    from vtclip.bench.page import draw, html_page, markdown_page
    from vtclip.bench.report import check_finished, make_report, read_benchmark
    from vtclip.files import several as several_of
    from vtclip.files import write_together

    rows, notes = read_benchmark(folder)
    report = make_report(rows, notes, args.method, args.published)
    check_finished(folder, report)
    title = f"vtclip benchmark: {folder.resolve().name}"
    command = command_line(args)
    files: dict[Path, str] = {}
    pictures: dict[str, str] = {}
    if page is not None:
        drawn = draw(report)
        pictures = drawn.files()
        files |= {folder / name: text for name, text in pictures.items()}
        files[page] = html_page(report, title, command, drawn)
    files[folder / "report.md"] = markdown_page(report, title, command, list(pictures))
    files[folder / "report.csv"] = report_csv(report)
    if paper is not None:
        files[paper] = latex_table(report, args.shots or 16, command)
    for path in files:
        check_place(path, args.overwrite)
    for named in (page, paper):
        if named is not None:
            named.parent.mkdir(parents=True, exist_ok=True)
    write_together({p: text.encode("utf-8", "backslashreplace") for p, text in files.items()})
    if args.json:
        value = {"runs": len(report.rows), "files": [str(path) for path in files]}
        emit_json("report", {**value, "notes": report.notes})
        return 0
    for note in report.notes:
        emit(note)
    emit(f"{several_of(len(report.rows), 'run')}: {', '.join(str(path) for path in files)}")
    return 0


def check_place(path: Path, overwrite: bool) -> None:
    """Refuse to replace a folder, and without `overwrite` a file that is not a report."""
    if path.is_dir():
        raise ValueError(f"{str(path)!a} is a folder")
    if overwrite or not path.exists():
        return
    with open(path, "rb") as file:
        if SIGNS[path.suffix.lower()] not in file.read(HEAD):
            raise ValueError(f"{str(path)!a} is not a report; --overwrite replaces it")


def command_line(args: argparse.Namespace) -> str:
    words = ["vtclip", "report", args.folder]
    words += ["--html", args.html] if args.html is not None else []
    words += ["--latex", args.latex] if args.latex is not None else []
    words += ["--shots", str(args.shots)] if args.shots is not None else []
    words += ["--published"] if args.published else []
    words += ["--method", ",".join(args.method)] if args.method else []
    return shlex.join(words)
