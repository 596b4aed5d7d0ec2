# SPDX-License-Identifier: Apache-2.0
"""Where `vtclip.extend` finds new classes: a folder of one class or of several, a list of files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from vtclip.data.class_names import some, with_class_names
from vtclip.data.folders import is_ignored, other_files, scan_class, scan_folder, walk_images
from vtclip.data.formats import is_image_name
from vtclip.data.image_datasets import is_saved_dataset
from vtclip.data.image_files import ImageFiles
from vtclip.data.layouts import FLAT
from vtclip.data.listed import list_images
from vtclip.data.records import check_class_names
from vtclip.files import printable
from vtclip.names import option


def new_classes(
    path: Path, name: str | None, class_names: Mapping[str, str] | None = None
) -> ImageFiles:
    """One class where `path` holds images or `name` is given, else one class per folder in it.

    A list or a saved dataset has the classes that it names. Split folders (vtclip.data.layouts)
    give the images their roles, those of one class too. class_names: from ids to names; a class
    that is none of the ids keeps its own.
    """
    path = path.resolve()
    if path.is_file() or is_saved_dataset(path):
        if name is not None:
            raise ValueError(f"extend: {option('name')} is for a folder of images, got {path}")
        return with_class_names(list_images(path), class_names, keep_others=True)
    entries = [entry for entry in path.iterdir() if not is_ignored(entry.name)]
    loose = any(is_image_name(entry.name) for entry in entries)
    folders = any(entry.is_dir() for entry in entries)
    if name is None and loose and folders:
        raise ValueError(
            f"extend: {path} holds images and folders; {option('name')} makes all of them one class"
        )
    if name is None and not loose:
        return with_class_names(_of_folders(path), class_names, keep_others=True)
    usual = (class_names or {}).get(path.name, path.name)
    (class_name,) = check_class_names([usual if name is None else name])
    return _of_one(path, class_name)


def check_new(known: Sequence[str], names: Sequence[str], path: Path, name: str | None) -> None:
    """Refuse classes of `path` that the run has already; `name` is what the user called one."""
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


def _of_folders(path: Path) -> ImageFiles:
    try:
        return scan_folder(path)
    except ValueError as error:
        if not str(error).endswith(FLAT):
            raise
        way = f"{option('name')} makes all of them one class and keeps their split"
        raise ValueError(f"{error}; {way}") from None


def _of_one(path: Path, class_name: str) -> ImageFiles:
    """All images in and below a folder.

    Their names start with the folder's own, as they would in a folder of both old and new classes:
    which of them are test images does not depend on how they came.
    """
    if not walk_images(path)[0]:
        raise ValueError(f"extend: {path} holds no images{other_files(path)}")
    files = scan_class(path, class_name)
    return replace(
        files,
        root=path.parent,
        names=[f"{path.name}/{name}" for name in files.names],
        skipped=[(f"{path.name}/{name}", why) for name, why in files.skipped],
    )
