# SPDX-License-Identifier: Apache-2.0
"""Global memory by the process's own addresses, and scratch memory of blocks and lanes.

Every byte has a shadow that says whether it was written. Words of 1 to 16 bytes are views of the
same bytes; wider accesses are cut.
"""

import bisect
import ctypes

import numpy as np

from .report import PtxError
from .types import UNSIGNED

WORDS = {**UNSIGNED, 16: np.complex128}  # complex128 stands for 16 bytes: it is only moved
# generic addresses: where each space begins, up to twice that
WINDOWS = {"shared": 1 << 57, "global": -(1 << 63), "local": 1 << 58, "param": 1 << 56}
SHIFT = {1: 0, 2: 1, 4: 2, 8: 3, 16: 4}
WRITTEN = {n: t(int("01" * n, 16)) for n, t in UNSIGNED.items()}


class Bytes:
    """Data and shadow; `start` is the address of the first byte, a multiple of 16."""

    def __init__(self, start: int, data: np.ndarray, written: bool):
        self.start = start
        self.words = {n: data.view(t) for n, t in WORDS.items()}
        self.shadow = np.full(data.size, written, np.uint8)
        self.shadow_words = {n: self.shadow.view(t) for n, t in UNSIGNED.items()}
        self.whole = written  # every byte was written
        self.accesses: list = []  # of the launch in progress, for the check of races

    def offset(self, place: int) -> int:
        """A place as it is told to people."""
        return place

    def gather(self, index: np.ndarray, n: int, v: int) -> list[np.ndarray]:
        """v words of n bytes at each place (in bytes)."""
        size = n * v
        if size > 16:
            parts = (self.gather(index + k, n, 16 // n) for k in range(0, size, 16))
            return [word for part in parts for word in part]
        got = self.words[size].take(index >> SHIFT[size], mode="clip")
        if v == 1:
            return [got]
        return list(got.view(UNSIGNED[n]).reshape(-1, v).T.copy())

    def unwritten(self, index: np.ndarray, size: int) -> np.ndarray | None:
        """Which places hold bytes nobody wrote; None: all are written."""
        step, bad = min(size, 8), False
        for k in range(0, size, step):
            place = (index + k if k else index) >> SHIFT[step]
            wrong = self.shadow_words[step].take(place, mode="clip") != WRITTEN[step]
            bad = wrong | bad if k else wrong
        return bad if bad.any() else None

    def scatter(self, index: np.ndarray, values: np.ndarray, size: int, written: int = 1) -> None:
        """Rows of `values` ([k, size] bytes, contiguous) to their places."""
        if size > 16:
            raw = values.view(np.uint8).reshape(-1, size)
            for k in range(0, size, 16):
                self.scatter(index + k, np.ascontiguousarray(raw[:, k : k + 16]), 16, written)
            return
        place = index >> SHIFT[size]
        self.words[size][place] = values.view(WORDS[size]).reshape(-1)
        self.mark(index, size, written)

    def mark(self, index: np.ndarray, size: int, written: int) -> None:
        step = min(size, 8)
        for k in range(0, size, step):
            place = (index + k if k else index) >> SHIFT[step]
            self.shadow_words[step][place] = WRITTEN[step] if written else 0
        if not written:
            self.whole = False


class Allocation(Bytes):
    """Bytes of the process that a kernel may touch: address up to address + size."""

    def __init__(self, address: int, size: int, name: str, initialised: bool):
        start = address & ~15
        length = -(-(address + size - start) // 16) * 16
        raw = (ctypes.c_uint8 * length).from_address(start)
        super().__init__(start, np.frombuffer(raw, np.uint8), initialised)
        self.address, self.size, self.name = address, size, name

    def of(self, address: int, size: int) -> np.ndarray:
        return self.shadow[address - self.start : address - self.start + size]

    def offset(self, place: int) -> int:
        return place + self.start - self.address

    def __str__(self) -> str:
        name = f"{self.name!r} " if self.name else ""
        return f"buffer {name}of {self.size} bytes"


class Memory:
    """Allocations by address."""

    def __init__(self):
        self.addresses: list[int] = []
        self.allocations: list[Allocation] = []

    def add(self, address: int, size: int, name: str = "", initialised: bool = True) -> None:
        if size == 0:
            return
        at = bisect.bisect_right(self.addresses, address)
        for other in self.allocations[max(at - 1, 0) : at + 1]:
            if address < other.address + other.size and other.address < address + size:
                raise PtxError(f"{size} bytes at {address:#x} overlap the {other}")
        self.addresses.insert(at, address)
        self.allocations.insert(at, Allocation(address, size, name, initialised))

    def remove(self, address: int) -> None:
        at = bisect.bisect_left(self.addresses, address)
        if at == len(self.addresses) or self.addresses[at] != address:
            raise PtxError(f"no buffer starts at {address:#x}")
        del self.addresses[at], self.allocations[at]

    def at(self, address: int) -> Allocation | None:
        """The last allocation that starts at or below an address."""
        k = bisect.bisect_right(self.addresses, address) - 1
        return self.allocations[k] if k >= 0 else None

    def _holding(self, address: int, size: int) -> Allocation:
        found = self.at(address)
        if found is None or address + size > found.address + found.size:
            raise PtxError(f"{size} bytes at {address:#x} lie in no buffer")
        return found

    def initialise(self, address: int, size: int) -> None:
        if size:
            self._holding(address, size).of(address, size)[:] = 1

    def is_initialised(self, address: int, size: int) -> bool:
        return size == 0 or bool(self._holding(address, size).of(address, size).all())


class Scratch(Bytes):
    """The same number of bytes for each unit in flight: shared of blocks, local of lanes."""

    def __init__(self, name: str, size: int, units: np.ndarray, data: np.ndarray | None = None):
        self.name, self.size = name, size
        self.stride = max(16, -(-size // 16) * 16)
        count = int(units[-1]) + 1
        room = np.empty(count * self.stride + 16, np.uint8)
        room = room[-room.ctypes.data % 16 :][: count * self.stride]
        room[:] = 0xFF
        if data is not None:
            room[:size] = data
        super().__init__(0, room, data is not None)
        self.base = units.astype(np.int64) * self.stride  # by lane

    def offset(self, place: int) -> int:
        return place % self.stride

    def __str__(self) -> str:
        return self.name
