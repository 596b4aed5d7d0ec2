# SPDX-License-Identifier: Apache-2.0
"""The site is built without a warning, and docstrings become what Sphinx reads."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "docs" / "site"))
import docstrings  # noqa: E402
import pages  # noqa: E402


def test_fields_become_a_list_and_indented_lines_code():
    text = [
        "Does a|b.",
        "",
        "Args:",
        "    x_: [B, *], `k` of it",
        "        and more",
        "",
        "    y = x",
    ]
    assert docstrings.as_rst(text) == [
        *("Does a\\|b.", "", "", "", "**Args**", "", "", "* ``x_``: [B, \\*], ``k`` of it"),
        *("  and more", "", "y = x", ""),
    ]
    assert docstrings.as_rst(["E:", "    a = b"]) == ["E:", "", "::", "", "    a = b", ""]
    assert docstrings.inline("`[K]`s of a`b`") == "``[K]``\\ s of a\\ ``b``"


def test_links_of_the_repository_become_links_of_the_site():
    text = "[s](../SECURITY.md) [t](own_images.md#folders) [u](../setup.py) [v](https://x.y)"
    assert pages.with_links(text, "index.md") == (
        "[s](generated/security.md) [t](own_images.md#folders) u (`setup.py`) [v](https://x.y)"
    )
    text = "[own](docs/own_images.md) ![p](docs/images/x.png)"
    assert pages.with_links(text, "generated/contributing.md") == (
        "[own](../own_images.md) ![p](docs/images/x.png)"
    )


def test_commands_and_data_sets_are_written_from_the_code():
    commands = pages.commands()
    assert "| `--shots N\\|all` |" in commands
    assert commands.count("\n## ") == len(pages.COMMANDS)
    assert "| `caltech101` | 100 | 4,128 / 1,649 / 2,465 |" in pages.data_sets()


def test_the_site_is_built_without_a_warning(tmp_path):
    for name in ("sphinx", "furo", "myst_nb", "sphinx_copybutton"):
        pytest.importorskip(name, reason="the site needs vtclip[docs]")
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q"]
    done = subprocess.run(
        [*command, str(ROOT / "docs"), str(tmp_path)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "generated" / "commands.html").is_file()
