# SPDX-License-Identifier: Apache-2.0
"""Runs a grid: several blocks at once, all their threads as lanes of arrays.

Lanes that stand at the same basic block form a group. The group of the lowest block runs first, so
that structured code comes together again; before warp-level instructions a warp waits for its
lanes. Barriers open when nothing else can run.
"""

import contextlib
import time
from collections.abc import Sequence

import numpy as np

from .access import Accesses
from .copies import Copies, Proxy
from .memory import Bytes, Memory, Scratch
from .parse import Kernel
from .races import Detector, Stamp, folded
from .report import Checks, Finding, PtxError, Report
from .translate import Program
from .warp import WarpGroups, WarpLevel

LONGEST_WAIT = 2000  # tries of mbarriers while nothing else happens
DEVICE_SHARED = 232448  # bytes: more than any block may have


def launch(
    kernel: Kernel, *, grid: Sequence[int], block: Sequence[int], parameters, memory: Memory,
    shared_bytes: int = 0, checks: Checks | None = None, lanes: int = 2048,
    seconds: float | None = None,
) -> Report:  # fmt: skip
    """Runs a kernel's grid; `shared_bytes` is the dynamic part, `lanes` run at once."""
    if kernel.program is None:
        kernel.program = Program(kernel)
    machine = Machine(kernel.program, grid, block, parameters, memory, shared_bytes, checks)
    with np.errstate(all="ignore"):
        machine.run(lanes, seconds)
    return machine.report


class Machine(Detector, Accesses, WarpLevel, WarpGroups, Copies):
    def __init__(self, program: Program, grid, block, parameters, memory, shared_bytes, checks):
        kernel = program.kernel
        self.program, self.memory, self.checks = program, memory, checks or Checks()
        self.grid, self.block = tuple(grid), tuple(block)
        self.count = int(np.prod(self.block))  # threads of a block that exist
        self.threads = -(-self.count // 32) * 32
        for name, got in (("grid", self.grid), ("block", self.block)):
            if len(got) != 3 or min(got) < 1:
                raise PtxError(f"{name}: wanted three positive extents, got {got}")
        self.raw, wanted = np.frombuffer(bytes(parameters), np.uint8), kernel.parameter_bytes
        if self.raw.size != wanted:
            raise PtxError(f"parameters: {kernel.name} wants {wanted} bytes, got {self.raw.size}")
        limit = int(np.prod(kernel.maximum_threads or kernel.required_threads or (1024,)))
        start = program.dynamic_start if shared_bytes else program.static_shared
        self.shared_bytes = start + shared_bytes
        if self.count > limit:
            raise PtxError(f"block: {kernel.name} has at most {limit} threads, got {self.count}")
        if self.shared_bytes > DEVICE_SHARED:
            raise PtxError(f"shared_bytes: at most {DEVICE_SHARED} in all, got {self.shared_bytes}")
        self.report = Report(np.zeros(kernel.instructions, bool))
        self.executed = self.report.executed
        self.findings: dict[tuple[str, int], Finding] = {}
        self.owner = np.empty(0, np.int64)
        self.logged = [0, 0]  # words of 4 bytes in shared and global memory since the last check
        for name, data in kernel.module.data.items():
            below = memory.at(at := data.ctypes.data)  # another buffer, or it from a launch before
            if name in program.symbols and (below is None or below.address != at):
                memory.add(at, data.size, name)

    def find(self, kind: str, pc: int, message: str, lanes=()) -> None:
        """Notes a fault, at most once for each instruction; `lanes`: their numbers, or a mask."""
        lanes = np.atleast_1d(lanes)
        if lanes.dtype == bool and (lanes := np.flatnonzero(lanes)).size == 0:
            return
        if (kind, pc) not in self.findings:
            i = self.program.body.code[min(pc, len(self.executed) - 1)]
            if lanes.size:
                message = f"{self.thread_name(int(lanes[0]) + self.first)}: {message}"
            self.findings[kind, pc] = Finding(kind, f"`{i.text}`, {message}", i.line, 0)
        self.findings[kind, pc].count += max(1, lanes.size)

    def thread_name(self, thread: int) -> str:
        return f"block {thread // self.threads} thread {thread % self.threads}"

    def run(self, lanes: int, seconds: float | None) -> None:
        total = int(np.prod(self.grid))
        at_once = max(1, lanes // self.threads)
        self.end = time.monotonic() + seconds if seconds else None
        for buffer in self.memory.allocations:
            buffer.accesses = []
            buffer.whole = buffer.whole or bool(buffer.of(buffer.address, buffer.size).all())
        for first in range(0, total, at_once):
            self.prepare(first, min(at_once, total - first))
            self.run_blocks()
            self.check_shared()
        self.check_global(last=True)
        self.report.findings = list(self.findings.values())

    def prepare(self, first_block: int, blocks: int) -> None:
        """State of the blocks that run together."""
        size, warps = blocks * self.threads, self.threads // 32
        self.blocks, self.first = blocks, first_block * self.threads
        self.lanes = np.arange(size)
        self.lane = (self.lanes % 32).astype(np.int32)
        self.warp_of, self.block_of = self.lanes // 32, self.lanes // self.threads
        thread = self.lanes % self.threads
        self.special = self._special(thread, self.block_of + first_block)
        self.shared = Scratch("shared", self.shared_bytes, self.block_of)
        self.spaces = {
            "shared": self.shared,
            "local": Scratch("local", self.program.local_bytes, self.lanes),
            "param": Scratch("param", self.raw.size, 0 * self.lanes, self.raw),
        }
        clock = np.zeros((size // 32, warps + 2), np.int64)
        clock[np.arange(size // 32), np.arange(size // 32) % warps] = 1
        self.stamp = Stamp(np.zeros(size, np.int32), clock)
        self.registers = list(self.program.zeros)
        self.all_lanes = np.ones(size, bool)
        self.alive = self.exists = thread < self.count
        self.whole = bool(self.alive.all())
        self.waits: dict = {}
        self.arrived: dict = {}
        self.ticks = np.zeros((blocks, 3), np.int64)  # of asynchronous work, by engine
        self.prepare_copies()
        self.prepare_groups()
        needed = self.program.asynchronous
        self.proxy = Proxy(self.shared.shadow.size, size) if needed else None

    def _special(self, thread, block) -> dict[str, np.ndarray]:
        special, n = {}, np.int32
        for name, at, extents in (("tid", thread, self.block), ("ctaid", block, self.grid)):
            for axis, extent in zip("xyz", extents, strict=True):
                value = (at % extent).astype(n)
                uniform = name == "ctaid" and self.blocks == 1
                special[f"%{name}.{axis}"] = value[0] if uniform else value
                special[f"%n{name}.{axis}"] = n(extent)
                at = at // extent
        special["%laneid"], special["%warpid"] = self.lane, (thread // 32).astype(n)
        special["%dynamic_smem_size"] = n(self.shared_bytes - self.program.static_shared)
        special["%total_smem_size"] = n(self.shared_bytes)
        return special

    def run_blocks(self) -> None:
        program, report = self.program, self.report
        groups: dict = {0: None if self.whole else self.alive.copy()}
        self.groups, self.delayed, self.stalled = groups, {}, None
        self.stalls = self.idle = 0
        while groups or self.waits:
            if self.end and time.monotonic() > self.end:
                raise PtxError("the time given for the launch is over")
            chosen = self.choose()
            if chosen is None:
                continue
            k, mask = chosen
            block = program.blocks[k]
            active = self.lanes.size if mask is None else int(np.count_nonzero(mask))
            mask = None if active == self.lanes.size else mask
            report.steps += block.end - block.start
            report.thread_instructions += (block.end - block.start) * active
            self.executed[block.always] = True
            function = block.function or program.function(block)
            self.stalled = None
            self.follow(block, k, mask, function(self.registers, self, mask))

    def choose(self):
        """The next group, taken out; before warp-level code only warps that have come whole."""
        groups, blocks = self.groups, self.program.blocks
        ready = sorted(k for k in groups if k not in self.delayed)
        if not ready:
            if self.waits and self.release():
                self.idle = 0
                return None
            self.idle += 1
            if not groups or self.idle > LONGEST_WAIT:
                self.deadlock()
                return None
            ready = [min(groups, key=self.delayed.get)]
        for k in ready:
            mask = groups[k]
            if mask is None or not blocks[k].warp_level:
                return self.take(k, mask)
            lanes = mask.reshape(-1, 32)
            complete = lanes.any(1) & (lanes == self.alive.reshape(-1, 32)).all(1)
            if complete.any():
                return self.take(k, (lanes & complete[:, None]).reshape(-1))
        return self.take(ready[0], groups[ready[0]])

    def take(self, k: int, mask):
        rest = None if mask is None else self.groups[k] & ~mask
        if rest is None or not rest.any():
            del self.groups[k]
            self.delayed.pop(k, None)
        else:
            self.groups[k] = rest
        return k, mask

    def follow(self, block, k: int, mask, result) -> None:
        """Sends the lanes that ran a block on."""
        if block.kind == "next":
            self.join(k + 1, mask)
            return
        if block.kind == "branch" and np.ndim(result) == 0:
            self.join(block.target if result is None or result else k + 1, mask)
            return
        here = self.all_lanes if mask is None else mask
        *barrier, condition = result if block.kind == "barrier" else (result,)
        if block.predicated:
            passing, here = here & ~condition, here & condition
            if passing.any():
                self.join(k + 1, passing if here.any() else mask)
        if not here.any():
            return
        if block.kind == "branch":
            self.join(block.target, here if passing.any() else mask)
        elif block.kind == "exit":
            self.alive = self.alive & ~here
        else:
            name, count, values = barrier
            key = (name, count, k, block.end - 1)
            lanes, _ = self.waits.get(key, (here, None))
            self.waits[key] = (lanes | here, values)

    def join(self, k: int, mask) -> None:
        if self.stalled is not None:
            self.delayed[k] = self.stalled
        else:
            self.delayed.pop(k, None)
        other = self.groups.get(k, mask)
        self.groups[k] = None if mask is None or other is None else other | mask

    def release(self) -> bool:
        """Opens barriers where all have come; whether any did."""
        opened = False
        for name, needed in sorted({key[:2] for key in self.waits}):
            here = {key: wait for key, wait in self.waits.items() if key[:2] == (name, needed)}
            waiting = np.logical_or.reduce([lanes for lanes, _ in here.values()])
            by_block = waiting.reshape(self.blocks, -1)
            come = by_block.sum(1) + self.arrived.get(name, (0,))[0]
            alive = self.alive.reshape(self.blocks, -1).sum(1)
            ready = (by_block.any(1)) & (come == (needed or self.count))
            pc = min(key[3] for key in here)
            late = by_block.any(1) & ~ready & (needed in (0, self.count)) & (come == alive)
            if late.any():
                b = int(np.flatnonzero(late)[0])
                text = f"barrier {name}: {come[b]} of {self.count} threads, the others have exited"
                self.find("barrier", pc, text, np.flatnonzero(late) * self.threads)
                ready |= late
            if ready.any():
                opened = True
                self.open(here, waiting, np.repeat(ready, self.threads), name)
        return opened

    def open(self, waits: dict, waiting, ready, name: int) -> None:
        alive = self.alive.reshape(-1, 32)
        for key, (lanes, values) in waits.items():
            go = lanes & ready
            if not go.any():
                continue
            by_warp = go.reshape(-1, 32)
            part = by_warp.any(1) & ~(by_warp == alive).all(1)
            if part.any() and self.checks.barriers:
                text = f"the barrier is reached by {int(by_warp[part][0].sum())} lanes of a warp"
                self.find("barrier", key[3], text, np.flatnonzero(part) * 32)
            block = self.program.blocks[key[2]]
            if block.reduction:
                self._reduce(block.reduction, values, go)
            self.stalled = None
            self.join(key[2] + 1, None if go.all() else go)
            rest = lanes & ~ready
            if rest.any():
                self.waits[key] = (rest, values)
            else:
                del self.waits[key]
        count, seen = self.arrived.get(name, (0, 0))
        if name in self.arrived:
            done = ready[:: self.threads]
            self.arrived[name] = (np.where(done, 0, count), np.where(done[:, None, None], 0, seen))
        met = waiting & ready
        self.meet(met, seen)
        if (met == self.alive).all():
            self.check_shared()

    def _reduce(self, reduction, values, go) -> None:
        """bar.red: one value for each block from its lanes' predicates."""
        how, register, kind = reduction
        p = np.broadcast_to(values, self.lanes.shape)
        by_block = np.where(go, p, how == "and").reshape(self.blocks, -1)
        got = {"popc": by_block.sum(1), "and": by_block.all(1), "or": by_block.any(1)}[how]
        new = np.repeat(got, self.threads).astype(kind)
        self.registers[register] = np.where(go, new, self.registers[register])

    def deadlock(self) -> None:
        blocks, waits, groups = self.program.blocks, self.waits.items(), self.groups.items()
        stuck = [(key[3], f"at barrier {key[0]}", lanes) for key, (lanes, _) in waits]
        stuck += [(blocks[k].start, "here", self.standing(mask)) for k, mask in groups]
        for pc, place, lanes in stuck:
            self.find("deadlock", pc, f"{int(lanes.sum())} threads wait {place} for ever", lanes)
        for state in (self.waits, self.groups, self.delayed):
            state.clear()

    def meet(self, lanes, seen, wait: bool = True):
        """Lanes that met at a barrier: what each did before happened before what follows.

        Returns what they know together, with those who arrived before without waiting (`seen`).
        """
        warps = self.threads // 32
        clock = self.stamp.clock.reshape(self.blocks, warps, warps + 2).copy()
        come = lanes.reshape(self.blocks, warps, 32).any(2)
        top = np.maximum(seen, np.where(come[:, :, None], clock, 0).max(1, keepdims=True))
        if wait:
            clock = np.where(come[:, :, None], np.maximum(clock, top), clock)
        clock[:, np.arange(warps), np.arange(warps)] += come
        segment = self.stamp.after(lanes) if wait else self.stamp.segment
        self.stamp = Stamp(segment, clock.reshape(-1, warps + 2))
        return top

    @contextlib.contextmanager
    def asynchronously(self, lanes, engine: int):
        """Accesses inside are of asynchronous work that these lanes start."""
        kept, clock = self.stamp, self.stamp.clock.copy()
        for lane in lanes:
            self.ticks[lane // self.threads, engine] += 1
            clock[lane // 32, -engine] = self.ticks[lane // self.threads, engine]
        self.stamp = Stamp(kept.segment, clock)
        yield
        self.stamp = kept

    def waited(self, mask, engine: int, ticks) -> None:
        """These lanes' warps know of asynchronous work up to the ticks of their blocks."""
        clock, warps = self.stamp.clock.copy(), self.standing_warps(mask)
        ticks = ticks[warps * 32 // self.threads]
        clock[warps, -engine] = np.maximum(clock[warps, -engine], ticks)
        self.stamp = Stamp(self.stamp.segment, clock)

    def check_shared(self) -> None:
        log, self.logged[0] = self.shared.accesses, 0
        # asynchronous work that not all have waited for is kept
        known = self.stamp.clock[:, -2:].reshape(self.blocks, -1, 2).min(1)
        self.shared.accesses = [
            a for a in log if a.engine > 0
            and a.stamp.clock[a.lanes[0] // 32, -a.engine]
            > known[a.lanes[0] // self.threads, -a.engine]
        ]  # fmt: skip
        self._report_races(self.shared, log)

    def check_global(self, last: bool = False) -> None:
        self.logged[1] = 0
        for buffer in self.memory.allocations:
            log, buffer.accesses = buffer.accesses, []
            if log:
                self._report_races(buffer, log)
                buffer.accesses = [] if last else folded(log, buffer.shadow.size)

    def _report_races(self, memory: Bytes, log: list) -> None:
        names, code = ("read", "written", "changed by an atomic"), self.program.body.code
        for place, earlier, later, count in self.races(log, memory.shadow.size):
            (pc, thread, kind), (pc2, thread2, kind2) = earlier, later
            text = (
                f"byte {memory.offset(place)} of {memory} is {names[kind]} by "
                f"{self.thread_name(thread)} and {names[kind2]} by {self.thread_name(thread2)} at "
                f"line {code[pc2].line} `{code[pc2].text}`; nothing orders the two"
            )
            self.find("race", pc, text)
            self.findings["race", pc].count += count - 1
