# SPDX-License-Identifier: Apache-2.0
"""Content digests of a folder's files, unreadable and repeated ones, and work ahead in threads."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from vtclip.data.decode import ImageError, content_digest, decoding_trait
from vtclip.data.image_files import ImageFiles
from vtclip.data.threads import ahead, decode_pool, progress_bar
from vtclip.distributed import World
from vtclip.files import printable


@dataclass
class ExtractionReport:
    """What was read, skipped and written for the features of a folder; `lines()` is for people.

    `skipped`: files of the present scan, whenever the features were made. `notes`: how many images
    have each of `decode_noted`'s notes. `stages`: seconds of hashing, of encoding, and of waiting
    for decoded images and for the disk.
    """

    rows: int = 0
    skipped: list[tuple[str, str]] = field(default_factory=list)
    duplicates: list[tuple[str, str]] = field(default_factory=list)
    num_bytes: int = 0
    seconds: float = 0.0
    reused: bool = False
    notes: dict[str, int] = field(default_factory=dict)
    stages: dict[str, float] = field(default_factory=dict)

    def lines(self, limit: int = 20) -> list[str]:
        total = self.rows + len(self.skipped)
        out = [f"{self.rows} of {total} images read"]
        rows = alike(self.skipped)
        for title, pairs in (("unreadable", rows), ("same content", self.duplicates)):
            out += [f"{title}: {printable(a)}: {printable(b)}" for a, b in pairs[:limit]]
            if len(pairs) > limit:
                out.append(f"{title}: {len(pairs) - limit} more")
        return out


def alike(skipped: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    """(file, reason) per reason, of several files as "3 files, e.g. a.jpg"."""
    names: dict[str, list[str]] = {}
    for name, reason in skipped:
        names.setdefault(reason, []).append(name)
    return [
        (those[0] if len(those) == 1 else f"{len(those)} files, e.g. {those[0]}", reason)
        for reason, those in names.items()
    ]


@dataclass(frozen=True)
class Hashed:
    """A folder's files after hashing: those that could be read, with size and content digest.

    traits: what else decides the pixels of some of them (`vtclip.data.decode.decoding_trait`).
    """

    folder: ImageFiles
    names: list[str]
    label: list[int]
    sizes: list[int]
    digests: list[str]
    skipped: list[tuple[str, str]]
    labels: list[list[int]] | None = None
    traits: list[str] = field(default_factory=list)

    def digest(self) -> str:
        total = hashlib.sha256()
        more = [] if self.labels is None else [self.labels]
        for row in zip(self.names, self.label, self.sizes, self.digests, *more, strict=True):
            line = repr(row).encode("utf-8", "backslashreplace")
            total.update(len(line).to_bytes(8, "little") + line)
        return total.hexdigest()


def hash_all(folder: ImageFiles, progress: bool, world: World | None = None) -> Hashed:
    """Size and digest of every file; of several processes each reads its share of them."""
    world = world or World()
    rows = range(world.rank, len(folder.names), world.size)
    names = [folder.names[row] for row in rows]

    def attempt(name: str) -> tuple[int, str, str | None] | ImageError:
        try:
            data = folder.read(name)
        except ImageError as error:
            return error
        return len(data), content_digest(data), decoding_trait(data)

    out = Hashed(folder, [], [], [], [], list(folder.skipped))
    if folder.labels is not None:
        out = replace(out, labels=[])
    results = []
    with decode_pool() as pool, progress_bar(len(names), "hashing", progress) as bar:
        for item in ahead(pool, attempt, names, 256):
            bar.update()
            results.append(item)
    shares = world.collect(results)
    traits = set()
    for row, (name, k) in enumerate(zip(folder.names, folder.label, strict=True)):
        item = shares[row % world.size][row // world.size]
        if isinstance(item, ImageError):
            out.skipped.append((name, item.reason))
            continue
        out.names.append(name)
        out.label.append(k)
        if out.labels is not None and folder.labels is not None:
            out.labels.append(folder.labels[row])
        out.sizes.append(item[0])
        out.digests.append(item[1])
        traits.add(item[2])
    out.traits.extend(sorted(trait for trait in traits if trait is not None))
    return out


def skipped_now(
    hashed: Hashed, names: Sequence[str], skipped: Sequence[tuple[str, str]]
) -> list[tuple[str, str]]:
    """(name, reason) of the files of this scan that features with these `names` have no row of.

    skipped: what was skipped when the features were made, files that are gone now among them.
    """
    undecoded = set(hashed.names).difference(names)
    return [*hashed.skipped, *(pair for pair in skipped if pair[0] in undecoded)]


def duplicates_of(hashed: Hashed, names: Sequence[str]) -> list[tuple[str, str]]:
    """(first file, later file) for every file of `names` whose content an earlier one has."""
    first: dict[str, str] = {}
    decoded = set(names)
    return [(first[digest], name) for digest, name in zip(hashed.digests, hashed.names, strict=True)
            if name in decoded and first.setdefault(digest, name) != name]  # fmt: skip


def in_other_classes(hashed: Hashed, pairs: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    """Those of `pairs` of copies whose two files have different labels, each with its label."""
    shown = (
        [hashed.folder.class_names[k] for k in hashed.label]
        if hashed.labels is None
        else [", ".join(hashed.folder.class_names[k] for k in row) for row in hashed.labels]
    )
    of = dict(zip(hashed.names, shown, strict=True))
    return [(f"{a} ({of[a]})", f"{b} ({of[b]})") for a, b in pairs if of[a] != of[b]]
