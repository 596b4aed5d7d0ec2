# SPDX-License-Identifier: Apache-2.0
"""Rows with a path, a label and perhaps a split to a table of image files; nothing is opened.

The columns are found by name, whatever the case: see PATHS, LABELS and SPLITS. Where several of
one kind are there, the first name of its tuple that is among them is taken, and said.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PureWindowsPath

from vtclip.data.folders import natural_key
from vtclip.data.image_files import ImageFiles, absent_images
from vtclip.data.layouts import TEST, TRAIN, VAL, WORDS
from vtclip.data.records import check_class_names
from vtclip.files import printable

logger = logging.getLogger(__name__)

PATHS = (
    *("path", "file", "filename", "file_name", "filepath", "file_path", "image", "image_path"),
    *("img", "img_path", "image_file"),
)
LABELS = ("label", "labels", "class", "class_name", "category", "target", "classes", "categories")
SPLITS = ("split", "subset", "partition", "role")
ROLE_NAMES = "train, training, val, validation, test or testing"  # of those that are known
SEPARATOR = "|"  # between the labels of one cell of text


def role_of(split: str) -> int | None:
    """The role (0 training, 1 validation, 2 test) that a split of this name has, if it is one."""
    role = WORDS.get(split.strip().casefold())
    return role if role in (TRAIN, VAL, TEST) else None


@dataclass(frozen=True)
class Row:
    """One row of a list: where it stands, for messages, and its cells by column."""

    where: str
    cells: Mapping[str, object]


@dataclass(frozen=True)
class Columns:
    """The names of the columns that count, as the list writes them."""

    path: str
    label: str
    split: str | None


def pick_columns(title: str, columns: Sequence[str]) -> Columns:
    """Which columns hold paths, labels and splits; a ValueError where one is missing."""

    def pick(what: str, names: Sequence[str]) -> str | None:
        words = [str(column).strip().casefold() for column in columns]
        found = [(name, words.index(name)) for name in names if name in words]
        if len(found) > 1:
            others = ", ".join(printable(str(columns[place])) for _, place in found[1:])
            logger.warning(
                "%s: column %s holds the %s, %s is not used",
                title, printable(str(columns[found[0][1]])), what, others,
            )  # fmt: skip
        return columns[found[0][1]] if found else None

    path, label, split = pick("paths", PATHS), pick("labels", LABELS), pick("splits", SPLITS)
    for what, found, names in (("paths", path, PATHS), ("labels", label, LABELS)):
        if found is None:
            have = ", ".join(printable(str(column)) for column in columns) or "none"
            raise ValueError(
                f"source: {title} has no column of the {what} ({', '.join(names[:6])}), only {have}"
            )
    if path is None or label is None:  # both raised above
        raise ValueError(title)
    return Columns(path, label, split)


def path_column(title: str, columns: Sequence[str]) -> str:
    """Which column holds paths, of a list of which nothing else is read."""
    names = {str(column).strip().casefold(): column for column in columns}
    for name in PATHS:
        if name in names:
            return names[name]
    have = ", ".join(printable(str(column)) for column in columns) or "none"
    raise ValueError(
        f"source: {title} has no column of the paths ({', '.join(PATHS[:6])}), only {have}"
    )


@dataclass
class _Listed:
    """What one image was given by the rows that name it."""

    name: str
    labels: list[str]
    role: int | None
    where: str


@dataclass
class _Collector:
    """Reads rows one by one and refuses the first that contradicts an earlier one."""

    title: str
    base: Path
    columns: Columns
    several: bool  # whether one image may have more than one label
    listed: dict[str, _Listed] = field(default_factory=dict)
    repeated: list[str] = field(default_factory=list)
    backslashes: list[str] = field(default_factory=list)

    def add(self, row: Row) -> None:
        columns, at = self.columns, f"source: {self.title} {row.where}"
        name = self._name(row.cells.get(columns.path), f"{at}, column {columns.path}")
        labels = self._labels(row.cells.get(columns.label), f"{at}, column {columns.label}")
        role = None
        if columns.split is not None:
            role = _role(row.cells.get(columns.split), f"{at}, column {columns.split}")
        key = os.path.normpath(self.base / name)
        before = self.listed.setdefault(key, _Listed(name, labels, role, row.where))
        if before.where == row.where:
            return
        for what, old, new in (
            (columns.label, sorted(before.labels), sorted(labels)),
            (columns.split, before.role, role),
        ):
            if old != new:
                raise ValueError(
                    f"{at}: {printable(name)!r} is listed with another {what} than in "
                    f"{before.where}"
                    + (f" ({_shown(old)}, now {_shown(new)})" if what == columns.label else "")
                )
        self.repeated.append(name)

    def _name(self, value: object, at: str) -> str:
        if isinstance(value, os.PathLike):
            value = os.fspath(value)
        if isinstance(value, (Mapping, bytes)):
            raise ValueError(
                f"{at}: holds images and not paths; write it with save_to_disk of the library "
                "datasets, and give that folder"
            )
        if _is_empty(value):
            raise ValueError(f"{at}: the path is empty")
        if not isinstance(value, str):
            raise ValueError(f"{at}: must be a path, got {value!r}")
        name = value.strip()
        if "\\" in name and os.sep != "\\" and not os.path.lexists(self.base / name):
            name = PureWindowsPath(name).as_posix()
            self.backslashes.append(name)
        if name.startswith("~") and not os.path.lexists(self.base / name):
            name = os.path.expanduser(name)
        base = os.path.abspath(self.base)
        place = os.path.normpath(os.path.join(base, name))
        if place.startswith(base.rstrip(os.sep) + os.sep):
            name = os.path.relpath(place, base)
        return (name if os.path.isabs(name) else os.path.normpath(name)).replace(os.sep, "/")

    def _labels(self, value: object, at: str) -> list[str]:
        if hasattr(value, "tolist"):  # of NumPy
            value = value.tolist()
        if not self.several:
            return [_label(value, at)]
        if isinstance(value, str):
            value = value.split(SEPARATOR)
        values = value if isinstance(value, (list, tuple)) else [value]
        labels = list(dict.fromkeys(_label(one, at) for one in values))
        if not labels:
            raise ValueError(f"{at}: the image has no label; one at least is needed")
        return labels


def images_of_rows(
    title: str,
    columns: Sequence[str],
    rows: Iterable[Row],
    base: str | Path,
    absent_ok: bool = False,
) -> ImageFiles:
    """The image files that `rows` list, with paths relative to `base` or absolute.

    title: what messages call the list. Classes are in natural order, images in that of the rows;
    an image that is listed twice in the same way counts once. Where a label is a list, or stands in
    a column `labels` of text with |, an image may have several.
    absent_ok: rows of images that are not there are passed over, if one image at least is.
    """
    rows = list(rows)
    picked = pick_columns(title, columns)
    several = _has_several(rows, picked.label)
    found = _Collector(title, Path(base), picked, several)
    for row in rows:
        found.add(row)
    if not found.listed:
        raise ValueError(f"source: {title} lists no images")
    _say(title, "listed more than once in the same way and counted once", found.repeated)
    _say(title, "with \\ in their paths, read as /", found.backslashes)
    entries = list(found.listed.values())
    entries = _there(title, found.base, entries, absent_ok)
    where: dict[str, str] = {}
    for entry in entries:
        for label in entry.labels:
            where.setdefault(label, f"{title} {entry.where}")
    class_names = checked_names(title, sorted(where, key=natural_key), where)
    number = {name: k for k, name in enumerate(class_names)}
    labels = [[number[label] for label in entry.labels] for entry in entries]
    roles = [entry.role for entry in entries]
    return ImageFiles(
        Path(base),
        class_names,
        [entry.name for entry in entries],
        [row[0] for row in labels],
        roles=None if picked.split is None else [role for role in roles if role is not None],
        labels=labels if several else None,
        where=where,
    )


def checked_names(title: str, names: list[str], where: Mapping[str, str]) -> list[str]:
    """`names`, or a ValueError that says which two stand for one class, and where they are."""
    try:
        return check_class_names(names)
    except ValueError as error:
        text = str(error).removeprefix("classes: ")
        lines = [f"{name!a}: {place}" for name, place in where.items() if f"{name!a}" in text]
        more = f" ({'; '.join(lines)})" if lines else ""
        raise ValueError(f"source: {title}: {text}{more}") from None


def _has_several(rows: Sequence[Row], column: str) -> bool:
    """Whether any label is a list, or, in a column whose name is plural, text with |."""
    plural = column.strip().casefold() in ("labels", "classes", "categories")
    for row in rows:
        value = row.cells.get(column)
        if isinstance(value, (list, tuple)) or getattr(value, "ndim", 0) == 1:
            return True
        if plural and isinstance(value, str) and SEPARATOR in value:
            return True
    return False


def _there(title: str, base: Path, entries: list[_Listed], absent_ok: bool) -> list[_Listed]:
    """The entries whose images are there, which all must be unless `absent_ok`."""
    absent = absent_images(base, [entry.name for entry in entries])
    if absent and not (absent_ok and len(absent) < len(entries)):
        name, why = absent[0]
        at = next(entry.where for entry in entries if entry.name == name)
        raise ValueError(
            f"source: {title}: {len(absent)} of {len(entries)} listed images cannot be read, first "
            f"{printable(name)!r} ({at}): {why}"
        )
    gone = {name for name, _ in absent}
    return [entry for entry in entries if entry.name not in gone]


def _say(title: str, fact: str, names: Sequence[str]) -> None:
    if names:
        logger.warning("%s: images %s: %d, e.g. %s", title, fact, len(names), printable(names[0]))


def _role(value: object, at: str) -> int:
    role = role_of(value) if isinstance(value, str) else None
    if role is None:
        got = "nothing" if _is_empty(value) else repr(value)
        raise ValueError(f"{at}: must be {ROLE_NAMES}, got {got}")
    return role


def _label(value: object, at: str) -> str:
    if _is_empty(value):
        raise ValueError(f"{at}: the label is empty")
    if isinstance(value, float) and value.is_integer():
        value = int(value)  # pandas makes floats of a column of integers with one missing
    if isinstance(value, bool) or not isinstance(value, (str, int)):
        raise ValueError(f"{at}: must be text or a whole number, got {value!r}")
    return str(value).strip()


def _is_empty(value: object) -> bool:
    if isinstance(value, str):
        return value.strip().casefold() in ("", "nan")
    return value is None or (isinstance(value, float) and math.isnan(value))


def _shown(labels: object) -> str:
    return ", ".join(map(printable, labels)) if isinstance(labels, list) else str(labels)
