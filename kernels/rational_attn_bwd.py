# SPDX-License-Identifier: Apache-2.0
"""Rational attention backward, without atomics and without a K x K map in memory.

A is recomputed from the map's maximum and sum alone. With dA = d_out value^T, the same for both,
    dS = A * (dA - c),   c = mean_i <d_out_i, part_i>,   a scalar per map,
and for the image's row, of weights p and gradient r = sum_i d_out_i: ds = p * (r value^T - <r, o>).
`sums` forms c and r; one kernel forms d_key and d_value per (image, head, key tile) in a loop over
rows, the other d_text and d_pair per (image chunk, head, row tile), summing a shared text query's
gradient over images on chip. Where one tile holds all rows, the kernel of rational_attn_one_bwd.py
does all of it.
"""

import torch
import triton
import triton.language as tl

from vtclip.kernels import _configs, _limits, _tiles
from vtclip.kernels._math import (
    LOG2E,
    cast,
    dot,
    head_program,
    indices,
    load_row,
    load_rows,
    product,
    store_rows,
    sum_partials,
    tile_indices,
)
from vtclip.kernels.rational_attn_one_bwd import (
    image_terms,
    load_map,
    rational_attn_one_bwd_kernel,
    unit_of,
    weighed,
)


@triton.jit(do_not_specialize=["B", "H", "K"])
def rational_attn_bwd_sums_kernel(
    d_out_ptr,  # [B, H, K, D]
    parts_ptr,  # [kinds, B, H, K, D]
    image_out_ptr,  # [B, H, D] float32, contiguous
    c_ptr,  # [3, B, H] float32, contiguous: written for the kinds that exist
    row_ptr,  # [B, H, D] float32, contiguous: written
    stride_d_out_b, stride_d_out_h, stride_d_out_k, stride_d_out_d,
    stride_parts_x, stride_parts_b, stride_parts_h, stride_parts_k, stride_parts_d,
    B, H, K, D,
    HAS_IMAGE: tl.constexpr, HAS_TEXT: tl.constexpr, HAS_PAIR: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    # one program per image and head
    MAPS: tl.constexpr = HAS_TEXT or HAS_PAIR
    BOTH: tl.constexpr = HAS_TEXT and HAS_PAIR
    FIRST: tl.constexpr = 1 if HAS_TEXT else 2
    index = tl.program_id(0).to(tl.int64)
    maps = B.to(tl.int64) * H
    b = index // H
    h = index % H
    offs_k = tl.arange(0, BLOCK_K).to(tl.int64)
    offs_d = tl.arange(0, BLOCK_D).to(tl.int64)
    d_out_ptr += b * stride_d_out_b + h * stride_d_out_h
    parts_ptr += b * stride_parts_b + h * stride_parts_h
    row = tl.zeros((BLOCK_D,), tl.float32)
    c_a = tl.zeros((BLOCK_D,), tl.float32)
    c_c = tl.zeros((BLOCK_D,), tl.float32)
    for start in range(0, K, BLOCK_K):
        rows = start + offs_k
        in_k = rows < K
        d_o = load_rows(d_out_ptr, rows, offs_d, stride_d_out_k, stride_d_out_d, in_k, D)
        d_o = d_o.to(tl.float32)
        row += tl.sum(d_o, axis=0)
        if MAPS:
            part = load_rows(parts_ptr, rows, offs_d, stride_parts_k, stride_parts_d, in_k, D)
            c_a += tl.sum(product(d_o, part.to(tl.float32)), axis=0)
        if BOTH:
            pair_ptr = parts_ptr + tl.cast(stride_parts_x, tl.int64)
            part = load_rows(pair_ptr, rows, offs_d, stride_parts_k, stride_parts_d, in_k, D)
            c_c += tl.sum(product(d_o, part.to(tl.float32)), axis=0)
    tl.store(row_ptr + index * D + offs_d, row, mask=offs_d < D)
    if HAS_IMAGE:
        o = load_row(image_out_ptr + index * D, offs_d, 1, D)
        tl.store(c_ptr + index, tl.sum(product(row, o), axis=0))
    if MAPS:
        tl.store(c_ptr + FIRST * maps + index, tl.sum(c_a, axis=0) / K)
    if BOTH:
        tl.store(c_ptr + 2 * maps + index, tl.sum(c_c, axis=0) / K)


@triton.jit(do_not_specialize=["B", "H", "K"])
def rational_attn_bwd_key_kernel(
    d_out_ptr,  # [B, H, K, D]
    image_ptr,  # [B, H, 1, D]
    text_ptr,  # [B|1, H, K, D]
    pair_ptr,  # [B, H, K, D]
    key_ptr,  # [B, H, K, D]
    value_ptr,  # [B, H, K, D]
    stats_ptr,  # [3, 2, B, H] float32, contiguous
    c_ptr,  # [3, B, H] float32, contiguous
    row_ptr,  # [B, H, D] float32, contiguous
    d_key_ptr,  # [B, H, K, D]: written
    d_value_ptr,  # [B, H, K, D]: written
    d_image_ptr,  # [tiles, B, H, D], contiguous, one slice per key tile: written
    stride_d_out_b, stride_d_out_h, stride_d_out_k, stride_d_out_d,
    stride_image_b, stride_image_h, stride_image_d,
    stride_text_b, stride_text_h, stride_text_k, stride_text_d,
    stride_pair_b, stride_pair_h, stride_pair_k, stride_pair_d,
    stride_key_b, stride_key_h, stride_key_k, stride_key_d,
    stride_value_b, stride_value_h, stride_value_k, stride_value_d,
    stride_d_key_b, stride_d_key_h, stride_d_key_k, stride_d_key_d,
    scale, share, B, H, K, D,
    HAS_IMAGE: tl.constexpr, HAS_TEXT: tl.constexpr, HAS_PAIR: tl.constexpr,
    PRECISION: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    b, h, tile = head_program(H, K, BLOCK_J)
    offs_j = tile_indices(tile, BLOCK_J, WIDE)
    offs_k = indices(BLOCK_K, WIDE)
    offs_d = indices(BLOCK_D, WIDE)
    keep = offs_j < K
    index = b * H + h
    maps = B.to(tl.int64) * H
    scale_log2 = scale * LOG2E

    d_out_ptr += b * stride_d_out_b + h * stride_d_out_h
    text_ptr += b * stride_text_b + h * stride_text_h
    pair_ptr += b * stride_pair_b + h * stride_pair_h
    key_ptr += b * stride_key_b + h * stride_key_h
    value_ptr += b * stride_value_b + h * stride_value_h
    k = load_rows(key_ptr, offs_j, offs_d, stride_key_k, stride_key_d, keep, D)
    v = load_rows(value_ptr, offs_j, offs_d, stride_value_k, stride_value_d, keep, D)
    unit = 1.0
    if HAS_TEXT:
        base_t, rtotal_t = load_map(stats_ptr, 1, maps, index)
        c_t = tl.load(c_ptr + maps + index)
        unit = tl.maximum(unit, unit_of(K * rtotal_t))
    if HAS_PAIR:
        base_p, rtotal_p = load_map(stats_ptr, 2, maps, index)
        c_p = tl.load(c_ptr + 2 * maps + index)
        unit = tl.maximum(unit, unit_of(K * rtotal_p))
    if HAS_IMAGE:  # first, while no sums take up registers
        row = load_row(row_ptr + index * D, offs_d, 1, D)
        p, d_s, q1, d_q = image_terms(
            image_ptr + b * stride_image_b + h * stride_image_h, stride_image_d, row, k, v, keep,
            stats_ptr, maps, index, tl.load(c_ptr + index), scale_log2, offs_d, D,
            PRECISION,
        )  # fmt: skip
        d_v = (p / unit)[:, None] * row[None, :]
        d_k = (d_s / unit)[:, None] * q1[None, :]
        d_q = cast(d_q * (scale * share), d_image_ptr.dtype.element_ty)
        tl.store(d_image_ptr + (tile * maps + index) * D + offs_d, d_q, mask=offs_d < D)
    else:
        d_v = tl.zeros((BLOCK_J, BLOCK_D), tl.float32)
        d_k = tl.zeros((BLOCK_J, BLOCK_D), tl.float32)
    if HAS_TEXT or HAS_PAIR:
        for start in tl.range(0, K, BLOCK_K, disable_licm=PRECISION != "ieee" and BLOCK_D > 64):
            rows = start + offs_k
            in_k = rows < K
            d_o = load_rows(d_out_ptr, rows, offs_d, stride_d_out_k, stride_d_out_d, in_k, D)
            d_a = dot(v, tl.trans(d_o), PRECISION)  # [BLOCK_J, BLOCK_K]
            a = tl.zeros((BLOCK_J, BLOCK_K), tl.float32)
            if HAS_TEXT:
                q = load_rows(text_ptr, rows, offs_d, stride_text_k, stride_text_d, in_k, D)
                s = dot(k, tl.trans(q), PRECISION)
                a_t = weighed(s, scale_log2, base_t, K * rtotal_t / unit, in_k)
                a += a_t
                d_k += dot((a_t * (d_a - c_t)).to(q.dtype), q, PRECISION)
            if HAS_PAIR:
                q = load_rows(pair_ptr, rows, offs_d, stride_pair_k, stride_pair_d, in_k, D)
                s = dot(k, tl.trans(q), PRECISION)
                a_p = weighed(s, scale_log2, base_p, K * rtotal_p / unit, in_k)
                a += a_p
                d_k += dot((a_p * (d_a - c_p)).to(q.dtype), q, PRECISION)
            d_v += dot(a.to(d_o.dtype), d_o, PRECISION)

    offset = b * stride_d_key_b + h * stride_d_key_h
    d_key_ptr += offset
    d_k = d_k * (scale * share * unit)
    d_v = d_v * (share * unit)
    store_rows(d_key_ptr, d_k, offs_j, offs_d, stride_d_key_k, stride_d_key_d, keep, D)
    d_value_ptr += offset
    store_rows(d_value_ptr, d_v, offs_j, offs_d, stride_d_key_k, stride_d_key_d, keep, D)


@triton.jit(do_not_specialize=["B", "H", "K", "images_per_program"])
def rational_attn_bwd_query_kernel(
    d_out_ptr,  # [B, H, K, D]
    text_ptr,  # [B|1, H, K, D]
    pair_ptr,  # [B, H, K, D]
    key_ptr,  # [B, H, K, D]
    value_ptr,  # [B, H, K, D]
    stats_ptr,  # [3, 2, B, H] float32, contiguous
    c_ptr,  # [3, B, H] float32, contiguous
    d_text_ptr,  # [chunks, H, K, D], one slice per image chunk: written
    d_pair_ptr,  # [B, H, K, D]: written
    stride_d_out_b, stride_d_out_h, stride_d_out_k, stride_d_out_d,
    stride_text_b, stride_text_h, stride_text_k, stride_text_d,
    stride_pair_b, stride_pair_h, stride_pair_k, stride_pair_d,
    stride_key_b, stride_key_h, stride_key_k, stride_key_d,
    stride_value_b, stride_value_h, stride_value_k, stride_value_d,
    stride_d_text_b, stride_d_text_h, stride_d_text_k, stride_d_text_d,
    stride_d_pair_b, stride_d_pair_h, stride_d_pair_k, stride_d_pair_d,
    scale, share, B, H, K, D, images_per_program,
    HAS_TEXT: tl.constexpr, HAS_PAIR: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    chunk, h, tile = head_program(H, K, BLOCK_K)
    first = chunk * images_per_program
    offs_k = tile_indices(tile, BLOCK_K, WIDE)
    offs_j = indices(BLOCK_J, WIDE)
    offs_d = indices(BLOCK_D, WIDE)
    in_k = offs_k < K
    maps = B.to(tl.int64) * H
    scale_log2 = scale * LOG2E

    if HAS_TEXT:
        # with more than one image per program the text is shared
        text_ptr += first * stride_text_b + h * stride_text_h
        q_t = load_rows(text_ptr, offs_k, offs_d, stride_text_k, stride_text_d, in_k, D)
        acc_t = tl.zeros((BLOCK_K, BLOCK_D), tl.float32)
        unit_t = 1.0
    for i in range(0, tl.minimum(images_per_program, B - first)):
        b = first + i
        index = b * H + h
        d_out_b = d_out_ptr + b * stride_d_out_b + h * stride_d_out_h
        key_b = key_ptr + b * stride_key_b + h * stride_key_h
        value_b = value_ptr + b * stride_value_b + h * stride_value_h
        d_o = load_rows(d_out_b, offs_k, offs_d, stride_d_out_k, stride_d_out_d, in_k, D)
        if HAS_TEXT:
            base_t, rtotal_t = load_map(stats_ptr, 1, maps, index)
            c_t = tl.load(c_ptr + maps + index)
            unit = unit_of(K * rtotal_t)
            acc_t *= unit_t / unit  # powers of two: nothing is lost
            unit_t = unit
        if HAS_PAIR:
            base_p, rtotal_p = load_map(stats_ptr, 2, maps, index)
            c_p = tl.load(c_ptr + 2 * maps + index)
            unit_p = unit_of(K * rtotal_p)
            pair_b = pair_ptr + b * stride_pair_b + h * stride_pair_h
            q_p = load_rows(pair_b, offs_k, offs_d, stride_pair_k, stride_pair_d, in_k, D)
            acc_p = tl.zeros((BLOCK_K, BLOCK_D), tl.float32)

        # without FMA operands held over the loop, ieee tiles fit into registers
        for start in tl.range(0, K, BLOCK_J, disable_licm=PRECISION == "ieee" or BLOCK_D > 64):
            cols = start + offs_j
            keep = cols < K
            k = load_rows(key_b, cols, offs_d, stride_key_k, stride_key_d, keep, D)
            v = load_rows(value_b, cols, offs_d, stride_value_k, stride_value_d, keep, D)
            d_a = dot(d_o, tl.trans(v), PRECISION)  # [BLOCK_K, BLOCK_J]
            if HAS_TEXT:
                s = dot(q_t, tl.trans(k), PRECISION)
                a_t = weighed(s, scale_log2, base_t, K * rtotal_t / unit_t, keep)
                d_s = a_t * (d_a - c_t)
                acc_t += dot(d_s.to(k.dtype), k, PRECISION)
            if HAS_PAIR:
                s = dot(q_p, tl.trans(k), PRECISION)
                a_p = weighed(s, scale_log2, base_p, K * rtotal_p / unit_p, keep)
                d_s = a_p * (d_a - c_p)
                acc_p += dot(d_s.to(k.dtype), k, PRECISION)

        if HAS_PAIR:
            d_pair_b = d_pair_ptr + b * stride_d_pair_b + h * stride_d_pair_h
            acc_p = acc_p * (scale * share * unit_p)
            store_rows(d_pair_b, acc_p, offs_k, offs_d, stride_d_pair_k, stride_d_pair_d, in_k, D)
    if HAS_TEXT:
        d_text_ptr += chunk * stride_d_text_b + h * stride_d_text_h
        acc_t = acc_t * (scale * share * unit_t)
        store_rows(d_text_ptr, acc_t, offs_k, offs_d, stride_d_text_k, stride_d_text_d, in_k, D)


def rational_attn_bwd(
    grad_out, image_query, text_query, pair_query, key, value, parts, image_out, stats, scale
):
    """(d_image_query, d_text_query, d_pairs); of absent queries [0].

    d_pairs [B, K, 2|3, H, d] holds the gradients of the pair query, where there is one, key, value.
    """
    B, H, K, d = key.shape
    _configs.check("rational_attn", key, d, _limits.MAX_HEAD_WIDTH)
    d_image, d_text = (
        key.new_empty((0,))
        if query is None
        else key.new_empty((query.shape[0], query.shape[2], H, d)).transpose(1, 2)
        for query in (image_query, text_query)
    )
    d_pairs = key.new_empty((B, K, 2 if pair_query is None else 3, H, d))
    grads = d_image, d_text, d_pairs
    if d_pairs.numel() == 0:
        for grad in grads:
            grad[:] = 0
        return grads
    *d_queries, d_key, d_value = d_pairs.permute(2, 0, 3, 1, 4).unbind()
    d_pair = d_queries[0] if d_queries else key  # without a pair query nothing is written to it
    has = _configs.kinds(image_query, text_query, pair_query)
    tile, precision, _ = _tiles.plan("rational_one_bwd", key, (B, H, K, K, d))
    queries, strides = _configs.query_arguments(image_query, text_query, pair_query, key)
    common = {**has, "PRECISION": precision, "BLOCK_D": _configs.padded(d)}
    common["WIDE"] = _configs.wide(grad_out, *queries, key, value, parts, d_key)
    tensors = (grad_out, *queries, key, value, stats)
    lengths = (*grad_out.stride(), *strides, *key.stride(), *value.stride())
    numbers = (scale, 1.0 / sum(has.values()), B, H, K, d)
    with torch.cuda.device_of(key):
        if tile.block_k >= K:
            slices, text_strides = d_text, (0, 0, 0, 0)
            if has["HAS_TEXT"]:
                slices = _configs.query_slices(d_text, B)
                text_strides = slices.stride()
            rational_attn_one_bwd_kernel[(B * H,)](
                *tensors, parts, image_out, d_image, slices, d_pair, d_key, d_value,
                *lengths, *parts.stride(), *text_strides, *d_key.stride(), *numbers,
                BLOCK_K=tile.block_k, **common, **tile.launch,
            )  # fmt: skip
            sum_partials(slices, d_text)
        else:
            c = key.new_empty((3, B, H), dtype=torch.float32)
            row = key.new_empty((B, H, d), dtype=torch.float32)
            rows, block_d, num_warps = _configs.row_tile(d, 4096)
            rational_attn_bwd_sums_kernel[(B * H,)](
                grad_out, parts, image_out, c, row, *grad_out.stride(), *parts.stride(),
                *numbers[2:], **has, BLOCK_K=rows, BLOCK_D=block_d,
                num_warps=num_warps, enable_fp_fusion=True,
            )  # fmt: skip
            _key_gradients(tensors, lengths, numbers, common, c, row, d_key, d_value, d_image)
            if has["HAS_TEXT"] or has["HAS_PAIR"]:
                _query_gradients(tensors, lengths, numbers, common, c, d_text, d_pair)
    return grads


def _key_gradients(tensors, lengths, numbers, common, c, row, d_key, d_value, d_image):
    B, H, K, d = d_key.shape
    tile, _, _ = _tiles.plan("rational_bwd_key", d_key, (B, H, K, K, d))
    tiles = triton.cdiv(K, tile.block_l)
    partial = d_image
    if tiles > 1 and common["HAS_IMAGE"]:
        partial = d_key.new_empty((tiles, B, H, d), dtype=torch.float32)
    rational_attn_bwd_key_kernel[(B * H * tiles,)](
        *tensors, c, row, d_key, d_value, partial, *lengths, *d_key.stride(), *numbers,
        BLOCK_K=tile.block_k, BLOCK_J=tile.block_l, **common, **tile.launch,
    )  # fmt: skip
    sum_partials(partial, d_image)


def _query_gradients(tensors, lengths, numbers, common, c, d_text, d_pair):
    grad_out, _, text_query, pair_query, key, value, stats = tensors
    B, H, K, d = key.shape
    tile, _, target = _tiles.plan("rational_bwd_query", key, (B, H, K, K, d))
    programs = H * triton.cdiv(K, tile.block_k)
    shared = common["HAS_TEXT"] and text_query.shape[0] == 1
    held = _tiles.resident("rational_bwd_query", key.dtype, d, target)
    images = _configs.images_per_program(B, programs, target, held) if shared else 1
    chunks = triton.cdiv(B, images)
    partial = _configs.query_slices(d_text, chunks) if shared else d_text
    absent = (0, 0, 0, 0)
    rational_attn_bwd_query_kernel[(programs * chunks,)](
        grad_out, text_query, pair_query, key, value, stats, c, partial, d_pair,
        *lengths[:4], *lengths[7:],
        *(partial.stride() if common["HAS_TEXT"] else absent),
        *(d_pair.stride() if common["HAS_PAIR"] else absent),
        *numbers, images,
        **{name: value for name, value in common.items() if name != "HAS_IMAGE"},
        BLOCK_K=tile.block_k, BLOCK_J=tile.block_l, **tile.launch,
    )  # fmt: skip
    sum_partials(partial, d_text)
