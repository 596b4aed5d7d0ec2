# SPDX-License-Identifier: Apache-2.0
"""Progress and colours: on a terminal, and nowhere else."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from commands import environment, python
from pictures import dots

from vtclip.cli.colours import coloured, paint

pytest.importorskip("pty", reason="this system has no pseudo-terminals")
from terminal import on_terminal

COLOUR = re.compile(r"\x1b\[\d+m")
HERE = ["--device", "cpu", "--threads", "1"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of drawn images, and a run of method auto on them."""
    folder = tmp_path_factory.mktemp("terminal")
    dots(folder / "dots")
    done = python("-m", "vtclip", *fit_words(folder, "run"), env=piped(folder))
    assert (done.returncode, COLOUR.search(done.stdout + done.stderr)) == (0, None)
    assert "\r" not in done.stderr
    assert {line.partition(": ")[0] for line in done.stderr.splitlines()} <= {"note", "WARNING"}
    return folder


def fit_words(folder: Path, out: str) -> list[Any]:
    return ["fit", folder / "dots", "--shots", "4", "--out", folder / out, *HERE]


def piped(folder: Path, **variables: str) -> dict[str, str]:
    return environment(VTCLIP_CACHE=str(folder / "cache"), **variables)


def watched(folder: Path, *words: Any, **options: Any) -> tuple[int, str, str]:
    return on_terminal(*words, VTCLIP_CACHE=str(folder / "cache"), **options)


def test_fit_shows_stages_candidates_and_steps_with_the_time_left(place):
    status, shown, _ = watched(place, *fit_words(place, "seen"))
    assert status == 0
    assert "\rfeatures ..." in shown
    assert "\revaluate ..." in shown
    assert re.search(r"candidates:\s+\d+%.*\[\d\d:\d\d<\S+, .*proker\]", shown)
    assert re.search(r"members:\s+\d+%.*\| \d/\d \[", shown)
    assert re.search(r"train:\s+\d+%.*\| \d+/\d+ \[\d\d:\d\d<", shown)
    (bold,) = re.findall(r"\x1b\[1m(.*?)\x1b\[0m", shown)
    assert "% right on" in bold
    assert re.search(r"\x1b\[33mnote: --model demo .*?\x1b\[0m\r\n", shown)


def test_predict_and_evaluate_show_what_they_do(place):
    words = ["predict", place / "run", place / "dots", *HERE]
    status, shown, out = watched(place, *words, "--json", out=False)
    assert (status, "loading the model ..." in shown) == (0, True)
    assert len(json.loads(out)["images"]) > 8  # all of stdout is the object
    status, shown, out = watched(place, "evaluate", place / "run", *HERE, out=False)
    assert (status, "evaluating ..." in shown) == (0, True)
    assert "% right on" in out.splitlines()[0]
    assert COLOUR.search(out) is None


@pytest.mark.parametrize("variables", [{"NO_COLOR": "1"}, {"TERM": "dumb"}])
def test_colours_can_be_turned_off(place, variables):
    for words in (["evaluate", place / "run", *HERE], ["evaluate", place / "gone"]):
        status, shown, _ = watched(place, *words, **variables)
        assert status == (0 if words[-1] == "1" else 2)
        assert COLOUR.search(shown) is None
        if variables == {"TERM": "dumb"}:
            assert "\x1b" not in shown
            assert "evaluating" not in shown


def test_an_error_is_red_and_a_hostile_name_in_it_stays_escaped(place):
    status, shown, _ = watched(place, "evaluate", "\x1b[2Jgone")
    assert status == 2
    assert shown.startswith("\x1b[31mvtclip evaluate: RUN ")
    assert shown.endswith("does not exist\x1b[0m\r\n")
    assert "\x1b[2J" not in shown


def test_json_has_no_colours_on_a_terminal_either(place):
    status, shown, _ = watched(place, "evaluate", place / "run", "--json", *HERE)
    assert (status, COLOUR.search(shown)) == (0, None)
    assert json.loads(shown[shown.index("{") :])["command"] == "evaluate"


def test_the_files_of_a_watched_fit_hold_no_escapes(place):
    assert watched(place, *fit_words(place, "files"))[0] == 0
    for name in ("result.json", "log.jsonl", "images.csv", "predictions.csv"):
        assert b"\x1b" not in (place / "files" / name).read_bytes()


class Terminal:
    def isatty(self) -> bool:
        return True


def test_who_sees_colours(monkeypatch):
    screen: Any = Terminal()
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("WT_SESSION", "1")
    monkeypatch.setenv("NO_COLOR", "")  # empty is as if it were not set
    assert coloured(screen)
    assert paint("text", "bold", screen) == "\x1b[1mtext\x1b[0m"
    assert paint("text", "", screen) == "text"
    monkeypatch.setenv("NO_COLOR", "0")
    assert not coloured(screen)
    assert not coloured(None)
