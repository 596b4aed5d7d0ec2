# SPDX-License-Identifier: Apache-2.0
"""The folder of a benchmark: its settings, one JSON line per job, and who may write what.

    bench.json             settings and sources, which every process must agree with
    results.jsonl          one line per finished, failed or skipped job; of shard i of n
                           results-I-of-N.jsonl
    runs/NAME/             the run of each job

A line is a run's result.json with the job's key, its source's name and its shots, or what kept the
job from running ("skipped", "failed"), with a digest of itself: a line that was damaged is named by
its number and left out, and its job runs again. Rows of earlier versions carry no digest. A process
holds the lock of its own file of rows as long as it lives, and that of the folder while it compares
settings or writes tables. A line without its end was cut off by a kill or a full disk: readers
ignore it, the next writer removes it.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from vtclip.files import (
    is_leftover,
    lock,
    locked,
    parse_json,
    printable,
    read_json,
    sealed,
    to_json,
    unsealed,
    write_atomic,
)
from vtclip.names import option
from vtclip.schemas import by_name, check, obj, table, text, whole

logger = logging.getLogger(__name__)

Row = dict[str, Any]
BENCH = "bench.json"
FORMAT = "vtclip-bench"
VERSION = 2  # from which on bench.json carries a digest of itself
WHAT, ROW = "a folder of vtclip bench", "a row of vtclip bench"
_SCHEMA = table({"settings": obj, "sources": by_name(obj)})
PLACE = ("source", "method", "shots", "seed")
_PLACED = table({"key": text, "source": text, "method": text, "shots": whole(), "seed": whole()})


class OtherContent(ValueError):
    """The folder holds results of other settings or of a source with other content."""


def check_bench_folder(out: Path, sources: Iterable[Path]) -> None:
    """Refuse a folder inside a source, a file, or a folder that holds something else."""
    for source in sources:
        if source.is_dir() and out.resolve().is_relative_to(source.resolve()):
            raise ValueError(f"{option('out')} {out} lies inside the source {source}")
    if not out.exists():
        return
    if not out.is_dir():
        raise FileExistsError(f"{option('out')} {out} exists and is not a folder")
    names = sorted(path.name for path in out.iterdir() if not is_leftover(path.name))
    if names and BENCH not in names:
        raise FileExistsError(
            f"{option('out')} {out} exists and is not a benchmark (it holds {names[0]!r})"
        )


def claim_folder(
    out: Path, settings: Mapping[str, Any], sources: Mapping[str, Mapping[str, Any]]
) -> None:
    """Write what all processes share into bench.json, or refuse a folder that says otherwise.

    settings must be equal, and every fact of a source that both name; new sources are added.
    """
    wanted = json.loads(to_json({"settings": settings, "sources": sources}))
    out.mkdir(parents=True, exist_ok=True)
    with locked(out):
        existing = {"settings": wanted["settings"], "sources": {}}
        if (out / BENCH).exists():
            existing = read_bench(out)
        for name, value in wanted["settings"].items():
            was = existing["settings"].get(name)
            if was != value:
                raise OtherContent(
                    f"{option('out')} {out} holds results with {name} {was!r}, now it is {value!r}"
                )
        for name, facts in wanted["sources"].items():
            known = existing["sources"].get(name, {})
            for fact in facts.keys() & known.keys():
                if known[fact] != facts[fact]:
                    raise OtherContent(
                        f"{option('out')} {out} holds results of {_other(name, fact, known[fact])}"
                    )
        merged = {
            **existing["sources"],
            **{name: existing["sources"].get(name, {}) | facts
               for name, facts in wanted["sources"].items()},
        }  # fmt: skip
        if merged != existing["sources"]:
            body = {"format": FORMAT, "version": VERSION, "settings": existing["settings"]}
            write_atomic(out / BENCH, to_json(sealed({**body, "sources": merged})))


def _other(name: str, fact: str, was: Any) -> str:
    if fact == "spatial_rows_only":
        rows = "its rows with spatial features only" if was else "all its rows"
        more = "say --spatial default" if was else "name another out"
        return f"{name} over {rows}, now it is the other way round; {more}"
    return f"another {name} (its {fact} differs), so rows would not compare; name another out"


def read_bench(out: Path) -> dict[str, Any]:
    path = out / BENCH
    content = unsealed(read_json(path, WHAT), path, WHAT)
    if content.get("format") != FORMAT or content.get("version") not in (1, VERSION):
        fact = f"{content.get('format')} {content.get('version')}"
        raise ValueError(f"{path}: this vtclip reads {FORMAT} {VERSION}, got {fact}")
    check(content, _SCHEMA, f"not {WHAT}: {path}")
    return content


class RowFile:
    """The rows of one shard, held against a second writer until it is closed."""

    def __init__(self, path: Path) -> None:
        self.path = path
        # Windows writes \r\n for \n and so moves every place in the file, unless told not to
        binary: int = getattr(os, "O_BINARY", 0)
        no_link: int = getattr(os, "O_NOFOLLOW", 0)
        flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | binary | no_link
        self._file = os.open(path, flags, 0o666)
        if not lock(self._file, 0.0):
            os.close(self._file)
            raise FileExistsError(f"{path} is being written by another benchmark")
        self._end = _end_of_lines(path)
        os.ftruncate(self._file, self._end)

    def append(self, row: Mapping[str, Any]) -> None:
        """One line, on the disk when this returns, or an OSError and no line at all."""
        plain = sealed(json.loads(to_json({**row, "time": time.time()})))
        line = (json.dumps(plain) + "\n").encode("ascii")
        try:
            written = os.write(self._file, line)
            if written < len(line):  # the next write says why
                written += os.write(self._file, line[written:])
            os.fsync(self._file)
        except OSError as error:
            with contextlib.suppress(OSError):
                os.ftruncate(self._file, self._end)
            message = f"cannot write {len(line)} bytes to {self.path}: {error.strerror}"
            raise OSError(error.errno, message, str(self.path)) from error
        self._end += len(line)

    def close(self) -> None:
        os.close(self._file)


def _end_of_lines(path: Path) -> int:
    """The size of the file up to its last complete line."""
    return path.read_bytes().rfind(b"\n") + 1


def read_lines(folder: Path) -> Iterator[tuple[str, Any]]:
    """The lines of all results*.jsonl as ("FILE, line N", content).

    The content of a line that is cut off or no JSON is None; of one whose digest is not that of its
    contents, or of another version, a ValueError.
    """
    for path in sorted(folder.glob("results*.jsonl")):
        lines = path.read_bytes().split(b"\n")
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            row: Any = None
            if number < len(lines):  # else its end was cut off
                with contextlib.suppress(ValueError):
                    row = parse_json(line)
            if isinstance(row, dict):
                try:
                    row = unsealed(row, path, ROW, f"line {number}")
                except ValueError as error:
                    row = error
            yield f"{path.name}, line {number}", row


def read_rows(out: str | Path) -> list[Row]:
    """The rows of all shards, one for each job, in the order in which they came.

    Where a job was tried again the later row counts, but what failed or was skipped never replaces
    a finished row of the same key.
    """
    rows: list[Row] = []
    for where, row in read_lines(Path(out)):
        try:
            if isinstance(row, ValueError):
                raise row
            check(row, _PLACED, where)
            rows.append(row)
        except ValueError as error:
            why = "was damaged" if error is row else "is not a row"
            logger.warning("%s %s; its job runs again", printable(where), why)
    latest: dict[tuple[Any, ...], Row] = {}
    for row in sorted(rows, key=time_of):
        place = place_of(row)
        old = latest.get(place)
        if old is None or is_finished(row) or row["key"] != old["key"] or not is_finished(old):
            latest.pop(place, None)
            latest[place] = row
    return list(latest.values())


def time_of(row: Mapping[str, Any]) -> float:
    """When it was written; 0 where it does not say."""
    value = row.get("time")
    plain = isinstance(value, int | float) and abs(value) < 1e300
    return float(value) if plain and isinstance(value, int | float) else 0.0


def place_of(row: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(row.get(name) for name in PLACE)


def reason_of(row: Mapping[str, Any]) -> str:
    """Why a job has no numbers."""
    kind = "failed" if "failed" in row else "skipped"
    return f"{kind}: {row[kind]}"


def is_finished(row: Mapping[str, Any]) -> bool:
    """Whether the row holds numbers."""
    return "skipped" not in row and "failed" not in row
