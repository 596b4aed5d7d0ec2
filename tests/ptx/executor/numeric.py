# SPDX-License-Identifier: Apache-2.0
"""Arithmetic that NumPy lacks; values are arrays over lanes or scalars."""

import numpy as np

from .types import UNSIGNED, f2, f4, f8, i2, i4, u1, u2, u4, u8

where, array = np.where, np.asarray


def f32_of_f16(x):
    return array(x).view(f2).astype(f4)


def f32_of_bf16(x):
    return (array(x).astype(i4) << i4(16)).view(f4)


def f16_bits(x):
    return array(x).astype(f2).view(i2)


def bf16_bits(x):
    """Nearest even; NaN becomes the canonical one."""
    x = array(x).astype(f4, copy=False)
    b = x.view(u4)
    rounded = ((b + (u4(0x7FFF) + ((b >> u4(16)) & u4(1)))) >> u4(16)).astype(u2)
    return where(x != x, u2(0x7FFF), rounded).view(i2)


def halves(x):
    """[N] of 32 bits to [N, 2] of 16 bits."""
    return np.ascontiguousarray(x).reshape(-1, 1).view(i2)


def packed(x):
    """[N, 2] of 16 bits to [N] of 32 bits; one row is a uniform value."""
    return column(np.ascontiguousarray(x).view(i4), 0)


def column(x, k):
    return x[:, k] if x.shape[0] > 1 else x[0, k]


def pack2(low, high, narrow, wide):
    """Two values of `narrow` bytes to one of twice as many."""
    t = UNSIGNED[2 * narrow]
    low, high = (array(x).view(UNSIGNED[narrow]).astype(t) for x in (low, high))
    return (low | (high << t(8 * narrow))).view(wide)


def part(x, k, narrow):
    """The k-th piece of 2 or 4 that a value is cut into."""
    x = array(x)
    return (x >> x.dtype.type(k * 8 * np.dtype(narrow).itemsize)).astype(narrow)


def directed(x, to_bits, of_bits, mode):
    """Bits of x (float32 or float64) rounded towards zero, down or up."""
    x = array(x)
    near = to_bits(x)
    back = of_bits(near).astype(x.dtype)
    wrong = {"rz": np.abs(back) > np.abs(x), "rm": back > x, "rp": back < x}[mode]
    smaller = {"rz": back != 0, "rm": back > 0, "rp": back < 0}[mode]  # in magnitude
    least = 1 if mode == "rp" else np.iinfo(near.dtype).min + 1
    stepped = where(back == 0, least, near + where(smaller, -1, 1))
    return where(wrong, stepped, near).astype(near.dtype)


def rounded32(x, mode):
    """float64 to float32 towards zero, down or up."""
    return directed(x, lambda x: x.astype(f4).view(i4), lambda b: b.view(f4), mode).view(f4)


def tf32(x, mode="rna"):
    """float32 with 10 bits of fraction: nearest (ties away or to even) or cut."""
    b = array(x).view(u4)
    b = b + {"rna": u4(0x1000), "rn": u4(0x0FFF) + ((b >> u4(13)) & u4(1)), "rz": u4(0)}[mode]
    return where(array(x) != array(x), u4(0x7FFFFFFF), b & u4(0xFFFFE000)).view(f4)


def fma64(a, b, c):
    """Error-free product and sum (Dekker, Knuth); plain arithmetic where that overflows."""
    a, b, c, split = array(a), array(b), array(c), f8(134217729.0)
    t, w = a * split, b * split
    ah, bh = t - (t - a), w - (w - b)
    al, bl = a - ah, b - bh
    p = a * b
    e = al * bl - (((p - ah * bh) - al * bh) - ah * bl)
    s = p + c
    z = s - p
    r = s + (((p - (s - z)) + (c - z)) + e)
    return where(np.isfinite(r), r, s)


def float_to_int(x, t):
    """A whole number to an integer: out of range saturates; NaN becomes 0."""
    x, low, high = array(x).astype(f8), np.iinfo(t).min, np.iinfo(t).max
    inside = (x > low) & (x < high)
    clipped = where(x != x, t(0), where(x <= low, t(low), t(high)))
    return where(inside, where(inside, x, 0).astype(t), clipped)


def saturated_int(x, t):
    """Integers of one type to another, clipped to its range."""
    x, into = array(x), np.iinfo(t)
    have = np.iinfo(x.dtype)
    return np.clip(x, max(into.min, have.min), min(into.max, have.max)).astype(t)


def divide(a, b):
    """Towards zero; division by zero gives all bits set."""
    a, b = array(a), array(b)
    safe = where(b == 0, b.dtype.type(1), b)
    q = a // safe
    if a.dtype.kind == "i":
        q = q + (((a < 0) != (safe < 0)) & (q * safe != a))
    return where(b == 0, ~b.dtype.type(0), q).astype(b.dtype)


def shift_left(a, s):
    bits = 8 * a.dtype.itemsize
    if np.ndim(s) == 0 and s < bits:
        return a << a.dtype.type(s)
    return where(array(s) >= bits, a.dtype.type(0), a << (s & u4(bits - 1)).astype(a.dtype))


def shift_right(a, s):
    bits = 8 * a.dtype.itemsize
    if np.ndim(s) == 0 and s < bits:
        return a >> a.dtype.type(s)
    r = a >> np.minimum(s, u4(bits - 1)).astype(a.dtype)
    return r if a.dtype.kind == "i" else where(array(s) >= bits, a.dtype.type(0), r)


def multiply_high(a, b):
    a, b = array(a), array(b)
    n = a.dtype.itemsize
    if n < 8:
        w = np.dtype(f"{a.dtype.kind}{2 * n}").type
        return ((a.astype(w) * b.astype(w)) >> w(8 * n)).astype(a.dtype)
    x, y, low, half = a.view(u8), b.view(u8), u8(0xFFFFFFFF), u8(32)
    x0, x1, y0, y1 = x & low, x >> half, y & low, y >> half
    k = x1 * y0 + ((x0 * y0) >> half)
    high = x1 * y1 + (k >> half) + ((x0 * y1 + (k & low)) >> half)
    if a.dtype.kind == "i":
        high = high - where(a < 0, y, u8(0)) - where(b < 0, x, u8(0))
    return array(high).view(a.dtype)


def leading_zeros(x):
    """Of unsigned values."""
    bits = 8 * x.dtype.itemsize
    for shift in (1, 2, 4, 8, 16, 32):
        x = x | shift_right(x, u4(shift))
    return (bits - np.bitwise_count(x).astype(i4)).astype(i4)


def highest_bit(a, from_top):
    """bfind: position of the highest bit that differs from the sign, or -1."""
    x = where(a < 0, ~a, a) if a.dtype.kind == "i" else array(a)
    zeros, bits = leading_zeros(x.view(UNSIGNED[x.dtype.itemsize])), 8 * x.dtype.itemsize
    return where(zeros == bits, -1, zeros if from_top else bits - 1 - zeros).astype(i4)


def reversed_bits(a):
    bits = np.unpackbits(array(a).reshape(-1, 1).view(u1), axis=1, bitorder="little")
    return column(np.packbits(bits[:, ::-1], axis=1, bitorder="little").view(a.dtype), 0)


def _cut(a, length):
    """How many bits of a do not belong to a field of that length."""
    bits = u4(8 * a.dtype.itemsize)
    return bits - np.minimum(length & u4(255), bits)


def insert_field(a, b, start, length):
    """The low `length` bits of a put into b at `start`."""
    t, start = UNSIGNED[a.dtype.itemsize], start & u4(255)
    mask = shift_left(shift_right(~t(0), _cut(a, length)), start)
    return (array(b).view(t) & ~mask | shift_left(array(a).view(t), start) & mask).view(b.dtype)


def extract_field(a, start, length):
    """`length` bits of a from `start`; of a signed type with sign extension."""
    cut = _cut(a, length)
    field = shift_right(shift_left(shift_right(array(a), start & u4(255)), cut), cut)
    return where(cut == 8 * a.dtype.itemsize, a.dtype.type(0), field)


def permute(a, b, selector):
    """prmt: four bytes chosen from the eight of (a, b), or their signs."""
    pair = np.stack(np.broadcast_arrays(array(a), b), -1)
    pieces = np.ascontiguousarray(pair).view(u1).reshape(*pair.shape[:-1], 8)
    nibbles = np.asarray(selector)[..., None] >> i4([0, 4, 8, 12]) & 15
    uniform = nibbles.ndim == 1
    chosen = pieces[..., nibbles & 7] if uniform else np.take_along_axis(pieces, nibbles & 7, -1)
    if (nibbles & 8).any():
        chosen = where(nibbles & 8, where(chosen > 127, u1(255), u1(0)), chosen)
    return np.ascontiguousarray(chosen).view(i4)[..., 0]


def any_logic(a, b, c, table):
    """lop3: bit k of the table is the result where (a, b, c) spell k."""
    out = i4(0)
    for k in range(8):
        if int(table) >> k & 1:
            out = out | ((a if k & 4 else ~a) & (b if k & 2 else ~b) & (c if k & 1 else ~c))
    return out


def funnel(low, high, amount, left, wrap):
    both = array(low).view(u4).astype(u8) | (array(high).view(u4).astype(u8) << u8(32))
    s = array(amount & u4(31) if wrap else np.minimum(amount, u4(32))).astype(u8)
    return array((both << s) >> u8(32) if left else both >> s).astype(u4).view(i4)
