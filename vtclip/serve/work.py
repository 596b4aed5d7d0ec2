# SPDX-License-Identifier: Apache-2.0
"""How many requests are open, decoded and computed at once, and until when each may take.

Bodies are read by the event loop. What is in them is parsed and decoded in a few threads, one
request in each, image by image, and computed by one thread at a time: torch takes all cores for it.
A thread cannot be stopped, so that the place of a request that was given up is free when its thread
has noticed, between two images.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

from vtclip.data.threads import num_cores
from vtclip.serve.limits import AT_ONCE, OPEN, Refusal, busy, too_late

Result = TypeVar("Result")


class Job:
    """One request's work: until when, and whether somebody still waits for it."""

    def __init__(self, timeout: float) -> None:
        self.timeout = timeout
        self._end = time.monotonic() + timeout
        self._given_up = threading.Event()

    @property
    def left(self) -> float:
        """Seconds until the time limit; 0 from then on."""
        return max(0.0, self._end - time.monotonic())

    def give_up(self) -> None:
        self._given_up.set()

    def check(self) -> None:
        """Raises the Refusal where the work is of no use any more."""
        if self._given_up.is_set() or not self.left:
            raise too_late(self.timeout)

    @contextmanager
    def holding(self, lock: threading.Lock) -> Iterator[None]:
        """`lock` held, once it is free."""
        if not lock.acquire(timeout=self.left):
            raise busy("other requests are computed; come again")
        try:
            self.check()
            yield
        finally:
            lock.release()


class Desk:
    """Takes requests in and hands them to threads."""

    def __init__(self, at_once: int | None = None, most_open: int = OPEN) -> None:
        self.at_once = at_once or max(1, min(AT_ONCE, num_cores()))
        self._most_open, self._open = most_open, 0
        self._pool = ThreadPoolExecutor(self.at_once, thread_name_prefix="vtclip-serve")
        self._running = asyncio.Semaphore(self.at_once)
        self._jobs: set[Job] = set()

    @contextmanager
    def place(self, timeout: float) -> Iterator[Job]:
        """A place among the open requests, or a Refusal at once."""
        if self._open >= self._most_open:
            raise busy(f"{self._open} requests are open, the limit; come again")
        self._open += 1
        job = Job(timeout)
        self._jobs.add(job)
        try:
            yield job
        finally:
            self._jobs.discard(job)
            self._open -= 1

    async def read(self, job: Job, body: Awaitable[Result]) -> Result:
        """What a client sends, within the job's time."""
        try:
            return await asyncio.wait_for(body, job.left)
        except asyncio.TimeoutError:
            line = f"the body took more than {job.timeout:g} s, the limit"
            raise Refusal(408, line) from None

    async def run(self, job: Job, work: Callable[[], Result]) -> Result:
        """work() in a thread of its own, when one is free."""
        try:
            await asyncio.wait_for(self._running.acquire(), job.left)
        except asyncio.TimeoutError:
            raise busy("other requests are decoded; come again") from None
        future = asyncio.get_running_loop().run_in_executor(self._pool, work)
        future.add_done_callback(lambda _: self._running.release())
        try:
            return await asyncio.wait_for(asyncio.shield(future), job.left)
        except asyncio.TimeoutError:
            # its own end is of no interest; without this it would be logged as never retrieved
            future.add_done_callback(lambda done: done.cancelled() or done.exception())
            raise too_late(job.timeout) from None
        finally:
            job.give_up()

    def close(self) -> None:
        """Ends what runs as soon as it looks at the clock."""
        for job in self._jobs:
            job.give_up()
        self._pool.shutdown(wait=False, cancel_futures=True)
