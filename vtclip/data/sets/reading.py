# SPDX-License-Identifier: Apache-2.0
"""Open one data set under a root: its list files, its lists, its images on disk."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from vtclip.data.image_datasets import as_source_object
from vtclip.data.image_files import IN_MEMORY, InMemory
from vtclip.data.sets.imagenet import CLASSNAMES, names_file
from vtclip.data.sets.listing import Listing, Spec
from vtclip.data.sets.table import find_set
from vtclip.files import printable
from vtclip.names import option


@dataclass(frozen=True)
class SetSource:
    """A data set by name under a data root: a source of images like a folder or a table."""

    spec: Spec
    root: Path

    @property
    def name(self) -> str:
        return self.spec.name

    def __str__(self) -> str:
        return self.name

    def resolve(self) -> SetSource:
        """Itself: the name of a data set does not depend on where it is stored."""
        return self

    def refuse(self, **options: object) -> None:
        """Raises if an option that has no meaning for a data set is set (is true)."""
        for name, value in options.items():
            if value:
                raise self.spec.error(
                    f"{option(name)} must be left out with a data set, got {value!r}"
                )


AnySource: TypeAlias = Path | SetSource | InMemory


def source_name(source: AnySource) -> str:
    """What a source is called where one word says it: of "." and ".." too the folder's name."""
    return source.resolve().name or str(source.resolve())


def as_source(source: object, data: str | Path | None) -> AnySource:
    """The data set `source` under the root `data`; without `data`, `source` as a path.

    A Python object that holds or lists images is taken as vtclip.data.image_datasets says; any
    other one is a TypeError.
    """
    if isinstance(source, (SetSource, InMemory)):
        return source
    if data is None and not isinstance(source, (str, os.PathLike)):
        return as_source_object(source)
    if not isinstance(source, (str, os.PathLike)):
        raise TypeError(
            f"data: source must be the name of a data set below it, got {type(source).__name__}"
        )
    if data is None and str(source).startswith(IN_MEMORY):
        raise ValueError(
            f"source: images {source} are on no disk and cannot be listed again; give a source"
        )
    if data is None:
        return Path(source).expanduser()
    root = Path(data).expanduser()
    spec = find_set(str(source))
    if not root.is_dir():
        raise ValueError(
            f"{option('data')}: the root of the data sets must be a folder, got {data}"
        )
    return SetSource(spec, root)


def missing_files(spec: Spec, root: Path) -> list[str]:
    """What `spec` needs and `root` lacks, and where to get it; no file is opened."""
    place = spec.place(root)
    if not place.is_dir():
        hint = ""
        if os.path.basename(os.path.realpath(root)) == spec.folder:
            hint = f"; give {printable(str(root.parent))}, the folder above"
        what = "a link to nothing" if place.is_symlink() else "missing"
        return [f"the folder {printable(str(place))} is {what}{hint}; images: {spec.home}"]
    missing = []
    for file in spec.files:
        path = names_file(spec, root) if file == CLASSNAMES else place / file
        if not path.is_file():
            missing.append(f"{printable(str(path))} is missing; official copy: {spec.lists}")
    if not spec.image_root(root).is_dir():
        missing.append(
            f"the image folder {printable(str(spec.image_root(root)))} is missing; "
            f"images: {spec.home}"
        )
    return missing


def open_listing(spec: Spec, root: Path) -> Listing:
    """The official lists of a set, or a SetError that names the first missing file and its home."""
    missing = missing_files(spec, root)
    if missing:
        raise spec.error(f"{missing[0]} (no other split is made up)")
    try:
        return spec.read(spec, root)
    except OSError as error:
        raise spec.error(f"{error.filename}: {error.strerror}") from None
