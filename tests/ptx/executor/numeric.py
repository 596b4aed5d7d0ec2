# SPDX-License-Identifier: Apache-2.0
"""Arithmetic that NumPy lacks; values are arrays over lanes or scalars."""

from __future__ import annotations

import numpy as np

from .types import UNSIGNED, f2, f4, f8, i2, i4, u2, u4, u8

where = np.where


def array(x):
    return np.asarray(x)


# ---- 16-bit floats: held as bits, computed in float32


def f32_of_f16(x):
    return array(x).view(f2).astype(f4)


def f32_of_bf16(x):
    return (array(x).astype(i4) << i4(16)).view(f4)


def f16_bits(x):
    return array(x).astype(f2).view(i2)


def bf16_bits(x):
    """Nearest even; NaN becomes the canonical one."""
    x = array(x)
    x = x if x.dtype == f4 else x.astype(f4)
    b = x.view(u4)
    rounded = ((b + (u4(0x7FFF) + ((b >> u4(16)) & u4(1)))) >> u4(16)).astype(u2)
    return where(x != x, u2(0x7FFF), rounded).view(i2)


def halves(x):
    """[N] of 32 bits to [N, 2] of 16 bits."""
    return np.ascontiguousarray(x).reshape(-1, 1).view(i2)


def packed(x):
    """[N, 2] of 16 bits to [N] of 32 bits; one row is a uniform value."""
    x = np.ascontiguousarray(x).view(i4)[:, 0]
    return x if x.size > 1 else x[0]


def column(x, k):
    return x[:, k] if x.shape[0] > 1 else x[0, k]


def pack2(low, high, narrow, wide):
    """Two values of `narrow` bytes to one of twice as many."""
    low, high = array(low).view(UNSIGNED[narrow]), array(high).view(UNSIGNED[narrow])
    t = UNSIGNED[2 * narrow]
    return (low.astype(t) | (high.astype(t) << t(8 * narrow))).view(wide)


def part(x, k, narrow):
    """The k-th piece of 2 or 4 that a value is cut into."""
    x = array(x)
    return (x >> x.dtype.type(k * 8 * np.dtype(narrow).itemsize)).astype(narrow)


def directed(x, to_bits, of_bits, mode):
    """x (float32 or float64) to 16 bits, rounded towards zero, down or up."""
    x = array(x)
    near = to_bits(x)
    back = of_bits(near).astype(x.dtype)
    wrong = {"rz": np.abs(back) > np.abs(x), "rm": back > x, "rp": back < x}[mode]
    smaller = {"rz": back != 0, "rm": back > 0, "rp": back < 0}[mode]  # in magnitude
    bits = near.view(u2).astype(i4)
    least = i4(1 if mode == "rp" else 0x8001)
    stepped = where(back == 0, least, bits + where(smaller, i4(-1), i4(1)))
    return where(wrong, stepped, bits).astype(u2).view(i2)


def rounded32(x, mode):
    """float64 to float32 towards zero, down or up."""
    x = array(x)
    near = x.astype(f4)
    wrong = {"rz": np.abs(near) > np.abs(x), "rm": near > x, "rp": near < x}[mode]
    target = {"rz": f4(0), "rm": f4(-np.inf), "rp": f4(np.inf)}[mode]
    return where(wrong, np.nextafter(near, target), near)


def tf32(x, mode="rna"):
    """float32 with 10 bits of fraction: nearest (ties away or to even) or cut."""
    b = array(x).view(u4)
    if mode == "rna":
        b = b + u4(0x1000)
    elif mode == "rn":
        b = b + (u4(0x0FFF) + ((b >> u4(13)) & u4(1)))
    return where(array(x) != array(x), u4(0x7FFFFFFF), b & u4(0xFFFFE000)).view(f4)


# ---- floating point


def fma32(a, b, c):
    """Product exact and sum to 53 bits in float64; the last rounding may be a second one."""
    return (array(a).astype(f8) * b + c).astype(f4)


def fma64(a, b, c):
    """Error-free product and sum (Dekker, Knuth); plain arithmetic where that overflows."""
    a, b, c = array(a), array(b), array(c)
    split = f8(134217729.0)
    t = a * split
    ah = t - (t - a)
    t = b * split
    bh = t - (t - b)
    al, bl = a - ah, b - bh
    p = a * b
    e = al * bl - (((p - ah * bh) - al * bh) - ah * bl)
    s = p + c
    z = s - p
    r = s + (((p - (s - z)) + (c - z)) + e)
    return where(np.isfinite(r), r, s)


def saturate(x):
    return np.fmin(np.fmax(x, x.dtype.type(0)), x.dtype.type(1))


def float_to_int(x, t, mode):
    """Out of range saturates; NaN becomes 0."""
    t = np.dtype(t)
    rounded = {"rzi": np.trunc, "rni": np.rint, "rmi": np.floor, "rpi": np.ceil}[mode](
        array(x).astype(f8)
    )
    low, high = np.iinfo(t).min, np.iinfo(t).max
    inside = (rounded > low) & (rounded < high)
    small, large = t.type(low), t.type(high)
    held = where(inside, rounded, 0).astype(t)
    return where(inside | (rounded != rounded), held, where(rounded <= low, small, large))


def saturated_int(x, t):
    """Integers of one type to another, clipped to its range."""
    x, t = array(x), np.dtype(t)
    low = max(int(np.iinfo(t).min), int(np.iinfo(x.dtype).min))
    high = min(int(np.iinfo(t).max), int(np.iinfo(x.dtype).max))
    return np.clip(x, x.dtype.type(low), x.dtype.type(high)).astype(t)


# ---- integers


def divide(a, b):
    """Towards zero; division by zero gives all bits set."""
    a, b = array(a), array(b)
    safe = where(b == 0, b.dtype.type(1), b)
    q = a // safe
    if a.dtype.kind == "i":
        q = q + (((a < 0) != (safe < 0)) & (q * safe != a))
    return where(b == 0, ~b.dtype.type(0), q).astype(b.dtype)


def remainder(a, b):
    return (array(a) - divide(a, b) * b).astype(array(b).dtype)


def shift_left(a, s):
    bits = 8 * a.dtype.itemsize
    if np.ndim(s) == 0 and s < bits:
        return a << a.dtype.type(s)
    a, s = array(a), array(s)
    return where(s >= bits, a.dtype.type(0), a << (s & u4(bits - 1)).astype(a.dtype))


def shift_right(a, s):
    bits = 8 * a.dtype.itemsize
    if np.ndim(s) == 0 and s < bits:
        return a >> a.dtype.type(s)
    a, s = array(a), array(s)
    r = a >> np.minimum(s, u4(bits - 1)).astype(a.dtype)
    return r if a.dtype.kind == "i" else where(s >= bits, a.dtype.type(0), r)


def multiply_high(a, b):
    a, b = array(a), array(b)
    n, signed = a.dtype.itemsize, a.dtype.kind == "i"
    if n < 8:
        w = np.dtype(f"{a.dtype.kind}{2 * n}").type
        return ((a.astype(w) * b.astype(w)) >> w(8 * n)).astype(a.dtype)
    x, y, low = a.view(u8), b.view(u8), u8(0xFFFFFFFF)
    x0, x1, y0, y1 = x & low, x >> u8(32), y & low, y >> u8(32)
    k = x1 * y0 + ((x0 * y0) >> u8(32))
    high = x1 * y1 + (k >> u8(32)) + ((x0 * y1 + (k & low)) >> u8(32))
    if signed:
        high = high - where(a < 0, y, u8(0)) - where(b < 0, x, u8(0))
    return array(high).view(a.dtype)


def leading_zeros(a):
    a = array(a)
    bits = 8 * a.dtype.itemsize
    x = a.view(UNSIGNED[a.dtype.itemsize])
    for shift in (1, 2, 4, 8, 16, 32):
        if shift < bits:
            x = x | (x >> x.dtype.type(shift))
    return (bits - np.bitwise_count(x).astype(i4)).astype(i4)


def bits_set(a):
    a = array(a)
    return np.bitwise_count(a.view(UNSIGNED[a.dtype.itemsize])).astype(i4)


def highest_bit(a, shift_amount):
    """bfind: position of the highest bit that differs from the sign, or -1."""
    a = array(a)
    x = where(a < 0, ~a, a) if a.dtype.kind == "i" else a
    bits = 8 * a.dtype.itemsize
    position = i4(bits - 1) - leading_zeros(x)
    return where(position < 0, i4(-1), i4(bits - 1) - position if shift_amount else position)


def reversed_bits(a):
    a = array(a)
    x = a.view(UNSIGNED[a.dtype.itemsize])
    bits, t, out = 8 * a.dtype.itemsize, x.dtype.type, x.dtype.type(0)
    for k in range(bits):
        out = out | (((x >> t(k)) & t(1)) << t(bits - 1 - k))
    return array(out).view(a.dtype)


def insert_field(a, b, start, length):
    """The low `length` bits of a put into b at `start`."""
    a, b = array(a), array(b)
    bits, t = 8 * a.dtype.itemsize, UNSIGNED[a.dtype.itemsize]
    start, length = array(start).view(u4) & u4(255), array(length).view(u4) & u4(255)
    ones = shift_left(t(1), length) - t(1)  # all ones where the length is the width or more
    mask = shift_left(where(length >= bits, ~t(0), ones), start)
    return ((b.view(t) & ~mask) | (shift_left(a.view(t), start) & mask)).view(b.dtype)


def extract_field(a, start, length):
    """`length` bits of a from `start`; of a signed type with sign extension."""
    a = array(a)
    bits = 8 * a.dtype.itemsize
    start, length = array(start).view(u4) & u4(255), array(length).view(u4) & u4(255)
    t = UNSIGNED[a.dtype.itemsize]
    ones = where(length >= bits, ~t(0), shift_left(t(1), length) - t(1))
    if a.dtype.kind == "u":
        return shift_right(a, start) & ones
    field = shift_right(a, start).view(t) & ones
    last = np.minimum(start + length - u4(1), u4(bits - 1))
    sign = (shift_right(a, last) & a.dtype.type(1)).astype(bool) & (length > 0)
    return where(sign, field | ~ones, field).view(a.dtype)


def permute(a, b, selector):
    """prmt: four bytes chosen from the eight of (a, b), or their signs."""
    a, b = array(a).view(u4), array(b).view(u4)
    if np.ndim(selector) == 0 and not int(selector) & 0x8888:
        return array(_chosen(a, b, [int(selector) >> 4 * k & 7 for k in range(4)])).view(i4)
    c, both, out = array(selector).view(u4), a.astype(u8) | (b.astype(u8) << u8(32)), u8(0)
    for k in range(4):
        nibble = ((c >> u4(4 * k)) & u4(15)).astype(u8)
        byte = (both >> ((nibble & u8(7)) << u8(3))) & u8(255)
        sign = where(byte & u8(128), u8(255), u8(0))
        out = out | (where(nibble & u8(8), sign, byte) << u8(8 * k))
    return array(out).astype(u4).view(i4)


def _chosen(a, b, selector):
    """Bytes of (a, b) by few shifts and masks: those that move alike move together."""
    moves = {}
    for k, s in enumerate(selector):
        moves.setdefault((s // 4, s % 4 - k), []).append(k)
    out = u4(0)
    for (which, by), places in moves.items():
        x = (a, b)[which]
        x = x >> u4(8 * by) if by > 0 else x << u4(-8 * by)
        out = out | (x & u4(sum(0xFF << 8 * k for k in places)))
    return out


def any_logic(a, b, c, table):
    """lop3: bit k of the table is the result where (a, b, c) spell k."""
    out = i4(0)
    for k in range(8):
        if int(table) >> k & 1:
            out = out | ((a if k & 4 else ~a) & (b if k & 2 else ~b) & (c if k & 1 else ~c))
    return out


def funnel(low, high, amount, left, wrap):
    both = array(low).view(u4).astype(u8) | (array(high).view(u4).astype(u8) << u8(32))
    s = array(amount).view(u4)
    s = (s & u4(31) if wrap else np.minimum(s, u4(32))).astype(u8)
    r = (both << s) >> u8(32) if left else both >> s
    return array(r).astype(u4).view(i4)
