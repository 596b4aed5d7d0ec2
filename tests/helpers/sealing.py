# SPDX-License-Identifier: Apache-2.0
"""JSON files with a digest of themselves, changed by a test as by the package: the digest fits."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vtclip.files import sealed, to_json


def opened(path: Path) -> dict[str, Any]:
    """The contents without format version and digest, which is what an earlier version wrote."""
    value: dict[str, Any] = json.loads(path.read_text())
    return {name: item for name, item in value.items() if name not in ("format_version", "digest")}


def resealed(path: Path, change: Callable[[dict[str, Any]], object] = lambda value: None) -> None:
    """Lets `change` edit the contents in place and writes them with a digest that fits."""
    value = opened(path)
    change(value)
    path.write_bytes(to_json(sealed(value)))


def as_older(path: Path, change: Callable[[dict[str, Any]], object] = lambda value: None) -> None:
    """Lets `change` edit the contents in place and writes them without a digest."""
    value = opened(path)
    change(value)
    path.write_text(json.dumps(value))
