# SPDX-License-Identifier: Apache-2.0
"""Names for classes that go by ids: the files people keep them in, and their use on a source.

Read are a JSON object of id to name, ImageNet's `{"0": ["n01440764", "tench"]}`, a JSON list in the
order of the classes, and lines of `id name`, `id,name` or `id<TAB>name`. In a .csv file the first
comma ends the id, elsewhere the first of a tab, a comma and a space (lines that all have a tab:
the tab), so that `n01440764 tench, Tinca tinca` names a class "tench, Tinca tinca".
"""

from __future__ import annotations

import csv
import dataclasses
import json
import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from vtclip.data.image_files import ImageFiles
from vtclip.data.records import check_class_names
from vtclip.files import printable
from vtclip.names import name_key, option

logger = logging.getLogger(__name__)
ID_END = re.compile(r"\t|,|\s")
SHOWN = 5  # ids or classes that a message names


# n01440764, 0001, class_12, c7, label-3, 4f3a9c01, a UUID
ID = re.compile(
    r"((class|cls|label|category|species|type|group|id|folder)[ _-]?|[a-z]{0,2}_?)[0-9]+"
    r"|[0-9a-f]{8,}|[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}",
    re.IGNORECASE,
)


def look_like_ids(names: Sequence[str]) -> bool:
    """Whether most of `names` are numbers or codes and no words that a text encoder knows."""
    found = [name for name in names if ID.fullmatch(name) and any(map(str.isdigit, name))]
    return 2 * len(found) > len(names)


def as_class_names(given: Mapping[str, str] | str | Path | None) -> dict[str, str] | None:
    """A mapping of ids to names, from one or from the file that holds it; None stays None."""
    if given is None:
        return None
    if not isinstance(given, Mapping):
        return read_class_names(given)
    return _checked(
        ((f"id {id_!r}", id_, name) for id_, name in given.items()), option("class_names")
    )


def read_class_names(path: str | Path) -> dict[str, str]:
    """The names in a file by id; a ValueError says in one line what is wrong, and where.

    A list in the order of the classes has the ids "0", "1", ..., and ImageNet's index both its
    numbers and its WordNet ids.
    """
    path = Path(path).expanduser()
    where = f"{option('class_names')} {printable(str(path))}"
    if not path.exists():
        raise FileNotFoundError(f"{where} does not exist")
    if not path.is_file():
        raise ValueError(f"{where} is not a file")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{where} is not UTF-8 text ({error.reason})") from None
    if not text.strip():
        raise ValueError(f"{where} is empty")
    if path.suffix.lower() == ".json" or text.lstrip()[0] in "{[":
        return _of_json(text, where)
    return _checked(_lines(text, path.suffix.lower(), where), where)


def _lines(text: str, suffix: str, where: str) -> Iterable[tuple[str, str, str]]:
    """(place, id, name) of every line that is not empty."""
    lines = [(number, line) for number, line in enumerate(text.splitlines(), 1) if line.strip()]
    tabs = all("\t" in line.strip() for _, line in lines)
    for number, line in lines:
        place = f"line {number}"
        if suffix == ".csv" and not tabs:
            cells = next(csv.reader([line], skipinitialspace=True))
            if len(cells) < 2 and ";" in line:
                cells = next(csv.reader([line], delimiter=";", skipinitialspace=True))
            parts = [cells[0], ",".join(cells[1:])] if len(cells) > 1 else cells
        else:
            end = ("\t", line.index("\t")) if tabs else None
            found = None if tabs else ID_END.search(line.strip())
            if end is not None:
                parts = [line[: end[1]], line[end[1] + 1 :]]
            elif found is not None:
                parts = [line.strip()[: found.start()], line.strip()[found.end() :]]
            else:
                parts = [line]
        if len(parts) < 2:
            raise ValueError(f"{where}, {place}: must hold an id and a name, got {line.strip()!a}")
        yield place, parts[0].strip().strip('"'), parts[1].strip().strip('"')


def _of_json(text: str, where: str) -> dict[str, str]:
    pairs: list[tuple[str, Any]] = []

    def kept(items: list[tuple[str, Any]]) -> list[tuple[str, Any]]:
        return items  # json's own dict would drop an id that comes twice

    try:
        value = json.loads(text, object_pairs_hook=kept)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is not valid JSON ({error})") from None
    if not isinstance(value, list) or not value:
        raise ValueError(f"{where} must hold a JSON object of id to name, or a list of names")
    if isinstance(value[0], tuple):
        pairs = value
    else:
        pairs = [(str(number), name) for number, name in enumerate(value)]
    found: list[tuple[str, str, str]] = []
    indexed: list[tuple[str, str, str]] = []
    for key, name in pairs:
        place = f"id {key!r}"
        if isinstance(name, list) and len(name) == 2 and key.isdecimal():  # ImageNet's index
            found.append((place, name[0], name[1]))
            indexed.append((place, key, name[1]))
        else:
            found.append((place, key, name))
    return {**_checked(indexed, where), **_checked(found, where)}


def _checked(entries: Iterable[tuple[str, Any, Any]], where: str) -> dict[str, str]:
    names: dict[str, str] = {}
    for place, id_, name in entries:
        for what, value in (("id", id_), ("name", name)):
            if not isinstance(value, str):
                kind = type(value).__name__
                raise ValueError(f"{where}, {place}: the {what} must be a string, got a {kind}")
            if not value.strip():
                raise ValueError(f"{where}, {place}: the {what} is empty")
        if id_ in names:
            raise ValueError(f"{where}, {place}: id {id_!r} comes twice: {names[id_]!r}, {name!r}")
        names[id_] = name.strip()
    return names


def with_class_names(
    files: ImageFiles, class_names: Mapping[str, str] | None, *, keep_others: bool = False
) -> ImageFiles:
    """`files` whose classes go by the names that stand for their ids; their order stays.

    A class that goes by one of the names already keeps it. Any other class without an entry is an
    error, or keeps its own name with keep_others=True.
    """
    if class_names is None:
        return files
    ids = files.class_names
    mapping = {**class_names}
    if not any(id_ in mapping for id_ in ids):
        mapping = _by_place(ids, mapping)
    known = {name_key(name) for name in mapping.values()}
    absent = [id_ for id_ in ids if id_ not in mapping and name_key(id_) not in known]
    turned = not any(id_ in mapping for id_ in ids) and look_like_ids(list(mapping.values()))
    where = f"of {printable(str(files.root))}"
    if (turned or len(absent) == len(ids)) and not keep_others:
        hint = "; it gives ids to names, and must give names to ids" if turned else ""
        raise ValueError(
            f"{option('class_names')}: no class {where} is among its ids: the classes are "
            f"{some(ids)}, the ids {some(list(class_names))}{hint}"
        )
    if absent and not keep_others:
        place = files.where.get(absent[0])
        raise ValueError(
            f"{option('class_names')}: {len(absent)} of {len(ids)} classes {where} have no name "
            f"in it: {some(absent)}" + (f" ({place})" if place else "")
        )
    names = [mapping.get(id_, id_) for id_ in ids]
    first: dict[str, str] = {}
    for id_, name in zip(ids, names, strict=True):
        other = first.setdefault(name_key(name), id_)
        if other != id_:
            raise ValueError(
                f"{option('class_names')}: {printable(other)!r} and {printable(id_)!r} have the "
                f"same name {name!r}, or one that differs in case, spaces or underscores only"
            )
    unused = [id_ for id_ in mapping if id_ not in ids]
    if unused:
        logger.info("%s: %d ids are of no class here, e.g. %s",
                    option("class_names"), len(unused), printable(unused[0]))  # fmt: skip
    return dataclasses.replace(files, class_names=check_class_names(names))


def _by_place(ids: Sequence[str], class_names: dict[str, str]) -> dict[str, str]:
    """Names by id, where `class_names` is a list of as many names in the order of the classes."""
    if list(class_names) != [str(number) for number in range(len(class_names))]:
        return class_names
    names = list(class_names.values())
    if len(names) != len(ids):
        raise ValueError(
            f"{option('class_names')}: a list of {len(names)} names is for as many classes, got "
            f"{len(ids)}"
        )
    if sorted(ids) != list(ids):
        raise ValueError(
            f"{option('class_names')}: a list of names is ambiguous here, because the classes have "
            f"one order by number and another by letter ({some(ids)}); give an id with each name"
        )
    logger.warning(
        "%s: the list names the classes in their order: %s",
        option("class_names"),
        some([f"{printable(id_)} is {name}" for id_, name in zip(ids, names, strict=True)]),
    )
    return dict(zip(ids, names, strict=True))


def some(words: Sequence[str]) -> str:
    """The first few of `words` for a message."""
    shown = ", ".join(map(printable, words[:SHOWN]))
    return shown + (", ..." if len(words) > SHOWN else "")


def needs_image_files(class_names: object, what: str) -> None:
    """Refuse names for the classes of a source that brings its own."""
    if class_names is not None:
        raise ValueError(
            f"{option('class_names')}: {what} has names of its classes already, and their texts"
        )
