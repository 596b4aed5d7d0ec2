# SPDX-License-Identifier: Apache-2.0
"""docs/json_output.md against what every command prints with --json, in both directions."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import call, environment, json_of, python
from pictures import dots

import vtclip
from vtclip.cli import COMMANDS, build_parser
from vtclip.clip import build_clip

PAGE = (Path(__file__).parents[2] / "docs" / "json_output.md").read_text(encoding="utf-8")
HERE = ["--device", "cpu", "--threads", "1"]
EVERY = {"command", "vtclip_version"}
CONFIG: dict[str, Any] = {
    "embed_dim": 48,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 64, "patch_size": 8},
    "text_cfg": {
        "context_length": 16, "vocab_size": 49408, "width": 64, "heads": 1, "layers": 1
    },
}  # fmt: skip
SCRIPTS = {"completion"}  # whose output is a script
LIKE_FIT = {"fit", "extend"}


def section(title: str) -> str:
    (text,) = re.findall(rf"^## {re.escape(title)}\n(.*?)(?=^## |\Z)", PAGE, re.M | re.S)
    return text


def documented(title: str) -> tuple[set[str], set[str]]:
    """The keys that are always there, and those that are there "only" in some cases."""
    always, sometimes = set[str](), set[str]()
    for keys, meaning in re.findall(r"^\| (`.+?) \| (.+) \|$", section(title), re.M):
        (sometimes if meaning.startswith("only ") else always).update(re.findall(r"`(\w+)`", keys))
    return always, sometimes


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of images with a run of method proker, a benchmark and a new class."""
    folder = tmp_path_factory.mktemp("json")
    images = dots(folder / "dots")
    new = sorted(path for path in images.iterdir() if path.is_dir())[-1]
    shutil.move(new, folder / "new")
    words = ["--method", "proker", "--shots", "4", "--cache-dir", folder / "cache", *HERE]
    assert call("fit", images, "--out", folder / "run", *words) == 0
    words = ["--methods", "zeroshot", "--shots", "1", "--seeds", "1", *words[4:]]
    assert call("bench", images, "--out", folder / "bench", *words) == 0
    return folder


def first_image(place: Path) -> Path:
    return sorted((place / "dots").glob("*/*.png"))[0]


WORDS: dict[str, Callable[[Path], list[Any]]] = {
    "evaluate": lambda p: [p / "run", "--cache-dir", p / "cache", *HERE],
    "predict": lambda p: [p / "run", first_image(p), *HERE],
    "explain": lambda p: [p / "run", first_image(p), *HERE],
    "features": lambda p: [p / "dots", "--out", p / "f", "--cache-dir", p / "cache", *HERE],
    "models": lambda p: ["RN50"],
    "repeat": lambda p: [p / "run", "--cache-dir", p / "cache"],
    "report": lambda p: [p / "bench"],
    "export": lambda p: [p / "run", "--features", "--out", p / "run.pt2"],
    "bench": lambda p: [
        *(p / "dots", "--out", p / "bench", "--methods", "zeroshot", "--shots", "1"),
        *("--seeds", "1", "--cache-dir", p / "cache", *HERE),
    ],
    "info": lambda p: [],
}


@pytest.mark.parametrize("command", WORDS)
def test_the_page_has_the_keys_of_a_command_and_no_others(command, place, capsys):
    found = json_of(capsys, command, *WORDS[command](place))
    assert found["command"] == command
    assert found["vtclip_version"] == vtclip.__version__
    always, sometimes = documented(command)
    assert always <= found.keys()
    assert found.keys() - EVERY <= always | sometimes


@pytest.mark.parametrize("command", sorted(LIKE_FIT))
def test_fit_and_extend_print_result_json_and_where_it_is(command, place, tmp_path, capsys):
    words = [place / "run", place / "new"]
    if command == "fit":
        words = [place / "dots", "--method", "proker", "--shots", "4"]
    words += ["--out", tmp_path / "r", "--cache-dir", place / "cache", *HERE]
    found = json_of(capsys, command, *words)
    written = json.loads((tmp_path / "r" / "result.json").read_bytes())
    assert found.pop("command") == command
    assert found.pop("vtclip_version") == vtclip.__version__
    assert found.pop("run") == str(tmp_path / "r")
    missing = written.keys() - found.keys()
    assert {key: written[key] for key in found} == found
    assert missing == {"digest", "format_version"}
    assert documented("fit")[0] == {"run"}


def test_data_names_each_set_and_what_is_elsewhere(tmp_path, capsys):
    found = json_of(capsys, "data", "check", tmp_path, status=1)
    assert found.keys() - EVERY == documented("data")[0]


def test_a_heat_map_has_the_keys_that_explain_has_of_it(place, capsys):
    words = ["--shots", "2", "--method", "vtclip", "--epochs", "1", "--out", place / "heat"]
    assert call("fit", place / "dots", *words, "--cache-dir", place / "cache", *HERE) == 0
    words = [place / "heat", first_image(place), "--out", place / "heat.png", *HERE]
    found = json_of(capsys, "explain", *words)
    assert found.keys() - EVERY == {"image", "label", "picture"} | documented("explain")[1]


def test_selftest_and_demo_have_the_keys_of_the_page(tmp_path, monkeypatch, capsys):
    from vtclip.demo import run as demo
    from vtclip.testing import selftest

    monkeypatch.setenv("VTCLIP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(selftest, "WORKER", (sys.executable, "-c", "raise SystemExit"))
    found = json_of(capsys, "selftest", "--device", "cpu", "--impl", "reference", status=1)
    assert found.keys() - EVERY == documented("selftest")[0]

    whole = demo.run_demo

    def small(out: str, **options: Any) -> Any:
        return whole(out, repeats=1, images_per_class=12, shots=(1,), **options)

    monkeypatch.setattr(demo, "run_demo", small)
    monkeypatch.setitem(demo.OVERRIDES, "epochs", 1)
    found = json_of(capsys, "demo", "--out", tmp_path / "demo", *HERE)
    assert found.keys() - EVERY == documented("demo")[0]


def test_convert_has_the_keys_of_the_page(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    state = build_clip(CONFIG).half().state_dict()
    torch.save({**state, "input_resolution": torch.tensor(32)}, "w.pt")
    found = json_of(capsys, "convert", "w.pt")
    always, sometimes = documented("convert")
    assert always <= found.keys()
    assert found.keys() - EVERY <= always | sometimes


def test_serve_prints_one_object_when_it_is_ready(place):
    for needed in ("fastapi", "uvicorn", "python_multipart"):
        pytest.importorskip(needed, reason="the extra serve")
    words = ["serve", str(place / "run"), "--port", "0", "--json", *HERE]
    child = subprocess.Popen(
        [sys.executable, "-m", "vtclip", *words],
        stdout=subprocess.PIPE, text=True, env=environment(),
    )  # fmt: skip
    try:
        assert child.stdout is not None
        text = ""
        while not text.endswith("\n}\n"):
            line = child.stdout.readline()
            assert line, text
            text += line
        found = json.loads(text)
        assert found.keys() - EVERY == documented("serve")[0]
        assert found["address"].startswith("http://127.0.0.1:")
    finally:
        child.terminate()
        rest, _ = child.communicate(timeout=60)
    assert rest == ""


def test_every_command_has_a_section_and_the_option():
    titles = re.findall(r"^## (\w+)$", PAGE, re.M)
    wanted = [name for name, _, _ in COMMANDS if name not in SCRIPTS]
    assert sorted(titles) == sorted(wanted)
    parsers = build_parser()._subparsers._group_actions[0].choices
    assert {name for name in parsers if "--json" in parsers[name].options} == {*wanted}
    assert documented("Every command")[0] == EVERY


def test_nothing_else_is_on_stdout_and_bad_input_leaves_it_empty(place):
    words = [place / "run", first_image(place), place / "gone.png", "--json", *HERE]
    done = python("-m", "vtclip", "predict", *words, env=environment())
    assert (done.returncode, done.stdout) == (2, "")
    done = python("-m", "vtclip", "predict", *words[:2], *words[3:], env=environment())
    assert done.returncode == 0
    assert done.stdout.startswith("{\n")
    assert json.loads(done.stdout)["images"][0]["image"] == str(first_image(place))
