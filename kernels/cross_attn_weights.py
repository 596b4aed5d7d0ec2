# SPDX-License-Identifier: Apache-2.0
"""Attention weights P = softmax_L(scale q k^T) in memory, and their backward.

dS = P * (dP - rowsum(P * dP) / rowsum(P)) * scale. The stored P was rounded, so a row of it sums to
1 within the precision of its dtype only; without the division dS of a weight near 1 would be that
rounding. The backward knows masked columns by their weights: a column with weight 0 in every row
gives nothing, so its key is not read and its gradient is 0.
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
    load_rows,
    product,
    row_max,
    scores,
    softmax_step,
    store_rows,
    sum_partials,
    tile_indices,
)


@triton.jit
def load_weights(
    p_ptr, d_p_ptr, offs_row, offs_col,
    stride_p_row, stride_p_col, stride_d_p_row, stride_d_p_col, in_row, in_col,
):  # fmt: skip
    """(P, dP) [rows, columns] float32 tiles of [K, L] matrices, 0 outside, dP where P is 0 too."""
    mask = in_row[:, None] & in_col[None, :]
    offs = offs_row[:, None] * stride_p_row + offs_col[None, :] * stride_p_col
    p = tl.load(p_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    offs = offs_row[:, None] * stride_d_p_row + offs_col[None, :] * stride_d_p_col
    d_p = tl.load(d_p_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    return p, tl.where(p != 0.0, d_p, 0.0)


@triton.jit
def store_weights(ptr, p, offs_k, cols, in_k, L):
    """Write a float32 tile of a contiguous [K, L] matrix in the dtype of `ptr`."""
    mask = in_k[:, None] & (cols < L)[None, :]
    tl.store(ptr + offs_k[:, None] * L + cols[None, :], cast(p, ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["B", "H", "K", "L", "images_per_program"])
def cross_attn_weights_fwd_kernel(
    query_ptr,  # [B|1, H, K, D]
    key_ptr,  # [B, H, L, D]
    mask_ptr,  # [B|1, L] uint8
    weights_ptr,  # [B, H, K, L], contiguous
    stride_query_b, stride_query_h, stride_query_k, stride_query_d,
    stride_key_b, stride_key_h, stride_key_l, stride_key_d,
    stride_mask_b, stride_mask_l,
    scale, B, H, K, L, D, images_per_program,
    HAS_MASK: tl.constexpr, ONE_TILE: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    # program = (image chunk, head, query tile), one image a chunk unless they share the query
    chunk, h, tile = head_program(H, K, BLOCK_K)
    first = chunk * images_per_program
    offs_k = tile_indices(tile, BLOCK_K, WIDE)
    offs_l = indices(BLOCK_L, WIDE)
    offs_d = indices(BLOCK_D, WIDE)
    in_k = offs_k < K

    query_ptr += first * stride_query_b + h * stride_query_h
    q = load_rows(query_ptr, offs_k, offs_d, stride_query_k, stride_query_d, in_k, D)
    scale_log2 = scale * LOG2E

    for i in range(0, tl.minimum(images_per_program, B - first)):
        b = first + i
        key_b = key_ptr + b * stride_key_b + h * stride_key_h
        mask_b = mask_ptr + b * stride_mask_b
        weights_b = weights_ptr + (b * H + h) * K * L

        if ONE_TILE:
            s, keep = scores(
                q, key_b, mask_b, offs_l, offs_d, stride_key_l, stride_key_d, stride_mask_l,
                scale_log2, L, D, HAS_MASK, PRECISION,
            )  # fmt: skip
            top = row_max(s)
            top = tl.where(top == float("-inf"), 0.0, top)
            p = tl.exp2(s - top[:, None])
            total = tl.sum(p, axis=1)
            total = tl.where(total == 0.0, 1.0, total)
            p = tl.where(keep[None, :], p * (1.0 / total)[:, None], 0.0)
            store_weights(weights_b, p, offs_k, offs_l, in_k, L)
        else:
            top = tl.full((BLOCK_K,), float("-inf"), tl.float32)
            total = tl.zeros((BLOCK_K,), tl.float32)
            for start in range(0, L, BLOCK_L):
                cols = start + offs_l
                s, keep = scores(
                    q, key_b, mask_b, cols, offs_d, stride_key_l, stride_key_d, stride_mask_l,
                    scale_log2, L, D, HAS_MASK, PRECISION,
                )  # fmt: skip
                _, _, top, total = softmax_step(s, top, total)
            top = tl.where(top == float("-inf"), 0.0, top)
            rtotal = 1.0 / tl.where(total == 0.0, 1.0, total)

            # the scores are recomputed: cheaper than keeping a row of them for any L
            for start in range(0, L, BLOCK_L):
                cols = start + offs_l
                s, keep = scores(
                    q, key_b, mask_b, cols, offs_d, stride_key_l, stride_key_d, stride_mask_l,
                    scale_log2, L, D, HAS_MASK, PRECISION,
                )  # fmt: skip
                p = tl.where(keep[None, :], tl.exp2(s - top[:, None]) * rtotal[:, None], 0.0)
                store_weights(weights_b, p, offs_k, cols, in_k, L)


@triton.jit
def add_query_gradient(
    acc, p, d_p, delta, key_ptr, cols, offs_d, stride_key_l, stride_key_d, D,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """acc + dS K of one tile of columns; a column with weight 0 in every row is not read."""
    d_s = p * (d_p - delta[:, None])
    used = tl.max((p != 0.0).to(tl.int32), axis=0) != 0  # [BLOCK_L]
    k = load_rows(key_ptr, cols, offs_d, stride_key_l, stride_key_d, used, D)
    return acc + dot(d_s.to(k.dtype), k, PRECISION)


@triton.jit(do_not_specialize=["B", "H", "K", "L", "images_per_program"])
def cross_attn_weights_bwd_query_kernel(
    d_weights_ptr,  # [B, H, K, L]
    weights_ptr,  # [B, H, K, L]
    key_ptr,  # [B, H, L, D]
    delta_ptr,  # [B, H, K] float32, contiguous: written
    d_query_ptr,  # [chunks, H, K, D], one slice per image chunk: written
    stride_d_weights_b, stride_d_weights_h, stride_d_weights_k, stride_d_weights_l,
    stride_weights_b, stride_weights_h, stride_weights_k, stride_weights_l,
    stride_key_b, stride_key_h, stride_key_l, stride_key_d,
    stride_d_query_b, stride_d_query_h, stride_d_query_k, stride_d_query_d,
    scale, B, H, K, L, D, images_per_program,
    ONE_TILE: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    chunk, h, tile = head_program(H, K, BLOCK_K)
    first = chunk * images_per_program
    offs_k = tile_indices(tile, BLOCK_K, WIDE)
    offs_l = indices(BLOCK_L, WIDE)
    offs_d = indices(BLOCK_D, WIDE)
    in_k = offs_k < K
    acc = tl.zeros((BLOCK_K, BLOCK_D), tl.float32)

    for i in range(0, tl.minimum(images_per_program, B - first)):
        b = first + i
        key_b = key_ptr + b * stride_key_b + h * stride_key_h
        p_b = weights_ptr + b * stride_weights_b + h * stride_weights_h
        d_p_b = d_weights_ptr + b * stride_d_weights_b + h * stride_d_weights_h

        if ONE_TILE:
            p, d_p = load_weights(
                p_b, d_p_b, offs_k, offs_l, stride_weights_k, stride_weights_l,
                stride_d_weights_k, stride_d_weights_l, in_k, offs_l < L,
            )  # fmt: skip
            delta = tl.sum(product(p, d_p), axis=1)
            total = tl.sum(p, axis=1)
            delta = delta / tl.where(total == 0.0, 1.0, total)
            acc = add_query_gradient(
                acc, p, d_p, delta, key_b, offs_l, offs_d, stride_key_l, stride_key_d, D, PRECISION
            )
        else:
            delta = tl.zeros((BLOCK_K,), tl.float32)
            total = tl.zeros((BLOCK_K,), tl.float32)
            for start in tl.range(0, L, BLOCK_L, disable_licm=True):
                cols = start + offs_l
                p, d_p = load_weights(
                    p_b, d_p_b, offs_k, cols, stride_weights_k, stride_weights_l,
                    stride_d_weights_k, stride_d_weights_l, in_k, cols < L,
                )  # fmt: skip
                delta += tl.sum(product(p, d_p), axis=1)
                total += tl.sum(p, axis=1)
            delta = delta / tl.where(total == 0.0, 1.0, total)

            for start in tl.range(0, L, BLOCK_L, disable_licm=True):
                cols = start + offs_l
                p, d_p = load_weights(
                    p_b, d_p_b, offs_k, cols, stride_weights_k, stride_weights_l,
                    stride_d_weights_k, stride_d_weights_l, in_k, cols < L,
                )  # fmt: skip
                acc = add_query_gradient(
                    acc, p, d_p, delta, key_b, cols, offs_d, stride_key_l, stride_key_d, D,
                    PRECISION,
                )  # fmt: skip
        tl.store(delta_ptr + (b * H + h) * K + offs_k, delta, mask=in_k)

    d_query_ptr += chunk * stride_d_query_b + h * stride_d_query_h
    acc = acc * scale
    store_rows(d_query_ptr, acc, offs_k, offs_d, stride_d_query_k, stride_d_query_d, in_k, D)


@triton.jit(do_not_specialize=["H", "K", "L"])
def cross_attn_weights_bwd_key_kernel(
    d_weights_ptr,  # [B, H, K, L]
    weights_ptr,  # [B, H, K, L]
    query_ptr,  # [B|1, H, K, D]
    delta_ptr,  # [B, H, K] float32, contiguous
    d_key_ptr,  # [B, H, L, D]: written
    stride_d_weights_b, stride_d_weights_h, stride_d_weights_k, stride_d_weights_l,
    stride_weights_b, stride_weights_h, stride_weights_k, stride_weights_l,
    stride_query_b, stride_query_h, stride_query_k, stride_query_d,
    stride_d_key_b, stride_d_key_h, stride_d_key_l, stride_d_key_d,
    scale, H, K, L, D,
    PRECISION: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    b, h, tile = head_program(H, L, BLOCK_L)
    offs_l = tile_indices(tile, BLOCK_L, WIDE)
    offs_k = indices(BLOCK_K, WIDE)
    offs_d = indices(BLOCK_D, WIDE)
    in_l = offs_l < L

    weights_ptr += b * stride_weights_b + h * stride_weights_h
    d_weights_ptr += b * stride_d_weights_b + h * stride_d_weights_h
    query_ptr += b * stride_query_b + h * stride_query_h
    delta_ptr += (b * H + h) * K
    used = tl.zeros((BLOCK_L,), tl.int32)
    acc = tl.zeros((BLOCK_L, BLOCK_D), tl.float32)
    for start in range(0, K, BLOCK_K):
        rows = start + offs_k
        in_k = rows < K
        # transposed tiles [BLOCK_L, BLOCK_K]
        p, d_p = load_weights(
            weights_ptr, d_weights_ptr, offs_l, rows, stride_weights_l, stride_weights_k,
            stride_d_weights_l, stride_d_weights_k, in_l, in_k,
        )  # fmt: skip
        delta = tl.load(delta_ptr + rows, mask=in_k, other=0.0)
        d_s = p * (d_p - delta[None, :])
        used = tl.maximum(used, tl.max((p != 0.0).to(tl.int32), axis=1))
        q = load_rows(query_ptr, rows, offs_d, stride_query_k, stride_query_d, in_k, D)
        acc += dot(d_s.to(q.dtype), q, PRECISION)

    acc = tl.where((used != 0)[:, None], acc * scale, 0.0)
    d_key_ptr += b * stride_d_key_b + h * stride_d_key_h
    store_rows(d_key_ptr, acc, offs_l, offs_d, stride_d_key_l, stride_d_key_d, in_l, D)


def cross_attn_weights_fwd(query, key, key_mask, scale):
    """weights [B, H, K, L]; masked columns and rows without a column are 0."""
    B, H, L, d = key.shape
    K = query.shape[2]
    _configs.check("cross_attn_weights", query, d, _limits.MAX_HEAD_WIDTH)
    weights = query.new_empty((B, H, K, L))
    if weights.numel() == 0:
        return weights
    tile, precision, target = _tiles.plan("weights", query, (B, H, K, L, d))
    programs = H * triton.cdiv(K, tile.block_k)
    held = _tiles.resident("weights", query.dtype, d, target)
    shared = query.shape[0] == 1
    images = _configs.images_per_program(B, programs, target, held) if shared else 1
    mask, mask_strides = _configs.mask_argument(key_mask, weights)
    with torch.cuda.device_of(query):
        cross_attn_weights_fwd_kernel[(programs * triton.cdiv(B, images),)](
            query, key, mask, weights,
            *_configs.query_strides(query), *key.stride(), *mask_strides,
            scale, B, H, K, L, d, images,
            HAS_MASK=key_mask is not None, ONE_TILE=tile.block_l >= L, PRECISION=precision,
            WIDE=_configs.wide(query, key, key_mask, weights),
            BLOCK_K=tile.block_k, BLOCK_L=tile.block_l, BLOCK_D=_configs.padded(d),
            **tile.launch,
        )  # fmt: skip
    return weights


def cross_attn_weights_bwd(grad_weights, weights, query, key, scale):
    """(d_query, d_key), each over [., K or L, H, d] memory; d_query as query is batched."""
    B, H, L, d = key.shape
    K = query.shape[2]
    _configs.check("cross_attn_weights", query, d, _limits.MAX_HEAD_WIDTH)
    d_query = query.new_empty((query.shape[0], K, H, d)).transpose(1, 2)
    d_key = key.new_empty((B, L, H, d)).transpose(1, 2)
    delta = query.new_empty((B, H, K), dtype=torch.float32)
    tile, precision, target = _tiles.plan("weights_bwd", query, (B, H, K, L, d))
    settings = {"PRECISION": precision, "BLOCK_D": _configs.padded(d), **tile.launch}
    settings |= {"BLOCK_K": tile.block_k, "BLOCK_L": tile.block_l}
    settings["WIDE"] = _configs.wide(grad_weights, weights, query, key, d_key)

    programs = H * triton.cdiv(K, tile.block_k)
    held = _tiles.resident("weights_bwd", query.dtype, d, target)
    shared = query.shape[0] == 1
    images = _configs.images_per_program(B, programs, target, held) if shared else 1
    chunks = triton.cdiv(B, images)
    partial = _configs.query_slices(d_query, chunks)
    with torch.cuda.device_of(query):
        if programs * chunks:
            cross_attn_weights_bwd_query_kernel[(programs * chunks,)](
                grad_weights, weights, key, delta, partial,
                *grad_weights.stride(), *weights.stride(), *key.stride(), *partial.stride(),
                scale, B, H, K, L, d, images, ONE_TILE=tile.block_l >= L, **settings,
            )  # fmt: skip
        sum_partials(partial, d_query)
        if B * H * L:
            cross_attn_weights_bwd_key_kernel[(B * H * triton.cdiv(L, tile.block_l),)](
                grad_weights, weights, query, delta, d_key,
                *grad_weights.stride(), *weights.stride(), *_configs.query_strides(query),
                *d_key.stride(), scale, H, K, L, d, **settings,
            )  # fmt: skip
    return d_query, d_key
