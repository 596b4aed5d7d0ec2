# SPDX-License-Identifier: Apache-2.0
"""Interleaved timing of several providers of one result, on fixed threads.

Every round runs each provider once, in turn, so that a machine that slows down slows all of them.
Quote medians and the ratio of medians. On a GPU the L2 cache is flushed before each call, and the
time is between CUDA events.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch


@dataclass
class Timing:
    """Seconds of each round, and the peak memory of one call above what was held before it."""

    seconds: list[float] = field(default_factory=list)
    peak_bytes: int = 0

    def quantile(self, q: float) -> float:
        ordered = sorted(self.seconds)
        return ordered[min(int(q * len(ordered)), len(ordered) - 1)]


class _Clock:
    def __init__(self, device: str) -> None:
        self.cuda = device == "cuda"
        if self.cuda:
            self.flush = torch.empty(256 * 2**20, dtype=torch.int8, device="cuda")

    def seconds(self, call: Callable[[], object]) -> float:
        if not self.cuda:
            start = time.perf_counter()
            call()
            return time.perf_counter() - start
        self.flush.zero_()
        start_event, end_event = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start_event.record()
        call()
        end_event.record()
        torch.cuda.synchronize()
        return start_event.elapsed_time(end_event) / 1000.0


class Captured:
    """A call as a CUDA graph: each call replays it, `result` is what every replay overwrites."""

    def __init__(self, call: Callable[[], object]) -> None:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # what is made at first use must not be captured
            for _ in range(3):
                call()
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.result = call()

    def __call__(self) -> object:
        self.graph.replay()
        return self.result


def kernel_count(call: Callable[[], object]) -> int:
    """Device activities of one call: kernels, and copies and fills, which cost a launch as well."""
    call()
    torch.cuda.synchronize()
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities, acc_events=True) as profile:
        call()
        torch.cuda.synchronize()
    cuda = torch.autograd.DeviceType.CUDA
    return sum(
        event.device_type == cuda and not getattr(event, "is_user_annotation", False)
        for event in profile.events()
    )


def peak_bytes(call: Callable[[], object], device: str) -> int:
    """The most that one call holds at a time of what it takes from torch's allocator.

    On CPU the scratch of kernels (tiles that fit the cache) and MKL's packing buffers are not seen.
    """
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(
        activities=activities, profile_memory=True, acc_events=True
    ) as profile:
        call()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


def interleaved(
    calls: dict[str, Callable[[], object]],
    *,
    device: str = "cpu",
    budget_s: float = 6.0,
    min_rounds: int = 5,
    max_rounds: int = 200,
) -> dict[str, Timing]:
    """Rounds of all calls in turn until `budget_s` is spent, at least `min_rounds`."""
    clock = _Clock(device)
    timings = {name: Timing() for name in calls}
    for name, call in calls.items():  # warm-up, and what one call needs
        call()
        timings[name].peak_bytes = peak_bytes(call, device)
    start = time.perf_counter()
    rounds = 0
    while rounds < min_rounds or (time.perf_counter() - start < budget_s and rounds < max_rounds):
        for name, call in calls.items():
            timings[name].seconds.append(clock.seconds(call))
        rounds += 1
    return timings
