# SPDX-License-Identifier: Apache-2.0
"""Where `vtclip.extend` finds new classes: a folder of one class or of several, a list of files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from vtclip.data.class_names import some, with_class_names
from vtclip.data.folders import is_ignored, other_files, scan_class, scan_folder, walk_images
from vtclip.data.formats import is_image_name
from vtclip.data.image_datasets import is_saved_dataset
from vtclip.data.image_files import ImageFiles
from vtclip.data.layouts import FLAT
from vtclip.data.listed import list_images
from vtclip.data.records import check_class_names
from vtclip.files import Json, printable
from vtclip.names import option


@dataclass(frozen=True)
class NewSource:
    """Where new classes lie, and how they are listed: what a run keeps of it in `sources`.

    name: of the one class that all images are of. names_of: the class names that the run was
    fitted with, from ids, for classes that are among the ids. class_names: the same of an
    extension, which then must name every class.
    """

    path: Path
    name: str | None = None
    names_of: Mapping[str, str] | None = None
    class_names: Mapping[str, str] | None = None
    follow_links: bool = False

    @classmethod
    def of_entry(cls, entry: Json, names_of: Mapping[str, str] | None, follow: bool) -> NewSource:
        """The source of an entry of `sources`; older ones lack what came later."""
        follow = follow or bool(entry.get("follow_links"))
        names = entry.get("class_names")
        return cls(Path(entry["source"]), entry["name"], names_of, names, follow)

    def as_json(self) -> Json:
        return {
            "source": str(self.path.resolve()),
            "name": self.name,
            "class_names": None if self.class_names is None else dict(self.class_names),
            "follow_links": self.follow_links,
        }

    def named(self, files: ImageFiles) -> ImageFiles:
        if self.class_names is not None:
            return with_class_names(files, self.class_names)
        names = {id_: name for id_, name in (self.names_of or {}).items()
                 if id_ in files.class_names}  # fmt: skip
        return with_class_names(files, names, keep_others=True) if names else files

    def refuse_table(self) -> None:
        """Refuse options that mean nothing where the features exist already."""
        for word in ("name", "class_names", "follow_links"):
            if getattr(self, word):
                raise ValueError(
                    f"extend: {option(word)} is for a folder of images, got {self.path}"
                )


def new_classes(source: NewSource) -> ImageFiles:
    """One class where the path holds images or has a name, else one class per folder in it.

    A list or a saved dataset has the classes that it names. Split folders (vtclip.data.layouts)
    give the images their roles, those of one class too.
    """
    path, name, follow = source.path.resolve(), source.name, source.follow_links
    if path.is_file() or is_saved_dataset(path):
        if name is not None:
            raise ValueError(f"extend: {option('name')} is for a folder of images, got {path}")
        return source.named(list_images(path))
    entries = [entry for entry in path.iterdir() if not is_ignored(entry.name)]
    loose = any(is_image_name(entry.name) for entry in entries)
    folders = any(entry.is_dir() for entry in entries)
    if name is None and loose and folders:
        raise ValueError(
            f"extend: {path} holds images and folders; {option('name')} makes all of them one class"
        )
    if name is None and not loose:
        return source.named(_of_folders(path, follow))
    (class_name,) = check_class_names([path.name if name is None else name])
    files = _of_one(path, class_name, follow)
    return source.named(files) if name is None else files


def check_new(known: Sequence[str], names: Sequence[str], source: NewSource) -> None:
    """Refuse classes of the source that the run has already."""
    path, name = source.path, source.name
    own = [one for one in names if one in known]
    if own and len(names) == 1:
        other = f"another {option('name')}" if name is not None else option("name")
        raise ValueError(
            f"extend: {path}: the run has class {printable(own[0])!r} already; fit again with all "
            f"its images to add these, or, if they are of another class, give {other}"
        )
    if own:
        which = f"{len(own)} of these {len(names)} classes"
        raise ValueError(
            f"extend: {path}: the run has {which} already ({some(own)}); leave them out, or fit "
            "again with all their images to add these"
        )
    check_class_names([*known, *names])


def _of_folders(path: Path, follow_links: bool) -> ImageFiles:
    try:
        return scan_folder(path, follow_links=follow_links)
    except ValueError as error:
        if not str(error).endswith(FLAT):
            raise
        way = f"{option('name')} makes all of them one class and keeps their split"
        raise ValueError(f"{error}; {way}") from None


def _of_one(path: Path, class_name: str, follow_links: bool) -> ImageFiles:
    """All images in and below a folder.

    Their names start with the folder's own, as they would in a folder of both old and new classes:
    which of them are test images does not depend on how they came.
    """
    if not walk_images(path, follow_links=follow_links)[0]:
        others = other_files(path, follow_links=follow_links)
        raise ValueError(f"extend: {path} holds no images{others}")
    files = scan_class(path, class_name, follow_links=follow_links)
    return replace(
        files,
        root=path.parent,
        names=[f"{path.name}/{name}" for name in files.names],
        skipped=[(f"{path.name}/{name}", why) for name, why in files.skipped],
    )
