# SPDX-License-Identifier: Apache-2.0
"""The part of a release's checklist that a machine can do: `python build_support/release.py`.

Says of every point whether it holds, and exits with status 1 where one does not. Needs `build` and
`twine`. What is left to people stands in docs/releasing.md.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import venv
from collections.abc import Callable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def version() -> str:
    text = (ROOT / "vtclip" / "__init__.py").read_text("utf-8")
    (found,) = re.findall(r'^__version__ = "(.+)"$', text, re.MULTILINE)
    return str(found)


def output(*command: str) -> str:
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def tree_is_clean() -> str:
    return output("git", "status", "--porcelain")


def versions_agree() -> str:
    cited = re.findall(r"^version: (.+)$", (ROOT / "CITATION.cff").read_text("utf-8"), re.MULTILINE)
    return "" if cited == [version()] else f"CITATION.cff says {cited}, the package {version()}"


def changes_are_named() -> str:
    found = f"## {version()}" in (ROOT / "CHANGELOG.md").read_text("utf-8")
    return "" if found else f"CHANGELOG.md has no section {version()}"


def tag_is_free() -> str:
    return "exists already" if output("git", "tag", "--list", f"v{version()}") else ""


def archives_install(folder: Path) -> str:
    """Builds sdist and wheel, checks both, and runs the wheel in an environment of its own."""
    subprocess.run([sys.executable, "-m", "build", "--outdir", str(folder)], cwd=ROOT, check=True)
    files = [str(path) for path in sorted(folder.iterdir())]
    subprocess.run([sys.executable, "-m", "twine", "check", "--strict", *files], check=True)
    venv.create(folder / "env", with_pip=True)
    python = str(folder / "env" / "bin" / "python")
    (wheel,) = folder.glob("*.whl")
    subprocess.run([python, "-m", "pip", "install", "-q", str(wheel)], check=True)
    said = subprocess.run(
        [python, "-m", "vtclip", "info"], capture_output=True, text=True, cwd=folder
    )
    return "" if said.returncode == 0 and version() in said.stdout else said.stderr[-300:]


def points(folder: Path) -> Iterator[tuple[str, Callable[[], str]]]:
    """Name, and what says the empty text where it holds."""
    yield "the working tree has no changes", tree_is_clean
    yield "versions agree", versions_agree
    yield "CHANGELOG.md has the version", changes_are_named
    yield "the tag is free", tag_is_free
    yield "sdist and wheel build, are sound and run", lambda: archives_install(folder)


def main() -> int:
    failed = 0
    with tempfile.TemporaryDirectory() as folder:
        for name, check in points(Path(folder)):
            try:
                why = check()
            except (OSError, subprocess.CalledProcessError) as error:
                why = str(error)
            failed += bool(why)
            print(f"{'FAILS' if why else 'holds'}  {name}{': ' + why if why else ''}", flush=True)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
