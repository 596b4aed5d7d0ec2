# SPDX-License-Identifier: Apache-2.0
"""What a data set lists: image names with labels for train, val and test, and its classes."""

from __future__ import annotations

import hashlib
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath, PureWindowsPath

from vtclip.data.records import check_class_names
from vtclip.files import printable

ROLES = ("train", "val", "test")


class SetError(ValueError):
    """A data set that cannot be used as it is on disk; the message names the file and the fact."""


@dataclass(frozen=True)
class Spec:
    """One data set of the protocol: where it is under the root and what it should hold.

    counts: images of train, val and test; None: no such list. `list_sha256` and `list_digest` are
    those of the official list, if known. `home` says where people get images, `lists` where they
    get the files that split them. `folder_of` returns a path's class folder, `name_of` the class
    name that the protocol derives from it; None: the path does not say.
    """

    name: str
    title: str
    folder: str
    images: str
    template: str
    classes: int
    counts: tuple[int | None, int | None, int]
    files: tuple[str, ...]
    read: Callable[[Spec, Path], Listing]
    home: str
    lists: str
    aliases: tuple[str, ...] = ()
    list_sha256: str | None = None
    list_digest: str | None = None
    folder_of: Callable[[str], str | None] | None = None
    name_of: Callable[[str], str | None] | None = None

    @property
    def test_only(self) -> bool:
        return self.counts[0] is None

    def place(self, root: Path) -> Path:
        """The set's folder under the data root."""
        return root / self.folder

    def image_root(self, root: Path) -> Path:
        return self.place(root) / self.images if self.images else self.place(root)

    def error(self, message: str) -> SetError:
        return SetError(f"data: {self.name}: {message}")

    def decoded(self, file: str, data: bytes) -> str:
        """The text in `data` of the list file `file`."""
        try:
            return data.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            fact = f"{error.reason} at byte {error.start}"
            raise self.error(f"{file} is not UTF-8 ({fact})") from None


@dataclass
class ImageList:
    """One list of a data set in its order: names relative to the image folder, and labels."""

    names: list[str] = field(default_factory=list)
    label: list[int] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.names)


@dataclass(frozen=True)
class Listing:
    """The lists of one data set. `prompts` are the words that templates are filled with.

    `val` is None if the set has no such list. `list_sha256` is that of the file that splits it.
    """

    spec: Spec
    image_root: Path
    class_names: list[str]
    prompts: list[str]
    train: ImageList
    val: ImageList | None
    test: ImageList
    list_sha256: str | None = None

    def image_lists(self) -> Iterator[tuple[str, ImageList]]:
        """(role, list) of the lists that the set has."""
        for role, images in zip(ROLES, (self.train, self.val, self.test), strict=True):
            if images is not None:
                yield role, images

    def rows(self) -> Iterator[tuple[str, str, int]]:
        """(role, name, label) of every image, in the order of the lists."""
        for role, images in self.image_lists():
            for name, k in zip(images.names, images.label, strict=True):
                yield role, name, k

    def digest(self) -> str:
        """sha256 over role, name, label and class of every image, in their order.

        Equal digests mean equal draws, however the files are written.
        """
        total = hashlib.sha256()
        for role, name, k in self.rows():
            line = f"{role}\0{name}\0{k}\0{self.prompts[k]}\n"
            total.update(line.encode("utf-8", "surrogatepass"))
        return total.hexdigest()

    def official(self) -> bool | None:
        """Whether these are the official lists; None if the digest of those is not known."""
        return None if self.spec.list_digest is None else self.digest() == self.spec.list_digest

    def check(self) -> Listing:
        """The same listing, or a SetError for names, labels, repeats, folders with two classes."""
        spec = self.spec
        if not len(self.test):
            raise spec.error("the test list is empty")
        try:
            check_class_names(self.class_names)
        except ValueError as error:
            raise spec.error(str(error)) from None
        role_of: dict[str, str] = {}
        for role, name, _ in self.rows():
            check_path(spec, name)
            if name in role_of:
                raise spec.error(
                    f"{printable(name)} is listed in {role_of[name]} and again in {role}"
                )
            role_of[name] = role
        for role, images in self.image_lists():
            empty = sorted(set(range(len(self.class_names))) - set(images.label))
            if empty and len(images) and role != "val":
                shown = ", ".join(printable(self.class_names[k]) for k in empty[:3])
                raise spec.error(f"the {role} list has no image of {len(empty)} classes: {shown}")
        if spec.folder_of is not None:
            self._check_folders(spec.folder_of)
        return self

    def _check_folders(self, folder_of: Callable[[str], str | None]) -> None:
        """Every class folder must hold one class: a label that disagrees is named."""
        votes: dict[str, Counter[int]] = {}
        for _, name, k in self.rows():
            folder = folder_of(name)
            if folder is not None:
                votes.setdefault(folder, Counter())[k] += 1
        usual = {folder: count.most_common(1)[0][0] for folder, count in votes.items()}
        odd = [(name, k) for _, name, k in self.rows() if usual.get(folder_of(name) or "", k) != k]
        if odd:
            name, k = odd[0]
            other = usual[folder_of(name) or ""]
            raise self.spec.error(
                f"{printable(name)} is labelled {printable(self.class_names[k])!r}, the others of "
                f"its folder {printable(self.class_names[other])!r} ({len(odd)} such images)"
            )

    def other_names(self) -> list[tuple[str, str]]:
        """(class name here, name in the protocol) of the classes whose names differ."""
        if self.spec.name_of is None:
            return []
        other: dict[str, str] = {}
        for _, name, k in self.rows():
            protocol_name = self.spec.name_of(name)
            if protocol_name is not None and protocol_name != self.prompts[k]:
                other.setdefault(self.prompts[k], protocol_name)
        return list(other.items())


def check_path(spec: Spec, name: str) -> None:
    """Raises unless `name` is a path that stays inside the image folder."""
    path = PurePosixPath(name)
    outside = path.is_absolute() or PureWindowsPath(name).drive or ".." in path.parts
    if outside or "\0" in name or path.name in ("", "."):
        raise spec.error(f"a listed image must be a path inside the image folder, got {name!a}")


def distinct_names(names: Sequence[str], marks: Sequence[str]) -> list[str]:
    """`names`, those that occur twice followed by their mark: "missile (n04008634)"."""
    keys = [
        " ".join(unicodedata.normalize("NFKC", name).casefold().replace("_", " ").split())
        for name in names
    ]
    count = Counter(keys)
    return [
        f"{name} ({mark})" if count[key] > 1 else name
        for name, key, mark in zip(names, keys, marks, strict=True)
    ]
