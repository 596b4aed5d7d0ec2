# SPDX-License-Identifier: Apache-2.0
"""PTX types and the NumPy types their registers are held in.

A register is a signed integer of 16, 32 or 64 bits, a float, or a bool; an instruction views it as
the type it names. 8-bit values live in 16-bit registers, halves as their bits.
"""

import functools
import re

import numpy as np

from .report import PtxError

i1, i2, i4, i8 = np.int8, np.int16, np.int32, np.int64
u1, u2, u4, u8 = np.uint8, np.uint16, np.uint32, np.uint64
f2, f4, f8 = np.float16, np.float32, np.float64

UNSIGNED = {1: u1, 2: u2, 4: u4, 8: u8}
NAMES = {f"{ptx}{8 * n}": f"{held}{n}" for ptx, held in ("si", "uu", "bi") for n in UNSIGNED}
NAMES |= {"b8": "u1", "f32": "f4", "f64": "f8", "tf32": "f4", "pred": "?"}
NAMES |= {"f16": "i2", "bf16": "i2", "f16x2": "i4", "bf16x2": "i4"}
TYPES = frozenset(NAMES)
HALVES = {"f16", "bf16", "f16x2", "bf16x2"}
FLOATS = {"f32", "f64"}
HELD = {"i1": "i2", "u1": "i2", "u2": "i2", "u4": "i4", "u8": "i8"}
REGISTERS = {ptx: HELD.get(name, name) for ptx, name in NAMES.items()}


def signless(ptx: str) -> str:
    """The signed type of equal width: two's complement makes + - * and bits the same."""
    return f"s{ptx[1:]}" if ptx[0] in "ub" and ptx not in HALVES else ptx


def bits(ptx: str) -> int:
    return 8 * np.dtype(NAMES[ptx]).itemsize


def size(numpy_name: str) -> int:
    return np.dtype(numpy_name).itemsize


@functools.cache
def immediate(text: str, want: str):
    """A literal as a NumPy scalar; hexadecimal floats are bits."""
    dtype = np.dtype(want)
    bits = f"u{dtype.itemsize}"
    if match := re.fullmatch(r"0([fFdD])([0-9a-fA-F]+)", text):
        double = match[1] in "dD"
        value = np.array(int(match[2], 16), "u8" if double else "u4")
        value = value.view("f8" if double else "f4")
        return (value if dtype.kind == "f" else value.view(bits)).astype(dtype)[()]
    if re.fullmatch(r"-?\d+\.\d+", text):
        return dtype.type(float(text))
    if not re.match(r"-?\d", text):
        raise PtxError(f"name {text!r}")
    value = int(text.rstrip("U"), 0) % 2 ** (8 * dtype.itemsize)
    return np.array(value, bits).view(dtype)[()]
