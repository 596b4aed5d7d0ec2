# SPDX-License-Identifier: Apache-2.0
"""A kernel's basic blocks as Python functions over arrays of lanes.

f(R, M, m): R holds the registers, M is the machine, m the mask of active lanes (None: all). In a
block registers are local variables; at its end those that live on are written back, under the mask.
"""

import re
from dataclasses import dataclass

import numpy as np

from . import numeric, types
from .effects import Effects, is_barrier
from .parse import Address, Instruction, Kernel, listed
from .report import PtxError, Unsupported
from .writer import is_plain

BRANCHES = {"bra", "ret", "exit", "trap"}
# before these a warp waits until its lanes stand together
WARP_LEVEL = {"shfl", "mma", "ldmatrix", "stmatrix", "vote", "match", "redux", "elect", "wgmma"}
NO_DESTINATION = {"bar", "barrier", "bra", "nanosleep", "setmaxnreg", "cp", "fence"}
MEMORY = {"ld", "st", "atom", "red"}
ENVIRONMENT = {k: v for k, v in (vars(types) | vars(numeric)).items() if k[0] != "_"}


@dataclass
class Block:
    """Instructions start to end; `kind` says how it ends: next, branch, barrier, exit."""

    start: int
    end: int
    always: np.ndarray  # instructions reached whenever the block is
    kind: str = "next"
    target: int = 0
    predicated: bool = False
    warp_level: bool = False
    source: str = ""
    constants: dict | None = None
    function: object = None
    reduction: tuple[str, int, str] | None = None  # of bar.red: operation, register, type


class Program:
    """Basic blocks of a kernel, its registers and its variables' places."""

    def __init__(self, kernel: Kernel):
        self.kernel, self.body = kernel, kernel.body
        self.index = {name: i for i, name in enumerate(self.body.registers)}
        self.zeros = [np.dtype(t).type(0) for t in self.body.registers.values()]
        self.symbols: dict[str, tuple[str, int]] = {}  # name to (space, address)
        self.dynamic_start = 0  # of shared memory
        self._place_variables()
        self.asynchronous = any(i.base == "wgmma" or "bulk" in i.parts for i in self.body.code)
        self.accumulators = self._accumulators()
        self.blocks = self._cut()
        for block, live in zip(self.blocks, self._live_out(), strict=True):
            self._translate(block, live)

    def _place_variables(self) -> None:
        module, variables, used = self.kernel.module, self.body.variables, {"shared": 0, "local": 0}
        words = set(re.findall(r"[\w$]+", module.text[slice(*self.kernel.span)]))
        variables |= {k: v for k, v in module.variables.items() if k in words}
        # dynamic shared memory, of size 0 here, comes last
        for v in sorted(variables.values(), key=lambda v: v.space == "shared" and not v.size):
            if v.space in used:
                alignment = v.alignment if v.size else max(v.alignment, 16)
                at = -(-used[v.space] // alignment) * alignment
                self.dynamic_start = self.dynamic_start if v.size else at
                used[v.space] = at + v.size
            else:
                at = module.place(v)
            self.symbols[v.name] = (v.space if v.space in used else "global", at)
        self.static_shared, self.local_bytes = used["shared"], used["local"]
        self.dynamic_start = self.dynamic_start or self.static_shared
        self.symbols |= {p.name: ("param", p.offset) for p in self.kernel.parameters}

    def _accumulators(self) -> set[str]:
        """Registers that wgmma writes, and those they are moved to."""
        code = self.body.code
        found = {r for i in code if i.parts[:2] == ("wgmma", "mma_async") for r in i.operands[0]}
        moves = [i.operands for i in code if is_plain(i)]
        while more := {to for to, source in moves if source in found} - found:
            found |= more
        return found

    def _cut(self) -> list[Block]:
        code, labels = self.body.code, self.body.labels
        starts = {0, len(code), *(labels[i.operands[0]] for i in code if i.base == "bra")}
        starts |= {k + 1 for k, i in enumerate(code) if i.base in BRANCHES or is_barrier(i)}
        edges = sorted(starts)
        place, blocks = {start: n for n, start in enumerate(edges)}, []
        for start, end in zip(edges, edges[1:], strict=False):
            body, last = code[start:end], code[end - 1]
            # under a predicate loads and stores count as reached only where it holds
            always = np.array([not (i.predicate and i.base in MEMORY) for i in body])
            block = Block(start, end, start + np.flatnonzero(always))
            arrives = (i.base == "bar" and not is_barrier(i) for i in body)
            block.warp_level = any(arrives) or any(i.base in WARP_LEVEL for i in body)
            block.predicated = last.predicate is not None
            if last.base == "bra":
                block.kind, block.target = "branch", place[labels[last.operands[0]]]
            elif last.base in BRANCHES or is_barrier(last):
                block.kind = "exit" if last.base in BRANCHES else "barrier"
            blocks.append(block)
        return [*blocks, Block(len(code), len(code), np.array([], int), "exit")]

    def reads_and_writes(self, i: Instruction) -> tuple[set[str], set[str]]:
        """Registers; under a predicate, and by wgmma, old values live on."""
        reads, writes = {i.predicate}, set()
        for n, operand in enumerate(i.operands):
            written = n == 0 and type(operand) is not Address and i.base not in NO_DESTINATION
            (writes if written else reads).update([w.lstrip("!") for w in listed(operand)])
        if is_barrier(i) and "red" in i.parts:
            writes = {i.operands[0]}
        if i.predicate or i.base == "wgmma":
            reads |= writes
        return reads & self.index.keys(), writes & self.index.keys()

    def _live_out(self) -> list[int]:
        """Registers read after each block, as the bits of a number."""
        live_in, defined, follow = [], [], []
        for k, block in enumerate(self.blocks):
            before, done = set(), set()
            for i in self.body.code[block.start : block.end]:
                reads, writes = self.reads_and_writes(i)
                before |= reads - done
                done |= writes
            live_in.append(sum(1 << self.index[r] for r in before))
            defined.append(sum(1 << self.index[r] for r in done))
            falls = block.kind in ("next", "barrier") or block.predicated
            follow.append([block.target] * (block.kind == "branch") + [k + 1] * falls)
        live_out, changed = [0] * len(self.blocks), True
        while changed:
            changed = False
            for k in reversed(range(len(self.blocks))):
                out = 0
                for after in follow[k]:
                    out |= live_in[after]
                if out != live_out[k]:
                    live_out[k], changed = out, True
                    live_in[k] |= out & ~defined[k]
        return live_out

    def _translate(self, block: Block, live: int) -> None:
        writer, result = Effects(self), "None"
        for pc in range(block.start, block.end):
            i = self.body.code[pc]
            try:
                if pc == block.end - 1 and block.kind != "next":
                    result = writer.ending(i, pc, block)
                else:
                    writer.instruction(i, pc)
            except (LookupError, ValueError, StopIteration, TypeError, PtxError) as e:
                opcode = ".".join(i.parts)
                raise Unsupported(f"line {i.line}: {opcode} is not modelled ({e}): {i.text}") from e
        kept = [k for k in map(self.index.get, writer.defined) if live >> k & 1]
        lines = [f"r{k} = R[{k}]" for k in map(self.index.get, writer.live_in)] + writer.lines
        if kept:
            lines += ["if m is None:", *(f"    R[{k}] = r{k}" for k in kept)]
            lines += ["else:", *(f"    R[{k}] = where(m, r{k}, R[{k}])" for k in kept)]
        block.source = "\n    ".join(["def f(R, M, m):", *lines, f"return {result}"])
        block.constants = writer.constants

    def function(self, block: Block):
        """The block's Python function, compiled when it is first reached."""
        environment = ENVIRONMENT | block.constants
        exec(compile(block.source, f"<{self.kernel.name}: {block.start}>", "exec"), environment)
        block.function = environment["f"]
        return block.function
