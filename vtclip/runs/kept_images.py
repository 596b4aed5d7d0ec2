# SPDX-License-Identifier: Apache-2.0
"""Images of a run by name, opened only where their content is still that of the fit."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from PIL import Image

from vtclip.data.decode import ImageError, content_digest, decode
from vtclip.data.image_datasets import is_saved_dataset
from vtclip.data.image_files import ImageFiles
from vtclip.data.listed import list_images, said_later
from vtclip.data.sets import find_set
from vtclip.data.sources import source_kind
from vtclip.files import Json

ROLES = ("val", "test")  # what names of images of --val and --test begin with


@dataclass(frozen=True)
class KeptImages:
    """names, digests: of images as `images.csv` lists them; None where they are not known.

    places: where they may lie, see `places_in`. data: --data, which the first of them is in.
    """

    names: list[str] | None
    digests: list[str] = field(default_factory=list)
    places: Sequence[tuple[str, str]] = ()
    data: str | None = None

    def open(self, row: int) -> Image.Image | None:
        """The picture in RGB; None where it cannot be found, or is not that of the fit."""
        if self.names is None or not self.digests[row]:
            return None
        for files, name in self._places(self.names[row]):
            try:
                data = files.read(name)
                if content_digest(data) == self.digests[row]:
                    return decode(data, name)
            except (ImageError, OSError, ValueError, KeyError):
                continue
        return None

    def _places(self, name: str) -> Iterator[tuple[ImageFiles, str]]:
        """Where an image of this name may lie, most likely first."""
        for role, files in self._files:
            if not role:
                yield files, name
            elif name.startswith(f"{role}/"):
                yield files, name.removeprefix(f"{role}/")

    @cached_property
    def _files(self) -> list[tuple[str, ImageFiles]]:
        """The sources, and under their roles those of --val and --test."""
        found = []
        for number, (role, source) in enumerate(self.places):
            try:
                files = _listed(source, None if number else self.data)
            except (ImportError, OSError, ValueError):  # gone, or no longer a source
                continue
            if files is None:
                continue
            found.append((role, files))
            if number and not role:  # a folder of one new class: its name begins its images'
                found.append((role, ImageFiles.below(files.root.parent)))
        return found


def places_in(result: Json) -> list[tuple[str, str]]:
    """(role, source) of each source of a run; the role is empty but of --val and --test."""
    config = result["config"]
    sources = result.get("sources") or [{"source": config["source"]}]
    named = [("", str(entry["source"])) for entry in sources]
    return named + [(role, str(config[role])) for role in ROLES if config.get(role)]


def _listed(source: str, data: str | None) -> ImageFiles | None:
    """The files of a source; None of features."""
    if data is not None:
        return ImageFiles.below(find_set(source).image_root(Path(data).expanduser()))
    path = Path(source).expanduser()
    if source_kind(path) != "folder":
        return None
    if path.is_dir() and not is_saved_dataset(path):
        return ImageFiles.below(path)
    with said_later():
        return list_images(path, absent_ok=True)
