# SPDX-License-Identifier: Apache-2.0
"""The stand-in as a preloaded process sees it; the recorder that hands launches to the executor.

Global memory is the process's own: the blocks that torch took for tensors. Those of before a call
are initialised; of those taken during it, the bytes that the host or a kernel wrote since.
"""

from __future__ import annotations

import ctypes
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from executor import Checks, Memory, Module, launch

POISON = np.uint64(2**64 - 1)  # kPoison of allocations.cpp, eight times
BLOCKS = 1 << 16  # its kSlots


class Standin:
    """The functions of host/*.cpp."""

    def __init__(self) -> None:
        self.library = ctypes.CDLL(None)
        if not hasattr(self.library, "standin_watch"):
            raise RuntimeError(
                "the stand-in is not preloaded: start a child by harness.child.start"
            )
        for name in ("standin_watch", "standin_blocks", "standin_lost"):
            getattr(self.library, name).restype = ctypes.c_uint64
        self._rows = np.zeros((BLOCKS, 3), np.uint64)

    def watch(self, on: bool) -> int:
        """Poisons new blocks, or no more; the serial number of the last block before."""
        return int(self.library.standin_watch(int(on)))

    def blocks(self) -> dict[int, tuple[int, int]]:
        """Serial number -> (address, size) of every block; of two that overlap, the newer."""
        pointer = self._rows.ctypes.data_as(ctypes.c_void_p)
        count = self.library.standin_blocks(pointer, ctypes.c_uint64(BLOCKS))
        if count > BLOCKS or self.library.standin_lost():
            raise RuntimeError(f"more than {BLOCKS} blocks of memory: bounds are not known")
        rows = self._rows[: int(count)]
        rows = rows[np.argsort(rows[:, 0])]
        kept: list[tuple[int, int, int]] = []
        for address, size, serial in rows.tolist():
            if kept and address < kept[-1][0] + kept[-1][1]:
                if serial < kept[-1][2]:
                    continue
                kept.pop()  # freed where `free` of allocations.cpp did not see it
            kept.append((address, size, serial))
        return {serial: (address, size) for address, size, serial in kept}


class Launch(NamedTuple):
    """One launch as it was executed. `key` names the kernel in coverage."""

    key: str
    grid: tuple[int, ...]
    threads: int
    report: Any
    seconds: float
    kernel: Any  # as the executor parsed it


@dataclass
class Recorder:
    """Executes the launches of calls, on the blocks of memory there are."""

    standin: Standin
    launches: list[Launch] = field(default_factory=list)
    error: BaseException | None = None
    edit: Callable[[str, str], str] | None = None  # (key, PTX) -> what is executed instead
    _memory: Memory = field(default_factory=Memory)
    _known: dict[int, tuple[int, int]] = field(default_factory=dict)
    _watched: list[tuple[int, int]] = field(default_factory=list)
    _since: int | None = None
    _parsed: dict[tuple[str, str], Any] = field(default_factory=dict)

    def start(self) -> None:
        """Forgets what was recorded and which bytes are initialised."""
        self.launches, self.error = [], None
        self._memory, self._known, self._watched = Memory(), {}, []

    @contextmanager
    def call(self) -> Iterator[None]:
        """The blocks taken within are uninitialised at first."""
        self._since = self.standin.watch(True)
        try:
            yield
        finally:
            self._watched.append((self._since, self.standin.watch(False)))
            self._since = None
        if self.error is not None:
            error, self.error = self.error, None
            raise error

    def _is_young(self, serial: int) -> bool:
        if self._since is not None and serial > self._since:
            return True
        return any(first < serial <= last for first, last in self._watched)

    def _refresh(self) -> None:
        """The memory's blocks are those there are now, and what the host wrote is initialised."""
        now = self.standin.blocks()
        for serial in self._known.keys() - now.keys():
            self._memory.remove(self._known.pop(serial)[0])
        for serial, (address, size) in now.items():
            young = self._is_young(serial)
            if serial not in self._known:
                self._known[serial] = address, size
                self._memory.add(address, size, f"block {serial}", initialised=not young)
            if young:
                for start, count in _written(address, size):
                    self._memory.initialise(address + start, count)

    def kernel(self, key: str, entry: str, text: str) -> Any:
        """The kernel `entry` of a PTX module, parsed once."""
        if self.edit is not None:
            text = self.edit(key, text)
        found = self._parsed.get((key, text))
        if found is None:
            found = self._parsed[key, text] = Module(text).kernels[entry]
        return found

    def execute(
        self,
        key: str,
        kernel: Any,
        grid: tuple[int, int, int],
        block: tuple[int, int, int],
        parameters: bytes,
        shared_bytes: int,
    ) -> None:
        """Runs one launch and keeps its report."""
        started = time.process_time()
        self._refresh()
        report = launch(
            kernel,
            grid=grid,
            block=block,
            parameters=parameters,
            memory=self._memory,
            shared_bytes=shared_bytes,
            checks=Checks(),
        )
        seconds = time.process_time() - started
        threads = block[0] * block[1] * block[2]
        self.launches.append(Launch(key, grid, threads, report, seconds, kernel))


def _written(address: int, size: int) -> list[tuple[int, int]]:
    """(start, count) of the bytes in groups of eight that are not poison any more.

    Behind every block lies a gap of poison, so that its last group may be read whole.
    """
    groups = -(-size // 8)
    memory = np.frombuffer((ctypes.c_uint8 * (8 * groups)).from_address(address), np.uint64)
    edges = np.flatnonzero(np.diff(np.concatenate(([False], memory != POISON, [False]))))
    starts, ends = 8 * edges[::2], np.minimum(8 * edges[1::2], size)
    return [(int(a), int(b - a)) for a, b in zip(starts, ends, strict=True)]


def entries(text: str) -> dict[str, str]:
    """Entry name -> a module of that entry alone, from a module of many."""
    starts = [
        m.start() for m in re.finditer(r"^(?:\.visible |\.weak )*\.entry ", text, re.MULTILINE)
    ]
    header = text[: starts[0]] if starts else text
    found: dict[str, str] = {}
    for start, end in zip(starts, [*starts[1:], len(text)], strict=True):
        body = text[start:end]
        closed = body.rindex("\n}") + 2
        header += body[closed:]  # what stands between two entries belongs to all
        name = re.search(r"\.entry\s+([\w$]+)", body)
        assert name is not None
        found[name[1]] = body[:closed]
    return {name: f"{header}\n{body}\n" for name, body in found.items()}
