# SPDX-License-Identifier: Apache-2.0
"""Rational attention of class queries to the classes of every image: forward.

The weights are normalised over the whole K x K map: A = K exp(S - max) / sum, S_ij = scale q_i k_j.
Row i of A is omega_i times the softmax of row i, so a program streams the keys past one row tile as
ordinary attention does, for the text and the pair queries side by side, and leaves its rows'
weights and the maximum and sum of its tile behind; `combine` weighs the rows when all tiles of a
map are known. One tile that holds all rows finishes by itself, in one launch.
The image query, one row with a softmax of its own, rides as row K of the first kind's tile.
The backward is in rational_attn_bwd.py.
"""

import torch
import triton
import triton.language as tl

from vtclip.kernels import _configs, _limits, _tiles
from vtclip.kernels._math import (
    LN2,
    LOG2E,
    cast,
    dot,
    fused,
    head_program,
    in_powers,
    indices,
    load_row,
    load_rows,
    product,
    row_max,
    store_rows,
    tile_indices,
)
from vtclip.kernels.rational_attn_bwd import rational_attn_bwd

__all__ = ["rational_attn_bwd", "rational_attn_fwd"]


@triton.jit
def attend(q, k, v, keep, top, total, acc, scale_log2, PRECISION: tl.constexpr):
    """One step of the running softmax of every row: (top, total, acc); scale_log2 > 0."""
    s = dot(q, tl.trans(k), PRECISION)  # [BLOCK_K, BLOCK_J]
    s = tl.where(keep[None, :], s, float("-inf"))
    new_top = tl.maximum(top, row_max(s) * scale_log2)  # in powers of two
    shift = tl.where(new_top == float("-inf"), 0.0, new_top)  # exp2(-inf) = 0, not NaN
    shrink = tl.exp2(top - shift)
    p = tl.exp2(fused(s, scale_log2, shift[:, None]))
    total = total * shrink + tl.sum(p, axis=1)
    acc = acc * shrink[:, None] + dot(p.to(v.dtype), v, PRECISION)
    return new_top, total, acc


@triton.jit
def joint(top, total, in_row):
    """(natural maximum, its base, sum) of `in_row`; weights [rows] that sum to it, ratios to it.

    A row's weights are exp2(s - top) as accumulated; times its ratio they are exp2(s - base).
    """
    natural = tl.max(tl.where(in_row, top, float("-inf")), axis=0) * LN2
    base = in_powers(natural)
    shift = tl.where(base == float("-inf"), 0.0, base)
    ratio = tl.exp2(tl.where(in_row, top - shift, float("-inf")))
    weight = tl.where(in_row, total * ratio, 0.0)
    return natural, base, tl.sum(weight, axis=0), weight, ratio


@triton.jit
def store_stats(stats_ptr, kind, maps, index, natural, total):
    """stats [3, 2, maps]"""
    stats_ptr += kind * 2 * maps + index
    tl.store(stats_ptr, natural)
    tl.store(stats_ptr + maps, total)


@triton.jit(do_not_specialize=["B", "H", "K"])
def rational_attn_fwd_kernel(
    image_ptr,  # [B, H, 1, D]
    text_ptr,  # [B|1, H, K, D]
    pair_ptr,  # [B, H, K, D]
    key_ptr,  # [B, H, K, D]
    value_ptr,  # [B, H, K, D]
    out_ptr,  # [B, H, K, D]: written if ONE_TILE
    parts_ptr,  # [kinds, B, H, K, D]: written if KEEP, else and if not ONE_TILE scratch
    image_out_ptr,  # [B, H, D] float32, contiguous: written
    stats_ptr,  # [3, 2, B, H] float32, contiguous: written, if not ONE_TILE only of the image
    weight_ptr,  # [kinds, B, H, K] float32, contiguous: written if not ONE_TILE
    partial_ptr,  # [kinds, B, H, 3, tiles] float32, contiguous: written if not ONE_TILE
    stride_image_b, stride_image_h, stride_image_d,
    stride_text_b, stride_text_h, stride_text_k, stride_text_d,
    stride_pair_b, stride_pair_h, stride_pair_k, stride_pair_d,
    stride_key_b, stride_key_h, stride_key_k, stride_key_d,
    stride_value_b, stride_value_h, stride_value_k, stride_value_d,
    stride_out_b, stride_out_h, stride_out_k, stride_out_d,
    scale, share, B, H, K, D,
    HAS_IMAGE: tl.constexpr, HAS_TEXT: tl.constexpr, HAS_PAIR: tl.constexpr,
    ONE_TILE: tl.constexpr, KEEP: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    # program = (image, head, row tile); neighbours share the keys of an image and a head
    MAPS: tl.constexpr = HAS_TEXT or HAS_PAIR
    BOTH: tl.constexpr = HAS_TEXT and HAS_PAIR
    FIRST: tl.constexpr = 1 if HAS_TEXT else 2
    rows_in_all = K * MAPS + HAS_IMAGE
    num_tiles = tl.cdiv(rows_in_all, BLOCK_K)
    b, h, tile = head_program(H, rows_in_all, BLOCK_K)
    offs_k = tile_indices(tile, BLOCK_K, WIDE)
    if not MAPS:
        offs_k += K  # the image's row alone
    offs_j = indices(BLOCK_J, WIDE)
    offs_d = indices(BLOCK_D, WIDE)
    in_k = offs_k < K
    is_image = offs_k == K
    index = b * H + h
    maps = B.to(tl.int64) * H

    # a: rows of the text, or of the pairs where there is no text; c: of the pairs next to the text
    if HAS_TEXT:
        text_ptr += b * stride_text_b + h * stride_text_h
        q_a = load_rows(text_ptr, offs_k, offs_d, stride_text_k, stride_text_d, in_k, D)
    if HAS_PAIR:
        pair_ptr += b * stride_pair_b + h * stride_pair_h
        q_c = load_rows(pair_ptr, offs_k, offs_d, stride_pair_k, stride_pair_d, in_k, D)
        if not HAS_TEXT:
            q_a = q_c
    if HAS_IMAGE:
        image_ptr += b * stride_image_b + h * stride_image_h
        q = load_rows(image_ptr, offs_k, offs_d, 0, stride_image_d, is_image, D)
        q_a = tl.where(is_image[:, None], q, q_a) if MAPS else q
    # a positive scale keeps the maximum in place, so that scores are scaled in the exponent alone
    sign = tl.where(scale < 0, -1.0, 1.0)
    q_a = cast(q_a.to(tl.float32) * sign, key_ptr.dtype.element_ty)
    if BOTH:
        q_c = cast(q_c.to(tl.float32) * sign, key_ptr.dtype.element_ty)
    scale_log2 = tl.maximum(scale * sign * LOG2E, 1e-30)  # 0 would make -inf NaN
    key_ptr += b * stride_key_b + h * stride_key_h
    value_ptr += b * stride_value_b + h * stride_value_h

    top_a = tl.full((BLOCK_K,), float("-inf"), tl.float32)
    total_a = tl.zeros((BLOCK_K,), tl.float32)
    acc_a = tl.zeros((BLOCK_K, BLOCK_D), tl.float32)
    if BOTH:
        top_c = tl.full((BLOCK_K,), float("-inf"), tl.float32)
        total_c = tl.zeros((BLOCK_K,), tl.float32)
        acc_c = tl.zeros((BLOCK_K, BLOCK_D), tl.float32)
    for start in range(0, K, BLOCK_J):
        cols = start + offs_j
        keep = cols < K
        k = load_rows(key_ptr, cols, offs_d, stride_key_k, stride_key_d, keep, D)
        v = load_rows(value_ptr, cols, offs_d, stride_value_k, stride_value_d, keep, D)
        top_a, total_a, acc_a = attend(
            q_a, k, v, keep, top_a, total_a, acc_a, scale_log2, PRECISION
        )
        if BOTH:
            top_c, total_c, acc_c = attend(
                q_c, k, v, keep, top_c, total_c, acc_c, scale_log2, PRECISION
            )

    out_ptr += b * stride_out_b + h * stride_out_h
    parts_ptr += b * stride_out_b + h * stride_out_h
    kind_size = maps * K * D
    if HAS_IMAGE:
        natural, base, total, weight, ratio = joint(top_a, total_a, is_image)
        if tile == num_tiles - 1:  # row K is the last
            store_stats(stats_ptr, 0, maps, index, natural, total)
        # [BLOCK_K, BLOCK_D] with one row, written by the program that has it
        total = tl.where(tile == num_tiles - 1, total, 1.0)
        row = tl.where(is_image[:, None], acc_a * (ratio / total)[:, None], 0.0)
        store_rows(image_out_ptr + index * D, row, offs_k, offs_d, 0, 1, is_image, D)

    if ONE_TILE:
        natural, base, total, weight, ratio = joint(top_a, total_a, in_k)
        store_stats(stats_ptr, FIRST, maps, index, natural, total)
        part = acc_a * (ratio * (K / total))[:, None]
        if KEEP:
            store_rows(parts_ptr, part, offs_k, offs_d, stride_out_k, stride_out_d, in_k, D)
        if BOTH:
            natural, base, total, weight, ratio = joint(top_c, total_c, in_k)
            store_stats(stats_ptr, 2, maps, index, natural, total)
            part_c = acc_c * (ratio * (K / total))[:, None]
            if KEEP:
                parts_ptr += kind_size
                store_rows(parts_ptr, part_c, offs_k, offs_d, stride_out_k, stride_out_d, in_k, D)
            part += part_c
        else:
            store_stats(stats_ptr, 3 - FIRST, maps, index, 0.0, 0.0)
        if HAS_IMAGE:
            part += tl.sum(row, axis=0)[None, :]
        else:
            store_stats(stats_ptr, 0, maps, index, 0.0, 0.0)
        store_rows(out_ptr, part * share, offs_k, offs_d, stride_out_k, stride_out_d, in_k, D)
    elif MAPS:
        num_tiles = num_tiles.to(tl.int64)
        weight_ptr += index * K
        partial_ptr += index * 3 * num_tiles + tile
        leave(
            top_a, total_a, acc_a, parts_ptr, weight_ptr, partial_ptr,
            offs_k, offs_d, stride_out_k, stride_out_d, in_k, num_tiles, D,
        )  # fmt: skip
        if BOTH:
            leave(
                top_c, total_c, acc_c,
                parts_ptr + kind_size, weight_ptr + maps * K, partial_ptr + maps * 3 * num_tiles,
                offs_k, offs_d, stride_out_k, stride_out_d, in_k, num_tiles, D,
            )  # fmt: skip


@triton.jit
def leave(
    top, total, acc, parts_ptr, weight_ptr, partial_ptr,
    offs_k, offs_d, stride_k, stride_d, in_k, num_tiles, D,
):  # fmt: skip
    """Rows by their own softmax, their weights and the tile's maximum and sum, for `combine`."""
    natural, base, tile_total, weight, ratio = joint(top, total, in_k)
    tl.store(partial_ptr, natural)
    tl.store(partial_ptr + num_tiles, base)
    tl.store(partial_ptr + 2 * num_tiles, tile_total)
    tl.store(weight_ptr + offs_k, weight, mask=in_k)
    # of 16-bit types such rows, averages of values, neither overflow nor underflow
    row = acc * (1.0 / tl.where(total == 0.0, 1.0, total))[:, None]
    store_rows(parts_ptr, row, offs_k, offs_d, stride_k, stride_d, in_k, D)


@triton.jit
def weigh(
    parts_ptr, weight_ptr, partial_ptr, offs_k, offs_d, stride_k, stride_d, in_k,
    tile, num_tiles, K, D, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """(A @ value of a row tile, natural maximum, sum): every program adds all tiles, in order."""
    offs_t = tl.arange(0, BLOCK_T).to(tl.int64)
    in_t = offs_t < num_tiles
    natural = tl.max(tl.load(partial_ptr + offs_t, mask=in_t, other=float("-inf")), axis=0)
    bases = tl.load(partial_ptr + num_tiles + offs_t, mask=in_t, other=float("-inf"))
    totals = tl.load(partial_ptr + 2 * num_tiles + offs_t, mask=in_t, other=0.0)
    base = tl.max(bases, axis=0)
    base = tl.where(base == float("-inf"), 0.0, base)
    total = tl.sum(product(totals, tl.exp2(bases - base)), axis=0)
    factor = tl.exp2(tl.load(partial_ptr + num_tiles + tile) - base)
    weight = tl.load(weight_ptr + offs_k, mask=in_k, other=0.0)
    part = load_rows(parts_ptr, offs_k, offs_d, stride_k, stride_d, in_k, D).to(tl.float32)
    return part * (weight * (factor * (K / total)))[:, None], natural, total


@triton.jit(do_not_specialize=["B", "H", "K", "num_tiles"])
def rational_attn_combine_kernel(
    parts_ptr,  # [kinds, B, H, K, D] rows by their own softmax; written if KEEP
    weight_ptr,  # [kinds, B, H, K] float32, contiguous
    partial_ptr,  # [kinds, B, H, 3, tiles] float32, contiguous
    image_out_ptr,  # [B, H, D] float32, contiguous
    out_ptr,  # [B, H, K, D]: written
    stats_ptr,  # [3, 2, B, H] float32, contiguous: written, of the image only if it is absent
    stride_out_b, stride_out_h, stride_out_k, stride_out_d,
    share, B, H, K, D, num_tiles,
    HAS_IMAGE: tl.constexpr, HAS_TEXT: tl.constexpr, HAS_PAIR: tl.constexpr, KEEP: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    # program = (image, head, row tile of the forward)
    MAPS: tl.constexpr = HAS_TEXT or HAS_PAIR
    BOTH: tl.constexpr = HAS_TEXT and HAS_PAIR
    FIRST: tl.constexpr = 1 if HAS_TEXT else 2
    b, h, tile = head_program(H, K, BLOCK_K)
    offs_k = tile * BLOCK_K + tl.arange(0, BLOCK_K)
    offs_d = tl.arange(0, BLOCK_D).to(tl.int64)
    in_k = offs_k < K
    index = b * H + h
    maps = B.to(tl.int64) * H
    out_ptr += b * stride_out_b + h * stride_out_h
    total_out = tl.zeros((BLOCK_K, BLOCK_D), tl.float32)
    if HAS_IMAGE:
        total_out += load_row(image_out_ptr + index * D, offs_d, 1, D)[None, :]
    elif tile == 0:
        store_stats(stats_ptr, 0, maps, index, 0.0, 0.0)
    if MAPS:
        parts_ptr += b * stride_out_b + h * stride_out_h
        weight_ptr += index * K
        num_tiles = num_tiles.to(tl.int64)
        partial_ptr += index * 3 * num_tiles
        part, natural, total = weigh(
            parts_ptr, weight_ptr, partial_ptr, offs_k, offs_d, stride_out_k, stride_out_d, in_k,
            tile, num_tiles, K, D, BLOCK_T,
        )  # fmt: skip
        total_out += part
        if KEEP:
            store_rows(parts_ptr, part, offs_k, offs_d, stride_out_k, stride_out_d, in_k, D)
        if tile == 0:
            store_stats(stats_ptr, FIRST, maps, index, natural, total)
    if BOTH:
        parts_ptr += maps * K * D
        part, natural, total = weigh(
            parts_ptr, weight_ptr + maps * K, partial_ptr + maps * 3 * num_tiles,
            offs_k, offs_d, stride_out_k, stride_out_d, in_k, tile, num_tiles, K, D, BLOCK_T,
        )  # fmt: skip
        total_out += part
        if KEEP:
            store_rows(parts_ptr, part, offs_k, offs_d, stride_out_k, stride_out_d, in_k, D)
        if tile == 0:
            store_stats(stats_ptr, 2, maps, index, natural, total)
    elif tile == 0:
        store_stats(stats_ptr, 3 - FIRST, maps, index, 0.0, 0.0)
        if not MAPS:
            store_stats(stats_ptr, FIRST, maps, index, 0.0, 0.0)
    store_rows(out_ptr, total_out * share, offs_k, offs_d, stride_out_k, stride_out_d, in_k, D)


def rational_attn_fwd(image_query, text_query, pair_query, key, value, scale, keep_parts):
    """out [B, H, K, d], parts [kinds, B, H, K, d], image_out [B, H, d], stats [3, 2, B, H]."""
    B, H, K, d = key.shape
    _configs.check("rational_attn", key, d, _limits.MAX_HEAD_WIDTH)
    has = _configs.kinds(image_query, text_query, pair_query)
    matrices = has["HAS_TEXT"] + has["HAS_PAIR"]
    share = 1.0 / max(1, matrices + has["HAS_IMAGE"])
    out = key.new_empty((B, K, H, d)).transpose(1, 2)
    parts = key.new_empty((matrices if keep_parts else 0, B, K, H, d)).transpose(2, 3)
    image_out = key.new_empty((B if has["HAS_IMAGE"] else 0, H, d), dtype=torch.float32)
    stats = key.new_empty((3, 2, B, H), dtype=torch.float32)
    if out.numel() == 0:
        # no class: nothing to sum; no column of a head: scores are 0
        stats[:] = 0
        image_out[:] = 0
        if K and not d:
            for kind, count in enumerate((K, K * K, K * K)):
                if list(has.values())[kind]:
                    stats[kind, 1] = count
        return out, parts, image_out, stats
    rows = K * (matrices > 0) + has["HAS_IMAGE"]
    tile, precision, _ = _tiles.plan("rational_fwd", key, (B, H, rows, K, d))
    tiles = triton.cdiv(rows, tile.block_k)
    one = tiles == 1 and matrices > 0
    scratch = parts
    if not keep_parts and not one:
        scratch = key.new_empty((matrices, B, K, H, d)).transpose(2, 3)
    size = 0 if one else matrices * B * H
    weights = key.new_empty((size, K), dtype=torch.float32)
    partial = key.new_empty((size, 3, tiles), dtype=torch.float32)
    queries, strides = _configs.query_arguments(image_query, text_query, pair_query, key)
    with torch.cuda.device_of(key):
        rational_attn_fwd_kernel[(B * H * tiles,)](
            *queries, key, value, out, scratch, image_out, stats, weights, partial,
            *strides, *key.stride(), *value.stride(), *out.stride(),
            scale, share, B, H, K, d,
            **has, ONE_TILE=one, KEEP=keep_parts,
            PRECISION=precision, WIDE=_configs.wide(*queries, key, value, out),
            BLOCK_K=tile.block_k, BLOCK_J=tile.block_l, BLOCK_D=_configs.padded(d),
            **tile.launch,
        )  # fmt: skip
        if not one:
            rational_attn_combine_kernel[(B * H * triton.cdiv(K, tile.block_k),)](
                scratch, weights, partial, image_out, out, stats, *out.stride(),
                share, B, H, K, d, tiles,
                **has, KEEP=keep_parts,
                BLOCK_K=tile.block_k, BLOCK_T=_configs.padded(tiles), BLOCK_D=_configs.padded(d),
                num_warps=4, enable_fp_fusion=True,
            )  # fmt: skip
    return out, parts, image_out, stats
