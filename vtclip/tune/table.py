# SPDX-License-Identifier: Apache-2.0
"""Tables of timed tiles: one JSON file of `vtclip tune`, read where VTCLIP_TUNED asks for it.

VTCLIP_TUNED=1 stands for `tuned.json` in the cache folder, any other value for a path; unset, empty
or 0 for none. A section belongs to one device name, capability, Triton version and vtclip version;
an entry to one kernel, dtype, precision and exactly one list of sizes. What is not in the table
runs with the built-in tiles, so do other sizes.

A file that is asked for and cannot be trusted (missing, damaged, changed by hand, no table, of
another format) is an error. A good file without a section for this device is a warning, once.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vtclip.files import default_cache, json_digest, only_writer, read_json, to_json, write_atomic

FORMAT = "vtclip tuned tiles"
VERSION = 1
WHAT = "a table of tuned tiles"

Entries = dict[str, tuple[int, ...]]


def wanted() -> Path | None:
    """The file that VTCLIP_TUNED names, or None."""
    named = os.environ.get("VTCLIP_TUNED", "")
    if named in ("", "0"):
        return None
    return default_place() if named == "1" else Path(named).expanduser()


def default_place() -> Path:
    return default_cache() / "tuned.json"


def identity() -> dict[str, str]:
    """The versions that a section holds for."""
    import triton

    import vtclip

    return {"triton": triton.__version__, "vtclip": vtclip.__version__}


def read(path: Path) -> list[dict[str, Any]]:
    """The sections of a table; a ValueError says in one line why a file is none."""
    table = read_json(path, WHAT)
    if table.get("format") != FORMAT:
        raise ValueError(f"not {WHAT}: {path} has no format {FORMAT!r}")
    if table.get("version") != VERSION:
        fact = f"has version {table.get('version')!r}, this vtclip reads {VERSION}"
        raise ValueError(f"not {WHAT}: {path} {fact}; run vtclip tune again")
    sections = table.get("sections")
    if table.get("digest") != json_digest({"sections": sections}):
        raise ValueError(f"not {WHAT}: {path} is damaged or was edited (its digest differs)")
    if not isinstance(sections, list) or not all(map(_is_section, sections)):
        raise ValueError(f"not {WHAT}: {path} holds tiles that no kernel can have")
    return sections


def _is_section(section: Any) -> bool:
    from vtclip.kernels import _candidates

    keys = {"device": str, "capability": int, "triton": str, "vtclip": str, "entries": dict}
    if not isinstance(section, dict):
        return False
    if not all(type(section.get(key)) is kind for key, kind in keys.items()):
        return False
    return all(
        _candidates.valid(name.partition(" ")[0], numbers)
        for name, numbers in section["entries"].items()
    )


def write(path: Path, device: str, capability: int, entries: Mapping[str, Any]) -> None:
    """Add `entries` to the device's section of the table at `path`; others stay as they are."""
    mark = {"device": device, "capability": capability, **identity()}
    path.parent.mkdir(parents=True, exist_ok=True)
    with only_writer(path.parent):
        sections = read(path) if path.exists() else []
        old = [s for s in sections if all(s[key] == value for key, value in mark.items())]
        merged = {**(old[0]["entries"] if old else {}), **{k: list(v) for k, v in entries.items()}}
        sections = [s for s in sections if s not in old]
        sections.append({**mark, "entries": dict(sorted(merged.items()))})
        table = {
            "format": FORMAT,
            "version": VERSION,
            "digest": json_digest({"sections": sections}),
        }
        write_atomic(path, to_json({**table, "sections": sections}))


def for_these_versions(path: Path) -> dict[tuple[str, int], Entries]:
    """Entries by (device name, capability) of the sections made with these versions."""
    now = identity()
    return {
        (section["device"], section["capability"]): {
            name: tuple(numbers) for name, numbers in section["entries"].items()
        }
        for section in read(path)
        if all(section[key] == value for key, value in now.items())
    }


def activate(device: tuple[str, int] | None) -> int:
    """Hand the kernels the table that VTCLIP_TUNED names; how many entries it has for `device`."""
    path = wanted()
    if path is None:
        return 0
    from vtclip.kernels import _tiles

    tables = for_these_versions(path)
    _tiles.use_tuned(tables)
    if device is not None and device not in tables:
        versions = ", ".join(f"{name} {version}" for name, version in identity().items())
        logging.getLogger("vtclip").warning(
            "%s has no tiles for %s with %s: the built-in ones are used", path, device[0], versions
        )
    return len(tables.get(device, ())) if device is not None else 0
