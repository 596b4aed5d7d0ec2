# SPDX-License-Identifier: Apache-2.0
"""A table of image files, whatever listed them: a folder of class folders, a list, a data set."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from vtclip.data.decode import read_file

IN_MEMORY = "in memory: "


@dataclass(frozen=True)
class ImageFiles:
    """Image files with a `label` each: `names` relative to `root`, with /, all different.

    A list may also name files outside `root`, by absolute names.

    skipped: (name, reason) of images that were passed over.
    prompts: the words that stand for the classes in templates, if they are not the class names.
    roles: what the source itself says of each file, see `vtclip.data.records.Records.roles`.
    labels: all classes of each image, where an image may have more than one; `label` is the first.
    reader: returns the bytes of an image by name, where they are not those of a file.
    where: says of a class in which part of the source it occurs first, for messages.
    passed: how many files of other kinds were passed over, by extension or kind.
    remarks: lines that whoever uses the files must say once (layout, files that are not read).
    """

    root: Path
    class_names: list[str]
    names: list[str]
    label: list[int]
    skipped: list[tuple[str, str]] = field(default_factory=list)
    prompts: list[str] | None = None
    roles: list[int] | None = None
    labels: list[list[int]] | None = None
    reader: Callable[[str], bytes] | None = field(default=None, compare=False, repr=False)
    where: Mapping[str, str] = field(default_factory=dict, compare=False, repr=False)
    passed: Mapping[str, int] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)

    @classmethod
    def below(cls, root: str | Path) -> ImageFiles:
        """Files below `root` by name, of which no list is made."""
        return cls(Path(root), [], [], [])

    def path(self, name: str) -> Path:
        """Where an image lies; no file where `reader` has the bytes."""
        return self.root / name

    def read(self, name: str) -> bytes:
        """The bytes of an image, or ImageError."""
        return read_file(self.path(name)) if self.reader is None else self.reader(name)

    def size(self, name: str) -> int:
        """The bytes that an image takes."""
        return len(self.read(name)) if self.reader is not None else os.path.getsize(self.path(name))


@dataclass(frozen=True)
class InMemory:
    """Images that a Python object holds or lists: a source like a folder, but without a path.

    name: what the run's folder is called after. title: what messages call it.
    """

    name: str
    title: str
    images: ImageFiles

    @property
    def root(self) -> Path:
        return self.images.root

    def __str__(self) -> str:
        return IN_MEMORY + self.title

    def resolve(self) -> InMemory:
        """Itself: it depends on no working directory."""
        return self


def absent_images(image_root: Path, names: Sequence[str]) -> list[tuple[str, str]]:
    """(name, reason) of the images that are not there or are empty; links are followed."""

    def fault(name: str) -> str | None:
        try:
            status = os.stat(image_root / name)
        except (OSError, ValueError) as error:
            if os.path.islink(image_root / name):
                return "a link to nothing"
            missing = isinstance(error, (FileNotFoundError, NotADirectoryError))
            return "no such file" if missing else str(getattr(error, "strerror", error))
        if not stat.S_ISREG(status.st_mode):
            return "not a regular file"
        return None if status.st_size else "the file is empty"

    def faults(chunk: Sequence[str]) -> list[tuple[str, str]]:
        return [(name, why) for name in chunk if (why := fault(name)) is not None]

    chunks = [names[start : start + 1024] for start in range(0, len(names), 1024)]
    with ThreadPoolExecutor(8, thread_name_prefix="vtclip-stat") as pool:
        return [row for rows in pool.map(faults, chunks) for row in rows]
