# SPDX-License-Identifier: Apache-2.0
"""`vtclip report` as a command: what it writes and refuses, and that a refusal writes nothing."""

from __future__ import annotations

from pathlib import Path

import bench_rows as made
import pytest
from commands import call, python, refused

from vtclip.cli import main


def run(*words: object) -> int:
    return call("report", *words)


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return made.write(tmp_path / "bench", made.grid())  # type: ignore[no-any-return]


def test_without_a_page_tables_are_written(out, capsys):
    assert run(out) == 0
    assert set(files(out)) == {"results.jsonl", "report.md", "report.csv"}
    assert capsys.readouterr().out.startswith("18 runs: ")
    assert "svg" not in (out / "report.md").read_text()


def test_with_a_page_pictures_are_written(out, tmp_path):
    page = tmp_path / "deep" / "er" / "page.html"
    assert run(out, "--html", page, "--published", "--method", "rada") == 0
    assert set(files(out)) == {
        "results.jsonl", "report.md", "report.csv", "report-shots.svg", "report-reliability.svg",
    }  # fmt: skip
    text = page.read_text(encoding="utf-8")
    assert "<title>vtclip benchmark: bench</title>" in text
    assert "--published --method rada" in text
    assert "proker" not in text
    assert "![report-shots.svg](report-shots.svg)" in (out / "report.md").read_text()


def test_the_same_rows_give_the_same_bytes(out):
    page = out / "page.html"
    assert run(out, "--html", page) == 0
    first = files(out)
    assert run(out, "--html", page) == 0
    assert files(out) == first


def test_no_torch_is_imported(out):
    code = (
        "import sys; from vtclip.cli import main; "
        f"assert main(['report', {str(out)!r}, '--html', {str(out / 'p.html')!r}]) == 0; "
        "assert 'torch' not in sys.modules and 'matplotlib' not in sys.modules"
    )
    done = python("-c", code)
    assert done.returncode == 0, done.stderr


def test_torn_lines_are_said(out, capsys):
    with open(out / "results.jsonl", "a") as file:
        file.write('{"source": "animals", "meth')
    assert run(out, "--html", out / "page.html") == 0
    said = "results.jsonl, line 19: cut off or broken, not counted."
    assert said in capsys.readouterr().out
    for name in ("page.html", "report.md"):
        assert said in (out / name).read_text().replace("\\_", "_")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "holds no results*.jsonl; vtclip bench writes them"),
        ("", "holds no whole row in its results*.jsonl"),
        ('{"source": "a', "holds no whole row in its results*.jsonl"),
        ("5\n", "results.jsonl, line 1: a row must be an object, got int"),
        (
            '{"source": "a", "method": "rada", "shots": 1, "seed": 1, "failed": "boom"}\n',
            "OUT holds no finished run: 1 were skipped or failed",
        ),
    ],
)
def test_folders_without_rows_are_refused(tmp_path, capsys, content, message):
    if content is not None:
        (tmp_path / "results.jsonl").write_text(content)
    before = files(tmp_path)
    page = tmp_path / "sub" / "page.html"
    assert message in refused(capsys, "report", tmp_path, "--html", page)
    assert files(tmp_path) == before
    assert not page.parent.exists()


def test_a_wrong_argument_is_one_line(out, tmp_path, capsys):
    before = files(out)
    assert "does not exist" in refused(capsys, "report", tmp_path / "none")
    assert "must be a folder" in refused(capsys, "report", out / "results.jsonl")
    assert "--html must end in .html, got" in refused(
        capsys, "report", out, "--html", out / "results.jsonl"
    )
    assert "no row is of 'prok'" in refused(capsys, "report", out, "--method", "prok")
    assert "must differ" in refused(capsys, "report", out, "--method", "rada,rada")
    assert "not be empty" in refused(capsys, "report", out, "--method", "")
    assert "unknown argument" in refused(capsys, "report", out, "--htm", "x.html")
    assert files(out) == before


def test_a_page_of_other_origin_stays(out, tmp_path, capsys):
    page = tmp_path / "index.html"
    page.write_text("<html>mine</html>")
    before = files(out)
    assert "is not a report; --overwrite replaces it" in refused(
        capsys, "report", out, "--html", page
    )
    assert page.read_text() == "<html>mine</html>"
    assert files(out) == before
    assert run(out, "--html", page, "--overwrite") == 0
    assert "mine" not in page.read_text()
    assert run(out, "--html", page) == 0  # now it is a report


@pytest.mark.parametrize("name", ["report.md", "report.csv", "report-shots.svg"])
def test_other_files_of_other_origin_stay(out, capsys, name):
    (out / name).write_text("mine")
    before = files(out)
    assert repr(str(out / name)) in refused(capsys, "report", out, "--html", out / "page.html")
    assert files(out) == before


def test_a_folder_is_never_replaced(out, capsys):
    (out / "page.html").mkdir()
    words = (out, "--html", out / "page.html", "--overwrite")
    assert "is a folder" in refused(capsys, "report", *words)
    assert not (out / "report.md").exists()


def test_differing_settings_are_said_on_page_and_screen(tmp_path, capsys):
    rows = [*made.grid(seeds=(1,)), *made.grid(seeds=(2,), revision="f" * 40)]
    out = made.write(tmp_path / "bench", rows)
    assert run(out, "--html", out / "page.html") == 0
    said = "The rows are of 2 revisions: 0123456789ab (6 rows), ffffffffffff (6 rows)."
    assert said in capsys.readouterr().out
    assert said in (out / "page.html").read_text()


def test_rows_of_a_real_benchmark_are_read(animals, tmp_path):
    out = tmp_path / "bench"
    words = ["bench", str(animals), "--methods", "zeroshot,proker", "--shots", "1,2"]
    assert main([*words, "--seeds", "1,2", "--out", str(out), "--threads", "1"]) == 0
    assert run(out, "--html", out / "page.html") == 0
    text = (out / "page.html").read_text()
    assert "animals, 2 shots" in text  # its rows hold the bins of the diagrams
    # tests/bench/test_tables.py compares the files' cells
    assert "| zeroshot | " in (out / "report.md").read_text()


def test_report_is_listed_with_the_commands(capsys):
    assert call("--help") == 0
    assert "report" in capsys.readouterr().out.split()
