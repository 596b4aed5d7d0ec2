# SPDX-License-Identifier: Apache-2.0
"""Files that list images: CSV, TSV, JSON lines, a JSON array, parquet.

CSV and TSV have a header, unless their first row already names a file that is there: then the
columns are path, label and, if there is a third, split. They are UTF-8, with or without a byte
order mark, or UTF-16 with one; a header without commas but with semicolons or tabs is split there.
Parquet is read by pyarrow, the extra `tables`.
"""

from __future__ import annotations

import codecs
import csv
import io
import json
import logging
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from vtclip.data.image_files import ImageFiles
from vtclip.data.list_rows import LABELS, PATHS, SPLITS, Row, images_of_rows, path_column
from vtclip.files import printable
from vtclip.names import LIST_SUFFIXES

logger = logging.getLogger(__name__)

UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


def is_list(path: Path) -> bool:
    """Whether the name of a file says that it is a list of images."""
    return path.suffix.lower() in LIST_SUFFIXES


def read_list(path: str | Path, absent_ok: bool = False) -> ImageFiles:
    """The image files that a list names, relative to its own folder or absolute.

    absent_ok: those that are not there are passed over, if one at least is.
    """
    path = Path(path).expanduser()
    title = printable(path.name)
    columns, rows = _columns_and_rows(path, title)
    return images_of_rows(title, columns, rows, path.parent, absent_ok)


def read_paths(path: str | Path) -> ImageFiles:
    """The image files that a list names, all of one class; its labels and splits are not read."""
    path = Path(path).expanduser()
    title = printable(path.name)
    columns, rows = _columns_and_rows(path, title)
    column = path_column(title, columns)
    rows = [Row(row.where, {"path": row.cells.get(column), "label": "image"}) for row in rows]
    return images_of_rows(title, ["path", "label"], rows, path.parent, False)


def _columns_and_rows(path: Path, title: str) -> tuple[list[str], list[Row]]:
    suffix = path.suffix.lower()
    if not is_list(path):
        raise ValueError(
            f"source: a list must end in {', '.join(LIST_SUFFIXES)}, got {printable(str(path))}"
        )
    if suffix == ".parquet":
        columns, rows = _parquet(path, title)
    elif suffix in (".csv", ".tsv"):
        columns, rows = _csv(path, title)
    else:
        entries = _json_array(path, title) if suffix == ".json" else _json_lines(path, title)
        rows = _objects(title, entries)
        columns = list(dict.fromkeys(name for row in rows for name in row.cells))
    if not rows:
        raise ValueError(f"source: {title} lists no images")
    return columns, rows


def _text(path: Path, title: str) -> str:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ValueError(f"source: {title} cannot be read: {error.strerror}") from None
    try:
        return data.decode("utf-16" if data.startswith(UTF16) else "utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise ValueError(
            f"source: {title} line {line} is not UTF-8 ({error.reason}); save the list as UTF-8"
        ) from None


def _csv(path: Path, title: str) -> tuple[list[str], list[Row]]:
    text = _text(path, title)
    first = text.lstrip("\r\n").partition("\n")[0]
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    if delimiter not in first:
        delimiter = next((other for other in ("\t", ";") if other in first), delimiter)
    table = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    rows: list[tuple[int, list[str]]] = []
    try:
        for cells in table:
            if any(cell.strip() for cell in cells):
                rows.append((table.line_num, cells))
    except csv.Error as error:
        raise ValueError(f"source: {title} line {table.line_num}: {error}") from None
    if not rows:
        raise ValueError(f"source: {title} is empty")
    columns = [cell.strip() for cell in rows[0][1]]
    if _is_header(path.parent, columns):
        rows = rows[1:]
        if len(set(columns)) < len(columns):
            twice = next(name for name in columns if columns.count(name) > 1)
            raise ValueError(f"source: {title} has two columns called {printable(twice)!r}")
    else:
        columns = ["path", "label", "split"][: len(columns)]
        logger.warning("%s has no header; its columns are read as %s", title, ", ".join(columns))
    for line, cells in rows:
        if len(cells) != len(columns):
            raise ValueError(
                f"source: {title} line {line} has {len(cells)} cells, the first line "
                f"{len(columns)} (a cell with {delimiter!r} in it needs quotes)"
            )
    return columns, [
        Row(f"line {line}", dict(zip(columns, cells, strict=True))) for line, cells in rows
    ]


def _is_header(base: Path, cells: Sequence[str]) -> bool:
    """Whether the first row of a list names columns, and not the first image."""
    known = {cell.casefold() for cell in cells} & {*PATHS, *LABELS, *SPLITS}
    if known or len(cells) not in (2, 3):
        return True
    written = (cells[0], cells[0].replace("\\", "/"), os.path.expanduser(cells[0]))
    try:
        return not any((base / path).is_file() for path in written)
    except (OSError, ValueError):
        return True


def _json_lines(path: Path, title: str) -> Iterator[tuple[str, object]]:
    for number, line in enumerate(_text(path, title).split("\n"), 1):
        if line.strip():
            try:
                yield f"line {number}", json.loads(line)
            except ValueError as error:
                raise ValueError(f"source: {title} line {number} is not JSON: {error}") from None


def _json_array(path: Path, title: str) -> Iterator[tuple[str, object]]:
    try:
        found = json.loads(_text(path, title))
    except json.JSONDecodeError as error:
        raise ValueError(f"source: {title} is not JSON: {error}") from None
    if not isinstance(found, list):
        raise ValueError(
            f"source: {title} must hold an array of objects, got {type(found).__name__}"
        )
    yield from ((f"entry {number}", entry) for number, entry in enumerate(found, 1))


def _objects(title: str, entries: Iterator[tuple[str, object]]) -> list[Row]:
    rows = []
    for where, entry in entries:
        if not isinstance(entry, dict):
            raise ValueError(
                f'source: {title} {where} must be an object such as {{"path": "a.jpg", "label": '
                f'"cat"}}, got {type(entry).__name__}'
            )
        rows.append(Row(where, entry))
    return rows


def _parquet(path: Path, title: str) -> tuple[list[str], list[Row]]:
    try:
        from pyarrow import ArrowException, parquet, types
    except ModuleNotFoundError:
        raise ValueError(
            f"source: {title} needs pyarrow; pip install 'vtclip[tables]' brings it"
        ) from None
    try:
        with parquet.ParquetFile(path) as file:
            names = list(file.schema_arrow.names)
            wanted = [name for name in names if name.casefold() in {*PATHS, *LABELS, *SPLITS}]
            for column in file.schema_arrow:
                if column.name in wanted and types.is_struct(column.type):
                    raise ValueError(
                        f"source: {title}: column {column.name} holds images and not paths; "
                        "read it with Dataset.from_parquet of the library datasets, and give that"
                    )
            table = file.read(columns=wanted)
    except (ArrowException, OSError) as error:
        reason = " ".join(str(error).split())[:160]
        raise ValueError(f"source: {title} is not a readable parquet file: {reason}") from None
    rows = [Row(f"row {number}", cells) for number, cells in enumerate(table.to_pylist(), 1)]
    return names, rows
