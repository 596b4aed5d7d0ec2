# SPDX-License-Identifier: Apache-2.0
"""Folders of class folders to a table of image files; nothing is opened.

Folder rules: `root/class_name/**/image.ext`. Classes are the folders directly below `root`, in
natural order (class_2 before class_10, case ignored); deeper folders belong to their class. Names
that start with a dot, Thumbs.db, desktop.ini, __MACOSX and files without an image extension
(.jpg .jpeg .jpe .jfif .png .webp .bmp .gif .tif .tiff .mpo, any case) are ignored. Links are
followed inside `root`, and out of it only with follow_links=True.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator
from pathlib import Path

from vtclip.data.image_files import ImageFiles
from vtclip.data.records import check_class_names
from vtclip.files import is_below, printable

logger = logging.getLogger(__name__)

EXTENSIONS = frozenset(
    ".jpg .jpeg .jpe .jfif .png .webp .bmp .gif .tif .tiff .mpo".split()  # noqa: SIM905
)
IGNORED = frozenset(("thumbs.db", "desktop.ini", "__macosx"))
SPLIT_NAMES = frozenset(("train", "training", "val", "valid", "validation", "test", "testing"))


def scan_folder(
    root: str | Path, *, follow_links: bool = False, empty_classes: bool = False
) -> ImageFiles:
    """The image files below `root` in their fixed order; nothing is opened yet.

    empty_classes: a class folder without images is a class of no image instead of an error.
    """
    root = Path(root).expanduser()
    if not root.is_dir():
        raise ValueError(f"source: must be a folder, got {printable(str(root))}")
    inside = os.path.realpath(root)
    classes: list[str] = []
    loose = 0
    with os.scandir(root) as entries:
        for entry in entries:
            if is_ignored(entry.name):
                continue
            if not entry.is_dir():
                loose += os.path.splitext(entry.name)[1].lower() in EXTENSIONS
            elif not follow_links and not is_below(entry.path, inside):
                raise ValueError(
                    f"source: class folder {printable(entry.name)} links out of "
                    f"{printable(str(root))}; follow_links allows it"
                )
            else:
                classes.append(entry.name)
    classes = _check_classes(root, sorted(classes, key=natural_key), loose)
    names: list[str] = []
    label: list[int] = []
    skipped: list[tuple[str, str]] = []
    empty: list[str] = []
    for k, class_name in enumerate(classes):
        before = len(names)
        for name in _walk(root, class_name, None if follow_links else inside, skipped):
            names.append(name)
            label.append(k)
        if len(names) == before:
            empty.append(class_name)
    if empty and not empty_classes:
        shown = ", ".join(map(printable, empty[:8])) + (", ..." if len(empty) > 8 else "")
        raise ValueError(f"source: {len(empty)} class folders hold no images: {shown}")
    if loose:
        logger.warning("%d images lie directly in %s, in no class, and are ignored", loose, root)
    return ImageFiles(root, classes, names, label, skipped)


def walk_images(root: str | Path) -> tuple[list[Path], list[tuple[str, str]]]:
    """Image files below `root`, by the rules for one class, and (path, reason) of skipped ones.

    Natural order, where the files of a folder come before those of its subfolders.
    """
    root = Path(root)
    skipped: list[tuple[str, str]] = []
    paths = [root / name for name in _walk(root, ".", os.path.realpath(root), skipped)]
    return paths, [(str(root / name), reason) for name, reason in skipped]


def _check_classes(root: Path, classes: list[str], loose: int) -> list[str]:
    where = printable(str(root))
    if not classes:
        rest = f", only {loose} images without a class" if loose else ""
        raise ValueError(f"source: {where} must hold one folder per class, got no folders{rest}")
    if all(name.lower() in SPLIT_NAMES for name in classes):
        raise ValueError(
            f"source: {where} holds {', '.join(classes)}, which are splits and not classes; "
            f"give one of them, e.g. {printable(str(root / classes[0]))}"
        )
    return check_class_names(classes)


def _walk(
    root: Path, class_name: str, inside: str | None, skipped: list[tuple[str, str]]
) -> Iterator[str]:
    """Relative names below one class folder in natural order; every real folder is read once."""
    seen: set[tuple[int, int]] = set()
    pending = [class_name]
    while pending:
        folder = pending.pop()
        status = os.stat(root / folder)
        if (status.st_dev, status.st_ino) in seen:  # a link to a folder above
            continue
        seen.add((status.st_dev, status.st_ino))
        deeper: list[str] = []
        with os.scandir(root / folder) as entries:
            for entry in sorted(entries, key=lambda entry: natural_key(entry.name)):
                if is_ignored(entry.name):
                    continue
                name = f"{folder}/{entry.name}"
                is_image = os.path.splitext(entry.name)[1].lower() in EXTENSIONS
                if entry.is_symlink() and inside is not None and not is_below(entry.path, inside):
                    if is_image or entry.is_dir():
                        skipped.append((name, "links out of the folder; follow_links allows it"))
                elif is_image:  # pipes and folders of such a name fail when they are read
                    yield name
                elif entry.is_dir():
                    deeper.append(name)
        pending += reversed(deeper)


def is_ignored(name: str) -> bool:
    """Whether it is the name of a hidden file or of what file managers leave behind."""
    return name.startswith(".") or name.lower() in IGNORED


def natural_key(name: str) -> tuple[list[tuple[int, int, str]], str]:
    """Numbers by value and letters without case, so class_2 < class_10; ties by the name itself."""
    parts = re.findall(r"[0-9]+|[^0-9]+", name.casefold())
    key = [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in parts]
    return key, name
