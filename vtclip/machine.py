# SPDX-License-Identifier: Apache-2.0
"""The machine a command runs on: device, threads, seconds and memory of each stage.

Memory is the most that the process, or one stage of its work, held at a time.

On a GPU it is what torch's allocator gave out, on a CPU the resident memory of the whole process,
its libraries included. Linux keeps the high-water mark and lets it be reset; where it does not, a
thread looks at the resident memory while the stage runs, and elsewhere a stage has no number.

Where memory runs out, a batch that only passes through a frozen model is taken in smaller parts
(`BatchSize`).
"""

from __future__ import annotations

import logging
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

STATM = Path("/proc/self/statm")
CLEAR_REFS = Path("/proc/self/clear_refs")
SAMPLE_S = 0.02
# what torch and its libraries say when memory runs out, on a GPU and on a CPU
OUT_OF_MEMORY = re.compile(
    r"out of memory|not enough memory|can(no|')t allocate|could not allocate"
    r"|failed to allocate|bad.alloc|ALLOC_FAILED"
    r"|aten::(new_)?empty\W.*API call failed",  # all that torch 2.11 passes on from its stable ABI
    re.IGNORECASE,
)  # fmt: skip
Result = TypeVar("Result")
_before: dict[str, float] = {}  # by device, the most before the counter was last reset


def peak_memory_mb(device: torch.device) -> float | None:
    """Most memory since the start of the process or `reset_peak_memory`; None where unknown."""
    now = _counter(device)
    return None if now is None else max(now, _before.get(str(device), 0.0))


def reset_peak_memory(device: torch.device) -> None:
    """Let `peak_memory_mb` count from now on, where the system can (a GPU, Linux)."""
    if _reset_counter(device):
        _before.pop(str(device), None)


@contextmanager
def stage_peak(name: str, peaks: dict[str, float], device: torch.device) -> Iterator[None]:
    """Note in peaks[name] the most memory held while the block ran, in MB."""
    earlier = peak_memory_mb(device)
    if _reset_counter(device):
        if earlier is not None:
            _before[str(device)] = earlier
        try:
            yield
        finally:
            peak = _counter(device)
            if peak is not None:
                peaks[name] = max(peak, peaks.get(name, 0.0))
    elif STATM.exists():
        with _sampled(name, peaks):
            yield
    else:
        yield


def _counter(device: torch.device) -> float | None:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    try:
        import resource
    except ImportError:  # no such module on Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def _reset_counter(device: torch.device) -> bool:
    """Set the counter to what is held now; returns whether that was possible."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return True
    try:
        CLEAR_REFS.write_text("5")
    except OSError:
        return False
    return True


@contextmanager
def _sampled(name: str, peaks: dict[str, float]) -> Iterator[None]:
    page = os.sysconf("SC_PAGE_SIZE")
    done = threading.Event()

    def sample() -> None:
        held = int(STATM.read_text().split()[1]) * page / 2**20
        peaks[name] = max(held, peaks.get(name, 0.0))

    def watch() -> None:
        while not done.wait(SAMPLE_S):
            sample()

    sample()
    thread = threading.Thread(target=watch, name="vtclip-memory", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        sample()


class OutOfMemory(MemoryError):
    """One row alone does not fit into memory."""


def why_out_of_memory(error: BaseException) -> str:
    """The first line of an error that means that memory ran out; "" for any other error."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return lines[0]
    if isinstance(error, RuntimeError) and OUT_OF_MEMORY.search(str(error)):
        return next(line for line in [*lines, lines[0]] if OUT_OF_MEMORY.search(line))
    return ""


class BatchSize:
    """How many rows pass through a frozen model at a time, halved where memory holds no more.

    rows: None takes as many as there are. what: the word for them in messages.

    Rows are computed alone, whatever they are computed with: the results are those of the whole
    batch but for rounding, because matrix products of other sizes may add in another order.
    """

    def __init__(self, rows: int | None = None, what: str = "images") -> None:
        self.rows, self.what = rows, what

    def map(self, function: Callable[[Tensor], Result], batch: Tensor) -> list[Result]:
        """function(part) of the parts of `batch` [B, ...], in order; OutOfMemory at one row."""
        results: list[Result] = []
        start, too_many = 0, 0
        while start < len(batch) or not results:
            part = batch[start:] if self.rows is None else batch[start : start + self.rows]
            full = ""
            try:
                results.append(function(part))
            except (RuntimeError, MemoryError) as error:
                full = why_out_of_memory(error)
                if not full:
                    raise
            if not full:
                if too_many:
                    logger.warning("memory does not hold %d %s at a time; going on with %d",
                                   too_many, self.what, self.rows)  # fmt: skip
                start, too_many = start + len(part), 0
                continue
            if len(part) < 2:
                raise OutOfMemory(f"not even one of the {self.what} fits into memory ({full})")
            too_many, self.rows = too_many or len(part), len(part) // 2
            if torch.cuda.is_available():  # what the failed attempt took is free but cached
                torch.cuda.empty_cache()
        return results


def check_threads(threads: int | None) -> None:
    if threads is not None and threads < 1:
        raise ValueError(f"threads must be at least 1, got {threads}")


def set_threads(threads: int | None) -> None:
    check_threads(threads)
    if threads is not None:
        torch.set_num_threads(threads)


def choose_device(device: str | torch.device | None) -> torch.device:
    """The named device, or the first GPU where there is one, else the CPU."""
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError:
        raise ValueError(f"device must be cpu, cuda or cuda:N, got {str(device)!r}") from None
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device {chosen}: this torch sees {torch.cuda.device_count()} GPUs")
    if chosen.type not in ("cpu", "cuda"):
        raise ValueError(f"device must be cpu, cuda or cuda:N, got {str(device)!r}")
    return chosen


@contextmanager
def doing(what: str, progress: bool) -> Iterator[None]:
    """A line on stderr, where it is a terminal, that says `what` is done while the block runs."""
    if not progress:
        yield
        return
    from tqdm import tqdm

    with tqdm(desc=f"{what} ...", bar_format="{desc}", leave=False, disable=None):
        yield


@dataclass
class Stopwatch:
    """Seconds per named stage and, where a device is named, the most memory held in each.

    progress: name the running stage on stderr, where it is a terminal.
    """

    device: torch.device | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    memory_mb: dict[str, float] = field(default_factory=dict)
    progress: bool = False

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        start, known = time.perf_counter(), self.device
        peak = nullcontext() if known is None else stage_peak(name, self.memory_mb, known)
        with doing(name, self.progress), peak:
            yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start
