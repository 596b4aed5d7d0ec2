# SPDX-License-Identifier: Apache-2.0
"""The whole way of a folder of images in every environment that users have, next to a plain one.

A fresh interpreter fits, evaluates, predicts and explains; names of files and classes are not all
UTF-8 or ASCII. What a run says and writes must not depend on the environment. Other versions of
Python, torch and Triton are the matter of CI.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from commands import environment, python
from pictures import dots

NOWHERE = "/proc/nowhere"  # where nobody can write, root neither
WAY = """
import contextlib, io, json, sys
from vtclip.cli import main
out = {}
for words in json.loads(sys.argv[1]):
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        try:
            code = main(words)
        except SystemExit as done:
            code = done.code
    out[words[0]] = [code, json.loads(said.getvalue())]
print(json.dumps(out))
"""
NO_NETWORK = """
import socket
def refuse(*_, **__):
    raise AssertionError("the network was asked for")
socket.socket.connect = socket.socket.connect_ex = socket.getaddrinfo = refuse
"""


def without(*modules: str) -> str:
    """Code after which the modules are not installed."""
    return f"""
import importlib.machinery as machinery
found = machinery.PathFinder.find_spec
def find_spec(name, path=None, target=None):
    return None if name.startswith({modules!r}) else found(name, path, target)
machinery.PathFinder.find_spec = staticmethod(find_spec)
"""


class Place(NamedTuple):
    """How an environment differs: options of Python, variables, code that runs first, notes."""

    options: tuple[str, ...] = ()
    variables: dict[str, str] = {}
    first: str = ""
    notes: tuple[str, ...] = ()
    kernels: bool = False  # whether others run


PLAIN = {"LANG": "C.UTF-8", "LC_ALL": "C.UTF-8"}
PLACES = {
    "optimised, warnings are errors": Place(("-O", "-W", "error")),
    "plain locale": Place((), {"LANG": "C", "LC_ALL": "C"}),
    "no packages of the user": Place(("-s",)),
    "no Triton": Place(first=without("triton")),
    "no kernels": Place(first=without("vtclip._C", "triton"), kernels=True),
    "no compiler": Place((), {"PATH": NOWHERE, "CC": "", "CXX": ""}),
    "no home": Place((), {"HOME": NOWHERE, "XDG_CACHE_HOME": NOWHERE, "XDG_CONFIG_HOME": NOWHERE}),
    "no cache": Place((), {"VTCLIP_CACHE": NOWHERE}, notes=("cache", "cache")),
    "no temporary folder of its own": Place((), {"TMPDIR": NOWHERE}),
    "no network": Place(first=NO_NETWORK),
    "portable instructions": Place((), {"VTCLIP_CPU_CAPABILITY": "scalar"}, kernels=True),
    "interpreted Triton": Place((), {"TRITON_INTERPRET": "1"}),
}  # fmt: skip


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of classes with names that not every environment can write."""
    root = dots(tmp_path_factory.mktemp("images") / "pictures")
    first, *_ = sorted(path for path in root.iterdir() if path.is_dir())
    first.rename(root / "b\u00e9e \u732b")
    picture = sorted((root / "b\u00e9e \u732b").iterdir())[0]
    os.rename(picture, os.fsencode(picture.parent) + b"/\xff\xe9.png")
    return root


def way(images: Path, place: Place, folder: Path) -> tuple[dict[str, Any], list[str]]:
    """What the commands print as JSON, and the lines of notes."""
    shutil.copytree(images, folder / "pictures")
    picture = sorted((folder / "pictures" / "b\u00e9e \u732b").iterdir())[0]
    here = ["--device", "cpu", "--threads", "1"]
    words = [
        ["fit", "pictures", "--method", "proker", "--shots", "4", "--out", "run", "--json", *here],
        ["evaluate", "run", "--json", *here],
        ["predict", "run", os.fspath(picture.relative_to(folder)), "--json", *here],
        ["explain", "run", os.fspath(picture.relative_to(folder)), "--json", *here],
    ]
    done = python(
        *place.options, "-c", place.first + WAY, json.dumps(words), cwd=folder,
        env=environment(**{"VTCLIP_CACHE": str(folder / "cache"), **PLAIN, **place.variables}),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1]), done.stderr.splitlines()


def close(found: Any, wanted: Any) -> bool:
    """Equal but for floats, which other kernels round otherwise."""
    if isinstance(wanted, dict):
        return found.keys() == wanted.keys() and all(close(found[k], wanted[k]) for k in wanted)
    if isinstance(wanted, list):
        return len(found) == len(wanted) and all(map(close, found, wanted))
    return bool(
        found == pytest.approx(wanted, abs=1e-4) if type(wanted) is float else found == wanted
    )


def said(found: dict[str, Any]) -> dict[str, Any]:
    """What must be the same: not the times, the versions and where the run lies."""
    assert {command: code for command, (code, _) in found.items()} == dict.fromkeys(found, 0)
    (_, fit), (_, evaluated), (_, predicted), (_, explained) = found.values()
    return {
        "digests": fit["digests"],
        "accuracy": [fit["accuracy"], evaluated["accuracy"]],
        "confusion": evaluated["confusion"],
        "predicted": predicted,
        "explained": explained,
    }


@pytest.fixture(scope="module")
def plain(images: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, list[str]]:
    found, notes = way(images, Place(), tmp_path_factory.mktemp("plain"))
    return said(found), notes


@pytest.mark.parametrize("name", PLACES)
def test_nothing_depends_on_the_environment(name, images, plain, tmp_path):
    place = PLACES[name]
    found, notes = way(images, place, tmp_path)
    wanted, usual = plain
    if place.kernels:
        assert close(said(found), wanted)
    else:
        assert said(found) == wanted
    more = [note for note in notes if note not in usual]
    assert len(more) == len(place.notes), more
    for note, word in zip(more, place.notes, strict=True):
        assert word in note


def test_a_locale_that_cannot_read_the_names_is_named_with_the_way_out(images, tmp_path):
    ascii_only = {"LANG": "C", "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    words = ["-m", "vtclip", "fit", images, "--device", "cpu", "--out", tmp_path / "run"]
    done = python(*words, env=environment(**ascii_only))
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].endswith("Python reads names as ascii, set PYTHONUTF8=1")
    assert not (tmp_path / "run").exists()
