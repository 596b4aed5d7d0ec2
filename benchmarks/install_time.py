# SPDX-License-Identifier: Apache-2.0
"""How long the compiled extension takes to build from a clean tree, and once more unchanged.

    python benchmarks/install_time.py [--jobs N] [--mode auto|cpu|cuda]

Builds a copy of the tracked files. CPU seconds are those of all compilers: where other programs
load the cores they say more than the time that passes. What pip does around it is not in here.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]


class Cost(NamedTuple):
    """Of one build: seconds passed, seconds of all cores together."""

    wall: float
    cpu: float


def copy_of_tracked_files(where: Path) -> Path:
    """The files that git knows, as they lie here."""
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    for name in listed.stdout.splitlines():
        if (ROOT / name).is_file():
            (where / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, where / name)
    return where


def build(tree: Path, env: dict[str, str]) -> Cost:
    """The cost of `setup.py build_ext --inplace`, whose output is shown."""
    begun, before = time.perf_counter(), os.times()
    subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--inplace"],
        cwd=tree, env=env, check=True, stdout=subprocess.DEVNULL,
    )  # fmt: skip
    after = os.times()
    cpu = sum(after[i] - before[i] for i in (2, 3))  # user and system, of children
    return Cost(time.perf_counter() - begun, cpu)


def seconds_of_files(tree: Path) -> dict[str, float]:
    """File -> seconds, longest first, from ninja's log."""
    found = {}
    for line in (tree / "build" / "temp" / ".ninja_log").read_text().splitlines():
        begun, ended, _, path, *_ = [*line.split("\t"), *[""] * 5][:5]
        if path.endswith(".o"):
            found[path.rpartition("csrc/")[2]] = (int(ended) - int(begun)) / 1000
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--jobs", type=int, help="files at a time (default: the build's own)")
    parser.add_argument("--mode", default="auto", choices=("auto", "cpu", "cuda"))
    given = parser.parse_args()
    env = {**os.environ, "VTCLIP_EXT": given.mode}
    env.update({"MAX_JOBS": str(given.jobs)} if given.jobs else {})
    with tempfile.TemporaryDirectory() as folder:
        tree = copy_of_tracked_files(Path(folder))
        costs = {"clean": build(tree, env), "unchanged": build(tree, env)}
        files = seconds_of_files(tree)
        sizes = {p.name.split(".")[0]: p.stat().st_size for p in (tree / "vtclip").glob("_C*.so")}
    for name, seconds in files.items():
        print(f"{seconds:8.1f} s  {name}")
    for name, size in sizes.items():
        print(f"{size / 1e6:8.1f} MB {name}")
    for name, cost in costs.items():
        print(f"{cost.wall:8.1f} s  {name} build, {cost.cpu:.1f} s of CPU")


if __name__ == "__main__":
    main()
