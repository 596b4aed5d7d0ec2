# SPDX-License-Identifier: Apache-2.0
"""`vtclip completion`: what bash proposes; without the library one line."""

from __future__ import annotations

import shutil
import subprocess
import sys

import pytest
from commands import call, refused

from vtclip.cli import COMMANDS


def test_the_extra_is_named_where_shtab_is_absent(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "shtab", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "pip install 'vtclip[completion]'" in refused(capsys, "completion", "bash")


@pytest.mark.parametrize("shell", ["zsh", "tcsh"])
def test_scripts_of_other_shells_name_every_command(capsys, shell):
    pytest.importorskip("shtab", reason="needs the extra completion")
    assert call("completion", shell) == 0
    script = capsys.readouterr().out
    assert all(name in script for name, _, _ in COMMANDS)


@pytest.mark.parametrize(
    ("words", "found"),
    [
        ("vtclip se", "selftest serve"),
        ("vtclip fit --meth", "--method"),
        ("vtclip fit --method tip-", "tip-adapter tip-adapter-f tip-x"),
        ("vtclip predict ru", "run"),
    ],
)
def test_bash_completes(capsys, tmp_path, words, found):
    pytest.importorskip("shtab", reason="needs the extra completion")
    if shutil.which("bash") is None:
        pytest.skip("no bash here")
    assert call("completion", "bash") == 0
    script = tmp_path / "script"
    script.write_text(capsys.readouterr().out)
    (tmp_path / "run").mkdir()
    typed = words.split()
    code = f"""
source {script}
function_of=$(complete -p vtclip | grep -o -- '-F [^ ]*' | cut -c4-)
COMP_WORDS=({" ".join(typed)}); COMP_CWORD={len(typed) - 1}
$function_of vtclip "${{COMP_WORDS[COMP_CWORD]}}" "${{COMP_WORDS[COMP_CWORD - 1]}}"
printf '%s\\n' "${{COMPREPLY[@]}}" | sort -u
"""
    done = subprocess.run(
        ["bash", "-c", code], capture_output=True, text=True, cwd=tmp_path, check=True
    )
    assert done.stdout.split() == found.split()
