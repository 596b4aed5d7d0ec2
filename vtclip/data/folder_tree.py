# SPDX-License-Identifier: Apache-2.0
"""The folders below one root, each listed once: images, what is passed over and why, and links.

Links to files are followed wherever they lead, as folders of links are a common layout. That is
safe, because only regular files are read, by image decoders alone: a link to something else becomes
a line with its name and never part of a result. Links to folders that lead out of the root are
entered with follow_links alone, since they may lead to any amount of files. A folder that was read
before, by device and inode, is not read again, so that cycles end and no image counts twice.

Names are relative to the root, with /; "" is the root itself.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from vtclip.data.formats import (
    NO_IMAGES,
    extension_of,
    formats,
    is_image_name,
    signature,
    unread_hint,
)
from vtclip.files import is_below, printable, several

IGNORED = frozenset(("thumbs.db", "desktop.ini", "__macosx", "icon\r"))
OUTSIDE = "a folder outside of the source; --follow-links enters it"
BROKEN = "a link to nothing"
HIDDEN, REPEATED, SPECIAL = "hidden", "links to folders that are read already", "no regular files"
NO_EXTENSION = "no extension"


class Listing(NamedTuple):
    """What lies directly in a folder, in natural order, by its names from the root."""

    folders: list[str]
    images: list[str]


class FolderTree:
    """See the module. `skipped`: (name, reason) of images and linked folders that are not read.

    passed: how many other files were passed over, by extension or kind.
    unread: per extension of images that cannot be read, and what to do, the folder of each.
    """

    def __init__(self, root: Path, *, follow_links: bool) -> None:
        self.root, self._follow = root, follow_links
        self._inside = os.path.realpath(root)
        self._listed: dict[str, Listing] = {}
        self._identities: dict[str, tuple[int, int] | str] = {}
        self._opened: set[tuple[int, int] | str] = set()
        self._read: dict[tuple[int, int] | str, str] = {}
        self.skipped: list[tuple[str, str]] = []
        self.passed: Counter[str] = Counter()
        self.unread: dict[tuple[str, str], list[str]] = {}

    def listing(self, folder: str) -> Listing:
        if folder not in self._listed:
            self._listed[folder] = Listing([], [])
            identity = self._identity(folder)
            counts = self.skipped, self.passed, self.unread
            if identity in self._opened:  # by another name: what is in it counts once
                self.skipped, self.passed, self.unread = [], Counter(), {}
            self._opened.add(identity)
            with os.scandir(self.root / folder) as entries:
                for entry in sorted(entries, key=lambda entry: natural_key(entry.name)):
                    self._add(self._listed[folder], folder, entry)
            self.skipped, self.passed, self.unread = counts
        return self._listed[folder]

    def folders(self, folder: str) -> list[str]:
        """The last parts of the names of the folders in `folder`."""
        return [last_part(name) for name in self.listing(folder).folders]

    def images(self, folder: str) -> list[str]:
        return self.listing(folder).images

    def holds_images(self, folder: str) -> bool:
        """Whether there is an image in `folder` or below it."""
        seen = set()
        pending = [folder]
        while pending:
            name = pending.pop()
            identity = self._identity(name)
            if identity in seen:
                continue
            seen.add(identity)
            if self.images(name):
                return True
            pending += self.listing(name).folders
        return False

    def claim(self, folder: str) -> str | None:
        """Mark a folder as read; returns the name under which it was marked before, if it was."""
        identity = self._identity(folder)
        if identity in self._read:
            return self._read[identity]
        self._read[identity] = folder
        return None

    def other_files(self, folders: Iterable[str]) -> str:
        """ "2 .mp4 files, 1 hidden file": what lies in and below `folders` and is no image.

        "" where there is nothing. Counted anew: `passed` has more folders in it.
        """
        tree = FolderTree(self.root, follow_links=self._follow)
        for folder in folders:
            if tree.claim(folder) is None:
                tree.below(folder)
        kinds = sorted(tree.passed.items(), key=lambda item: (-item[1], item[0]))
        return ", ".join(_kind_words(kind, count) for kind, count in kinds if kind != REPEATED)

    def below(self, folder: str) -> list[str]:
        """The images in and below a claimed folder: its own come before those of its folders."""
        names: list[str] = []
        pending = [folder]
        while pending:
            name = pending.pop()
            if name != folder and self.claim(name) is not None:
                self.passed[REPEATED] += 1
                continue
            names += self.images(name)
            pending += reversed(self.listing(name).folders)
        return names

    def linked_out(self, folder: str) -> list[str]:
        """Links to folders outside of the root that lie directly in `folder`."""
        return [name for name, why in self.skipped if why == OUTSIDE and parent_of(name) == folder]

    def _identity(self, folder: str) -> tuple[int, int] | str:
        if folder not in self._identities:
            path = self.root / folder
            status = os.stat(path)
            known = status.st_ino != 0  # file systems without inodes say 0
            inode = status.st_dev, status.st_ino
            self._identities[folder] = inode if known else os.path.realpath(path)
        return self._identities[folder]

    def _add(self, listing: Listing, folder: str, entry: os.DirEntry[str]) -> None:
        name = f"{folder}/{entry.name}" if folder else entry.name
        if is_ignored(entry.name):
            self.passed[HIDDEN] += 1
        elif _is_folder(entry):
            away = entry.is_symlink() and not self._follow
            if away and not is_below(entry.path, self._inside):
                self.skipped.append((name, OUTSIDE))
            else:
                listing.folders.append(name)
        elif entry.is_symlink() and not os.path.exists(entry.path):
            self.skipped.append((name, BROKEN))
        elif is_image_name(entry.name) or self._begins_like_image(entry, name):
            listing.images.append(name)  # reading says what is wrong with a pipe of such a name
        elif (hint := unread_hint(extension_of(entry.name))) is not None:
            self._unread(name, extension_of(entry.name), hint)

    def _begins_like_image(self, entry: os.DirEntry[str], name: str) -> bool:
        """Whether a file with no extension of images is one; other files are counted."""
        extension = extension_of(entry.name)
        if unread_hint(extension) is not None:
            return False
        if not entry.is_file():
            self.passed[SPECIAL] += 1
            return False
        kind = None
        if extension not in NO_IMAGES:
            try:
                with open(entry.path, "rb") as file:
                    kind = signature(file.read(16))
            except OSError as error:
                self.skipped.append((name, error.strerror or type(error).__name__))
                return False
        if kind in formats().by_content:
            return True
        hint = None if kind is None else unread_hint("." + kind.lower())
        if hint is None:
            self.passed[extension or NO_EXTENSION] += 1
        else:
            self._unread(name, extension, hint)
        return False

    def _unread(self, name: str, extension: str, hint: str) -> None:
        self.skipped.append((name, f"{extension or 'no extension'} is not read: {hint}"))
        self.unread.setdefault((extension, hint), []).append(parent_of(name))


def _kind_words(kind: str, count: int) -> str:
    """So many files of a kind in `FolderTree.passed`."""
    if kind == NO_EXTENSION:
        return f"{several(count, 'file')} without an extension"
    if kind == SPECIAL:
        return several(count, "special file")
    return several(count, f"{printable(kind)} file")


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def in_remarks(reason: str) -> bool:
    """Whether files that are skipped for this reason are counted in a line of their own."""
    return " is not read: " in reason or reason == OUTSIDE


def last_part(name: str) -> str:
    return name.rsplit("/", 1)[-1]


def parent_of(name: str) -> str:
    return name.rpartition("/")[0]


def is_ignored(name: str) -> bool:
    """Whether it is the name of a hidden file or of what file managers leave behind."""
    return name.startswith(".") or name.lower() in IGNORED


def natural_key(name: str) -> tuple[list[tuple[int, int, str]], str]:
    """Numbers by value and letters without case, so class_2 < class_10; ties by the name itself."""
    parts = re.findall(r"[0-9]+|[^0-9]+", name.casefold())
    key = [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in parts]
    return key, name


def named(names: list[str], limit: int = 8) -> str:
    """The first of `names` on one line."""
    return ", ".join(map(printable, names[:limit])) + (", ..." if len(names) > limit else "")
