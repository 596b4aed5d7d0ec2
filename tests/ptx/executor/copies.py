# SPDX-License-Identifier: Apache-2.0
"""Asynchronous copies: cp.async, mbarrier, bulk and tensor copies.

Bytes in flight count as not written: cp.async delivers at wait_group, a bulk copy when the phase
of its mbarrier is complete.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from . import tensor_map
from .races import WRITE, Stamp
from .types import i8, u1
from .warp import space_of


@dataclass
class Barrier:
    """An mbarrier: arrivals still wanted, bytes still wanted, the phase's number."""

    expected: int
    pending: int
    bytes: int = 0
    phase: int = 0
    clock: np.ndarray | None = None  # what those who arrived had seen
    segment: np.ndarray | None = None  # their newest segment, of each warp
    copies: list = field(default_factory=list)


class Copies:
    """Needs of a machine: active(), _load(), write(), find(), stamp, shared."""

    def prepare_copies(self) -> None:
        self.pending: list = []  # cp.async: (place, lanes, rows, group, pc)
        self.groups_made = np.zeros(self.lanes.size, np.int64)
        self.barriers: dict[int, Barrier] = {}

    # ---- cp.async
    def copy_async(self, to, to_offset, source, offset, n: int, have, mask, pc: int) -> None:
        a, lanes = self.active(to, to_offset, mask)
        if lanes.size == 0:
            return
        self.executed[pc] = True
        s, _ = self.active(source, offset, mask)
        count = np.broadcast_to(n if have is None else have, self.lanes.shape)[lanes]
        if ((count < 0) | (count > n)).any():
            self.find("bounds", pc, f"a source of {int(count.max())} of {n} bytes", lanes)
        rows = np.zeros((lanes.size, n), u1)
        whole, some = np.flatnonzero(count == n), np.flatnonzero((count > 0) & (count < n))
        if whole.size:
            self.aligned(s[whole], n, lanes[whole], pc, "global")
            words = self.read("global", s[whole], lanes[whole], 4, n // 4, pc)
            rows[whole] = np.stack(words, 1).view(u1)
        for k in range(int(count[some].max()) if some.size else 0):
            j = some[count[some] > k]
            rows[j, k] = self.read("global", s[j] + k, lanes[j], 1, 1, pc)[0]
        for memory, place, i in self.pieces(space_of(a), a, n, lanes, pc):
            self.log(memory, place, lanes[i], n, WRITE, pc, rows[i])
            memory.mark(place, n, 0)
            self.pending.append((place, lanes[i], rows[i], self.groups_made[lanes[i]], pc))

    def commit_copies(self, mask, pc: int) -> None:
        self.groups_made = self.groups_made + self.standing(mask)

    def wait_copies(self, newest: int | None, mask, pc: int) -> None:
        """Delivers groups of the lanes but their `newest`; None: everything."""
        here, kept = self.standing(mask), []
        for place, lanes, rows, group, at in self.pending:
            done = here[lanes]
            if newest is not None:
                done = done & (group < self.groups_made[lanes] - newest)
            if done.any():
                p, w, r = place[done], lanes[done], np.ascontiguousarray(rows[done])
                self.shared.scatter(p, r, r.shape[1])
                self.log(self.shared, p, w, r.shape[1], WRITE, at, r)
                if self.proxy is not None:
                    self.proxy.written(p, r.shape[1], w)
            if not done.all():
                kept.append((place[~done], lanes[~done], rows[~done], group[~done], at))
        self.pending = kept

    def copies_arrive(self, address, offset: int, counted: bool, mask, pc: int) -> None:
        """cp.async.mbarrier.arrive: as if the copies so far were waited for at once."""
        self.wait_copies(None, mask, pc)
        if counted:
            self.arrive(address, offset, 1, 0, False, mask, pc)

    # ---- mbarrier
    def barriers_at(self, address, offset: int, mask, pc: int):
        """(place, lanes that name it, lanes) for each mbarrier; unknown ones are reported."""
        a, lanes = self.active(address, offset, mask)
        if lanes.size == 0:
            return
        self.executed[pc] = True
        for _, place, s in self.pieces(space_of(a), a, 8, lanes, pc):
            for p in np.unique(place):
                yield int(p), lanes[s][place == p]

    def known(self, place: int, lanes, pc: int) -> Barrier | None:
        barrier = self.barriers.get(place)
        if barrier is None:
            self.find("barrier", pc, "this mbarrier was never initialised", lanes)
        return barrier

    def barrier_init(self, address, offset: int, count, mask, pc: int) -> None:
        for place, lanes in self.barriers_at(address, offset, mask, pc):
            n = int(np.broadcast_to(count, self.lanes.shape)[lanes[0]])
            self.barriers[place] = Barrier(n, n)
            self.shared.mark(np.array([place]), 8, 1)
            self.log(self.shared, np.array([place]), lanes[:1], 8, WRITE, pc, np.array([[n]], i8))

    def barrier_inval(self, address, offset: int, mask, pc: int) -> None:
        for place, _ in self.barriers_at(address, offset, mask, pc):
            self.barriers.pop(place, None)

    def arrive(self, address, offset, count, expect, drop: bool, mask, pc: int) -> list:
        """Arrivals (and bytes to expect) at mbarriers; returns the number of the phase."""
        state = np.zeros(self.lanes.size, i8)
        for place, lanes in self.barriers_at(address, offset, mask, pc):
            barrier = self.known(place, lanes, pc)
            if barrier is None:
                continue
            state[lanes] = barrier.phase
            total = int(np.broadcast_to(count, self.lanes.shape)[lanes].sum())
            barrier.bytes += int(np.broadcast_to(expect, self.lanes.shape)[lanes].sum())
            barrier.pending -= total
            barrier.expected -= total if drop else 0
            if barrier.pending < 0:
                self.find("barrier", pc, "more arrivals than this mbarrier's phase wants", lanes)
            self._release_to(barrier, lanes)
            self._complete(barrier)
        return [state]

    def expect_bytes(self, address, offset: int, count, sign: int, mask, pc: int) -> None:
        for place, lanes in self.barriers_at(address, offset, mask, pc):
            barrier = self.known(place, lanes, pc)
            if barrier:
                n = int(np.broadcast_to(count, self.lanes.shape)[lanes].sum())
                barrier.bytes += sign * n
                self._complete(barrier)

    def _release_to(self, barrier: Barrier, lanes: np.ndarray) -> None:
        """What the lanes' warps did so far is known to whoever waits for the phase."""
        warps = np.unique(lanes // 32)
        clock = self.stamp.clock.copy()
        seen = clock[warps].max(0)
        barrier.clock = seen if barrier.clock is None else np.maximum(barrier.clock, seen)
        if barrier.segment is None:
            barrier.segment = np.zeros(clock.shape[0], np.int64)
        np.maximum.at(barrier.segment, lanes // 32, self.stamp.segment[lanes])
        clock[warps, warps % (self.threads // 32)] += 1
        self.stamp = Stamp(self.stamp.segment, clock)

    def _complete(self, barrier: Barrier) -> None:
        if barrier.pending > 0 or barrier.bytes != 0:
            return
        barrier.phase += 1
        barrier.pending = barrier.expected
        self.idle = 0
        for place, rows in barrier.copies:
            self.shared.scatter(place, rows, 16)
        barrier.copies = []

    def barrier_test(self, address, offset: int, state, parity: bool, mask, pc: int) -> list:
        """Whether the phase of that number or parity is complete; lanes that wait are delayed."""
        done = np.zeros(self.lanes.size, bool)
        for place, lanes in self.barriers_at(address, offset, mask, pc):
            barrier = self.known(place, lanes, pc)
            if barrier is None:
                done[lanes] = True
                continue
            want = np.broadcast_to(state, self.lanes.shape)[lanes]
            over = (barrier.phase & 1) != (want & 1) if parity else barrier.phase > want
            done[lanes] = over
            if over.any() and barrier.clock is not None:
                warps = np.unique(lanes[over] // 32)
                clock = self.stamp.clock.copy()
                clock[warps] = np.maximum(clock[warps], barrier.clock)
                segment, passed = self.stamp.segment.copy(), lanes[over]
                if barrier.segment is not None:
                    segment[passed] = np.maximum(segment[passed], barrier.segment[passed // 32] + 1)
                self.stamp = Stamp(segment, clock)
        if not done[self.standing(mask)].all():
            self.stalled = self.stalls = self.stalls + 1
        return [done]

    # ---- bulk and tensor copies
    def bulk_load(self, to, to_offset, source, offset, size, barrier, at, mask, pc: int) -> None:
        a, lanes = self.active(to, to_offset, mask)
        s, _ = self.active(source, offset, mask)
        sizes = np.broadcast_to(size, self.lanes.shape)[lanes]
        for k, lane in enumerate(lanes):
            n = int(sizes[k])
            if n % 16 or s[k] % 16 or a[k] % 16:
                self.find("alignment", pc, "a bulk copy's addresses or size", lane)
            pieces = 16 * np.arange(n // 16)
            who = np.full(pieces.size, lane)
            words = self.read("global", s[k] + pieces, who, 8, 2, pc)
            rows = np.stack(words, 1).view(u1).reshape(-1, 16)
            self._arriving(int(a[k]) + pieces, rows, int(lane), barrier, at, pc)

    def tensor_load(self, to, to_offset, source, offset, coordinates, barrier, at, mask, pc):
        a, lanes = self.active(to, to_offset, mask)
        for k, lane in enumerate(lanes):
            tile = self._tensor_map(source, offset, int(lane), pc)
            if a[k] % 128:
                self.find("alignment", pc, "a tensor copy's shared address (128 bytes)", lane)
            address, good = tile.elements(self._of_lane(coordinates, int(lane)))
            data = np.zeros(address.size, f"u{tile.element}")
            if good.any():
                who = np.full(int(good.sum()), lane)
                data[good] = self.read("global", address[good], who, tile.element, 1, pc)[0]
            rows = data.view(u1).reshape(-1, 16)
            place = tensor_map.swizzled(int(a[k]) + 16 * np.arange(len(rows)), tile.swizzle)
            self._arriving(place, rows, int(lane), barrier, at, pc)

    def _arriving(self, a, rows, lane: int, barrier, at: int, pc: int) -> None:
        """Rows of 16 bytes that reach shared memory with the phase of an mbarrier."""
        self.executed[pc] = True
        warp, kept = lane // 32, self.stamp
        self.stamp = self.started(lane, 1)
        clock = self.stamp.clock[warp]
        pieces = list(self.pieces(space_of(a), a, 16, np.full(a.size, lane), pc))
        for memory, place, i in pieces:
            self.log(memory, place, np.full(place.size, lane), 16, WRITE, pc, rows[i], engine=1)
            memory.mark(place, 16, 0)
        self.stamp = kept
        only = self.lanes == lane
        for p, lanes in self.barriers_at(barrier, at, only, pc):
            b = self.known(p, lanes, pc)
            if b is not None:
                b.copies += [(place, rows[i]) for _, place, i in pieces]
                b.clock = clock if b.clock is None else np.maximum(b.clock, clock)
                b.bytes -= rows.size
                self._complete(b)

    def bulk_store(self, to, to_offset, source, offset, size, mask, pc: int) -> None:
        s, lanes = self.active(source, offset, mask)
        a, _ = self.active(to, to_offset, mask)
        sizes = np.broadcast_to(size, self.lanes.shape)[lanes]
        for k, lane in enumerate(lanes):
            pieces = 16 * np.arange(int(sizes[k]) // 16)
            if sizes[k] % 16 or s[k] % 16 or a[k] % 16:
                self.find("alignment", pc, "a bulk copy's addresses or size", lane)
            rows = self._leaving(int(s[k]) + pieces, int(lane), pc)
            self.write("global", a[k] + pieces, rows, np.full(pieces.size, lane), pc)

    def tensor_store(self, to, to_offset, source, offset, coordinates, mask, pc: int) -> None:
        s, lanes = self.active(source, offset, mask)
        for k, lane in enumerate(lanes):
            tile = self._tensor_map(to, to_offset, int(lane), pc)
            address, good = tile.elements(self._of_lane(coordinates, int(lane)))
            pieces = 16 * np.arange(address.size * tile.element // 16)
            place = tensor_map.swizzled(int(s[k]) + pieces, tile.swizzle)
            data = self._leaving(place, int(lane), pc).view(f"u{tile.element}").reshape(-1, 1)
            if good.any():
                who = np.full(int(good.sum()), lane)
                self.write("global", address[good], data[good], who, pc)

    def _leaving(self, a, lane: int, pc: int) -> np.ndarray:
        """Shared rows of 16 bytes as the asynchronous proxy reads them."""
        self.executed[pc] = True
        who = np.full(a.size, lane)
        kept, self.stamp = self.stamp, self.started(lane, 1)
        rows = np.stack(self.read("shared", a, who, 8, 2, pc, engine=1), 1)
        self.stamp = kept
        self.check_proxy(a, who, 16, pc)
        return rows

    def wait_bulk(self, newest: int, mask, pc: int) -> None:
        """The lanes' bulk stores have read shared memory (groups are waited for together)."""
        if newest == 0:
            warps = np.flatnonzero(self.standing(mask).reshape(-1, 32).any(1))
            self.waited(warps, 1, self.ticks[warps * 32 // self.threads, 1])

    def _of_lane(self, values: list, lane: int) -> list[int]:
        return [int(np.broadcast_to(v, self.lanes.shape)[lane]) for v in values]

    def _tensor_map(self, address, offset: int, lane: int, pc: int) -> tensor_map.TensorMap:
        pieces = self._of_lane([address], lane)[0] + offset + 16 * np.arange(8)
        raw = np.stack(self.read("", pieces, np.full(8, lane), 8, 2, pc), 1)
        return tensor_map.decode(raw.tobytes())

    # ---- proxies
    def fence_proxy(self, mask, pc: int) -> None:
        if self.proxy is not None:
            self.proxy.fences = self.proxy.fences + self.standing(mask)

    def check_proxy(self, a, lanes, size: int, pc: int) -> None:
        """Shared bytes that are read asynchronously were fenced by the lane that wrote them."""
        if self.proxy is None or not self.checks.proxies:
            return
        inside = (a >= 0) & (a <= self.shared.size - size)
        at, writer = self.proxy.unfenced((a + self.shared.base[lanes])[inside], size)
        if at.size:
            at, writer = int(at[0]) % self.shared.stride, int(writer[0]) % self.threads
            text = (
                f"shared byte {at}, written by thread {writer}, is read without fence.proxy.async"
            )
            self.find("proxy", pc, text, lanes[:1])


class Proxy:
    """Who wrote each byte of shared memory by ordinary stores, and its fences until then."""

    def __init__(self, length: int, lanes: int):
        self.writer = np.full(length, -1, np.int64)
        self.fences = np.zeros(lanes, np.int64)

    def written(self, place, size: int, lanes) -> None:
        tag = lanes | (self.fences[lanes] << 32)
        for k in range(size):
            self.writer[place + k] = tag

    def unfenced(self, place, size: int) -> tuple[np.ndarray, np.ndarray]:
        at = np.concatenate([place + k for k in range(size)])
        tag = self.writer[at]
        lane = tag & 0xFFFFFFFF
        bad = (tag >= 0) & ((tag >> 32) >= self.fences[lane % self.fences.size])
        return at[bad], lane[bad]
