# SPDX-License-Identifier: Apache-2.0
"""Time of one launch on an H200 from its compiled instructions; within some 25 % at best.

One pass of a block's loop takes, in cycles,

    tensor + max(issued / 0.9, exponentials) + waits

tensor: m64nNk16 of one warp group max(N / 2, 16 + N / 4), the second where A is in shared memory;
issued: warp instructions x warps / 4, as four schedulers issue one each; exponentials: EX2 x 8 x
warps / 4; waits: 200 for barriers and latency, 900 where loads are waited for at once. n blocks on
one multiprocessor, as registers, threads and shared memory let them, hide each other's waits:

    max(T / n x 1.15, tensor / 0.8, issued / 0.85)      per block

132 multiprocessors, 1.75 GHz; never faster than its bytes at 4.0 TB/s. Checked against published
rates of Triton's attention on an H100: 128 x 64 tiles, 8 warps, d = 128 gives 403 TFLOP/s where 407
were measured, d = 64 gives 300 where 290 to 353 were.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil

from loops import Loop

PROCESSORS, CLOCK, BANDWIDTH = 132, 1.75e9, 4.0e12
WAIT, LOAD_WAIT = 200, 900
ISSUE, SHARED_ISSUE, TENSOR, OVERLAP = 0.9, 0.85, 0.8, 1.15
REGISTERS, SHARED, THREADS, BLOCKS = 65536, 227 * 1024, 2048, 32


@dataclass(frozen=True)
class Kernel:
    """What a launch is made of. `body` is the whole kernel, a loop of one trip."""

    name: str
    body: Loop
    warps: int
    registers: int
    shared: int
    blocks: int
    bytes: int

    @property
    def resident(self) -> int:
        """Blocks that one multiprocessor holds."""
        threads = 32 * self.warps
        each = -(-self.registers // 8) * 8 * threads
        shared = self.shared + 1024
        return max(1, min(REGISTERS // each, SHARED // shared, THREADS // threads, BLOCKS))


@dataclass(frozen=True)
class Cycles:
    """Of a block, all passes together."""

    tensor: float = 0.0
    issued: float = 0.0
    exponentials: float = 0.0
    waits: float = 0.0

    def __add__(self, other: Cycles) -> Cycles:
        return Cycles(*(a + b for a, b in zip(self.parts, other.parts, strict=True)))

    @property
    def parts(self) -> tuple[float, float, float, float]:
        return self.tensor, self.issued, self.exponentials, self.waits

    @property
    def alone(self) -> float:
        return self.tensor + max(self.issued / ISSUE, self.exponentials) + self.waits


def tensor_cycles(name: str) -> float:
    """Of one warp's instruction on its own scheduler's tensor core."""
    if name.startswith("HGMMA"):
        N = int(re.search(r"\d+x(\d+)x\d+", name).group(1))
        return max(N / 2, 16 + N / 4) if name.endswith("shared") else N / 2
    if name.startswith("HMMA"):
        return 4.0 if "1688" in name else 8.0  # half of the rate of HGMMA
    return 0.0


def one_pass(loop: Loop, warps: int) -> Cycles:
    """Of a body without the loops inside."""
    counts = loop.counts
    share = warps / 4
    issued = sum(number for name, number in counts.items() if name != "NOP")
    tensor = sum(number * tensor_cycles(name) for name, number in counts.items())
    exponentials = sum(n for name, n in counts.items() if name.startswith("MUFU.EX2"))
    early = any(name.startswith(("LDGSTS", "UTMALDG")) for name in counts)
    loads = early or any(name.startswith("LDG.") for name in counts)
    waits = LOAD_WAIT if loads and (loop.inside or not early) else WAIT
    return Cycles(tensor * share, issued * share, exponentials * 8 * share, waits)


def _bodies(loop: Loop, times: int = 1) -> Iterator[tuple[int, Loop]]:
    times *= 1 if loop.trips is None else loop.trips
    yield times, loop
    for inside in loop.inside:
        yield from _bodies(inside, times)


def cycles(kernel: Kernel) -> tuple[Cycles, float]:
    """(the parts, cycles of one block that has a multiprocessor for itself)."""
    total, alone = Cycles(), 0.0
    for times, loop in _bodies(kernel.body):
        once = one_pass(loop, kernel.warps)
        total += Cycles(*(times * part for part in once.parts))
        alone += times * once.alone
    return total, alone


def seconds(kernel: Kernel) -> float:
    """Of one launch, without the gap before it."""
    parts, alone = cycles(kernel)

    def each(resident: int) -> float:
        if resident == 1:
            return alone
        exponentials = parts.exponentials / SHARED_ISSUE
        return max(
            alone / resident * OVERLAP,
            parts.tensor / TENSOR,
            parts.issued / SHARED_ISSUE,
            exponentials,
        )

    at_once = PROCESSORS * kernel.resident
    full, rest = divmod(kernel.blocks, at_once)
    taken = full * kernel.resident * each(kernel.resident)
    if rest:
        resident = ceil(rest / PROCESSORS)
        taken += resident * each(resident)
    return max(taken / CLOCK, kernel.bytes / BANDWIDTH)
