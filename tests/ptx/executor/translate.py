# SPDX-License-Identifier: Apache-2.0
"""A kernel's basic blocks as Python functions over arrays of lanes.

f(R, M, m): R holds the registers, M is the machine, m the mask of active lanes (None: all). In a
block registers are local variables; at its end those that live on are written back, under the mask.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np

from . import numeric, opcodes, types
from .parse import Address, Instruction, Kernel, Pair
from .report import PtxError, Unsupported

SHARED_WINDOW = 1 << 56  # of generic addresses; below, parameters and local memory
LOCAL_WINDOW = 1 << 57
PARAMETER_WINDOW = 1 << 55
BRANCHES = {"bra", "ret", "exit", "trap"}
# before these a warp waits until its lanes stand together
WARP_LEVEL = {"shfl", "mma", "ldmatrix", "stmatrix", "vote", "match", "redux", "elect", "wgmma"}
NO_DESTINATION = {"bar", "barrier", "bra", "nanosleep", "setmaxnreg", "cp", "fence"}
ENVIRONMENT = {k: v for k, v in (vars(types) | vars(numeric)).items() if k[0] != "_"}


def is_barrier(instruction: Instruction) -> bool:
    parts = instruction.parts
    if parts[0] in ("bar", "barrier"):
        return "warp" not in parts and not ("cluster" in parts and "arrive" in parts)
    return False


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
    always: slice | np.ndarray | None = None  # instructions reached whenever the block is

    @property
    def count(self) -> int:
        return self.end - self.start


class Program:
    """Basic blocks of a kernel, its registers and its variables' places."""

    def __init__(self, kernel: Kernel):
        self.kernel, self.body = kernel, kernel.body
        self.index = {name: i for i, name in enumerate(self.body.registers)}
        self.zeros = [
            np.dtype("?" if t == "?" else "i8" if t == "pair" else t).type(0)
            for t in self.body.registers.values()
        ]
        self.symbols: dict[str, tuple[str, int]] = {}  # name to (space, address)
        self.static_shared = self.local_bytes = 0
        self._place_variables()
        self.opcodes = {i.base for i in self.body.code}
        self.opcodes |= {".".join(i.parts[:3]) for i in self.body.code if i.base == "cp"}
        self.accumulators = self._accumulators()
        self.blocks = self._cut()
        live = self._live_out()
        for block, registers in zip(self.blocks, live, strict=True):
            self._translate(block, registers)

    def _place_variables(self) -> None:
        module, text = self.kernel.module, None
        start, end = self.kernel.span
        for name, variable in module.variables.items():
            text = text or set(re.findall(r"[\w$]+", module.text[start:end]))
            if name in text:
                self.body.variables.setdefault(name, variable)
        dynamic = 16
        for name, v in self.body.variables.items():
            if v.space == "shared" and v.size:
                at = -(-self.static_shared // v.alignment) * v.alignment
                self.symbols[name], self.static_shared = ("shared", at), at + v.size
            elif v.space == "local":
                at = -(-self.local_bytes // v.alignment) * v.alignment
                self.symbols[name], self.local_bytes = ("local", at), at + v.size
            elif v.space == "shared":
                dynamic = max(dynamic, v.alignment)
            else:
                if name not in module.data:
                    room = np.zeros(v.size + 256, np.uint8)
                    room = room[-room.ctypes.data % 256 :][: v.size]
                    room[: len(v.data)] = np.frombuffer(v.data, np.uint8)
                    module.data[name] = room
                self.symbols[name] = ("global", module.data[name].ctypes.data)
        self.dynamic_start = -(-self.static_shared // dynamic) * dynamic
        for name, v in self.body.variables.items():
            if v.space == "shared" and not v.size:
                self.symbols[name] = ("shared", self.dynamic_start)
        for parameter in self.kernel.parameters:
            self.symbols[parameter.name] = ("param", parameter.offset)

    def _accumulators(self) -> set[str]:
        """Registers that wgmma writes, and those they are moved to."""
        code = self.body.code
        found = {r for i in code if i.parts[:2] == ("wgmma", "mma_async") for r in i.operands[0]}
        moves = [i.operands for i in code if i.base == "mov" and isinstance(i.operands[1], str)]
        grown = bool(found)
        while grown:
            more = {to for to, source in moves if source in found and isinstance(to, str)} - found
            found |= more
            grown = bool(more)
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
                i.base in WARP_LEVEL or i.parts[:2] == ("bar", "warp") or "arrive" in i.parts[1:2]
                for i in body
            )
            block.predicated = last.predicate is not None
            if last.base == "bra":
                block.kind, block.target = "branch", place[labels[last.operands[0]]]
            elif last.base in BRANCHES:
                block.kind = "exit"
            elif is_barrier(last):
                block.kind = "barrier"
            always = [
                k for k in range(block.start, block.end) if not self._has_effect_under_predicate(k)
            ]
            whole = len(always) == block.count
            block.always = slice(block.start, block.end) if whole else np.array(always)
        blocks.append(Block(len(code), len(code), "exit", always=slice(0, 0)))
        return blocks

    def _has_effect_under_predicate(self, k: int) -> bool:
        i = self.body.code[k]
        return i.predicate is not None and i.base in {"ld", "st", "atom", "red"}

    def reads_and_writes(self, i: Instruction) -> tuple[set[str], set[str]]:
        reads, writes = set(), set()
        for n, operand in enumerate(i.operands):
            written = n == 0 and not isinstance(operand, Address) and i.base not in NO_DESTINATION
            words = operand if isinstance(operand, tuple) else (operand,)
            if isinstance(operand, Address):
                words = (operand.base, *operand.coordinates)
            elif isinstance(operand, Pair):
                words = (operand.first, operand.second)
            for word in words:
                word = word.removeprefix("!")
                if word in self.index:
                    (writes if written else reads).add(word)
        if i.predicate:
            reads.add(i.predicate)
        if i.predicate or i.base == "wgmma":
            reads |= writes
        if i.parts[:2] in (("bar", "red"), ("barrier", "red")):
            word = i.operands[0]
            reads, writes = reads | {word}, {word}
        return reads, writes

    def _live_out(self) -> list[set[str]]:
        """Registers read after each block."""
        used, defined = [], []
        for block in self.blocks:
            before, done = set(), set()
            for i in self.body.code[block.start : block.end]:
                reads, writes = self.reads_and_writes(i)
                before |= reads - done
                done |= writes
            used.append(before)
            defined.append(done)
        n = len(self.blocks)
        follow = []
        for k, block in enumerate(self.blocks):
            after = set()
            if block.kind == "branch":
                after.add(block.target)
            if block.kind in ("next", "barrier") or block.predicated:
                after.add(k + 1)
            follow.append({a for a in after if a < n})
        live_in = [set(u) for u in used]
        live_out: list[set[str]] = [set() for _ in range(n)]
        changed = True
        while changed:
            changed = False
            for k in reversed(range(n)):
                out = set().union(*(live_in[a] for a in follow[k])) if follow[k] else set()
                if len(out) != len(live_out[k]):
                    live_out[k] = out
                    grown = used[k] | (out - defined[k]) | live_in[k]
                    changed |= len(grown) != len(live_in[k])
                    live_in[k] = grown
        return live_out

    # ---- code
    def _translate(self, block: Block, live: set[str]) -> None:
        from .effects import Effects

        writer = Effects(self)
        result = "None"
        for pc in range(block.start, block.end):
            i = self.body.code[pc]
            try:
                if pc == block.end - 1 and block.kind not in ("next",):
                    result = writer.ending(i, pc, block)
                else:
                    writer.instruction(i, pc)
            except Unsupported:
                raise
            except (KeyError, IndexError, ValueError, AttributeError, TypeError, PtxError) as e:
                raise Unsupported(
                    f"line {i.line}: `{i.text}` is not modelled ({type(e).__name__}: {e})"
                ) from e
        lines = ["def f(R, M, m):"]
        lines += [f"    {writer.local(r)} = R[{self.index[r]}]" for r in writer.live_in]
        lines += [f"    {line}" for line in writer.lines]
        kept = [r for r in writer.defined if r in live]
        if kept:
            lines.append("    if m is None:")
            lines += [f"        R[{self.index[r]}] = {writer.local(r)}" for r in kept]
            lines.append("    else:")
            lines += [
                f"        R[{self.index[r]}] = where(m, {writer.local(r)}, R[{self.index[r]}])"
                for r in kept
            ]
        block.source = "\n".join([*lines, f"    return {result}"])
        block.constants = writer.constants

    def function(self, block: Block):
        """The block's Python function, compiled when it is first reached."""
        environment = ENVIRONMENT | block.constants
        name = f"<{self.kernel.name[:60]}: {block.start}>"
        exec(compile(block.source, name, "exec"), environment)
        block.function = environment["f"]
        return block.function


class Writer:
    """Python lines of one basic block: operands, destinations and rows of the table."""

    def __init__(self, program: Program):
        self.program = program
        self.lines: list[str] = []
        self.live_in: dict[str, None] = {}
        self.defined: dict[str, None] = {}
        self.constants: dict[str, object] = {}
        self.known: dict[tuple, str] = {}
        self.temporaries = 0

    def emit(self, line: str) -> None:
        self.lines.append(line)

    def temporary(self) -> str:
        self.temporaries += 1
        return f"x{self.temporaries}"

    def local(self, register: str) -> str:
        return "r_" + re.sub(r"\W", "_", register)

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
        want = types.name(kind)
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
        return self.constant(immediate(operand, want))

    def _special(self, name: str, want: str) -> str:
        if name in ("%clock", "%clock64", "%globaltimer", "%smid", "%nsmid"):
            return self.constant(np.dtype(want).type(0))
        if re.match(r"%(cluster_ctaid|cluster_ctarank|clusterid)\b", name):
            return self.constant(np.dtype(want).type(0))
        if re.match(r"%(cluster_nctaid|cluster_nctarank)\b", name):
            return self.constant(np.dtype(want).type(1))
        if not re.match(
            r"%(tid|ntid|ctaid|nctaid)\.[xyz]$|%(laneid|warpid|lanemask_\w+)$", name
        ) and (name != "%dynamic_smem_size" and name != "%total_smem_size"):
            raise Unsupported(f"special register {name} is not modelled")
        text = f"M.special[{name!r}]"
        return (
            text
            if want == "i4"
            else f"{text}.view(u4)"
            if want == "u4"
            else f"{text}.astype({want})"
        )

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
        if have != want:
            if types.size(have) == types.size(want):
                value = f"({value}).view({want})"
            elif types.size(have) < types.size(want) and want[0] == "i":
                value = f"({value}).astype({want})"
            elif types.size(have) < types.size(want):
                value = f"({value}).astype(i{want[1:]}).view({want})"
            else:
                value = f"({value}).astype({want})"
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
        kinds = i.types()
        kind = kinds[0] if kinds else "b32"
        row = opcodes.row(i.parts, kind)
        unknown = [p for p in i.parts[1:] if p not in opcodes.MODIFIERS | types.TYPES]
        if row is None or unknown:
            raise Unsupported(f"line {i.line}: opcode {'.'.join(i.parts)} is not modelled")
        mode = next((p for p in i.parts if p in ("rz", "rm", "rp")), None)
        if mode and (kind != "f32" or i.base not in opcodes.ROUNDED):
            raise Unsupported(f"line {i.line}: rounding of {'.'.join(i.parts)} is not modelled")
        self._by_row(
            i, (f"rounded32({opcodes.ROUNDED[i.base]}, {mode!r})", *row[1:]) if mode else row, kind
        )

    def _watch_accumulators(self, i: Instruction, pc: int) -> None:
        reads, writes = self.program.reads_and_writes(i)
        if i.base == "mov" and isinstance(i.operands[1], str) and writes:
            if (reads | writes) & self.program.accumulators:
                self.emit(f"M.accumulator_moved({i.operands[0]!r}, {i.operands[1]!r})")
            return
        for name in sorted(reads & self.program.accumulators):
            self.emit(f"M.accumulator_read({name!r}, {self.mask(i)}, {pc})")

    def _by_row(self, i: Instruction, row: tuple[str, str, str], kind: str) -> None:
        template, letters, result = row
        if kind.startswith("b") and kind not in types.HALVES and i.base in ("shr", "min", "max"):
            kind = f"u{kind[1:]}"
        if kind in types.HALVES and i.base == "selp":
            kind = {"f16": "s16", "bf16": "s16"}.get(kind, "s32")
        kinds = {"t": kind, "s": types.signless(kind), "u": "u32", "i": "s32", "p": "pred"}
        if "w" in letters + result:
            kinds["w"] = f"{kind[0]}{2 * int(kind[1:])}"
        half = kind in types.HALVES
        sources = []
        for letter, operand in zip(letters, i.operands[1:], strict=False):
            wide = half and letter in "ts"
            sources.append((self.widened if wide else self.read)(operand, kinds[letter]))
        names = {"t": "f4" if half else types.name(kinds["s"])}
        names["w"] = types.name(kinds["w"]) if "w" in kinds else ""
        if i.base == "lop3":
            names["lut"] = int(i.operands[4], 0)
        if i.base == "dp4a":
            names["signed_a"], names["signed_b"] = (t == "s32" for t in i.types())
        value = f"({template.format(*sources, **names)})"
        shift = i.base in ("shl", "shr") and re.fullmatch(r"\d+", i.operands[2])
        if shift and int(i.operands[2]) < types.bits(kind):
            value = f"({sources[0]} {'<<' if i.base == 'shl' else '>>'} {int(i.operands[2])})"
        if i.base == "prmt" and len(i.parts) == 2 and re.fullmatch(r"\w*", i.operands[3]):
            value = self._permutation(i, sources) or value
        if "relu" in i.parts:
            value = f"np.maximum({value}, f4(0))"
        if "sat" in i.parts:
            value = f"saturate({value})"
        if half and result in "ts":
            value = self.narrowed(value, kind)
        self.write(i.operands[0], value, types.name(kinds[result]), i)

    def _permutation(self, i: Instruction, sources: list[str]) -> str | None:
        try:
            selector = int(i.operands[3].rstrip("U"), 0)
        except ValueError:
            return None
        nibbles = [selector >> 4 * k & 15 for k in range(4)]
        if max(nibbles) > 7:
            return None
        return f"permute_bytes({sources[0]}, {sources[1]}, {nibbles})"


def immediate(text: str, want: str):
    """A literal as a NumPy scalar; hexadecimal floats are bits."""
    dtype = np.dtype(want)
    match = re.fullmatch(r"0([fFdD])([0-9a-fA-F]+)", text)
    if match:
        value = np.array(int(match[2], 16), "u4" if match[1] in "fF" else "u8")
        value = value.view("f4" if match[1] in "fF" else "f8")
        if dtype.kind == "f":
            return value.astype(dtype)[()]
        return value.view(f"i{value.dtype.itemsize}").astype(dtype)[()]
    if not re.match(r"-?\d", text):
        raise PtxError(f"name {text!r} is not known")
    value = int(text.rstrip("U"), 0) if "." not in text else None
    if dtype.kind == "f":
        if value is None:
            return dtype.type(float(text))
        return np.array(value % 2 ** (8 * dtype.itemsize), f"u{dtype.itemsize}").view(dtype)[()]
    wrapped = value % 2 ** (8 * dtype.itemsize)
    return np.array(wrapped, f"u{dtype.itemsize}").view(dtype)[()]
