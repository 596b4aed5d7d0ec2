# SPDX-License-Identifier: Apache-2.0
"""Which images the rows are that a head keeps: their names in `images.csv`, and their pixels.

A head keeps its training images in the order in which `images.csv` lists those of role "train".
A file is opened only where its content is still that of the fit.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from PIL import Image

from vtclip.data.decode import ImageError, content_digest, decode
from vtclip.data.image_datasets import is_saved_dataset
from vtclip.data.image_files import ImageFiles
from vtclip.data.listed import list_images
from vtclip.data.sets import find_set
from vtclip.data.sources import source_kind
from vtclip.files import several
from vtclip.runs.multi_label import said_later
from vtclip.runs.result import RESULT, Run
from vtclip.runs.seen import Seen
from vtclip.runs.sources import sources_of

ROLES = ("val", "test")  # what names of images of --val and --test begin with


@dataclass(frozen=True)
class TrainingImages:
    """names and digests of the rows, or None and "why": the reason, in words.

    run: of whose sources the files are.
    """

    names: list[str] | None
    digests: list[str] = field(default_factory=list)
    why: str = ""
    run: Run | None = None

    def name(self, row: int, class_name: str) -> str:
        """What row `row` is called: its file, or its number among the training images."""
        if self.names is None:
            return f"training image {row + 1} of class {class_name}"
        return self.names[row]

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
        """The sources of the run, and under their roles those of --val and --test."""
        if self.run is None:
            return []
        config = self.run.result["config"]
        named = [("", str(entry["source"])) for entry in sources_of(self.run)]
        named += [(role, str(config[role])) for role in ROLES if config.get(role)]
        found = []
        for number, (role, source) in enumerate(named):
            try:
                files = _listed(source, None if number else config.get("data"))
            except (ImportError, OSError, ValueError):  # gone, or no longer a source
                continue
            if files is None:
                continue
            found.append((role, files))
            if number and not role:  # a folder of one new class: its name begins its images'
                found.append((role, ImageFiles.below(files.root.parent)))
        return found


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


def training_images(folder: str | Path, class_names: Sequence[str]) -> TrainingImages:
    """The training images of the run in `folder`, of a head that has rows of `class_names` [N].

    Without names, and with the reason, where the folder holds an adapter alone, where the run is
    from before runs kept a list of their images, or where the list is another run's.
    """
    folder = Path(folder).expanduser()
    if not (folder / RESULT).is_file():
        return TrainingImages(None, why="the folder holds an adapter without its run")
    try:
        run = Run.load(folder)
        entry = run.result.get("seen")
        if entry is None:
            why = "the run is from before runs kept a list of their images"
            return TrainingImages(None, why=why)
        seen = Seen.read(folder, entry)
    except ValueError as error:
        return TrainingImages(None, why=str(error))
    rows = [row for row, role in enumerate(seen.roles) if role == "train"]
    if len(rows) != len(class_names):
        counts = f"{several(len(rows), 'training image')}, the head keeps {len(class_names)}"
        return TrainingImages(None, why=f"{entry['file']} lists {counts}")
    labels = [seen.labels[row] for row in rows]
    # pseudo-labels are the head's, and the list has the classes of the folders
    if labels != list(class_names) and not run.result["config"].get("pseudo_labels"):
        row = next(row for row, name in enumerate(class_names) if labels[row] != name)
        fact = f"{labels[row]!a}, the head's row is of {class_names[row]!a}"
        why = f"{entry['file']}: training image {row + 1} is of {fact}"
        return TrainingImages(None, why=why)
    names = [seen.names[row] for row in rows]
    return TrainingImages(names, [seen.digests[row] for row in rows], run=run)
