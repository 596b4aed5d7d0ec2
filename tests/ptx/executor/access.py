# SPDX-License-Identifier: Apache-2.0
"""Loads, stores and atomics of a machine, with their checks."""

from collections.abc import Iterator

import numpy as np

from .memory import WINDOWS, Allocation, Bytes
from .races import ATOMIC, READ, WRITE, Access
from .types import UNSIGNED

ALL = slice(None)
LONGEST_LOG = 1 << 20  # words of 4 bytes whose accesses are kept before races are looked for
Pieces = Iterator[tuple[Bytes, np.ndarray, np.ndarray | slice]]


class Accesses:
    """Needs of a machine: lanes, memory, spaces by name, find(), stamp, logs."""

    def active(self, address, offset: int, mask) -> tuple[np.ndarray, np.ndarray]:
        """Addresses (64-bit) and lanes on which an effect takes place."""
        address = np.asarray(address)
        lanes = self.lanes
        if mask is not None:
            lanes = np.flatnonzero(mask) if np.ndim(mask) else lanes[: lanes.size * mask]
        if address.ndim == 0:
            return np.full(lanes.size, int(address) + offset), lanes
        address = address if mask is None else address[lanes]
        address = address.astype(np.int64, copy=False)
        return (address + offset if offset else address), lanes

    def spread(self, values: np.ndarray, lanes: np.ndarray) -> np.ndarray:
        """Values of some lanes as an array over all."""
        if lanes.size == self.lanes.size:
            return values
        out = np.zeros(self.lanes.size, values.dtype)
        out[lanes] = values
        return out

    def pieces(self, space: str, a: np.ndarray, size: int, lanes, pc: int) -> Pieces:
        """(memory, places in it, which accesses these are); what lies outside is reported only."""
        if a.size == 0:
            return
        if not space:
            for name, start in WINDOWS.items():
                end = 2 * start if start > 0 else WINDOWS["param"]
                here, offset = np.flatnonzero((a >= start) & (a < end)), max(start, 0)
                if here.size == a.size:
                    yield from self.pieces(name, a - offset, size, lanes, pc)
                    return
                for memory, place, s in self.pieces(name, a[here] - offset, size, lanes[here], pc):
                    yield memory, place, here[s]
            return
        a = self.aligned(a, size, lanes, pc, space)
        if space == "global":
            yield from self.buffers(a, size, lanes, pc)
            return
        memory = self.spaces[space]
        limit, inside = memory.size - size, ALL
        if limit < 0 or int(a.view(np.uint64).max()) > limit:
            good = (a >= 0) & (a <= limit)
            at, inside = int(a[~good][0]), np.flatnonzero(good)
            text = f"{memory} bytes {at}..{at + size - 1} of {memory.size}"
            self.find("bounds", pc, text, lanes[~good])
        yield memory, a[inside] + memory.base[lanes[inside]], inside

    def buffers(self, a, size: int, lanes, pc: int) -> Pieces:
        """As `pieces`, in global memory."""
        low, high = int(a.min()), int(a.max())
        buffer = self.memory.at(low)
        if buffer is not None and high + size <= buffer.address + buffer.size:
            yield buffer, a - buffer.start, ALL
            return
        number = np.searchsorted(np.array(self.memory.addresses, np.int64), a, "right") - 1
        for k in np.unique(number):
            buffer = self.memory.allocations[k] if k >= 0 else None
            end = buffer.address + buffer.size if buffer else 0
            good, bad = (number == k) & (a + size <= end), (number == k) & (a + size > end)
            if bad.any():
                at = int(a[bad][0])
                near = f", {at - buffer.address} bytes into the {buffer}" if buffer else ""
                text = f"{size} bytes at global address {at:#x} lie in no buffer{near}"
                self.find("bounds", pc, text, lanes[bad])
            if good.any():
                yield buffer, a[good] - buffer.start, np.flatnonzero(good)

    def aligned(self, a: np.ndarray, size: int, lanes, pc: int, space: str) -> np.ndarray:
        """Addresses, rounded down where they are no multiple of the access's size."""
        if not int(np.bitwise_or.reduce(a)) & (size - 1):
            return a
        bad = (a & (size - 1)) != 0
        if self.checks.alignment:
            text = f"{space} address {int(a[bad][0]):#x} is no multiple of {size}"
            self.find("alignment", pc, text, lanes[bad])
        return a & ~np.int64(size - 1)

    def load(self, space: str, address, offset: int, n: int, v: int, mask, pc: int) -> list:
        """v words of n bytes for each lane, as unsigned integers."""
        uniform = space == "global" and np.ndim(address) == 0
        if uniform:  # read once, by a lane of each block
            here = self.standing(mask).reshape(-1, self.threads)
            blocks = np.flatnonzero(here.any(1))
            lanes = blocks * self.threads + here[blocks].argmax(1)
            a = np.full(lanes.size, int(address) + offset)
        else:
            a, lanes = self.active(address, offset, mask)
        if lanes.size == 0:
            return [UNSIGNED[n](0)] * v
        self.executed[pc] = True
        words = self.read(space, a, lanes, n, v, pc)
        if uniform:
            return [w[0] for w in words]
        return words if mask is None else [self.spread(w, lanes) for w in words]

    def read(self, space: str, a, lanes, n: int, v: int, pc: int, engine: int = 0) -> list:
        """As `load`, of some lanes; all bits are set where an address is bad."""
        words = []
        for memory, place, s in self.pieces(space, a, n * v, lanes, pc):
            self.log(memory, place, lanes[s], n * v, READ, pc, engine=engine)
            self.demand_written(memory, place, n * v, lanes[s], pc)
            words.append((s, memory.gather(place, n, v)))
        if len(words) == 1 and words[0][0] is ALL:
            return words[0][1]
        whole = np.full((v, a.size), ~UNSIGNED[n](0))
        for s, part in words:
            whole[:, s] = part
        return list(whole)

    def demand_written(self, memory: Bytes, place, size: int, lanes, pc: int) -> None:
        if memory.whole or not self.checks.uninitialised:
            return
        bad = memory.unwritten(place, size)
        if bad is not None:
            at = memory.offset(int(place[bad][0]))
            text = (
                f"bytes {at}..{at + size - 1} of {memory} are read but were never written, or the "
                f"copy that writes them was not waited for"
            )
            self.find("uninitialised", pc, text, lanes[bad])

    def store(self, space: str, address, offset: int, values: list, n: int, mask, pc: int) -> None:
        a, lanes = self.active(address, offset, mask)
        if lanes.size == 0:
            return
        self.executed[pc] = True
        t, rows = UNSIGNED[n], np.empty((lanes.size, len(values)), UNSIGNED[n])
        for k, x in enumerate(values):
            x = np.asarray(x)
            x = x.view(t) if x.dtype.itemsize == n else x.astype(t)
            rows[:, k] = x if x.ndim == 0 or mask is None else x[lanes]
        self.write(space, a, rows, lanes, pc)

    def write(self, space: str, a, rows: np.ndarray, lanes, pc: int) -> None:
        """Rows of bytes to addresses; what lies outside is dropped."""
        size = rows.itemsize * rows.shape[1]
        for memory, place, s in self.pieces(space, a, size, lanes, pc):
            if memory is self.spaces["param"]:
                self.find("bounds", pc, "a store to parameters", lanes[s])
                continue
            self.put(memory, place, rows[s], lanes[s], pc)

    def put(self, memory: Bytes, place, rows: np.ndarray, lanes, pc: int) -> None:
        """Rows of bytes to places."""
        size = rows.itemsize * rows.shape[1]
        self.log(memory, place, lanes, size, WRITE, pc, rows)
        if memory is self.shared and self.proxy is not None:
            self.proxy.written(place, size, lanes)
        memory.scatter(place, rows, size)

    def atomic(self, space: str, address, offset: int, change, values: list, n: int, mask, pc: int):
        """Old values of n bytes; change(old, *values) is stored lane after lane."""
        a, lanes = self.active(address, offset, mask)
        old = np.zeros(lanes.size, UNSIGNED[n])
        given = [np.broadcast_to(x, self.lanes.shape)[lanes] for x in values]
        for memory, place, s in self.pieces(space, a, n, lanes, pc):
            self.executed[pc] = True
            self.demand_written(memory, place, n, lanes[s], pc)
            self.log(memory, place, lanes[s], n, ATOMIC, pc)
            old[s] = _in_turn(memory, place, change, [g[s] for g in given], n)
        return [self.spread(old, lanes)]

    def log(self, memory: Bytes, place, lanes, size, kind: int, pc: int, values=None, engine=0):
        in_global = isinstance(memory, Allocation)
        in_shared = memory is self.shared and self.checks.shared_races
        if not (self.checks.global_races if in_global else in_shared):
            return
        access = Access(place, lanes, size, kind, pc, values, self.stamp, self.first, engine)
        memory.accesses.append(access)
        self.logged[in_global] += place.size * size // 4 + 1
        if self.logged[in_global] > LONGEST_LOG:
            (self.check_global if in_global else self.check_shared)()


def _in_turn(memory: Bytes, place, change, given: list, n: int) -> np.ndarray:
    """Reads and changes places; lanes that share one go one after another."""
    order = np.argsort(place, kind="stable")
    fresh = np.r_[True, np.diff(place[order]) != 0]
    starts = np.maximum.accumulate(np.where(fresh, np.arange(order.size), 0))
    turn = np.empty(order.size, np.int64)
    turn[order] = np.arange(order.size) - starts
    old = np.empty(place.size, UNSIGNED[n])
    for k in range(int(turn.max()) + 1):
        s = np.flatnonzero(turn == k)
        old[s] = memory.gather(place[s], n, 1)[0]
        new = np.ascontiguousarray(change(old[s], *(g[s] for g in given)))
        memory.scatter(place[s], new.view(UNSIGNED[n])[:, None], n)
    return old
