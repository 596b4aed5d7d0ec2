# SPDX-License-Identifier: Apache-2.0
"""Comparisons, moves and conversions as Python expressions."""

from __future__ import annotations

from . import opcodes, types
from .parse import Instruction, Pair
from .report import PtxError
from .translate import WINDOWS, Writer

TO_INTEGER = ("rzi", "rni", "rmi", "rpi")
ROUND = {"rzi": "np.trunc", "rni": "np.rint", "rmi": "np.floor", "rpi": "np.ceil"}


class Moves(Writer):
    # ---- comparisons
    def compared(self, i: Instruction, kind: str, a: str, b: str) -> str:
        if kind in types.HALVES:
            a, b = self.widened(a, kind), self.widened(b, kind)
        else:
            kind = f"s{kind[1:]}" if kind[0] == "b" else kind
            a, b = self.read(a, kind), self.read(b, kind)
        floats = kind in types.HALVES | types.FLOATS
        table = opcodes.FLOATS_COMPARED if floats else opcodes.COMPARED
        return f"({table[i.parts[1]].format(a, b)})"

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
        if isinstance(target, Pair):
            # both before either is assigned: the condition may be one of the targets
            self.emit(f"{value}, {value}q = {first}, {second}")
            self.write(target.first, value, "?", i)
            self.write(target.second, f"{value}q", "?", i)
        else:
            self.write(target, first, "?", i)

    # ---- moves
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
            if kind in types.HALVES:
                kind = "s16" if types.bits(kind) == 16 else "s32"
            kind = types.signless(kind)
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
        text = f"(({a} >= i8({low})) & ({a} < i8({2 * low})))"
        if space == "global":
            text = f"({a} < i8({WINDOWS['param']}))"
        self.write(i.operands[0], text, "?", i)

    # ---- conversions
    def op_cvt(self, i: Instruction, pc: int) -> None:
        into, kind = i.types()
        words = [p for p in i.parts[1:] if p not in types.TYPES]
        known = {*TO_INTEGER, "rn", "rz", "rm", "rp", "rna", "ftz", "sat", "relu", "satfinite"}
        if set(words) - known:
            raise PtxError(f"modifier {set(words) - known}")
        value, have = self._converted(i, into, kind, set(words))
        self.write(i.operands[0], value, have, i)

    def _converted(self, i: Instruction, into: str, kind: str, words: set[str]) -> tuple[str, str]:
        floats = types.FLOATS | types.HALVES
        if into in ("f16x2", "bf16x2"):
            high, low = (
                self._to_half(self.read(s, "f32"), "f32", into[:-2], words) for s in i.operands[1:3]
            )
            return f"pack2({low}, {high}, 2, i4)", "i4"
        source = i.operands[1]
        x = self.widened(source, kind) if kind in types.HALVES else self.read(source, kind)
        held = "f32" if kind in types.HALVES else kind
        if into == "tf32":
            x = f"np.maximum({x}, f4(0))" if "relu" in words else x
            mode = next(w for w in ("rna", "rn", "rz") if w in words)
            return f"tf32({x}, {mode!r})", "f4"
        if into in types.HALVES:
            integral = next((w for w in TO_INTEGER if w in words), None)
            x = f"{ROUND[integral]}({x})" if integral else x
            return self._to_half(x, held, into, words), "i2"
        t = types.NAMES[into]
        if into in types.FLOATS:
            integral = next((w for w in TO_INTEGER if w in words), None)
            x = f"{ROUND[integral]}({x})" if integral and kind in floats else x
            wider = types.bits(into) >= types.bits(held) and held in types.FLOATS
            mode = next((w for w in ("rz", "rm", "rp") if w in words), None)
            if mode and not wider:
                if into == "f64":
                    raise PtxError("rounding other than to nearest")
                return f"rounded32(array({x}).astype(f8), {mode!r})", t
            x = f"array({x}).astype({t})"
            return (f"np.fmin(np.fmax({x}, 0), 1)" if "sat" in words else x), t
        if kind in floats:
            mode = next(w for w in TO_INTEGER if w in words)
            return f"float_to_int({x}, {t}, {mode!r})", t
        return (f"saturated_int({x}, {t})" if "sat" in words else f"{x}.astype({t})"), t

    def _to_half(self, x: str, held: str, into: str, words: set[str]) -> str:
        if held not in types.FLOATS:
            x = f"array({x}).astype(f8)"
        x = f"np.maximum({x}, f4(0))" if "relu" in words else x
        x = f"np.fmin(np.fmax({x}, 0), 1)" if "sat" in words else x
        directed = next((w for w in ("rz", "rm", "rp") if w in words), None)
        if directed:
            return f"directed({x}, {into}_bits, f32_of_{into}, {directed!r})"
        return f"{into}_bits({x})"
