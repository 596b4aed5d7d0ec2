# SPDX-License-Identifier: Apache-2.0
"""Times tiles of the Triton kernels for given shapes, and keeps those that beat the built-in ones.

A job is a launcher call; the tiles it asks for are found by watching it. For each of them the walk
starts at the built-in tile and steps to the fastest neighbour as long as one is faster by MARGIN.
Candidates of one step are timed in turn, ROUNDS times, and compared by their medians. A candidate
that does not compile, does not fit, or whose results differ from the built-in ones is passed over.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

MARGIN = 0.02  # share of the time that a change must save: less is noise
ROUNDS = 3
STEPS = 4  # of one walk
# candidates may sum in another order: relative L2 distance in rounding steps of the products
SLACK = 8.0

Call = Callable[[], Sequence[Tensor]]
Timer = Callable[[Call], float]


class TileRequest(NamedTuple):
    """What a launcher asked `kernels._tiles.choose` for."""

    kind: str
    dtype: torch.dtype
    precision: str
    sizes: tuple[int, ...]
    target: Any

    @property
    def key(self) -> str:
        from vtclip.kernels import _tiles

        name: str = _tiles.entry_name(self.kind, self.dtype, self.precision, self.sizes)
        return name


class Tuned(NamedTuple):
    """A tile that was found, and times in milliseconds of the launcher with the tiles before it."""

    key: str
    tile: tuple[int, ...]
    before: float
    after: float
    tried: int
    dropped: int


@dataclass(frozen=True)
class TileJob:
    """One launcher call, drawn on first use."""

    name: str
    draw: Callable[[], Call]


def gpu_timer(call: Call) -> float:
    """Milliseconds of one call among many of a CUDA graph, without the host's share."""
    from triton.testing import do_bench_cudagraph

    return float(do_bench_cudagraph(call, rep=20, return_mode="median"))


@contextmanager
def tiles_in_use(target: Any, entries: dict[str, tuple[int, ...]]) -> Iterator[None]:
    """Within it launchers take `entries`, and for what these do not hold the built-in tiles."""
    from vtclip.kernels import _tiles

    with _tiles.choosing(_tiles.from_tables({(target.name, target.capability): entries})):
        yield


def tile_requests(call: Call) -> list[TileRequest]:
    """What a call with the built-in tiles asks for, in order, each once."""
    from vtclip.kernels import _tiles

    requests: list[TileRequest] = []
    built_in = _tiles.from_tables({})

    def chooser(*arguments: Any) -> Any:
        if arguments not in requests:
            requests.append(TileRequest(*arguments))
        return built_in(*arguments)

    with _tiles.choosing(chooser):
        call()
    return requests


def same(actual: Sequence[Tensor], expected: Sequence[Tensor], precision: str) -> bool:
    """Whether results differ by no more than another order of summation explains."""
    for a, b in zip(actual, expected, strict=True):
        if not b.is_floating_point():
            continue
        eps = 2.0**-11 if precision == "tf32" else 0.0
        if precision == "ieee":
            eps = 2.0**-20  # sums of thousands of float32
        eps = max(eps, torch.finfo(b.dtype).eps)
        distance = (a.double() - b.double()).norm()
        if not bool(distance <= SLACK * eps * b.double().norm()):
            return False
    return True


def walk(
    call: Call, request: TileRequest, entries: dict[str, tuple[int, ...]], timer: Timer
) -> Tuned:
    """The fastest tile that is reached from the built-in one, with `entries` for other kernels."""
    from vtclip.kernels import _candidates, _tiles

    dtype, sizes, target = request.dtype, request.sizes, request.target
    start = _tiles.built_in(request.kind, dtype, request.precision, sizes, target)
    tile = _tiles.fitted(request.kind, start, sizes)
    broken: set[Any] = set()

    def results(candidate: Any) -> list[Tensor]:
        with tiles_in_use(target, {**entries, request.key: tuple(candidate)}):
            return [tensor.clone() for tensor in call()]

    def milliseconds(candidate: Any) -> float:
        with tiles_in_use(target, {**entries, request.key: tuple(candidate)}):
            return timer(call)

    expected = results(tile)
    first = milliseconds(tile)
    times: dict[Any, float] = {}
    for _ in range(STEPS):
        near = _candidates.neighbours(request.kind, tile, dtype, sizes, target)
        fresh = [candidate for candidate in near if candidate not in times.keys() | broken]
        for candidate in list(fresh):
            if not works(results, candidate, expected, request.precision):
                broken.add(candidate)
                fresh.remove(candidate)
        if not fresh:
            break
        rounds: dict[Any, list[float]] = {candidate: [] for candidate in (tile, *fresh)}
        for _ in range(ROUNDS):
            for candidate, measured in rounds.items():
                measured.append(milliseconds(candidate))
        medians = {candidate: statistics.median(rounds[candidate]) for candidate in rounds}
        times |= medians
        best = fastest(medians, tile)
        if best == tile:
            break
        tile = best
    after = times.get(tile, first)
    return Tuned(request.key, tuple(tile), first, after, len(times), len(broken))


def works(
    results: Callable[[Any], list[Tensor]], candidate: Any, expected: list[Tensor], precision: str
) -> bool:
    """Whether a candidate compiles, fits the device and gives the built-in tile's results."""
    from triton.compiler.errors import CompilationError
    from triton.runtime.errors import OutOfResources, PTXASError

    try:
        return same(results(candidate), expected, precision)
    except (CompilationError, OutOfResources, PTXASError):
        return False


def fastest(times: dict[Any, float], now: Any) -> Any:
    """The key of the least time, or `now` unless that saves MARGIN."""
    best = min(times, key=times.__getitem__)
    return best if times[best] < times[now] * (1.0 - MARGIN) else now


def tune(
    jobs: Iterable[TileJob],
    timer: Timer = gpu_timer,
    report: Callable[[str], object] = lambda line: None,
) -> dict[str, Tuned]:
    """Tiles of all kernels of `jobs` by key; only those that differ from the built-in ones."""
    faster: dict[str, Tuned] = {}
    done: set[str] = set()
    for job in jobs:
        call = job.draw()
        for request in tile_requests(call):
            if request.key in done:
                continue
            done.add(request.key)
            entries = {key: tuned.tile for key, tuned in faster.items()}
            tuned = walk(call, request, entries, timer)
            tiles = f"{tuned.tried} tiles timed, {tuned.dropped} dropped"
            line = f"{job.name}: {request.key}: {tuned.before:.4f} ms built in"
            report(f"{line}, {tuned.after:.4f} ms with {list(tuned.tile)} ({tiles})")
            if tuned.after < tuned.before * (1.0 - MARGIN):
                faster[request.key] = tuned
    return faster
