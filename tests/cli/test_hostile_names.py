# SPDX-License-Identifier: Apache-2.0
"""Names that try to command a terminal, a spreadsheet or a page, through every command's outputs.

A name comes from whoever made a folder, a list or a shared run. Whatever the format, it stays a
name: no control character is printed, no line, row or cell is forged, no markup and no formula.
"""

from __future__ import annotations

import csv
import html.parser
import io
import json
import logging
import os
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from commands import call
from PIL import Image

from vtclip.cli import info, main
from vtclip.files import csv_lines, unescape

# what each does: clears the screen, sets the title, forges a line, turns the text around
TERMINAL = "\x1b[2J\x1b]0;x\x07\x9b1m"
CLASSES = (
    f"=cmd|'x'!A0 ant{TERMINAL}",
    "@bee\r\nforged: row, 100.0 %\n| forged | row |",
    "<script>cow<img src=x>\u2028\u202e`*[x](y)|",
)
FILES = ("=1+1|{}.png", "{}\x1b[2J\r\nforged: line.png", "-<script>{}\u2028\u202e`|\udcff.png")
BAD = "\tforged\r\n=unreadable\x1b[2J.png"
OPTIONS = ("--device", "cpu", "--threads", "1")


class Tags(html.parser.HTMLParser):
    """The tags and attributes of a page or a picture."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags |= {tag, *(name for name, _ in attrs)}


def picture(path: Path, k: int, number: int) -> None:
    """A PNG of the colour of class k; its name goes through the system's own letters."""
    draw = np.random.default_rng([k, number])
    pixels = draw.integers(0, 90, (16, 20, 3)) + 150 * (np.arange(3) == k)
    path.parent.mkdir(parents=True, exist_ok=True)
    data = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(data, "PNG")
    path.write_bytes(data.getvalue())


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three classes of nine images, one of them unreadable, in folders of hostile names."""
    root = tmp_path_factory.mktemp("hostile")
    for k, name in enumerate(CLASSES):
        for number in range(9):
            picture(root / "p\x1b[2Jics" / name / FILES[number % 3].format(number), k, number)
    (root / "p\x1b[2Jics" / CLASSES[0] / BAD).write_bytes(b"hello")
    return root


class Said:
    """What one command wrote, checked as everything that is printed must be."""

    def __init__(self, out: str, err: str) -> None:
        self.out, self.err = out, err
        for line in f"{out}\n{err}".split("\n"):
            assert line.isprintable(), line
            assert not re.match(r"\W*forged", line), line


@pytest.fixture
def said(place, capsys, caplog, monkeypatch):
    """Runs a command in `place`; its lines and the package's own records are checked."""
    monkeypatch.chdir(place)

    def run(*words: str, status: int = 0) -> Said:
        capsys.readouterr()
        caplog.clear()
        caplog.set_level(logging.DEBUG, "vtclip")
        got = call(*words)
        seen = capsys.readouterr()
        assert got == status, seen.err
        records = [record for record in caplog.records if record.name.startswith("vtclip")]
        for record in records:
            assert record.getMessage().isprintable(), record
        return Said(seen.out, "\n".join([seen.err, *(record.getMessage() for record in records)]))

    return run


@pytest.fixture(scope="module")
def run(place) -> Path:
    old = os.getcwd()
    os.chdir(place)
    try:
        words = ["--method", "tip-adapter", "--shots", "3", "--out", "r\x1b[2Jun"]
        assert call("fit", "p\x1b[2Jics", *words, "--cache-dir", "cache", *OPTIONS) == 0
    finally:
        os.chdir(old)
    return place / "r\x1b[2Jun"


def check_csv(text: str) -> list[list[str]]:
    """The rows, none of which is forged, cut or a formula."""
    rows = list(csv.reader(io.StringIO(text, newline="")))
    assert len(rows) == len(text.splitlines())
    for row in rows:
        assert len(row) == len(rows[0])
        for cell in row:
            assert cell.isprintable(), cell
            assert re.match(r"[-+=@\t\r]", cell) is None or re.fullmatch(r"-?[\d.e-]+", cell), cell
            assert not cell.startswith("forged")
    return rows


def check_markdown(text: str) -> None:
    """No markup of the names' own, and in every table one number of cells."""
    assert "<script" not in text
    assert "<img" not in text
    assert all(line.isprintable() for line in text.split("\n"))
    cells = None
    for line in text.split("\n"):
        count = len(re.findall(r"(?<!\\)(?:\\\\)*\|", line)) if line.startswith("|") else None
        assert cells is None or count is None or count == cells, line
        cells = count
        assert not line.startswith("| forged")


def check_markup(text: str) -> None:
    assert "script" not in Tags(text).tags
    assert "img" not in Tags(text).tags
    assert "onerror" not in Tags(text).tags
    assert all(line.isprintable() for line in text.split("\n"))


def test_fit(said, place):
    words = ["--method", "tip-adapter", "--shots", "20", "--out", "f\x1b[2J"]
    seen = said("fit", "p\x1b[2Jics", *words, "--cache-dir", "cache", *OPTIONS)
    assert "\\x1b[2J" in seen.out
    assert "not an image of a known format" in seen.err
    assert said("fit", "p\x1b[2Jics", *words, "--cache-dir", "cache", *OPTIONS, status=2).out == ""
    seen = said("fit", "p\x1b[2Jics", *words, "--overwrite", "--json", "--cache-dir", "cache")
    assert seen.out.isascii()
    assert json.loads(seen.out)["classes"] == sorted(CLASSES)


def test_the_files_of_a_run(run):
    result = json.loads((run / "result.json").read_bytes())
    assert sorted(result["classes"]) == sorted(CLASSES)
    for path in run.rglob("*.json"):
        assert path.read_bytes().isascii()
    rows = check_csv((run / "predictions.csv").read_text("utf-8"))
    assert {unescape(row[1]) for row in rows[1:]} == set(CLASSES)
    rows = check_csv((run / "images.csv").read_text("utf-8"))
    assert {unescape(row[1]) for row in rows[1:]} == set(CLASSES)
    assert len(rows) == 1 + 3 * 9


def test_predict(said, run, place):
    seen = said("predict", run.name, "p\x1b[2Jics", *OPTIONS, status=1)
    assert len(seen.out.splitlines()) == 27
    assert "not an image of a known format" in seen.err
    words = ["--coverage", "0.5", "--topk", "2"]
    rows = check_csv(said("predict", run.name, "p\x1b[2Jics", "--csv", *words, status=1).out)
    assert rows[0] == ["image", "rank", "label", "probability", "in_set"]
    assert {unescape(row[2]) for row in rows[1:]} <= set(CLASSES)
    assert {Path(unescape(row[0])).parent.name for row in rows[1:]} == set(CLASSES)
    seen = said("predict", run.name, "p\x1b[2Jics", "--json", status=1)
    assert seen.out.isascii()
    assert len(json.loads(seen.out)["images"]) == 28


def test_evaluate(said, run):
    said("evaluate", run.name, *OPTIONS)
    seen = said("evaluate", run.name, "p\x1b[2Jics", "--predictions", "=p.csv", *OPTIONS)
    assert "tip-adapter on p\\x1b[2Jics" in seen.out
    check_csv(Path("=p.csv").read_text("utf-8"))
    assert said("evaluate", run.name, "--json", *OPTIONS).out.isascii()


def test_explain(said, run):
    image = str(Path("p\x1b[2Jics", CLASSES[1], FILES[1].format(1)))
    said("explain", run.name, image, "--out", "x\x1b[2J.png", *OPTIONS)
    assert said("explain", run.name, image, "--json", *OPTIONS).out.isascii()
    said("explain", run.name, image, "--class", "none\x1b[2J\nforged", *OPTIONS, status=2)


def test_extend(said, run, place):
    picture(place / "new" / "eel\x1b[2J\nforged\u2028|" / "a\x1b[2J.png", 2, 77)
    picture(place / "new" / "eel\x1b[2J\nforged\u2028|" / "b\x1b[2J.png", 2, 78)
    seen = said("extend", run.name, "new", "--out", "larger\x1b[2J", "--shots", "1", *OPTIONS)
    assert "eel\\x1b[2J" in seen.out


def test_repeat(said, run):
    said("repeat", run.name, "--cache-dir", "cache")


def test_features(said, place):
    words = ["--out", "f\x1b[2J\nforged", "--spatial", "none", *OPTIONS]
    said("features", "p\x1b[2Jics", *words)
    said("features", "p\x1b[2Jics", *words[:1], "p\x1b[2Jics/f", status=2)


def test_bench_and_report(said, place):
    words = ["--methods", "zeroshot,tip-adapter", "--shots", "1,2", "--seeds", "1,2"]
    out = ["--out", "b\x1b[2J", "--cache-dir", "cache", *OPTIONS]
    seen = said("bench", "p\x1b[2Jics", *words, *out)
    assert "Few-shot results" in seen.out
    assert said("bench", "p\x1b[2Jics", *words, *out, "--json").out.isascii()
    folder = place / "b\x1b[2J"
    # a failed job's reason, and options that a row of another machine may name
    row = json.loads((folder / "results.jsonl").read_text().splitlines()[-1])
    forged = {"failed": "\x1b[2J<script>|\nforged", "key": "x", "source": "=s\x1b[2J|<img src=x>"}
    forged |= {name: row[name] for name in ("method", "shots", "seed")}
    odd = {**row, "source": "=s\x1b[2J|<img src=x>\nforged", "key": "y", "time": 1}
    odd["versions"] = {**row["versions"], "tor\x1b[2Jch<img src=x>|": "1\x1b[2J\nforged |"}
    with open(folder / "results-2.jsonl", "w") as file:
        file.write(f"{json.dumps(forged)}\n{json.dumps(odd)}\n")
    said("report", "b\x1b[2J", "--html", "p\x1b[2Jage.html")
    check_markup((place / "p\x1b[2Jage.html").read_text("utf-8"))
    pictures = sorted(folder.glob("*.svg"))
    assert pictures
    for path in pictures:
        check_markup(path.read_text("utf-8"))
    for path in folder.glob("*.md"):
        check_markdown(path.read_text("utf-8"))
    for path in folder.glob("*.csv"):
        assert len(check_csv(path.read_text("utf-8"))) > 1
    said("report", "b\x1b[2J", "--method", "none\x1b[2J", status=2)


def test_copies_are_named(said, place, tmp_path):
    for k, name in enumerate(CLASSES[:2]):
        for number in range(6):
            picture(tmp_path / "twice\x1b[2J" / name / FILES[number % 3].format(number), k, 0)
    source = str(tmp_path / "twice\x1b[2J")
    words = ["--method", "proker", "--shots", "2", "--cache-dir", "cache", *OPTIONS]
    said("fit", source, *words, "--out", str(tmp_path / "r"), status=2)
    said("fit", source, *words, "--strict", "--out", str(tmp_path / "r"), status=2)


def test_lists_of_images(said, place, tmp_path):
    rows = [["path", "label", "what\x1b[2J", "what\x1b[2J"]]
    rows += [[f"gone\x1b[2J{number}.png", "x\x1b[2J\nforged"] for number in range(3)]
    (tmp_path / "list\x1b[2J.csv").write_text(csv_lines(rows))
    said("fit", str(tmp_path / "list\x1b[2J.csv"), "--out", str(tmp_path / "r"), status=2)
    said("data", "check", str(tmp_path), "n\x1b[2J\nforged", status=2)
    said("convert", str(tmp_path / "list\x1b[2J.csv"), status=2)


def test_crashes_and_records_are_printed_as_lines(capsys, monkeypatch):
    """Whatever is raised or logged, by whatever library."""

    def crash(_: object) -> int:
        logging.getLogger("some.library").warning("%s", "a\x1b[2J\r\nforged")
        raise RuntimeError("b\x1b[2J\r\nforged")

    monkeypatch.setattr(info, "run", crash)
    monkeypatch.setattr(sys, "argv", ["vtclip", "info"])
    monkeypatch.setattr(sys, "excepthook", sys.__excepthook__)
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    with pytest.raises(RuntimeError) as raised:
        main()
    sys.excepthook(raised.type, raised.value, raised.tb)
    seen = Said(*capsys.readouterr())
    assert "WARNING: a\\x1b[2J\\r\\nforged\n" in seen.err
    assert "Traceback" in seen.err
    assert "RuntimeError: b\\x1b[2J\\r\\nforged\n" in seen.err
