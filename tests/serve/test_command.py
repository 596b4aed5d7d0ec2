# SPDX-License-Identifier: Apache-2.0
"""`vtclip serve`: what it refuses before its work, and what it says."""

from __future__ import annotations

import importlib.util
import re
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from commands import call, python, refused
from service import World

for needed in ("fastapi", "uvicorn", "python_multipart"):
    pytest.importorskip(needed, reason="the extra serve")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return World(tmp_path_factory.mktemp("command")).run("takl")


@pytest.fixture
def taken() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


def test_a_port_that_is_taken_is_one_line_before_the_model_is_loaded(
    capsys, monkeypatch, run, taken
):
    from vtclip.runs.classifier import Classifier

    monkeypatch.setattr(Classifier, "load", None)  # whoever loads it fails
    line = refused(capsys, "serve", run, "--port", taken)
    assert line == f"vtclip serve: --port {taken} on 127.0.0.1: Address already in use\n"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--host", "no such host"], "--host 'no such host' is no name or address of a machine"),
        (["--host", "192.0.2.1"], "--port 8000 on 192.0.2.1: Cannot assign requested address"),
        (["--port", "70000"], "--port: must be in 0..65535, got 70000"),
        (["--max-upload", "0"], "--max-upload: must be above 0"),
        (["--timeout", "0"], "--timeout: must be above 0"),
        (["--unknown", "0.0001"], "--unknown"),
        (["--allow-host", "a,,b", "--port", "0"], "--allow-host must be names"),
    ],
)
def test_what_cannot_be_done_is_one_line(capsys, run, words, message):
    assert message in refused(capsys, "serve", run, *words)


def test_a_run_that_was_changed_is_refused(capsys, run, tmp_path):
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in run.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    data = bytearray((copy / "adapter.safetensors").read_bytes())
    data[-1] ^= 1
    (copy / "adapter.safetensors").write_bytes(data)
    line = refused(capsys, "serve", copy, "--port", 0)
    assert "digest" in line


def test_without_the_extra_one_line_says_what_to_install(capsys, monkeypatch, run):
    real = importlib.util.find_spec

    def absent(name: str, *more: Any) -> Any:
        return None if name == "uvicorn" else real(name, *more)

    monkeypatch.setattr(importlib.util, "find_spec", absent)
    assert refused(capsys, "serve", run) == (
        "vtclip serve: uvicorn not found; pip install 'vtclip[serve]' brings what is needed\n"
    )


def test_another_host_is_warned_of_and_called_by_any_name(capsys, monkeypatch, run):
    from vtclip.serve import server

    seen: dict[str, Any] = {}

    async def served(_predictor: Any, _bound: Any, hosts: Any, ready: Any, _log: Any) -> None:
        seen["hosts"] = hosts
        ready()

    monkeypatch.setattr(server, "_serve", served)
    usual = ["serve", run, "--port", 0, "--device", "cpu"]
    assert call(*usual, "--host", "0.0.0.0") == 0
    said = capsys.readouterr()
    assert said.err == (
        "note: 0.0.0.0 is reached by other machines, and there is neither a password nor TLS; "
        "put a reverse proxy with both before it\n"
    )
    assert re.match(r"http://0\.0\.0\.0:\d+/  run takl, ", said.out)
    assert seen["hosts"] is None
    assert call(*usual, "--host", "0.0.0.0", "--allow-host", "Photos.Example") == 0
    assert seen["hosts"] == {"photos.example"}
    capsys.readouterr()
    assert call(*usual, "--allow-host", "photos.example") == 0
    assert capsys.readouterr().err == ""
    assert seen["hosts"] == {"localhost", "127.0.0.1", "::1", "photos.example"}


def test_nothing_of_it_is_imported_before_it_is_asked_for():
    names = "fastapi", "uvicorn", "starlette", "torch"
    code = f"import sys, vtclip.cli; print([one for one in {names} if one in sys.modules])"
    assert python("-c", code).stdout == "[]\n"
