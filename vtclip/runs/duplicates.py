# SPDX-License-Identifier: Apache-2.0
"""Copies of one image in several roles: a test image that trained measures memory, not skill.

Three kinds, each counted once: the same file (of a table, the same row), the same pixels in another
file, and pictures that look nearly alike by a perceptual digest, where the source has one. The
first two are kept out of the test; the third is only said, because such a digest can be wrong.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from vtclip.data.records import Records
from vtclip.data.splits import Split
from vtclip.files import Json, printable
from vtclip.names import option

logger = logging.getLogger(__name__)

KINDS = {"file": "the same content", "pixels": "the same pixels", "near": "nearly the same picture"}
NEAR_BITS = 2  # of 64: what saving a photo once more as JPEG changes
MAX_PAIRS = 2**32  # beyond it only equal perceptual digests count as near
BLOCK = 2**20  # pairs that are compared at once


@dataclass(frozen=True)
class Copy:
    """A row with the picture of an earlier role's row; roles are "train", "val" and "test"."""

    kind: str
    role: str
    row: int
    of_role: str
    of_row: int


def check_duplicates(
    records: Records, split: Split, strict: bool, *, learns: bool = True
) -> tuple[Split, Json]:
    """The split without test rows whose content trained or validated, and how many those are.

    Copies across roles are said in one line. strict: they are a ValueError instead.
    learns: whether training rows are fitted on; of a method that learns nothing they are not.
    The test list of a data set is official and stays whole.
    """
    left_out = {"trained": 0, "validated": 0}
    copies = copies_across(records, split, learns=learns)
    if not copies:
        return split, left_out
    if strict:
        raise ValueError(f"{_described(records, copies)}; {option('strict')} refuses such a source")
    if "set" in records.info:
        return split, left_out  # said when its lists were read
    exact = [copy for copy in copies if copy.role == "test" and copy.kind != "near"]
    kept = ~torch.isin(split.test, torch.tensor([copy.row for copy in exact], dtype=torch.long))
    left_out["trained"] = sum(copy.of_role == "train" for copy in exact)
    left_out["validated"] = len(exact) - left_out["trained"]
    if len(exact) and not bool(kept.any()):
        raise ValueError(
            f"{_described(records, copies)}; no test image is left that was neither trained nor "
            "validated on"
        )
    them = "1 test image is" if len(exact) == 1 else f"{len(exact)} test images are"
    fate = f"; {them} left out for it" if exact else ""
    logger.warning("%s%s", _described(records, copies), fate)
    return dataclasses.replace(split, test=split.test[kept]), left_out


def copies_across(records: Records, split: Split, *, learns: bool = True) -> list[Copy]:
    """Rows whose picture an earlier role has, in the order train, val, test; each row once."""
    roles = {"train": split.train if learns else split.train[:0], "val": split.val,
             "test": split.test}  # fmt: skip
    rows = {role: index.tolist() for role, index in roles.items()}
    found: dict[int, Copy] = {}
    pixels: Sequence[str | None] | None = getattr(records, "pixels", None)
    for kind, digests in ("file", records.digests), ("pixels", pixels):
        if digests is None:
            continue
        first: dict[str, tuple[str, int]] = {}
        for role, index in rows.items():
            for row in index:
                digest = digests[row]
                if digest and (known := first.get(digest)) and known[0] != role:
                    found.setdefault(row, Copy(kind, role, row, *known))
            for row in index:
                if digests[row]:
                    first.setdefault(str(digests[row]), (role, row))
    near: Sequence[str | None] | None = getattr(records, "perceptual", None)
    if near is not None:
        for copy in _near(near, rows):
            found.setdefault(copy.row, copy)
    return sorted(found.values(), key=lambda copy: (list(KINDS).index(copy.kind), copy.row))


def _near(digests: Sequence[str | None], rows: dict[str, list[int]]) -> list[Copy]:
    """Pairs whose perceptual digests, 64 bits in hexadecimal, differ in at most NEAR_BITS."""
    known: list[tuple[str, int]] = []
    copies = []
    for role, index in rows.items():
        index = [row for row in index if digests[row]]
        if known and index:
            mine, theirs = ([str(digests[row]) for row in part]
                            for part in (index, [row for _, row in known]))  # fmt: skip
            for place, of in near_pairs(mine, theirs):
                copies.append(Copy("near", role, index[place], *known[of]))
        known += [(role, row) for row in index]
    return copies


def near_pairs(mine: Sequence[str], theirs: Sequence[str]) -> list[tuple[int, int]]:
    """For each of `mine` that has one, the first of `theirs` within NEAR_BITS; as positions."""
    return _close(_bits(mine), _bits(theirs))


def _bits(digests: Sequence[str]) -> NDArray[np.uint64]:
    return np.array([int(digest, 16) & (2**64 - 1) for digest in digests], dtype=np.uint64)


def _close(mine: NDArray[np.uint64], theirs: NDArray[np.uint64]) -> list[tuple[int, int]]:
    if len(mine) * len(theirs) > MAX_PAIRS:
        first = {int(value): place for place, value in reversed(list(enumerate(theirs)))}
        return [(n, first[int(value)]) for n, value in enumerate(mine) if int(value) in first]
    best = np.full(len(mine), len(theirs))
    for n, of in _alike_in_part(mine, theirs):
        octets = (mine[n] ^ theirs[of]).view(np.uint8).reshape(-1, 8)
        near = np.unpackbits(octets, axis=1).sum(axis=1) <= NEAR_BITS
        np.minimum.at(best, n[near], of[near])
    return [(int(n), int(best[n])) for n in np.flatnonzero(best < len(theirs))]


def _alike_in_part(
    mine: NDArray[np.uint64], theirs: NDArray[np.uint64]
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Places in `mine` and `theirs` of all pairs with an equal one of NEAR_BITS + 1 parts of bits.

    Digests that differ in at most NEAR_BITS have one. Pairs come in blocks, and more than once.
    """
    edges = np.linspace(0, 64, NEAR_BITS + 2).astype(np.uint64)
    for start, stop in zip(edges[:-1], edges[1:], strict=True):
        mask = np.uint64(2 ** int(stop - start) - 1)
        own, other = (mine >> start) & mask, (theirs >> start) & mask
        order = np.argsort(other, kind="stable")
        first = np.searchsorted(other[order], own, side="left")
        counts = np.searchsorted(other[order], own, side="right") - first
        wanted = np.flatnonzero(counts)
        blocks = np.cumsum(counts[wanted]) // BLOCK
        for rows in np.split(wanted, np.flatnonzero(np.diff(blocks)) + 1):
            n = np.repeat(rows, counts[rows])
            within = np.arange(len(n)) - np.repeat(np.cumsum(counts[rows]) - counts[rows],
                                                   counts[rows])  # fmt: skip
            yield n, order[np.repeat(first[rows], counts[rows]) + within]


def _described(records: Records, copies: Sequence[Copy]) -> str:
    """Counts by kind and roles, with the first pair."""
    words = {"train": "training", "val": "validation", "test": "test"}
    parts = []
    for kind, title in KINDS.items():
        of_kind = [copy for copy in copies if copy.kind == kind]
        for role, of_role in (("test", "train"), ("test", "val"), ("val", "train")):
            count = sum((copy.role, copy.of_role) == (role, of_role) for copy in of_kind)
            if count:
                verb, noun = ("has", "image") if count == 1 else ("have", "images")
                parts.append(
                    f"{count} {words[role]} {noun} {verb} {title} as a {words[of_role]} image"
                )
    first = copies[0]
    a, b = (printable(records.names[row]) for row in (first.row, first.of_row))
    return f"{', '.join(parts)}, e.g. {a} and {b}"
