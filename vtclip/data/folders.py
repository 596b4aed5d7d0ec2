# SPDX-License-Identifier: Apache-2.0
"""Folders of class folders to a table of image files, of which only names are looked at.

Folder rules: `root/class_name/**/image.ext`. Classes are the folders directly below `root`, in
natural order (class_2 before class_10, case ignored); deeper folders belong to their class. Split
folders (train/, val/, test/ and their cousins) above or below the class folders give the images
roles: see vtclip.data.layouts. Images have an extension of vtclip.data.formats, or none that is
known and the first bytes of an image. Links: see vtclip.data.folder_tree.

No file is lost without a word: what lies in the folder is either listed, or in `skipped` with its
reason, or counted in `passed` by kind (hidden files, other extensions, images of no class). Hidden
are names that start with a dot, Thumbs.db, desktop.ini and __MACOSX; such folders count as one.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from vtclip.data.folder_tree import (
    OUTSIDE,
    FolderTree,
    is_ignored,
    named,
    natural_key,
    parent_of,
)
from vtclip.data.image_files import ImageFiles
from vtclip.data.layouts import TRAIN, Layout, class_layout, count_lines, find_layout
from vtclip.data.records import check_class_names
from vtclip.files import printable, several

__all__ = ["is_ignored", "natural_key", "other_files", "scan_class", "scan_folder", "walk_images"]
NO_CLASS, UNUSED = "images in no class folder", "images of folders without labels"


def scan_folder(
    root: str | Path, *, follow_links: bool = False, empty_classes: bool = False
) -> ImageFiles:
    """The image files below `root` in their fixed order: class by class, roles within a class.

    The names of a layout with split folders keep them ("train/apple/im0.png"), class names are the
    union of all splits, and `roles` says which images train (0), validate (1) and test (2). Where
    all of them train, because there is but one split folder, roles are None: nothing is fixed then.
    `remarks` holds the lines that whoever uses the files must say.

    follow_links: enter linked folders that lead out of `root`; a class folder of that kind is else
        a ValueError, a deeper one is skipped.
    empty_classes: keep classes without images, or without training images beside a train/, with a
        remark each, instead of a ValueError. For sources that are only evaluated.
    """
    root = Path(root).expanduser()
    where = printable(str(root))
    if not root.is_dir():
        raise ValueError(f"source: must be a folder, got {where}")
    tree = FolderTree(root, follow_links=follow_links)
    return _files_of(tree, find_layout(tree, where), where, empty_classes)


def scan_class(root: str | Path, class_name: str, *, follow_links: bool = False) -> ImageFiles:
    """All image files in and below `root` as those of one class, with the split that it holds."""
    root = Path(root).expanduser()
    where = printable(str(root))
    tree = FolderTree(root, follow_links=follow_links)
    return _files_of(tree, class_layout(tree, where, class_name), where, False)


def _files_of(tree: FolderTree, layout: Layout, where: str, empty_classes: bool) -> ImageFiles:
    """The image files of a layout; see `scan_folder`."""
    _check_places(tree, layout, where)
    _claim(tree, layout, where)
    images = [tree.below(place.folder) for place in layout.places]
    remarks = [*layout.remarks, *_aside(tree, layout, where)]
    class_names, lines = _classes(tree, layout, images, where, empty_classes)
    counts = Counter[str]()
    for place, files in zip(layout.places, images, strict=True):
        counts[place.part] += len(files)
    remarks += count_lines(layout, where, counts) + lines + tree_lines(tree, where)
    rows = [
        (k, place.role, name)
        for k, class_name in enumerate(class_names)
        for place, files in zip(layout.places, images, strict=True)
        if place.class_name == class_name
        for name in files
    ]
    roles = [role for _, role, _ in rows]
    return ImageFiles(
        tree.root,
        class_names,
        [name for _, _, name in rows],
        [k for k, _, _ in rows],
        tree.skipped,
        roles=roles if any(role != TRAIN for role in roles) else None,
        passed=dict(+tree.passed),
        remarks=remarks,
    )


def walk_images(
    root: str | Path, *, follow_links: bool = False
) -> tuple[list[Path], list[tuple[str, str]]]:
    """Image files below `root`, by the rules for one class, and (path, reason) of skipped ones.

    Natural order, where the files of a folder come before those of its subfolders.
    """
    root = Path(root)
    tree = FolderTree(root, follow_links=follow_links)
    tree.claim("")
    paths = [root / name for name in tree.below("")]
    return paths, [(str(root / name), reason) for name, reason in tree.skipped]


def other_files(root: str | Path, *, follow_links: bool = False) -> str:
    """What lies in and below `root` and is no image, as ": 2 .mp4 files"; "" for nothing."""
    others = FolderTree(Path(root), follow_links=follow_links).other_files([""])
    return f": {others}" if others else ""


def tree_lines(tree: FolderTree, where: str) -> list[str]:
    """A line for each kind of image that is not read, and one for linked folders."""
    lines = []
    for (extension, hint), folders in tree.unread.items():
        count = len(folders)
        kind = f"{extension} file" if extension else "file without an extension"
        many = f"{extension} files" if extension else "files without an extension"
        lines.append(
            f"{several(count, kind, many)} in {several(len(set(folders)), 'folder')} of {where} "
            f"{_are(count)} not read: {hint}"
        )
    away = sum(why == OUTSIDE for _, why in tree.skipped)
    if away:
        lines.append(
            f"{several(away, 'linked folder leads', 'linked folders lead')} out of {where} and "
            f"{_are(away)} not entered; --follow-links enters them"
        )
    return lines


def _check_places(tree: FolderTree, layout: Layout, where: str) -> None:
    # a folder that is one class itself has no folders of classes: links in it are skipped
    whole = any(place.folder == "" for place in layout.places)
    tops = set() if whole else {parent_of(place.folder) for place in layout.places} or {""}
    away = [name for top in sorted(tops) for name in tree.linked_out(top)]
    if away:
        raise ValueError(
            f"source: {several(len(away), 'class folder links', 'class folders link')} out of "
            f"{where}: {named(away)}; --follow-links allows it"
        )
    if not layout.places:
        loose = len(tree.images(""))
        rest = f", only {loose} images without a class" if loose else ""
        rest += "".join(f"; {line}" for line in tree_lines(tree, where))
        others = tree.other_files([""])
        rest += f"; it holds {others}" if others else ""
        raise ValueError(f"source: {where} must hold one folder per class, got no folders{rest}")


def _claim(tree: FolderTree, layout: Layout, where: str) -> None:
    """Mark the class folders and those above as read: no link below them leads to them again."""
    for folder in sorted({above for place in layout.places for above in _above(place.folder)}):
        tree.claim(folder)
    for place in layout.places:
        other = tree.claim(place.folder)
        if other is not None:
            first = printable(other) if other else "the source itself"
            raise ValueError(
                f"source: {where}: {first} and {printable(place.folder)} are the same folder, by a "
                "link"
            )


def _above(folder: str) -> list[str]:
    parents = []
    while folder:
        folder = parent_of(folder)
        parents.append(folder)
    return parents


def _aside(tree: FolderTree, layout: Layout, where: str) -> list[str]:
    """Counts images that belong to no class; a line for each place where there are some."""
    lines = []
    for folder in layout.aside:
        tree.claim(folder)
        count = len(tree.below(folder))
        tree.passed[UNUSED] += count
        if count:
            lines.append(
                f"{where}: {several(count, 'image')} below {printable(folder)}/ {_have(count)} no "
                f"label and {_are(count)} not used"
            )
    loose: Counter[str] = Counter()
    used = {place.folder for place in layout.places}
    above = {folder for place in layout.places for folder in _above(place.folder)}
    for folder in above:
        loose[folder] += len(tree.images(folder))
        for name in tree.listing(folder).folders:
            # nothing but folders without images: find_layout refuses or uses all others
            if name not in used | above and tree.claim(name) is None:
                loose[folder] += len(tree.below(name))
    tree.passed[NO_CLASS] += sum(loose.values())
    for folder, count in sorted(loose.items()):
        if count:
            place = printable(str(tree.root / folder))
            lines.append(
                f"{several(count, 'image lies', 'images lie')} directly in {place}, in no class, "
                f"and {_are(count)} ignored"
            )
    return lines


def _have(count: int) -> str:
    return "has" if count == 1 else "have"


def _are(count: int) -> str:
    return "is" if count == 1 else "are"


def _classes(
    tree: FolderTree, layout: Layout, images: list[list[str]], where: str, empty_classes: bool
) -> tuple[list[str], list[str]]:
    """The class names of a layout in natural order, and lines about those without some images."""
    roles: dict[str, set[int]] = {place.class_name: set() for place in layout.places}
    for place, files in zip(layout.places, images, strict=True):
        if files:
            roles[place.class_name].add(place.role)
    names = sorted(roles, key=natural_key)
    empty = [name for name in names if not roles[name]]
    lines = []
    if empty:
        shown = named([_with_reason(tree, layout, name) for name in empty])
        text = f"{several(len(empty), 'class folder holds', 'class folders hold')} no images: "
        places = [place.folder for place in layout.places if place.class_name in empty]
        others = tree.other_files(places)
        shown += f"; {'it holds' if len(empty) == 1 else 'they hold'} {others}" if others else ""
        if not empty_classes or len(empty) == len(names):
            raise ValueError(f"source: {where}: {text}{shown}")
        lines.append(f"{where}: {text}{shown}")
    if TRAIN in layout.parts.values():
        extra = [name for name in names if roles[name] and TRAIN not in roles[name]]
        if extra:
            text = f"{several(len(extra), 'class has', 'classes have')} no training image: "
            if not empty_classes:
                raise ValueError(f"source: {where}: {text}{named(extra)}")
            lines.append(f"{where}: {text}{named(extra)}")
        for role, kind in ((1, "validation"), (2, "test")):
            missing = [name for name in names if roles[name] and role not in roles[name]]
            if missing and role in layout.parts.values():
                text = f"{several(len(missing), 'class has', 'classes have')} no {kind} image: "
                lines.append(f"{where}: {text}{named(missing)}")
    return check_class_names(names), lines


def _with_reason(tree: FolderTree, layout: Layout, class_name: str) -> str:
    """A class without images, with the reason for which most of its files are skipped."""
    folders = [f"{place.folder}/" for place in layout.places if place.class_name == class_name]
    reasons = Counter(
        why for name, why in tree.skipped if any(name.startswith(folder) for folder in folders)
    )
    if not reasons:
        return class_name
    why, count = reasons.most_common(1)[0]
    return f"{class_name} ({several(count, 'file is', 'files are')} skipped: {why})"
