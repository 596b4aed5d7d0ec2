# SPDX-License-Identifier: Apache-2.0
"""Loads, stores and atomics of a machine, with their checks."""

from __future__ import annotations

import numpy as np

from .memory import Allocation, Bytes
from .races import ATOMIC, READ, WRITE, Access
from .translate import LOCAL_WINDOW, PARAMETER_WINDOW, SHARED_WINDOW
from .types import UNSIGNED

WINDOWS = (
    ("local", LOCAL_WINDOW),
    ("shared", SHARED_WINDOW),
    ("param", PARAMETER_WINDOW),
    ("global", -(1 << 63)),
)
LONGEST_LOG = 3000  # accesses kept before races are looked for


class Accesses:
    """Needs of a machine: lanes, shared, local, memory, parameters, find(), stamp, ..."""

    def active(self, address, offset: int, mask) -> tuple[np.ndarray, np.ndarray]:
        """Addresses (64-bit) and lanes on which an effect takes place."""
        address = np.asarray(address)
        if mask is None:
            lanes = self.lanes
        else:
            lanes = np.flatnonzero(mask) if np.ndim(mask) else self.lanes[: self.lanes.size * mask]
        if address.ndim == 0:
            return np.full(lanes.size, int(address) + offset), lanes
        if mask is not None:
            address = address[lanes]
        if address.dtype.itemsize < 8:
            address = address.astype(np.int64)
        return (address + offset if offset else address), lanes

    def window(self, a: np.ndarray) -> list[tuple[str, np.ndarray, np.ndarray | None]]:
        """Generic addresses by space: (space, addresses in it, selection or None for all)."""
        low, high = a.min(), a.max()
        for space, start in WINDOWS:
            if low >= start:
                return [(space, a if space == "global" else a - start, None)]
            if high >= start:
                inside = a >= start
                top, rest = np.flatnonzero(inside), np.flatnonzero(~inside)
                found = [(space, a[top] - start, top)]
                for other, b, selection in self.window(a[rest]):
                    found.append((other, b, rest if selection is None else rest[selection]))
                return found
        raise AssertionError("the last window starts at the lowest address")

    # ---- loads
    def load(self, space: str, address, offset: int, n: int, v: int, mask, pc: int) -> list:
        """v words of n bytes for each lane, as unsigned integers."""
        if space == "global" and np.ndim(address) == 0:
            return self._uniform_load(int(address) + offset, n, v, mask, pc)
        a, lanes = self.active(address, offset, mask)
        if lanes.size == 0:
            return [np.zeros(self.lanes.size, UNSIGNED[n])] * v
        self.executed[pc] = True
        if space:
            words = self._load(space, a, lanes, n, v, pc)
        else:
            words = None
            for where, b, selection in self.window(a):
                if selection is None:
                    words = self._load(where, b, lanes, n, v, pc)
                    break
                words = words or [np.zeros(a.size, UNSIGNED[n]) for _ in range(v)]
                part = self._load(where, b, lanes[selection], n, v, pc)
                for all_of, some in zip(words, part, strict=True):
                    all_of[selection] = some
        return words if mask is None else [self.spread(w, lanes) for w in words]

    def spread(self, values: np.ndarray, lanes: np.ndarray) -> np.ndarray:
        if lanes.size == self.lanes.size:
            return values
        out = np.zeros(self.lanes.size, values.dtype)
        out[lanes] = values
        return out

    def _uniform_load(self, address: int, n: int, v: int, mask, pc: int) -> list:
        """One address for all: read once, logged for one lane of each block."""
        lanes = self.lanes[:: self.threads] if mask is None else self.first_active(mask)
        if lanes.size == 0:
            return [UNSIGNED[n](0)] * v
        self.executed[pc] = True
        return [w[0] for w in self._load("global", np.full(lanes.size, address), lanes, n, v, pc)]

    def first_active(self, mask) -> np.ndarray:
        m = np.broadcast_to(mask, self.lanes.shape).reshape(-1, self.threads)
        blocks = np.flatnonzero(m.any(1))
        return blocks * self.threads + m[blocks].argmax(1)

    def _load(self, space: str, a, lanes, n: int, v: int, pc: int) -> list[np.ndarray]:
        size = n * v
        a = self.aligned(a, size, lanes, pc, space)
        if space == "global":
            parts = self.parts(a, size, lanes, pc)
            if len(parts) == 1 and parts[0][1] is None:
                return self._read(parts[0][0], a, lanes, n, v, pc)
            words = [np.full(a.size, ~UNSIGNED[n](0)) for _ in range(v)]
            for buffer, selection in parts:
                part = self._read(buffer, a[selection], lanes[selection], n, v, pc)
                for all_of, some in zip(words, part, strict=True):
                    all_of[selection] = some
            return words
        memory, place = self.place(space, a, size, lanes, pc)
        if memory is self.shared:
            self.log_shared(place, lanes, size, READ, pc)
        if self.checks.uninitialised:
            self._report_unwritten(memory, place, size, lanes, pc, space)
        return memory.gather(place, n, v)

    def _read(self, buffer: Allocation, a, lanes, n: int, v: int, pc: int) -> list[np.ndarray]:
        place = a - buffer.start
        if self.checks.uninitialised and not buffer.whole:
            self._report_unwritten(buffer, place, n * v, lanes, pc, str(buffer))
        self.log_global(buffer, place, lanes, n * v, READ, pc)
        return buffer.gather(place, n, v)

    def _report_unwritten(self, memory: Bytes, place, size: int, lanes, pc: int, name: str) -> None:
        bad = memory.unwritten(place, size)
        if bad is None:
            return
        if isinstance(memory, Allocation):
            at = int(place[bad][0]) + memory.start - memory.address
        else:
            at = int(place[bad][0]) % memory.stride
        self.find(
            "uninitialised",
            pc,
            f"bytes {at}..{at + size - 1} of {name} are read but were never written, or the copy "
            f"that writes them was not waited for",
            lanes[bad],
        )

    # ---- stores
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
        for where, b, selection in [(space, a, None)] if space else self.window(a):
            if selection is None:
                self.write(where, b, rows, lanes, pc)
            else:
                self.write(where, b, rows[selection], lanes[selection], pc)

    def write(self, space: str, a, rows: np.ndarray, lanes, pc: int) -> None:
        """Rows of bytes to addresses of one space; what lies outside is dropped."""
        size = rows.itemsize * rows.shape[1]
        a = self.aligned(a, size, lanes, pc, space)
        if space == "global":
            for buffer, selection in self.parts(a, size, lanes, pc):
                if selection is None:
                    selection = slice(None)
                place, values = a[selection] - buffer.start, rows[selection]
                self.log_global(buffer, place, lanes[selection], size, WRITE, pc, values)
                buffer.scatter(place, values, size)
            return
        if space == "param":
            self.find("bounds", pc, "a store to parameters", lanes)
            return
        inside = self.inside(space, a, size, lanes, pc)
        if inside is not None:
            a, rows, lanes = a[inside], rows[inside], lanes[inside]
        memory = self.shared if space == "shared" else self.local
        place = a + memory.base[lanes]
        if memory is self.shared:
            self.log_shared(place, lanes, size, WRITE, pc, rows)
            if self.proxy is not None:
                self.proxy.written(place, size, lanes)
        memory.scatter(place, rows, size)

    # ---- atomics
    def atomic(self, space: str, address, offset: int, change, values: list, n: int, mask, pc: int):
        """Old values of n bytes; change(old, *values) is stored lane after lane."""
        a, lanes = self.active(address, offset, mask)
        if lanes.size == 0:
            return np.zeros(self.lanes.size, UNSIGNED[n])
        self.executed[pc] = True
        if not space:
            windows = self.window(a)
            space, a = windows[0][0], windows[0][1]
            if windows[0][2] is not None:
                lanes = lanes[windows[0][2]]
                self.find("bounds", pc, "an atomic to several spaces at once", lanes)
        given = []
        for x in values:
            x = np.asarray(x)
            given.append(np.full(lanes.size, x) if x.ndim == 0 else x[lanes])
        a = self.aligned(a, n, lanes, pc, space)
        old = np.zeros(lanes.size, UNSIGNED[n])
        if space == "global":
            parts = self.parts(a, n, lanes, pc)
            for buffer, selection in parts:
                s = np.arange(lanes.size) if selection is None else selection
                place = a[s] - buffer.start
                self._report_unwritten(buffer, place, n, lanes[s], pc, str(buffer))
                self.log_global(buffer, place, lanes[s], n, ATOMIC, pc)
                old[s] = _in_turn(buffer, place, change, [g[s] for g in given], n)
        else:
            memory, place = self.place(space, a, n, lanes, pc)
            self._report_unwritten(memory, place, n, lanes, pc, space)
            if memory is self.shared:
                self.log_shared(place, lanes, n, ATOMIC, pc)
            old = _in_turn(memory, place, change, given, n)
        return old if mask is None else self.spread(old, lanes)

    # ---- checks of addresses
    def aligned(self, a: np.ndarray, size: int, lanes, pc: int, space: str) -> np.ndarray:
        """Addresses, rounded down where they are no multiple of the access's size."""
        if size & (size - 1) or not int(np.bitwise_or.reduce(a)) & (size - 1):
            return a
        bad = (a & (size - 1)) != 0
        if self.checks.alignment:
            text = f"{space} address {int(a[bad][0]):#x} is no multiple of {size}"
            self.find("alignment", pc, text, lanes[bad])
        return a & ~np.int64(size - 1)

    def inside(self, space: str, a, size: int, lanes, pc: int) -> np.ndarray | None:
        """Accesses to scratch memory within its bounds; None: all are."""
        limit = (self.shared if space == "shared" else self.local).size - size
        if limit >= 0 and int(a.view(np.uint64).max()) <= limit:
            return None
        good = (a >= 0) & (a <= limit)
        at = int(a[~good][0])
        text = f"{space} bytes {at}..{at + size - 1} of {limit + size}"
        self.find("bounds", pc, text, lanes[~good])
        return np.flatnonzero(good)

    def place(self, space: str, a, size: int, lanes, pc: int) -> tuple[Bytes, np.ndarray]:
        """Memory and places for a read; what lies outside is read at its start."""
        if space == "param":
            limit = self.parameters.shadow.size - 16 - size
            bad = (a < 0) | (a > limit)
            if bad.any():
                text = f"parameter bytes at {int(a[bad][0])} of {limit + size}"
                self.find("bounds", pc, text, lanes[bad])
            return self.parameters, np.where(bad, 0, a)
        memory = self.shared if space == "shared" else self.local
        good = self.inside(space, a, size, lanes, pc)
        if good is not None:
            kept = np.zeros_like(a)
            kept[good] = a[good]
            a = kept
        return memory, a + memory.base[lanes]

    def parts(self, a, size: int, lanes, pc: int) -> list[tuple[Allocation, np.ndarray | None]]:
        """Buffers and the accesses that lie in each; what lies in none is reported, not returned."""
        if a.size == 0:
            return []
        low, high = int(a.min()), int(a.max())
        buffer = self.memory.at(low)
        if buffer is not None and high + size <= buffer.address + buffer.size:
            return [(buffer, None)]
        number = np.searchsorted(np.array(self.memory.addresses, np.int64), a, "right") - 1
        found = []
        for k in np.unique(number):
            chosen = number == k
            buffer = self.memory.allocations[k] if k >= 0 else None
            good = chosen & (a + size <= buffer.address + buffer.size) if k >= 0 else chosen & False
            bad = chosen & ~good
            if bad.any():
                at = int(a[bad][0])
                near = f", {at - buffer.address} bytes into the {buffer}" if buffer else ""
                text = f"{size} bytes at global address {at:#x} lie in no buffer{near}"
                self.find("bounds", pc, text, lanes[bad])
            if good.any():
                found.append((buffer, np.flatnonzero(good)))
        return found

    # ---- logs for the check of races
    def log_shared(self, place, lanes, size: int, kind: int, pc: int, values=None, **more) -> None:
        if not self.checks.shared_races:
            return
        access = Access(place, lanes, size, kind, pc, values, self.stamp, self.first, **more)
        self.shared_log.append(access)
        if len(self.shared_log) > LONGEST_LOG:
            self.check_shared()

    def log_global(self, buffer: Allocation, place, lanes, size, kind, pc, values=None) -> None:
        if not self.checks.global_races:
            return
        buffer.accesses.append(Access(place, lanes, size, kind, pc, values, self.stamp, self.first))
        self.logged += 1
        if self.logged > LONGEST_LOG:
            self.check_global(last=False)


def _in_turn(memory: Bytes, place, change, given: list, n: int) -> np.ndarray:
    """Reads and changes places; lanes that share one go one after another."""
    _, inverse = np.unique(place, return_inverse=True)
    order = np.argsort(inverse, kind="stable")
    fresh = np.r_[True, np.diff(inverse[order]) != 0]
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
