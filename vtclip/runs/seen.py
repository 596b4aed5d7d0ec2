# SPDX-License-Identifier: Apache-2.0
"""The images that a run saw, by content: `images.csv` in its folder, which result.json names.

One row per image of the run's sources: its name, its class, its role and what identifies it,
the digest of its file (of a table of features that of its row) and, where it is known, the digest
of its pixels, which a copy in another format without loss shares, and its perceptual hash, which
is near that of a copy with loss. Names are written as `vtclip.files.escape` says.

    train    the adapter was fitted on it
    val      it chose something: a hyper-parameter, a step of training, the temperature; of a run
             that was fitted once more on these images ("refit" of result.json) they are "train"
    test     the run's numbers count it
    unused   none of these: it lay in the pool from which the others were drawn
"""

from __future__ import annotations

import csv
import hashlib
import io
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from vtclip.data.records import Records
from vtclip.data.splits import Split
from vtclip.files import Json, NewFiles, csv_lines, unescape

FILE = "images.csv"
COLUMNS = ("file", "label", "role", "digest", "pixels", "perceptual")
UNESCAPED = ("name", *COLUMNS[1:])  # of an older list, whose names are as they are
ROLES = ("train", "val", "test", "unused")  # the first that a content has is what it counts as
NEW = "new"
WHAT = "the list of a vtclip run's images"


@dataclass(frozen=True)
class Seen:
    """Images in columns of equal length; the last three have "" where they are unknown."""

    names: list[str] = field(default_factory=list)
    labels: list[str] = field(default_factory=list)
    roles: list[str] = field(default_factory=list)
    digests: list[str] = field(default_factory=list)
    pixels: list[str] = field(default_factory=list)
    perceptual: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, records: Records, split: Split, *, learns: bool = True) -> Seen:
        """The rows of `records` with the roles that `split` gives them.

        learns: whether the method is fitted to training images; if not, they are unused.
        """
        roles = ["unused"] * len(records)
        drawn = {"train" if learns else "unused": split.train, "val": split.val, "test": split.test}
        for role, rows in drawn.items():
            for row in rows.tolist():
                roles[row] = role
        names = [records.class_names[k] for k in records.label.tolist()]
        blank = [""] * len(records)
        of_pictures = (getattr(records, column, None) or blank for column in COLUMNS[-2:])
        pixels, perceptual = ([digest or "" for digest in column] for column in of_pictures)
        return cls(list(records.names), names, roles, records.digests or blank, pixels, perceptual)

    def __len__(self) -> int:
        return len(self.names)

    def __add__(self, other: Seen) -> Seen:
        return Seen(*(mine + theirs for mine, theirs in zip(self._columns(), other._columns(),
                                                            strict=True)))  # fmt: skip

    def _columns(self) -> tuple[list[str], ...]:
        return self.names, self.labels, self.roles, self.digests, self.pixels, self.perceptual

    @property
    def knows_contents(self) -> bool:
        return any(self.digests)

    def with_role(self, role: str) -> Seen:
        """The same images, all of one role."""
        return replace(self, roles=[role] * len(self))

    def counts(self) -> dict[str, int]:
        """Images of each role."""
        found = Counter(self.roles)
        return {role: found[role] for role in ROLES}

    def roles_of(
        self, digests: Sequence[str], pixels: Sequence[str | None] | None = None
    ) -> list[str]:
        """The role of each content, "new" where the run did not see it.

        A content of several roles counts as the first of ROLES: what trained, trained.
        """
        known = self.by_content()
        roles = [known.get(digest, NEW) for digest in digests]
        for row, digest in enumerate(pixels or ()):
            if digest and (role := known.get(digest)) is not None:
                roles[row] = role if roles[row] == NEW else min(role, roles[row], key=ROLES.index)
        return roles

    def by_content(self) -> dict[str, str]:
        """File and pixel digests to roles; they are of different lengths or of different bytes."""
        known: dict[str, str] = {}
        for digests in (self.digests, self.pixels):
            for digest, role in zip(digests, self.roles, strict=True):
                if digest:
                    known[digest] = min(role, known.get(digest, role), key=ROLES.index)
        return known

    def content_of(
        self, digests: Sequence[str], pixels: Sequence[str | None] | None = None
    ) -> list[str]:
        """One name per content: equal for images that are copies of each other without loss."""
        known: dict[str, str] = {}
        for digest, own in zip(self.digests, self.pixels, strict=True):
            known[digest] = own or digest
        given = pixels if pixels is not None else [None] * len(digests)
        pairs = zip(digests, given, strict=True)
        return [known.get(digest, own or digest) for digest, own in pairs]

    def tested(self) -> Counter[str]:
        """How often the run tested each content, see `content_of`."""
        contents = self.content_of(self.digests, self.pixels)
        pairs = zip(contents, self.roles, strict=True)
        return Counter(content for content, role in pairs if role == "test")

    def write(self, new: NewFiles) -> Json:
        """Writes `images.csv`; returns what result.json says of it: its name, digest and counts."""
        rows = zip(*self._columns(), strict=True)
        data = csv_lines([COLUMNS, *rows]).encode("utf-8")
        new.write(FILE, data)
        return {"file": FILE, "sha256": hashlib.sha256(data).hexdigest(), "images": self.counts()}

    @classmethod
    def read(cls, folder: Path, entry: Json) -> Seen:
        """The list in `folder` that a result names; a ValueError where it is another or gone."""
        path = folder / Path(str(entry["file"])).name
        if not path.is_file():
            raise ValueError(
                f"not {WHAT}: {path} does not exist, and only it says which images trained"
            )
        data = path.read_bytes()
        if hashlib.sha256(data).hexdigest() != entry["sha256"]:
            raise ValueError(f"not {WHAT}: {path} was changed after it was written")
        text = data.decode("utf-8", "surrogatepass")
        rows = list(csv.reader(io.StringIO(text, newline="")))
        if rows and tuple(rows[0]) == UNESCAPED[:-1]:  # before perceptual hashes were kept
            rows = [list(UNESCAPED), *([*row, ""] for row in rows[1:])]
        if not rows or tuple(rows[0]) not in (COLUMNS, UNESCAPED):
            raise ValueError(f"not {WHAT}: {path} must have the columns {', '.join(COLUMNS)}")
        for number, row in enumerate(rows[1:], 2):
            if len(row) != len(COLUMNS):
                raise ValueError(
                    f"not {WHAT}: row {number} of {path} has {len(row)} cells, not {len(COLUMNS)}"
                )
        columns = zip(*rows[1:], strict=True) if len(rows) > 1 else ([] for _ in COLUMNS)
        names, labels, *others = map(list, columns)
        if tuple(rows[0]) == COLUMNS:
            names, labels = list(map(unescape, names)), list(map(unescape, labels))
        return cls(names, labels, *others)
