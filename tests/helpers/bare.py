# SPDX-License-Identifier: Apache-2.0
"""A Python environment that holds some distributions and what they require, and nothing else.

They are links to those of this environment: no copy, no network.
"""

from __future__ import annotations

import importlib.metadata as metadata
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from packaging.requirements import Requirement


def required(*names: str) -> dict[str, metadata.Distribution]:
    """The distributions of that name with all that they require, as installed here."""
    found: dict[str, metadata.Distribution] = {}
    waiting = [*names]
    while waiting:
        name = waiting.pop().lower().replace("_", "-")
        if name in found:
            continue
        try:
            found[name] = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            continue  # required for a system or an extra that this one does without
        for line in found[name].requires or ():
            requirement = Requirement(line)
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                waiting.append(requirement.name)
    return found


def _tops(distribution: metadata.Distribution) -> Iterator[Path]:
    """Files and folders of a distribution right below the folder it is installed in."""
    root = Path(str(distribution.locate_file("")))
    names = {file.parts[0] for file in distribution.files or ()}
    yield from (root / name for name in sorted(names) if name not in ("..", "__pycache__"))


def environment(folder: Path, *names: str) -> Path:
    """Its interpreter, for an environment of these distributions in `folder`."""
    command = [sys.executable, "-m", "venv", "--without-pip", "--symlinks", str(folder)]
    subprocess.run(command, check=True)
    (packages,) = folder.glob("lib/python*/site-packages")
    for distribution in required(*names).values():
        for top in _tops(distribution):
            if top.exists() and not (packages / top.name).exists():
                (packages / top.name).symlink_to(top)
    return folder / "bin" / "python"
