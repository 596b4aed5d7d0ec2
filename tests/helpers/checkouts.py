# SPDX-License-Identifier: Apache-2.0
"""Copies of this repository to build in."""

from __future__ import annotations

import shutil
from pathlib import Path

ROOT = Path(__file__).parents[2]
LEFT_BY_BUILDS = (".git", "build", "*.so", "*.egg-info", "__pycache__", "runs")


def copy_of_the_tree(where: Path) -> Path:
    """The sources, without what a build leaves behind."""
    tree = where / "tree"
    ignore = shutil.ignore_patterns(*LEFT_BY_BUILDS)
    shutil.copytree(ROOT, tree, symlinks=True, ignore=ignore)
    return tree
