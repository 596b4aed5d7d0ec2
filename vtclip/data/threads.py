# SPDX-License-Identifier: Apache-2.0
"""Cores divided between decoding threads and the computation that they feed.

While a batch is computed, decoding uses the cores that the computation leaves free; while the
computation waits for a batch, decoding uses them all. If there were more running threads than
cores, every decoded image would stop one thread of a parallel loop and so, at the loop's end, all.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, TypeVar

from vtclip.environment import process_number


def num_cores() -> int:
    """The cores this process may use: its share, where torchrun started several processes."""
    try:
        count = len(os.sched_getaffinity(0))
    except AttributeError:  # not on every system
        count = os.cpu_count() or 1
    return max(1, count // process_number("LOCAL_WORLD_SIZE", 1))


class Cores:
    """At most `total` threads decode at once, and `total - computing` during a computation."""

    def __init__(self, total: int, computing: int) -> None:
        self.total, self.spare = max(1, total), max(0, total - computing)
        self._limit, self._running = self.spare, 0
        self._changed = threading.Condition()

    @contextmanager
    def decoding(self) -> Iterator[None]:
        """One decoding thread's piece of work, which begins when a core is free for it."""
        with self._changed:
            self._changed.wait_for(lambda: self._running < self._limit)
            self._running += 1
        try:
            yield
        finally:
            with self._changed:
                self._running -= 1
                self._changed.notify_all()

    @contextmanager
    def lent(self) -> Iterator[None]:
        """While the computation waits, all cores decode; the block's end returns its own."""
        self._set_limit(self.total)
        yield
        self._set_limit(self.spare)
        with self._changed:
            self._changed.wait_for(lambda: self._running <= self.spare)

    def close(self) -> None:
        """Nothing more is computed: every waiting thread goes on."""
        self._set_limit(self.total)

    def _set_limit(self, limit: int) -> None:
        with self._changed:
            self._limit = limit
            self._changed.notify_all()


Item = TypeVar("Item")


Result = TypeVar("Result")


def decode_pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(min(16, num_cores()), thread_name_prefix="vtclip-decode")


def ahead(
    pool: ThreadPoolExecutor, work: Callable[[Item], Result], items: Iterable[Item], depth: int
) -> Iterator[Result]:
    """work(item) in order, with at most `depth` results waiting."""
    pending: deque[Future[Result]] = deque()
    try:
        for item in items:
            pending.append(pool.submit(work, item))
            if len(pending) >= depth:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        for future in pending:
            future.cancel()


def progress_bar(total: int, what: str, progress: bool, unit: str = "img") -> Any:
    """A bar with the time left, on stderr where it is a terminal; `update` moves it."""
    from tqdm import tqdm

    # disable=None: silent where the output is no terminal
    return tqdm(total=total, desc=what, unit=unit, delay=1.0, leave=False,
                disable=None if progress else True)  # fmt: skip
