# SPDX-License-Identifier: Apache-2.0
"""Asynchronous copies: cp.async, mbarrier, bulk and tensor copies.

Bytes in flight count as not written: cp.async delivers at wait_group, a bulk copy when the phase
of its mbarrier is complete.
"""

from dataclasses import dataclass, field

import numpy as np

from .races import WRITE, Stamp
from .tensor_map import TensorMap, decode, swizzled
from .types import i8, u1
from .warp import space_of


@dataclass
class Barrier:
    """An mbarrier: arrivals still wanted, bytes still wanted, the phase's number."""

    expected: int
    pending: int
    clock: np.ndarray  # what those who arrived had seen
    segment: np.ndarray  # their newest segment, of each warp
    bytes: int = 0
    phase: int = 0
    copies: list = field(default_factory=list)  # of the phase: (place, rows)


class Copies:
    """Needs of a machine: active(), pieces(), read(), write(), find(), stamp, shared."""

    def prepare_copies(self) -> None:
        self.pending: list = []  # cp.async: (place, lanes, rows, group, pc)
        self.groups_made = np.zeros(self.lanes.size, np.int64)
        self.barriers: dict[int, Barrier] = {}

    def copy_async(self, to, to_offset, source, offset, n: int, have, mask, pc: int) -> None:
        a, lanes = self.active(to, to_offset, mask)
        if lanes.size == 0:
            return
        self.executed[pc] = True
        s, _ = self.active(source, offset, mask)
        count = self.full(have)[lanes]
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
        for copy in self.pending:
            place, lanes, rows, group, at = copy
            done = here[lanes]
            if newest is not None:
                done = done & (group < self.groups_made[lanes] - newest)
            if done.any():
                self.put(self.shared, place[done], rows[done], lanes[done], at)
            if not done.all():
                kept.append((*(x[~done] for x in copy[:4]), at))
        self.pending = kept

    def copies_arrive(self, address, offset: int, counted: bool, mask, pc: int) -> None:
        """cp.async.mbarrier.arrive: as if the copies so far were waited for at once."""
        self.wait_copies(None, mask, pc)
        if counted:
            self.arrive(address, offset, 1, 0, False, mask, pc)

    def places(self, address, offset: int, mask, pc: int):
        """(place, lanes that name it) for each mbarrier."""
        a, lanes = self.active(address, offset, mask)
        for _, place, s in self.pieces(space_of(a), a, 8, lanes, pc):
            self.executed[pc] = True
            for p in np.unique(place):
                yield int(p), lanes[s][place == p]

    def known(self, address, offset: int, mask, pc: int):
        """(mbarrier, lanes that name it); what was never initialised is reported."""
        for place, lanes in self.places(address, offset, mask, pc):
            if place in self.barriers:
                yield self.barriers[place], lanes
            else:
                self.find("barrier", pc, "this mbarrier was never initialised", lanes)

    def barrier_init(self, address, offset: int, count, mask, pc: int) -> None:
        for place, lanes in self.places(address, offset, mask, pc):
            n, clock = int(self.full(count)[lanes[0]]), self.stamp.clock
            self.barriers[place] = Barrier(n, n, 0 * clock[0], np.zeros(clock.shape[0], i8))
            self.shared.mark(np.array([place]), 8, 1)
            self.log(self.shared, np.array([place]), lanes[:1], 8, WRITE, pc, np.array([[n]], i8))

    def barrier_inval(self, address, offset: int, mask, pc: int) -> None:
        for place, _ in self.places(address, offset, mask, pc):
            self.barriers.pop(place, None)

    def arrive(self, address, offset, count, expect, drop: bool, mask, pc: int) -> list:
        """Arrivals (and bytes to expect) at mbarriers; returns the number of the phase."""
        state, count, expect = np.zeros(self.lanes.size, i8), self.full(count), self.full(expect)
        for barrier, lanes in self.known(address, offset, mask, pc):
            state[lanes] = barrier.phase
            total = int(count[lanes].sum())
            barrier.bytes += int(expect[lanes].sum())
            barrier.pending -= total
            barrier.expected -= total if drop else 0
            if barrier.pending < 0:
                self.find("barrier", pc, "more arrivals than this mbarrier's phase wants", lanes)
            # what the lanes' warps did so far is known to whoever waits for the phase
            warps, clock = np.unique(lanes // 32), self.stamp.clock.copy()
            barrier.clock = np.maximum(barrier.clock, clock[warps].max(0))
            np.maximum.at(barrier.segment, lanes // 32, self.stamp.segment[lanes])
            clock[warps, warps % (self.threads // 32)] += 1
            self.stamp = Stamp(self.stamp.segment, clock)
            self._complete(barrier)
        return [state]

    def expect_bytes(self, address, offset: int, count, sign: int, mask, pc: int) -> None:
        for barrier, lanes in self.known(address, offset, mask, pc):
            barrier.bytes += sign * int(self.full(count)[lanes].sum())
            self._complete(barrier)

    def _complete(self, barrier: Barrier) -> None:
        if barrier.pending > 0 or barrier.bytes != 0:
            return
        barrier.phase += 1
        barrier.pending, copies, barrier.copies = barrier.expected, barrier.copies, []
        self.idle = 0
        for place, rows in copies:
            self.shared.scatter(place, rows, 16)

    def barrier_test(self, address, offset: int, state, parity: bool, mask, pc: int) -> list:
        """Whether the phase of that number or parity is complete; lanes that wait are delayed."""
        done = np.ones(self.lanes.size, bool)
        for barrier, lanes in self.known(address, offset, mask, pc):
            want = self.full(state)[lanes]
            done[lanes] = (barrier.phase ^ want) & 1 if parity else barrier.phase > want
            passed = lanes[done[lanes]]
            warps, clock = np.unique(passed // 32), self.stamp.clock.copy()
            clock[warps] = np.maximum(clock[warps], barrier.clock)
            segment = self.stamp.segment.copy()
            segment[passed] = np.maximum(segment[passed], barrier.segment[passed // 32] + 1)
            self.stamp = Stamp(segment, clock)
        if not done.all():
            self.stalled = self.stalls = self.stalls + 1
        return [done]

    def tiles(self, shared, shared_offset, far, offset: int, extent, mask, pc: int):
        """(lane, its shared places of 16 bytes, the tensor map, global addresses, which exist).

        `extent` is a number of bytes, or a list of coordinates where `far` points to a tensor map.
        """
        a, lanes = self.active(shared, shared_offset, mask)
        for at, lane in zip(a.tolist(), lanes.tolist(), strict=True):
            self.executed[pc] = True
            first = int(self.full(far)[lane]) + offset
            if isinstance(extent, list):
                pieces = first + 16 * np.arange(8)
                raw = np.stack(self.read("", pieces, np.full(8, lane), 8, 2, pc), 1)
                tile, corner = decode(raw.tobytes()), [self.full(x)[lane] for x in extent]
                bad = at % 128
            else:
                n, corner = int(self.full(extent)[lane]), [0]
                tile = TensorMap(first, (n // 8,), (), (n // 8,), 8, steps=(1,))
                bad = (at | first | n) % 16
            if bad:
                self.find("alignment", pc, "addresses or size of a bulk copy", lane)
            address, good = tile.elements(corner)
            places = at + 16 * np.arange(address.size * tile.element // 16)
            yield lane, swizzled(places, tile.swizzle), tile, address, good

    def bulk_load(self, to, to_offset, far, offset, extent, barrier, at, mask, pc: int) -> None:
        """Global to shared memory; the bytes arrive with the phase of an mbarrier."""
        tiles = self.tiles(to, to_offset, far, offset, extent, mask, pc)
        for lane, a, tile, address, good in tiles:
            data, who = np.zeros(address.size, f"u{tile.element}"), np.full(address.size, lane)
            data[good] = self.read("global", address[good], who[good], tile.element, 1, pc)[0]
            rows, pieces = data.view(u1).reshape(-1, 16), []
            with self.asynchronously([lane], 1):
                clock = self.stamp.clock[lane // 32]
                for memory, place, i in self.pieces(space_of(a), a, 16, who[: a.size], pc):
                    self.log(memory, place, who[: place.size], 16, WRITE, pc, rows[i], engine=1)
                    memory.mark(place, 16, 0)
                    pieces.append((place, rows[i]))
            for b, _ in self.known(barrier, at, self.lanes == lane, pc):
                b.copies += pieces
                b.clock = np.maximum(b.clock, clock)
                b.bytes -= rows.size
                self._complete(b)

    def bulk_store(self, far, offset, source, source_offset, extent, mask, pc: int) -> None:
        """Shared to global memory, at once."""
        tiles = self.tiles(source, source_offset, far, offset, extent, mask, pc)
        for lane, a, tile, address, good in tiles:
            who = np.full(address.size, lane)
            with self.asynchronously([lane], 1):
                rows = np.stack(self.read("shared", a, who[: a.size], 8, 2, pc, engine=1), 1)
            self.check_proxy(a, who[: a.size], 16, pc)
            data = rows.view(f"u{tile.element}").reshape(-1, 1)
            self.write("global", address[good], data[good], who[good], pc)

    def wait_bulk(self, newest: int, mask, pc: int) -> None:
        """The lanes' bulk stores have read shared memory (groups are waited for together)."""
        if newest == 0:
            self.waited(mask, 1, self.ticks[:, 1])

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
            text = f"byte {self.shared.offset(int(at[0]))} of shared, written by thread "
            text += f"{int(writer[0]) % self.threads}, is read without fence.proxy.async"
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
