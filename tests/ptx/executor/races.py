# SPDX-License-Identifier: Apache-2.0
"""Races: two accesses to a byte, one a write, that nothing orders.

Accesses are logged with the state of synchronisation at their time and looked at together. A first
pass only asks whether a byte that was written was touched by two lanes. Where it was, neighbouring
accesses in time are compared exactly: lanes of a warp are ordered by bar.warp.sync and barriers,
warps of a block by vector clocks, blocks by nothing. Writes of equal values are no race.
"""

from typing import NamedTuple

import numpy as np

from .types import UNSIGNED

READ, WRITE, ATOMIC = 0, 1, 2


class Stamp:
    """Synchronisation so far: a segment for each lane, a vector clock for each warp.

    clock[w, u]: up to which of its own ticks warp u of the same block is known to warp w. Two more
    columns count asynchronous work, wgmma and bulk copies: known to those who waited for it.
    """

    __slots__ = ("clock", "segment")

    def __init__(self, segment: np.ndarray, clock: np.ndarray):
        self.segment, self.clock = segment, clock

    def after(self, lanes: np.ndarray) -> np.ndarray:
        """Segments once these lanes met, each with those of its warp."""
        newest = np.where(lanes, self.segment, -1).reshape(-1, 32).max(1) + 1
        return np.where(lanes, np.repeat(newest, 32), self.segment)


class Access(NamedTuple):
    place: np.ndarray  # in bytes
    lanes: np.ndarray
    size: int
    kind: int
    pc: int
    values: np.ndarray | None  # contiguous, size bytes a row
    stamp: Stamp
    first: int  # thread of the grid that is lane 0
    engine: int = 0  # 1: a bulk copy, 2: wgmma, that column from the end; -1: all lanes together


class Detector:
    """Needs of a machine: threads, of a block padded to whole warps; owner, -1 between calls."""

    def races(self, log: list[Access], length: int) -> list[tuple]:
        """Place, two sides (pc, thread of the grid, kind) and number of races in a log."""
        if not any(a.kind for a in log):
            return []
        shift = _shift(log)
        if self.owner.size <= length >> shift:
            self.owner = np.full((length >> shift) + 1, -1, np.int64)
        owner, parts = self.owner, [
            (x.kind, _granules(x, shift), (x.kind != ATOMIC) * (1 + _threads(x, shift)))
            for x in log]  # fmt: skip
        for kind, granule, who in parts:
            if kind != READ:
                owner[granule] = who
        copies = any(a.engine > 0 for a in log)  # a lane races with its own copies, too
        hit = np.concatenate([
            g[((seen := owner[g]) >= 0) & (copies | (seen != who))] for _, g, who in parts
        ])  # fmt: skip
        owner[np.concatenate([g for kind, g, _ in parts if kind != READ])] = -1
        if not hit.size:
            return []
        owner[hit] = 0
        chosen = [np.flatnonzero(owner[granule] >= 0) for _, granule, _ in parts]
        owner[hit] = -1
        entry = np.repeat(np.arange(len(log)), [c.size for c in chosen])
        kind = np.array([a.kind for a in log], np.int8)[entry]
        granule, thread, value = (
            np.concatenate([f(a, shift)[c] for a, c in zip(log, chosen, strict=True)])
            for f in (_granules, _threads, _values)
        )
        order = np.argsort(granule, kind="stable")
        return self._compare(log, shift, *(x[order] for x in (granule, thread, kind, entry, value)))

    def _compare(self, log, shift, granule, thread, kind, entry, value) -> list[tuple]:
        """Neighbours in time among accesses sorted by granule."""
        n = np.arange(granule.size)
        start = np.maximum.accumulate(n * np.r_[True, granule[1:] != granule[:-1]])
        before = np.r_[-1, np.maximum.accumulate(np.where(kind != READ, n, -1))[:-1]]
        later = n[before >= start]
        # each read and the next write behind it
        next_write = np.minimum.accumulate(np.where(kind != READ, n, n.size)[::-1])[::-1]
        reads = n[(kind == READ) & (np.r_[start, -1][next_write] == start)]
        x, y = np.r_[before[later], reads], np.r_[later, next_write[reads]]
        free = (kind[x] != READ) & (kind[y] != READ)
        free &= ((kind[x] == ATOMIC) & (kind[y] == ATOMIC)) | (value[x] == value[y])
        x, y = x[~free], y[~free]
        bad = ~self._ordered(log, entry[x], entry[y], thread[x], thread[y])
        x, y = x[bad], y[bad]
        pcs = np.array([a.pc for a in log])[entry]
        pairs = pcs[x] << 32 | pcs[y]  # what is found is told once for each two instructions
        _, first, counts = np.unique(pairs, return_index=True, return_counts=True)
        sides = np.stack([pcs, thread, kind], 1)
        return [
            (int(granule[x[k]]) << shift, sides[x[k]].tolist(), sides[y[k]].tolist(), int(count))
            for k, count in zip(first[:16], counts, strict=False)
        ]

    def _ordered(self, log, ex, ey, tx, ty) -> np.ndarray:
        """Whether access ex of thread tx happens before the later ey of ty."""
        stamps = list({id(a.stamp): a.stamp for a in log}.values())
        number = {id(s): k for k, s in enumerate(stamps)}
        stamp, first, own = np.array([(number[id(a.stamp)], a.first, a.engine) for a in log]).T
        width = max(s.segment.size for s in stamps)
        segments = np.full((len(stamps), width), -1, np.int64)
        columns = max(s.clock.shape[1] for s in stamps)
        clocks = np.zeros((len(stamps), width // 32, columns), np.int64)
        for k, s in enumerate(stamps):  # a last batch of blocks may be shorter
            segments[k, : s.segment.size] = s.segment
            clocks[k, : s.clock.shape[0], : s.clock.shape[1]] = s.clock
        lx, ly = (tx - first[ex]) % width, (ty - first[ey]) % width
        sx, sy, wx, wy = stamp[ex], stamp[ey], lx >> 5, ly >> 5
        column = np.where(own[ex] > 0, columns - own[ex], wx % (self.threads >> 5))
        known = clocks[sy, wy, column] >= clocks[sx, wx, column]
        warp = (tx >> 5) == (ty >> 5)
        by_warp = (tx == ty) | (own[ex] < 0) | (segments[sx, lx] < segments[sy, ly])
        block = tx // self.threads == ty // self.threads
        return block & np.where(warp & (own[ex] <= 0), by_warp, known)


def folded(log: list[Access], length: int) -> list[Access]:
    """A log as one read and one write of each granule, the last ones; a block's own are ordered."""
    shift = _shift(log)
    before = Stamp(np.full(32, -1), np.zeros((1, 1), np.int64))
    short = []
    for kind in (READ, WRITE):
        thread = np.full((length >> shift) + 1, -1, np.int64)
        values, pc = np.zeros(thread.size, UNSIGNED[1 << shift]), 0
        for a in log:
            if a.kind == kind:
                place, pc = _granules(a, shift), a.pc
                thread[place] = _threads(a, shift)
                values[place] = _values(a, shift)
        at = np.flatnonzero(thread >= 0)
        if at.size:
            given = values[at] if kind == WRITE else None
            short.append(Access(at << shift, thread[at], 1 << shift, kind, pc, given, before, 0))
    return short


def _shift(log: list[Access]) -> int:
    """log2 of the largest granule that no access cuts, 8 bytes at most."""
    bits = 8
    for a in log:
        bits |= a.size | int(np.bitwise_or.reduce(a.place))
    return (bits & -bits).bit_length() - 1


def _threads(a: Access, shift: int) -> np.ndarray:
    return np.repeat(a.lanes + a.first, a.size >> shift)


def _granules(a: Access, shift: int) -> np.ndarray:
    return ((a.place >> shift)[:, None] + np.arange(a.size >> shift)).ravel()


def _values(a: Access, shift: int) -> np.ndarray:
    if a.values is None:
        return np.zeros(a.place.size * (a.size >> shift), np.uint64)
    return a.values.view(UNSIGNED[1 << shift]).ravel().astype(np.uint64)
