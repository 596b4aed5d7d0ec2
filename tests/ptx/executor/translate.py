# SPDX-License-Identifier: Apache-2.0
"""A kernel's basic blocks as Python functions over arrays of lanes.

f(R, M, m): R holds the registers, M is the machine, m the mask of active lanes (None: all). In a
block registers are local variables; at its end those that live on are written back, under the mask.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass

import numpy as np

from . import numeric, opcodes, types
from .parse import Address, Instruction, Kernel, Pair
from .report import PtxError, Unsupported

# generic addresses: where each space begins, up to twice that
WINDOWS = {"shared": 1 << 57, "global": -(1 << 63), "local": 1 << 58, "param": 1 << 56}
BRANCHES = {"bra", "ret", "exit", "trap"}
# before these a warp waits until its lanes stand together
WARP_LEVEL = {"shfl", "mma", "ldmatrix", "stmatrix", "vote", "match", "redux", "elect", "wgmma"}
NO_DESTINATION = {"bar", "barrier", "bra", "nanosleep", "setmaxnreg", "cp", "fence"}
SPECIAL = {"%laneid", "%warpid", "%dynamic_smem_size", "%total_smem_size"}
# clusters are of one block; clocks stand still
CONSTANT = {r"%cluster_n": 1, r"%cluster": 0, r"%(clock|globaltimer|n?smid)": 0}
ENVIRONMENT = {k: v for k, v in (vars(types) | vars(numeric)).items() if k[0] != "_"}


def is_barrier(i: Instruction) -> bool:
    return i.base in ("bar", "barrier") and not {"warp", "arrive"} & set(i.parts)


def is_plain(i: Instruction) -> bool:
    """A move of one register or value."""
    return i.base == "mov" and all(isinstance(x, str) for x in i.operands)


@dataclass
class Block:
    """Instructions start to end; `kind` says how it ends: next, branch, barrier, exit."""

    start: int
    end: int
    kind: str = "next"
    target: int = 0
    predicated: bool = False
    warp_level: bool = False
    source: str = ""
    constants: dict | None = None
    function: object = None
    reduction: tuple[str, int, str] | None = None  # of bar.red: operation, register, type
    always: np.ndarray | None = None  # instructions reached whenever the block is


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

    # ---- blocks
    def _cut(self) -> list[Block]:
        code, labels = self.body.code, self.body.labels
        starts = {0, *(labels[i.operands[0]] for i in code if i.base == "bra")}
        starts |= {k + 1 for k, i in enumerate(code) if i.base in BRANCHES or is_barrier(i)}
        edges = sorted(s for s in starts if s < len(code)) + [len(code)]
        blocks = [Block(a, b) for a, b in zip(edges, edges[1:], strict=False)]
        place = {block.start: n for n, block in enumerate(blocks)}
        place[len(code)] = len(blocks)
        for block in blocks:
            body = code[block.start : block.end]
            last = body[-1]
            block.warp_level = any(
                i.base in WARP_LEVEL or i.base == "bar" and not is_barrier(i) for i in body
            )
            block.predicated = last.predicate is not None
            if last.base == "bra":
                block.kind, block.target = "branch", place[labels[last.operands[0]]]
            elif last.base in BRANCHES:
                block.kind = "exit"
            elif is_barrier(last):
                block.kind = "barrier"
            # under a predicate loads and stores count as reached only where it holds
            memory = ("ld", "st", "atom", "red")
            always = np.array([not (i.predicate and i.base in memory) for i in body])
            block.always = block.start + np.flatnonzero(always)
        blocks.append(Block(len(code), len(code), "exit", always=np.array([], int)))
        return blocks

    def reads_and_writes(self, i: Instruction) -> tuple[set[str], set[str]]:
        reads, writes = set(), set()
        for n, operand in enumerate(i.operands):
            kind, words = type(operand), (operand,)
            if kind is tuple:
                words = operand
            elif kind is Address:
                words = (operand.base, *operand.coordinates)
            elif kind is Pair:
                words = (operand.first, operand.second)
            written = n == 0 and kind is not Address and i.base not in NO_DESTINATION
            words = [w.lstrip("!") for w in words]
            (writes if written else reads).update(w for w in words if w in self.index)
        if i.predicate:
            reads.add(i.predicate)
        if i.predicate or i.base == "wgmma":
            reads |= writes
        if i.base in ("bar", "barrier") and "red" in i.parts:
            writes = {i.operands[0]}
        return reads, writes

    def _live_out(self) -> list[set[str]]:
        """Registers read after each block."""
        used: list[set[str]] = [set() for _ in self.blocks]
        defined: list[set[str]] = [set() for _ in self.blocks]
        for block, before, done in zip(self.blocks, used, defined, strict=True):
            for i in self.body.code[block.start : block.end]:
                reads, writes = self.reads_and_writes(i)
                before |= reads - done
                done |= writes
        # what one block alone touches is not followed
        touched = Counter(r for a, b in zip(used, defined, strict=True) for r in a | b)
        wide = {r for r, n in touched.items() if n > 1}
        used, defined = ([x & wide for x in y] for y in (used, defined))
        count, follow = len(self.blocks), []
        for k, block in enumerate(self.blocks):
            falls = block.kind in ("next", "barrier") or block.predicated and k + 1 < count
            follow.append([block.target] * (block.kind == "branch") + [k + 1] * falls)
        live_in, live_out = used, [set() for _ in range(count)]
        changed = True
        while changed:
            changed = False
            for k in reversed(range(count)):
                out = set().union(*(live_in[a] for a in follow[k]))
                if len(out) > len(live_out[k]):
                    live_out[k], changed = out, True
                    live_in[k] = live_in[k] | (out - defined[k])
        return live_out

    # ---- code
    def _translate(self, block: Block, live: set[str]) -> None:
        from .effects import Effects  # which needs Writer

        writer = Effects(self)
        result = "None"
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
        kept = [(f"R[{self.index[r]}]", writer.local(r)) for r in writer.defined if r in live]
        lines = ["def f(R, M, m):"]
        lines += [f"    {writer.local(r)} = R[{self.index[r]}]" for r in writer.live_in]
        lines += [f"    {line}" for line in writer.lines]
        if kept:
            lines.append("    if m is None:")
            lines += [f"        {place} = {value}" for place, value in kept]
            lines.append("    else:")
            lines += [f"        {place} = where(m, {value}, {place})" for place, value in kept]
        block.source = "\n".join([*lines, f"    return {result}"])
        block.constants = writer.constants

    def function(self, block: Block):
        """The block's Python function, compiled when it is first reached."""
        environment = ENVIRONMENT | block.constants
        exec(compile(block.source, f"<{self.kernel.name}: {block.start}>", "exec"), environment)
        block.function = environment["f"]
        return block.function


class Writer:
    """Python lines of one basic block: operands, destinations and rows of the table."""

    def __init__(self, program: Program):
        self.program, self.lines, self.temporaries = program, [], 0
        self.live_in: dict[str, None] = {}  # in order
        self.defined: dict[str, None] = {}
        self.constants: dict[str, object] = {}
        self.known: dict[tuple, str] = {}

    def emit(self, line: str) -> None:
        self.lines.append(line)

    def temporary(self) -> str:
        self.temporaries += 1
        return f"x{self.temporaries}"

    def local(self, register: str) -> str:
        return f"r{self.program.index[register]}"

    def register(self, name: str) -> str:
        if name not in self.defined:
            self.live_in[name] = None
        return self.local(name)

    def constant(self, value) -> str:
        key = (type(value), np.asarray(value).tobytes())
        if key not in self.known:
            self.known[key] = f"k{len(self.known)}"
            self.constants[self.known[key]] = value
        return self.known[key]

    # ---- operands
    def read(self, operand: str, kind: str) -> str:
        """Python expression of an operand seen as a PTX type."""
        want = types.NAMES[kind]
        if kind == "pred":
            if operand.startswith("!"):
                return f"(~{self.register(operand[1:])})"
            if operand in self.program.index:
                return self.register(operand)
            return self.constant(np.bool_(int(operand, 0) != 0))
        if operand in self.program.index:
            have, name = self.program.body.registers[operand], self.register(operand)
            if have == want:
                return name
            if types.size(have) == types.size(want):
                return f"{name}.view({want})"
            if types.size(have) < types.size(want):
                raise PtxError(f"operand {operand} is narrower than {kind}")
            if have[0] == "f":
                name = f"{name}.view(i{have[1:]})"
            return f"{name}.astype({want})"
        if operand.startswith("%"):
            return self._special(operand, want)
        if operand in self.program.symbols:
            return self.constant(np.dtype(want).type(self.program.symbols[operand][1]))
        return self.constant(types.immediate(operand, want))

    def _special(self, name: str, want: str) -> str:
        if name in SPECIAL or re.match(r"%n?(tid|ctaid)\.[xyz]$", name):
            text = f"M.special[{name!r}]"
            return text if want == "i4" else f"{text}.astype({want})"
        for pattern, value in CONSTANT.items():
            if re.match(pattern, name):
                return self.constant(np.dtype(want).type(value))
        raise PtxError(f"special register {name}")

    def predicate(self, i: Instruction) -> str | None:
        if i.predicate is None:
            return None
        return f"(~{self.register(i.predicate)})" if i.negated else self.register(i.predicate)

    def mask(self, i: Instruction) -> str:
        """Lanes on which an effect takes place."""
        p = self.predicate(i)
        return "m" if p is None else f"({p} if m is None else {p} & m)"

    def write(self, register: str, value: str, have: str, i: Instruction) -> None:
        """Assigns a value of NumPy type `have` to a register."""
        if register == "_":
            return
        want = self.program.body.registers[register]
        if types.size(have) < types.size(want):
            have = f"i{types.size(want)}"
            value = f"({value}).astype({have})"
        if have != want:
            same = types.size(have) == types.size(want)
            value = f"({value}).{'view' if same else 'astype'}({want})"
        p, name = self.predicate(i), self.local(register)
        if p is not None:
            value = f"where({p}, {value}, {self.register(register)})"
        self.emit(f"{name} = {value}")
        self.defined[register] = None

    # ---- halves
    def widened(self, operand: str, kind: str) -> str:
        """A half or pair of halves in float32; pairs as [N, 2]."""
        text = self.read(operand, kind)
        text = f"halves({text})" if kind.endswith("x2") else text
        return f"f32_of_{kind.removesuffix('x2')}({text})"

    def narrowed(self, text: str, kind: str) -> str:
        text = f"{kind.removesuffix('x2')}_bits({text})"
        return f"packed({text})" if kind.endswith("x2") else text

    # ---- rows of the table
    def instruction(self, i: Instruction, pc: int) -> None:
        if self.program.accumulators and i.base != "wgmma":
            self._watch_accumulators(i, pc)
        special = getattr(self, f"op_{i.base}", None)
        if special is not None:
            special(i, pc)
            return
        kind = next(iter(i.types()), "b32")
        row = opcodes.row(i.parts, kind)
        unknown = set(i.parts[1:]) - opcodes.MODIFIERS - types.TYPES
        if row is None or unknown:
            raise PtxError(f"modifiers {sorted(unknown)}" if unknown else "opcode")
        mode = next((p for p in i.parts if p in ("rz", "rm", "rp")), None)
        if mode:
            if kind != "f32" or i.base not in opcodes.ROUNDED:
                raise PtxError("rounding")
            row = (f"rounded32({opcodes.ROUNDED[i.base]}, {mode!r})", *row[1:])
        self._by_row(i, row, kind)

    def _watch_accumulators(self, i: Instruction, pc: int) -> None:
        reads, writes = self.program.reads_and_writes(i)
        if is_plain(i):
            if (reads | writes) & self.program.accumulators:
                self.emit(f"M.accumulator_moved({i.operands[0]!r}, {i.operands[1]!r})")
            return
        for name in sorted(reads & self.program.accumulators):
            self.emit(f"M.accumulator_read({name!r}, {self.mask(i)}, {pc})")

    def _by_row(self, i: Instruction, row: tuple[str, str, str], kind: str) -> None:
        template, letters, result = row
        if kind[0] == "b" and kind not in types.HALVES and i.base == "shr":
            kind = f"u{kind[1:]}"
        half = kind in types.HALVES and i.base != "selp"
        if kind in types.HALVES and not half:
            kind = f"s{types.bits(kind)}"
        kinds = {"t": kind, "s": types.signless(kind), "u": "u32", "i": "s32", "p": "pred"}
        kinds["n"] = f"u{types.bits(kind)}"
        if "w" in letters + result:
            kinds["w"] = f"{kind[0]}{2 * int(kind[1:])}"
        sources = [
            (self.widened if half and letter in "ts" else self.read)(operand, kinds[letter])
            for letter, operand in zip(letters, i.operands[1:], strict=True)
        ]
        names = {"t": "f4" if half else types.NAMES[kinds["s"]]}
        names["w"] = types.NAMES[kinds["w"]] if "w" in kinds else ""
        value = f"({template.format(*sources, **names)})"
        value = f"np.maximum({value}, f4(0))" if "relu" in i.parts else value
        value = f"np.fmin(np.fmax({value}, 0), 1)" if "sat" in i.parts else value
        value = self.narrowed(value, kind) if half and result in "ts" else value
        self.write(i.operands[0], value, types.NAMES[kinds[result]], i)
