# SPDX-License-Identifier: Apache-2.0
"""A table of image files, whatever listed them: a folder of class folders, a list, a data set."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from vtclip.data.decode import read_file


@dataclass(frozen=True)
class ImageFiles:
    """Image files with a `label` each: `names` relative to `root`, with /, all different.

    skipped: (name, reason) of images that were passed over.
    prompts: the words that stand for the classes in templates, if they are not the class names.
    roles: what the source itself says of each file, see `vtclip.data.records.Records.roles`.
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
    passed: Mapping[str, int] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)

    def path(self, name: str) -> Path:
        return self.root / name

    def read(self, name: str) -> bytes:
        """The bytes of an image, or ImageError."""
        return read_file(self.path(name))
