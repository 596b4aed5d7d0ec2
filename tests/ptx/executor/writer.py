# SPDX-License-Identifier: Apache-2.0
"""Operands, rows of the table, comparisons, moves and conversions as Python expressions."""

import re

import numpy as np

from . import opcodes, types
from .memory import WINDOWS
from .parse import Instruction
from .report import PtxError

SPECIAL = re.compile(r"%(n?(tid|ctaid)\.[xyz]|laneid|warpid|(dynamic|total)_smem_size)")
# clusters are of one block; clocks stand still
CONSTANT = {r"%cluster_n": 1, r"%cluster": 0, r"%(clock|globaltimer|n?smid)": 0}
TO_INTEGER = {"rzi": "np.trunc", "rni": "np.rint", "rmi": "np.floor", "rpi": "np.ceil"}
DIRECTED = {"rz", "rm", "rp"}


def is_plain(i: Instruction) -> bool:
    """A move of one register or value."""
    return i.base == "mov" and all(isinstance(x, str) for x in i.operands)


def clipped(text: str, modifiers) -> str:
    """An expression under .relu and .sat."""
    text = f"np.maximum({text}, f4(0))" if "relu" in modifiers else text
    return f"np.fmin(np.fmax({text}, 0), 1)" if "sat" in modifiers else text


def widened(text: str, kind: str) -> str:
    """A half or pair of halves in float32; pairs as [N, 2]."""
    text = f"halves({text})" if kind.endswith("x2") else text
    return f"f32_of_{kind.removesuffix('x2')}({text})"


def narrowed(text: str, kind: str) -> str:
    text = f"{kind.removesuffix('x2')}_bits({text})"
    return f"packed({text})" if kind.endswith("x2") else text


class Writer:
    """Python lines of one basic block: operands, destinations and rows of the table."""

    def __init__(self, program):
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

    def register(self, name: str) -> str:
        if name not in self.defined:
            self.live_in[name] = None
        return f"r{self.program.index[name]}"

    def constant(self, value) -> str:
        key = (type(value), np.asarray(value).tobytes())
        if key not in self.known:
            self.known[key] = f"k{len(self.known)}"
            self.constants[self.known[key]] = value
        return self.known[key]

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
        if SPECIAL.fullmatch(name):
            text = f"M.special[{name!r}]"
            return text if want == "i4" else f"{text}.astype({want})"
        for pattern, value in CONSTANT.items():
            if re.match(pattern, name):
                return self.constant(np.dtype(want).type(value))
        raise PtxError(f"special register {name}")

    def predicate(self, i: Instruction) -> str | None:
        name = i.predicate and self.register(i.predicate)
        return f"(~{name})" if i.negated else name

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
        if p := self.predicate(i):
            value = f"where({p}, {value}, {self.register(register)})"
        self.emit(f"r{self.program.index[register]} = {value}")
        self.defined[register] = None

    def wide(self, operand: str, kind: str) -> str:
        """As `read`; halves in float32."""
        text = self.read(operand, kind)
        return widened(text, kind) if kind in types.HALVES else text

    def instruction(self, i: Instruction, pc: int) -> None:
        if self.program.accumulators and i.base != "wgmma":
            self._watch_accumulators(i, pc)
        if special := getattr(self, f"op_{i.base}", None):
            special(i, pc)
            return
        kind = next(iter(i.types()), "b32")
        row = opcodes.row(i.parts, kind)
        unknown = set(i.parts[1:]) - opcodes.MODIFIERS - types.TYPES
        if row is None or unknown:
            raise PtxError(f"modifiers {sorted(unknown)}" if unknown else "opcode")
        mode = next((p for p in i.parts if p in DIRECTED), None)
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
        if kind in types.HALVES and i.base == "selp":
            kind = f"s{types.bits(kind)}"
        half, bits = kind in types.HALVES, types.bits(kind)
        kinds = {"t": kind, "s": types.signless(kind), "u": "u32", "i": "s32", "p": "pred"}
        kinds |= {"n": f"u{bits}", "w": f"{kind[0]}{2 * bits}"}
        operands = zip(i.operands[1:], letters, strict=True)
        sources = [self.wide(operand, kinds[letter]) for operand, letter in operands]
        names = {"t": "f4" if half else types.NAMES[kinds["s"]]}
        names["w"] = types.NAMES.get(kinds["w"])
        value = f"({template.format(*sources, **names)})"
        value = clipped(value, i.parts)
        value = narrowed(value, kind) if half and result in "ts" else value
        self.write(i.operands[0], value, types.NAMES[kinds[result]], i)

    def compared(self, i: Instruction, kind: str, a: str, b: str) -> str:
        floats = kind in types.HALVES | types.FLOATS
        table = opcodes.FLOATS_COMPARED if floats else opcodes.COMPARED
        kind = f"s{kind[1:]}" if kind[0] == "b" and not floats else kind
        return f"({table[i.parts[1]].format(self.wide(a, kind), self.wide(b, kind))})"

    def op_setp(self, i: Instruction, pc: int) -> None:
        kind, (target, a, b, *more) = i.types()[-1], i.operands
        value = self.temporary()
        self.emit(f"{value} = {self.compared(i, kind, a, b)}")
        first, second = value, f"(~{value})"
        if kind.endswith("x2"):
            first, second = f"column({value}, 0)", f"column({value}, 1)"
        combine = next((p for p in i.parts if p in ("and", "or", "xor")), None)
        if combine:
            sign, c = {"and": "&", "or": "|", "xor": "^"}[combine], self.read(more[0], "pred")
            first, second = f"({first} {sign} {c})", f"({second} {sign} {c})"
        if isinstance(target, tuple):
            # both before either is assigned: the condition may be one of the targets
            self.emit(f"{value}, {value}q = {first}, {second}")
            self.write(target[0], value, "?", i)
            self.write(target[1], f"{value}q", "?", i)
        else:
            self.write(target, first, "?", i)

    def op_mov(self, i: Instruction, pc: int) -> None:
        kind, target, source = i.types()[-1], i.operands[0], i.operands[1]
        if isinstance(target, tuple):
            whole, narrow = types.bits(kind), types.bits(kind) // len(target)
            x = self.temporary()
            self.emit(f"{x} = {self.read(source, f's{whole}')}")
            for k, register in enumerate(target):
                self.write(register, f"part({x}, {k}, i{narrow // 8})", f"i{narrow // 8}", i)
        elif isinstance(source, tuple):
            width = types.bits(kind) // 8 // len(source)
            words = [self.read(s, f"s{8 * width}") for s in source]
            while len(words) > 1:
                pairs = zip(words[::2], words[1::2], strict=True)
                words = [f"pack2({a}, {b}, {width}, i{2 * width})" for a, b in pairs]
                width *= 2
            self.write(target, words[0], f"i{width}", i)
        else:
            kind = f"s{types.bits(kind)}" if kind in types.HALVES else types.signless(kind)
            self.write(target, self.read(source, kind), types.NAMES[kind], i)

    def op_cvta(self, i: Instruction, pc: int) -> None:
        space = next((p.split("::")[0] for p in i.parts[1:] if p not in ("to", "u64", "u32")), "")
        text = self.read(i.operands[1], "s64")
        if space in ("shared", "local", "param"):
            text = f"({text} {'-' if 'to' in i.parts else '+'} i8({WINDOWS[space]}))"
        self.write(i.operands[0], text, "i8", i)

    def op_isspacep(self, i: Instruction, pc: int) -> None:
        a, space = self.read(i.operands[1], "s64"), i.parts[1].split("::")[0]
        low = WINDOWS[space]
        high = WINDOWS["param"] if space == "global" else 2 * low
        text = f"(({a} >= i8({low})) & ({a} < i8({high})))"
        self.write(i.operands[0], text, "?", i)

    def op_cvt(self, i: Instruction, pc: int) -> None:
        into, kind = i.types()
        words = {p for p in i.parts[1:] if p not in types.TYPES}
        unknown = words - {*TO_INTEGER, *DIRECTED, "rn", "rna", "ftz", "sat", "relu", "satfinite"}
        if unknown:
            raise PtxError(f"modifiers {sorted(unknown)}")
        value, have = self._converted(i, into, kind, words)
        self.write(i.operands[0], value, have, i)

    def _converted(self, i: Instruction, into: str, kind: str, words: set[str]) -> tuple[str, str]:
        integral = next((w for w in TO_INTEGER if w in words), None)
        directed = next((w for w in DIRECTED if w in words), None)
        if into in ("f16x2", "bf16x2"):
            high, low = (
                self._to_half(self.read(s, "f32"), "f32", into[:-2], words) for s in i.operands[1:3]
            )
            return f"pack2({low}, {high}, 2, i4)", "i4"
        source = i.operands[1]
        x = self.wide(source, kind)
        held = "f32" if kind in types.HALVES else kind
        if into == "tf32":
            x = clipped(x, words - {"sat"})
            mode = next(w for w in ("rna", "rn", "rz") if w in words)
            return f"tf32({x}, {mode!r})", "f4"
        if into in types.HALVES:
            x = f"{TO_INTEGER[integral]}({x})" if integral else x
            return self._to_half(x, held, into, words), "i2"
        t = types.NAMES[into]
        if into in types.FLOATS:
            x = f"{TO_INTEGER[integral]}({x})" if integral and held in types.FLOATS else x
            wider = types.bits(into) >= types.bits(held) and held in types.FLOATS
            if directed and not wider:
                if into == "f64":
                    raise PtxError("rounding other than to nearest")
                return f"rounded32(array({x}).astype(f8), {directed!r})", t
            x = f"array({x}).astype({t})"
            return clipped(x, words), t
        if held in types.FLOATS:
            return f"float_to_int({TO_INTEGER[integral]}({x}), {t})", t
        return (f"saturated_int({x}, {t})" if "sat" in words else f"{x}.astype({t})"), t

    def _to_half(self, x: str, held: str, into: str, words: set[str]) -> str:
        if held not in types.FLOATS:
            x = f"array({x}).astype(f8)"
        x = clipped(x, words)
        if directed := next((w for w in DIRECTED if w in words), None):
            return f"directed({x}, {into}_bits, f32_of_{into}, {directed!r})"
        return f"{into}_bits({x})"
