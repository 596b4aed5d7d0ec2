# SPDX-License-Identifier: Apache-2.0
"""The sources of a fit opened as one table: training images, and those of --val and --test."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping

from vtclip.data.image_files import ImageFiles, InMemory
from vtclip.data.joined import join_records
from vtclip.data.options import Draw, FeatureOptions
from vtclip.data.records import Records
from vtclip.data.sets import AnySource, SetSource
from vtclip.data.sources import open_records, source_kind
from vtclip.files import printable
from vtclip.names import as_known, option

logger = logging.getLogger(__name__)
NUMBERS = {"val": 1, "test": 2}


def open_all(
    source: AnySource,
    options: FeatureOptions,
    draw: Draw | None = None,
    *,
    val: AnySource | None = None,
    test: AnySource | None = None,
    listed: Mapping[str, ImageFiles] | None = None,
) -> Records:
    """Records of `source` and, with their roles, of the sources of validation and test images.

    All are opened with the same options. Of a `val` or `test` that has roles itself only its
    validation or test images are taken, where it has any. Rows of `source` keep their names, the
    others' begin with "val/" or "test/".
    listed: files by "source", "val" and "test", where they were listed already.
    """
    listed = listed or {}
    records = open_records(source, options, draw, images=listed.get("source"))
    named: dict[str, AnySource] = {
        role: place for role, place in (("val", val), ("test", test)) if place is not None
    }
    if not named:
        return records
    if records.roles is not None:
        for role in named:
            check_no_own(role, records.roles.tolist(), source)
    others = {}
    for role, place in named.items():
        # classes are renamed where both name them; a class that only one has is matched by name
        with named_as(role):
            part = open_records(place, options, images=listed.get(role))
        own = part.roles
        if own is not None and bool((own == NUMBERS[role]).any()):
            part = part.select((own == NUMBERS[role]).nonzero().flatten())
        alike = as_known(part.class_names, records.class_names)
        names = [alike.get(name, name) for name in part.class_names]
        here = {names[k] for k in set(part.label.tolist())}
        missing = [name for name in records.class_names if name not in here]
        if missing:
            logger.warning(
                "%s: %s has no images of %d of %d classes: %s%s",
                option(role), printable(str(place)), len(missing), len(records.class_names),
                ", ".join(map(printable, missing[:5])), ", ..." if missing[5:] else "",
            )  # fmt: skip
        others[role] = part
    return join_records(records, others)


@contextlib.contextmanager
def named_as(role: str) -> Iterator[None]:
    """Errors about the source of a role name the option that named it, e.g. --test."""
    try:
        yield
    except ValueError as error:
        text = str(error)
        if role == "source" or not text.startswith("source: "):
            raise
        raise ValueError(f"{option(role)}: {text.removeprefix('source: ')}") from None


def check_no_own(role: str, roles: list[int], source: AnySource) -> None:
    """Refuse to name images of a role that the source has itself."""
    own = roles.count(NUMBERS[role])
    if own:
        words = {"val": "validation", "test": "test"}[role]
        raise ValueError(
            f"{option(role)}: {source} has {own} {words} images of its own; leave "
            f"{option(role)} out, or give the folder of its training images alone"
        )


def check_others(source: AnySource, val: AnySource | None, test: AnySource | None) -> None:
    """Refuse sources of validation and test images that cannot go with the training source."""
    seen = {str(source.resolve()): option("source")}
    for role, place in (("val", val), ("test", test)):
        if place is None:
            continue
        if isinstance(source, SetSource):
            raise ValueError(
                f"{option(role)}: data set {source.name} has official lists, got {place}"
            )
        kinds = [_kind(role, place), source_kind(source)]
        if (kinds[0] == "npz") != (kinds[1] == "npz"):
            raise ValueError(
                f"{option(role)}: an .npz table goes with another alone, got {place} "
                f"beside {source}"
            )
        if isinstance(place, InMemory):
            continue
        other = seen.setdefault(str(place.resolve()), option(role))
        if other != option(role):
            raise ValueError(f"{option(role)}: {place} is {other} as well; name other images")


def _kind(role: str, place: AnySource) -> str:
    if isinstance(place, SetSource):
        raise ValueError(
            f"{option(role)}: a data set cannot stand beside other images, got {place}"
        )
    with named_as(role):
        return source_kind(place)
