# SPDX-License-Identifier: Apache-2.0
"""Environment variables: one table of them, and what a launcher's say without a launcher."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from commands import call, refused

from vtclip.cli import COMMANDS, TOGETHER
from vtclip.environment import ELSEWHERE, VARIABLES, check_launcher, is_first, unknown_variables

ROOT = Path(__file__).parents[1]
READ = re.compile(
    r"""environ(?:\.get\(|\.setdefault\(|\.pop\(|\[)\s*["'](\w+)|get_?env\(\s*["'](\w+)""",
    re.IGNORECASE,
)
LAUNCHED = {
    "RANK": "1",
    "WORLD_SIZE": "2",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "localhost",
    "MASTER_PORT": "29500",
}
NOT_LAUNCHED = [
    ({"RANK": "1"}, "RANK is 1 but WORLD_SIZE is not set"),
    ({"LOCAL_RANK": "3"}, "LOCAL_RANK is 3 but WORLD_SIZE is not set"),
    ({"LOCAL_WORLD_SIZE": "4"}, "LOCAL_WORLD_SIZE is 4 but WORLD_SIZE is not set"),
    ({"WORLD_SIZE": "2"}, "WORLD_SIZE is 2 but RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PORT are not"),
    ({"WORLD_SIZE": "1", "RANK": "1"}, "RANK is 1 but WORLD_SIZE is 1"),
    ({"WORLD_SIZE": "0"}, "WORLD_SIZE must be at least 1, got 0"),
    ({"WORLD_SIZE": "two"}, "WORLD_SIZE must be a whole number, got 'two'"),
    ({"RANK": "-1"}, "RANK must be a whole number, got '-1'"),
    ({**LAUNCHED, "RANK": "2"}, "RANK is 2 but WORLD_SIZE is 2"),
    ({**LAUNCHED, "LOCAL_WORLD_SIZE": "3"}, "LOCAL_WORLD_SIZE is 3 but WORLD_SIZE is 2"),
]
# the least that the parser takes
WORDS = {"bench": ["x", "--out", "y"], "features": ["x", "--out", "y"], "predict": ["x", "y"]}
WORDS |= {"explain": ["x", "y"], "extend": ["x", "y", "--out", "z"], "data": ["check", "x"]}
WORDS["completion"] = ["bash"]
WORDS |= dict.fromkeys(("info", "demo", "selftest", "tune", "models"), [])


@pytest.fixture(autouse=True)
def clean(monkeypatch):
    for name in LAUNCHED:
        monkeypatch.delenv(name, raising=False)


def put(monkeypatch, variables):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize(("variables", "message"), NOT_LAUNCHED)
def test_variables_without_a_launcher_are_named(monkeypatch, variables, message):
    put(monkeypatch, variables)
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        check_launcher()
    assert str(caught.value).endswith("; start the processes with torchrun, or unset it")


@pytest.mark.parametrize(
    "variables",
    [
        {},
        {"RANK": "0", "LOCAL_RANK": "0"},
        {"MASTER_ADDR": "here", "MASTER_PORT": "1"},
        LAUNCHED,
        {**LAUNCHED, **dict.fromkeys(("RANK", "LOCAL_RANK"), "0"),
         **dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), "1")},
    ],
)  # fmt: skip
def test_a_launcher_and_none_are_both_right(monkeypatch, variables):
    put(monkeypatch, variables)
    check_launcher()
    assert is_first() == (variables != LAUNCHED)


@pytest.mark.parametrize("command", [name for name, _, _ in COMMANDS])
def test_no_command_is_silenced(capsys, monkeypatch, command):
    monkeypatch.setenv("RANK", "1")
    line = refused(capsys, command, *WORDS.get(command, ["x"]))
    assert line.startswith(f"vtclip {command}: RANK is 1 but WORLD_SIZE is not set; ")


@pytest.mark.parametrize("command", sorted({name for name, _, _ in COMMANDS} - {*TOGETHER}))
def test_what_runs_in_one_process_is_not_done_once_by_each(capsys, monkeypatch, command):
    put(monkeypatch, LAUNCHED)
    line = refused(capsys, command, *WORDS.get(command, ["x"]))
    assert line.rstrip() == (
        f"vtclip {command}: runs in one process, but WORLD_SIZE is 2; start it without torchrun"
    )


def test_a_misspelt_variable_is_named_once_with_the_nearest(capsys, monkeypatch):
    monkeypatch.setenv("VTCLIP_CACH", "/tmp")
    assert unknown_variables() == ["VTCLIP_CACH"]
    assert call("data", "check", "gone") == 2
    note, _ = capsys.readouterr().err.splitlines()
    assert note == ("note: VTCLIP_CACH is set, and nothing reads it; did you mean 'VTCLIP_CACHE'?")


def test_every_variable_that_is_read_is_in_the_table():
    read = {}
    for path in [*(ROOT / "vtclip").rglob("*.py"), *(ROOT / "kernels").rglob("*.py"),
                 *(ROOT / "csrc").rglob("*.h"), *(ROOT / "csrc").rglob("*.cpp")]:  # fmt: skip
        text = path.read_text()
        names = {name for found in READ.findall(text) for name in found if name}
        read |= dict.fromkeys(names, path.name)
        # no other way of reading, which this test would not see
        uses = len(re.findall(r"os\.environ\b|getenv\(", text))
        assert path.name in ("environment.py", "selftest.py") or uses == len(READ.findall(text))
    assert set(read) - set(VARIABLES) == set()
    assert {"VTCLIP_CACHE", "VTCLIP_TUNED", "VTCLIP_CPU_CAPABILITY"} <= set(read)
    others = "".join(
        path.read_text()
        for path in [ROOT / "setup.py", *(ROOT / "build_support").glob("*.py"),
                     *(ROOT / "tests").rglob("*.py")]
    )  # fmt: skip
    assert all(f'"{name}"' in others for name in ELSEWHERE)
