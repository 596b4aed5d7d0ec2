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

__all__ = ["ROLES", "Listing", "Part", "SetError", "Spec", "distinct_names"]

ROLES = ("train", "val", "test")


class SetError(ValueError):
    """A data set that cannot be used as it lies there; the message names the file and the fact."""


@dataclass(frozen=True)
class Spec:
    """One data set of the protocol: where it lies under the root and what it should hold.

    counts: images of train, val and test; None: no such list. `list_sha256` and `list_digest` are
    those of the official list, where known. `home` says where people get images, `lists` where they
    get the files that split them. `folder_of` gives a path's class folder, `name_of` the class name
    that the protocol makes of it; None: the path does not tell.
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


@dataclass
class Part:
    """One list in its own order: names relative to the image folder, with labels."""

    names: list[str] = field(default_factory=list)
    label: list[int] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.names)


@dataclass(frozen=True)
class Listing:
    """The lists of one data set. `prompts` are the words that templates are filled with.

    `val` is None where the set has no such list. `list_sha256` is that of the file that splits it.
    """

    spec: Spec
    image_root: Path
    class_names: list[str]
    prompts: list[str]
    train: Part
    val: Part | None
    test: Part
    list_sha256: str | None = None

    def parts(self) -> Iterator[tuple[str, Part]]:
        for role, part in zip(ROLES, (self.train, self.val, self.test), strict=True):
            if part is not None:
                yield role, part

    def digest(self) -> str:
        """sha256 over role, name, label and class of every image, in their order.

        Equal digests mean equal draws, however the files are written.
        """
        total = hashlib.sha256()
        for role, part in self.parts():
            for name, k in zip(part.names, part.label, strict=True):
                line = f"{role}\0{name}\0{k}\0{self.prompts[k]}\n"
                total.update(line.encode("utf-8", "surrogatepass"))
        return total.hexdigest()

    def official(self) -> bool | None:
        """Whether these are the official lists; None where no digest of those is known here."""
        return None if self.spec.list_digest is None else self.digest() == self.spec.list_digest

    def check(self) -> Listing:
        """The same listing, or a SetError: names, labels, repeats, folders with two classes."""
        spec = self.spec
        if not len(self.test):
            raise spec.error("the test list is empty")
        try:
            check_class_names(self.class_names)
        except ValueError as error:
            raise spec.error(str(error)) from None
        where: dict[str, str] = {}
        for role, part in self.parts():
            for name in part.names:
                check_path(spec, name)
                if name in where:
                    raise spec.error(
                        f"{printable(name)} is listed in {where[name]} and again in {role}"
                    )
                where[name] = role
        for role, part in self.parts():
            empty = sorted(set(range(len(self.class_names))) - set(part.label))
            if empty and len(part) and role != "val":
                shown = ", ".join(printable(self.class_names[k]) for k in empty[:3])
                raise spec.error(f"the {role} list has no image of {len(empty)} classes: {shown}")
        if spec.folder_of is not None:
            self._check_folders(spec.folder_of)
        return self

    def _check_folders(self, folder_of: Callable[[str], str | None]) -> None:
        """Every class folder holds one class: a label that disagrees is named."""
        votes: dict[str, Counter[int]] = {}
        rows = [(name, k) for _, part in self.parts() for name, k in zip(part.names, part.label,
                                                                         strict=True)]  # fmt: skip
        for name, k in rows:
            folder = folder_of(name)
            if folder is not None:
                votes.setdefault(folder, Counter())[k] += 1
        usual = {folder: count.most_common(1)[0][0] for folder, count in votes.items()}
        odd = [(name, k) for name, k in rows if usual.get(folder_of(name) or "", k) != k]
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
        found: dict[str, str] = {}
        for _, part in self.parts():
            for name, k in zip(part.names, part.label, strict=True):
                wanted = self.spec.name_of(name)
                if wanted is not None and wanted != self.prompts[k]:
                    found.setdefault(self.prompts[k], wanted)
        return list(found.items())


def check_path(spec: Spec, name: str) -> None:
    """A path that stays inside the image folder."""
    path = PurePosixPath(name)
    outside = path.is_absolute() or PureWindowsPath(name).drive or ".." in path.parts
    if outside or "\0" in name or path.name in ("", "."):
        raise spec.error(f"a listed image must be a path inside the image folder, got {name!a}")


def distinct_names(names: Sequence[str], marks: Sequence[str]) -> list[str]:
    """`names`, where those that occur twice get their mark: "missile (n04008634)"."""
    keys = [
        " ".join(unicodedata.normalize("NFKC", name).casefold().replace("_", " ").split())
        for name in names
    ]
    count = Counter(keys)
    return [
        f"{name} ({mark})" if count[key] > 1 else name
        for name, key, mark in zip(names, keys, marks, strict=True)
    ]
