# SPDX-License-Identifier: Apache-2.0
"""Rational attention backward where one tile holds every class: one program per image and head.

The equations are those of rational_attn_bwd.py. All five gradients come from one launch; a shared
text query's are one float32 slice per image, added by `sum_partials` in their order.
"""

import triton
import triton.language as tl

from vtclip.kernels._math import (
    LOG2E,
    cast,
    dot,
    fused,
    in_powers,
    indices,
    load_row,
    load_rows,
    power_of_two,
    product,
    store_rows,
)


@triton.jit
def load_map(stats_ptr, kind, maps, index):
    """(maximum in powers of two, 1 / sum) of stats [3, 2, maps]."""
    stats_ptr += kind * 2 * maps + index
    return in_powers(tl.load(stats_ptr)), 1.0 / tl.load(stats_ptr + maps)


@triton.jit
def unit_of(most):
    """Power of two, at least 1, that the largest entry `most` of A = K softmax is less than twice.

    A / unit and what is made of it by gradients of a scaled loss stay within float16; small entries
    of a flat map, of unit 1, are no smaller than in A.
    """
    return tl.maximum(power_of_two(most), 1.0)


@triton.jit
def weighed(s, scale_log2, base, factor, there):
    """factor exp2(s scale_log2 - base) of s [rows, columns], 0 where no column is `there`."""
    shift = tl.where(there, base, float("inf"))
    return tl.exp2(fused(s, scale_log2, shift[None, :])) * factor


@triton.jit
def image_terms(
    image_ptr, stride_d, row, k, v, keep, stats_ptr, maps, index, c, scale_log2, offs_d, D,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """(p, ds) [keys] of the image's row, (its query, the query's gradient) [BLOCK_D].

    The scores come from a dot of 16 rows, 15 of them 0, to be rounded as the forward's are.
    """
    offs_r = tl.arange(0, 16).to(tl.int64)
    q = load_rows(image_ptr, offs_r, offs_d, 0, stride_d, offs_r < 1, D)
    s = tl.sum(dot(k, tl.trans(q), PRECISION), axis=1)
    base, rtotal = load_map(stats_ptr, 0, maps, index)
    p = tl.where(keep, tl.exp2(fused(s, scale_log2, base)) * rtotal, 0.0)
    d_s = p * (tl.sum(product(v.to(tl.float32), row[None, :]), axis=1) - c)
    d_q = tl.sum(product(d_s[:, None], k.to(tl.float32)), axis=0)
    return p, d_s, load_row(image_ptr, offs_d, stride_d, D), d_q


@triton.jit
def one_map(
    q, part, d_o, k, d_a, in_k, stats_ptr, kind, maps, index, scale_log2, K, unit,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """(A, dS) / unit [rows, keys] of one kind, zero where a row or a key does not exist."""
    base, rtotal = load_map(stats_ptr, kind, maps, index)
    each = product(d_o.to(tl.float32), part.to(tl.float32))
    c = tl.sum(tl.sum(each, axis=1), axis=0) / K
    exponent = fused(dot(q, tl.trans(k), PRECISION), scale_log2, base)
    exponent = tl.where(in_k[:, None] & in_k[None, :], exponent, float("-inf"))
    a = tl.exp2(exponent) * (K * rtotal / unit)
    return a, a * (d_a - c)


@triton.jit(do_not_specialize=["B", "H", "K"])
def rational_attn_one_bwd_kernel(
    d_out_ptr,  # [B, H, K, D]
    image_ptr,  # [B, H, 1, D]
    text_ptr,  # [B|1, H, K, D]
    pair_ptr,  # [B, H, K, D]
    key_ptr,  # [B, H, K, D]
    value_ptr,  # [B, H, K, D]
    stats_ptr,  # [3, 2, B, H] float32, contiguous
    parts_ptr,  # [kinds, B, H, K, D]
    image_out_ptr,  # [B, H, D] float32, contiguous
    d_image_ptr,  # [B, H, D], contiguous: written
    d_text_ptr,  # [B, H, K, D], one slice per image: written
    d_pair_ptr,  # [B, H, K, D]: written
    d_key_ptr,  # [B, H, K, D]: written
    d_value_ptr,  # [B, H, K, D]: written
    stride_d_out_b, stride_d_out_h, stride_d_out_k, stride_d_out_d,
    stride_image_b, stride_image_h, stride_image_d,
    stride_text_b, stride_text_h, stride_text_k, stride_text_d,
    stride_pair_b, stride_pair_h, stride_pair_k, stride_pair_d,
    stride_key_b, stride_key_h, stride_key_k, stride_key_d,
    stride_value_b, stride_value_h, stride_value_k, stride_value_d,
    stride_parts_x, stride_parts_b, stride_parts_h, stride_parts_k, stride_parts_d,
    stride_d_text_b, stride_d_text_h, stride_d_text_k, stride_d_text_d,
    stride_grad_b, stride_grad_h, stride_grad_k, stride_grad_d,
    scale, share, B, H, K, D,
    HAS_IMAGE: tl.constexpr, HAS_TEXT: tl.constexpr, HAS_PAIR: tl.constexpr,
    PRECISION: tl.constexpr, WIDE: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    # one program per image and head; d_pair, d_key and d_value have the same layout
    index = tl.program_id(0).to(tl.int64)
    maps = B.to(tl.int64) * H
    b = index // H
    h = index % H
    offs_k = indices(BLOCK_K, WIDE)
    offs_d = indices(BLOCK_D, WIDE)
    in_k = offs_k < K
    scale_log2 = scale * LOG2E
    grad = b * stride_grad_b + h * stride_grad_h
    d_out_ptr += b * stride_d_out_b + h * stride_d_out_h
    key_ptr += b * stride_key_b + h * stride_key_h
    value_ptr += b * stride_value_b + h * stride_value_h
    parts_ptr += b * stride_parts_b + h * stride_parts_h
    d_o = load_rows(d_out_ptr, offs_k, offs_d, stride_d_out_k, stride_d_out_d, in_k, D)
    k = load_rows(key_ptr, offs_k, offs_d, stride_key_k, stride_key_d, in_k, D)
    v = load_rows(value_ptr, offs_k, offs_d, stride_value_k, stride_value_d, in_k, D)
    unit = 1.0
    if HAS_TEXT:
        unit = tl.maximum(unit, unit_of(K / tl.load(stats_ptr + 3 * maps + index)))
    if HAS_PAIR:
        unit = tl.maximum(unit, unit_of(K / tl.load(stats_ptr + 5 * maps + index)))
    if HAS_IMAGE:  # first, while no sums take up registers
        row = tl.sum(d_o.to(tl.float32), axis=0)
        o = load_row(image_out_ptr + index * D, offs_d, 1, D)
        c = tl.sum(product(row, o), axis=0)
        p, d_s1, q1, d_q1 = image_terms(
            image_ptr + b * stride_image_b + h * stride_image_h, stride_image_d, row, k, v, in_k,
            stats_ptr, maps, index, c, scale_log2, offs_d, D, PRECISION,
        )  # fmt: skip
        d_v = (p / unit)[:, None] * row[None, :]
        d_k = (d_s1 / unit)[:, None] * q1[None, :]
        d_q1 = cast(d_q1 * (scale * share), d_image_ptr.dtype.element_ty)
        tl.store(d_image_ptr + index * D + offs_d, d_q1, mask=offs_d < D)
    else:
        d_v = tl.zeros((BLOCK_K, BLOCK_D), tl.float32)
        d_k = tl.zeros((BLOCK_K, BLOCK_D), tl.float32)
    d_a = dot(d_o, tl.trans(v), PRECISION)  # [BLOCK_K, BLOCK_K]
    a = tl.zeros((BLOCK_K, BLOCK_K), tl.float32)
    if HAS_TEXT:
        text_ptr += b * stride_text_b + h * stride_text_h
        q = load_rows(text_ptr, offs_k, offs_d, stride_text_k, stride_text_d, in_k, D)
        part = load_rows(parts_ptr, offs_k, offs_d, stride_parts_k, stride_parts_d, in_k, D)
        parts_ptr += tl.cast(stride_parts_x, tl.int64)
        a_x, d_s = one_map(
            q, part, d_o, k, d_a, in_k, stats_ptr, 1, maps, index, scale_log2, K,
            unit, PRECISION,
        )  # fmt: skip
        a += a_x
        d_k += dot(tl.trans(d_s.to(q.dtype)), q, PRECISION)
        d_q = dot(d_s.to(k.dtype), k, PRECISION) * (scale * share * unit)
        d_text_ptr += b * stride_d_text_b + h * stride_d_text_h
        store_rows(d_text_ptr, d_q, offs_k, offs_d, stride_d_text_k, stride_d_text_d, in_k, D)
    if HAS_PAIR:
        pair_ptr += b * stride_pair_b + h * stride_pair_h
        q = load_rows(pair_ptr, offs_k, offs_d, stride_pair_k, stride_pair_d, in_k, D)
        part = load_rows(parts_ptr, offs_k, offs_d, stride_parts_k, stride_parts_d, in_k, D)
        a_x, d_s = one_map(
            q, part, d_o, k, d_a, in_k, stats_ptr, 2, maps, index, scale_log2, K,
            unit, PRECISION,
        )  # fmt: skip
        a += a_x
        d_k += dot(tl.trans(d_s.to(q.dtype)), q, PRECISION)
        d_q = dot(d_s.to(k.dtype), k, PRECISION) * (scale * share * unit)
        store_rows(d_pair_ptr + grad, d_q, offs_k, offs_d, stride_grad_k, stride_grad_d, in_k, D)
    d_v += dot(tl.trans(a.to(d_o.dtype)), d_o, PRECISION)
    d_k = d_k * (scale * share * unit)
    store_rows(d_key_ptr + grad, d_k, offs_k, offs_d, stride_grad_k, stride_grad_d, in_k, D)
    d_v = d_v * (share * unit)
    store_rows(d_value_ptr + grad, d_v, offs_k, offs_d, stride_grad_k, stride_grad_d, in_k, D)
