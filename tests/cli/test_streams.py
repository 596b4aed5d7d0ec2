# SPDX-License-Identifier: Apache-2.0
"""An output that is closed or full, folders that hide modules: what was written stays whole."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from commands import call, environment

QUICK = ["--method", "zeroshot", "--threads", "1", "--device", "cpu"]


def test_without_a_stdout_the_run_is_complete(npz, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for number, words in enumerate(([], ["--json"])):
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", None)  # as Python has it where a shell closed it
            patch.setattr(sys, "stderr", None)
            assert call("fit", npz, "--out", f"r{number}", *words, *QUICK) == 0
        assert json.loads((tmp_path / f"r{number}" / "result.json").read_text())["accuracy"] > 0


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no full device")
def test_a_full_device_as_stdout_is_one_line_and_the_run_is_complete(
    npz, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    full = open("/dev/full", "w")  # noqa: SIM115
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", full)
        assert call("fit", npz, "--out", "r", *QUICK) == 1
    with contextlib.suppress(OSError):  # what could not be written cannot be now
        full.close()
    line = capsys.readouterr().err
    assert line.startswith("vtclip fit: ")
    assert line.endswith("No space left on device\n")
    assert line.count("\n") == 1
    assert json.loads((tmp_path / "r" / "result.json").read_text())["accuracy"] > 0


def test_files_named_like_modules_in_the_working_folder_are_not_imported(tmp_path):
    script = Path(sys.executable).with_name("vtclip")
    if not script.is_file():
        pytest.skip("the command is not installed")
    for name in ("torch", "types", "random", "numpy", "json", "vtclip", "triton"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('imported')")
    done = subprocess.run(
        [sys.executable, str(script), "info"],
        cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert "cross_attn" in done.stdout


WATCHED = """
import sys
def watch(event, args):
    if event in ("socket.connect", "socket.getaddrinfo"):
        raise SystemExit(f"{event} {args}")
sys.addaudithook(watch)
import vtclip, vtclip.ops, vtclip.clip, vtclip.data, vtclip.heads, vtclip.info
raise SystemExit(vtclip.info.main())
"""


def test_import_and_info_write_no_file_and_call_nobody(tmp_path):
    work = tmp_path / "work"
    work.mkdir()
    homes = {"HOME": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path / ".cache")}
    homes |= {"TRITON_CACHE_DIR": str(tmp_path / "triton"), "TMPDIR": str(tmp_path)}
    env = environment(**homes, PYTHONDONTWRITEBYTECODE="1")
    env = {name: value for name, value in env.items() if name != "VTCLIP_CACHE"}
    command = [sys.executable, "-c", WATCHED]
    done = subprocess.run(command, cwd=work, env=env, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stderr) == (0, "")
    assert "cross_attn" in done.stdout
    assert [name for _, _, names in os.walk(tmp_path) for name in names] == []
