# SPDX-License-Identifier: Apache-2.0
"""Cross-attention backward, without atomics.

P = exp(S - lse), dP = d_out v^T, delta = rowsum(d_out * out) - d_lse,
dS = P * (dP - delta) * scale.
One kernel forms d_query per (image chunk, head, query tile), summing over images on chip, and
leaves delta behind; the other forms d_key and d_value per (image, head, key tile) in a loop over
queries.
"""

import torch
import triton
import triton.language as tl

from vtclip.kernels import _configs, _limits, _tiles
from vtclip.kernels._math import (
    LOG2E,
    attended,
    dot,
    head_program,
    indices,
    load_rows,
    product,
    store_rows,
    sum_partials,
    tile_indices,
)


@triton.jit
def load_lse(ptrs, in_k):
    """[BLOCK_K] log-sum-exp in powers of two; of an empty row (-inf) any finite number does."""
    lse = tl.load(ptrs, mask=in_k, other=0.0)
    return tl.where(lse == float("-inf"), 0.0, lse * LOG2E)


@triton.jit(do_not_specialize=["B", "H", "K", "L", "images_per_program"])
def cross_attn_bwd_query_kernel(
    d_out_ptr,  # [B, H, K, D]
    d_lse_ptr,  # [B, H, K]
    query_ptr,  # [B|1, H, K, D]
    key_ptr,  # [B, H, L, D]
    value_ptr,  # [B, H, L, D]
    mask_ptr,  # [B|1, L] uint8
    out_ptr,  # [B, H, K, D]
    lse_ptr,  # [B, H, K] float32, contiguous
    delta_ptr,  # [B, H, K] float32, contiguous: written
    d_query_ptr,  # [chunks, H, K, D], one slice per image chunk: written
    stride_d_out_b, stride_d_out_h, stride_d_out_k, stride_d_out_d,
    stride_d_lse_b, stride_d_lse_h, stride_d_lse_k,
    stride_query_b, stride_query_h, stride_query_k, stride_query_d,
    stride_key_b, stride_key_h, stride_key_l, stride_key_d,
    stride_value_b, stride_value_h, stride_value_l, stride_value_d,
    stride_mask_b, stride_mask_l,
    stride_out_b, stride_out_h, stride_out_k, stride_out_d,
    stride_d_query_b, stride_d_query_h, stride_d_query_k, stride_d_query_d,
    scale, B, H, K, L, D, images_per_program,
    HAS_MASK: tl.constexpr, HAS_D_LSE: tl.constexpr,
    PRECISION: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    chunk, h, tile = head_program(H, K, BLOCK_K)
    first = chunk * images_per_program
    offs_k = tile_indices(tile, BLOCK_K, WIDE)
    offs_l = indices(BLOCK_L, WIDE)
    offs_d = indices(BLOCK_D, WIDE)
    in_k = offs_k < K

    query_ptr += first * stride_query_b + h * stride_query_h
    q = load_rows(query_ptr, offs_k, offs_d, stride_query_k, stride_query_d, in_k, D)
    scale_log2 = scale * LOG2E
    acc = tl.zeros((BLOCK_K, BLOCK_D), tl.float32)

    for i in range(0, tl.minimum(images_per_program, B - first)):
        b = first + i
        key_b = key_ptr + b * stride_key_b + h * stride_key_h
        value_b = value_ptr + b * stride_value_b + h * stride_value_h
        mask_b = mask_ptr + b * stride_mask_b
        first_row = (b * H + h) * K
        d_out_b = d_out_ptr + b * stride_d_out_b + h * stride_d_out_h
        d_o = load_rows(d_out_b, offs_k, offs_d, stride_d_out_k, stride_d_out_d, in_k, D)
        out_b = out_ptr + b * stride_out_b + h * stride_out_h
        o = load_rows(out_b, offs_k, offs_d, stride_out_k, stride_out_d, in_k, D)
        delta = tl.sum(product(d_o.to(tl.float32), o.to(tl.float32)), axis=1)  # [BLOCK_K]
        if HAS_D_LSE:
            d_lse_b = d_lse_ptr + b * stride_d_lse_b + h * stride_d_lse_h
            d_lse = tl.load(d_lse_b + offs_k * stride_d_lse_k, mask=in_k, other=0.0)
            delta -= d_lse.to(tl.float32)
        tl.store(delta_ptr + first_row + offs_k, delta, mask=in_k)
        lse = load_lse(lse_ptr + first_row + offs_k, in_k)

        # without FMA operands of q and d_o held over the loop, ieee tiles fit into registers
        for start in tl.range(0, L, BLOCK_L, disable_licm=PRECISION == "ieee" or BLOCK_D > 64):
            cols = start + offs_l
            keep = attended(mask_b, cols, stride_mask_l, L, HAS_MASK)
            k = load_rows(key_b, cols, offs_d, stride_key_l, stride_key_d, keep, D)
            v = load_rows(value_b, cols, offs_d, stride_value_l, stride_value_d, keep, D)
            p = tl.exp2(dot(q, tl.trans(k), PRECISION) * scale_log2 - lse[:, None])
            d_p = dot(d_o, tl.trans(v), PRECISION)
            # by selection, not by a factor 0: delta of an empty row may be anything
            d_s = tl.where(keep[None, :], p * (d_p - delta[:, None]), 0.0)
            acc += dot(d_s.to(k.dtype), k, PRECISION)

    d_query_ptr += chunk * stride_d_query_b + h * stride_d_query_h
    acc = acc * scale
    store_rows(d_query_ptr, acc, offs_k, offs_d, stride_d_query_k, stride_d_query_d, in_k, D)


@triton.jit(do_not_specialize=["H", "K", "L"])
def cross_attn_bwd_key_kernel(
    d_out_ptr,  # [B, H, K, D]
    query_ptr,  # [B|1, H, K, D]
    key_ptr,  # [B, H, L, D]
    value_ptr,  # [B, H, L, D]
    mask_ptr,  # [B|1, L] uint8
    lse_ptr,  # [B, H, K] float32, contiguous
    delta_ptr,  # [B, H, K] float32, contiguous
    d_key_ptr,  # [B, H, L, D]: written
    d_value_ptr,  # [B, H, L, D]: written
    stride_d_out_b, stride_d_out_h, stride_d_out_k, stride_d_out_d,
    stride_query_b, stride_query_h, stride_query_k, stride_query_d,
    stride_key_b, stride_key_h, stride_key_l, stride_key_d,
    stride_value_b, stride_value_h, stride_value_l, stride_value_d,
    stride_mask_b, stride_mask_l,
    stride_d_key_b, stride_d_key_h, stride_d_key_l, stride_d_key_d,
    stride_d_value_b, stride_d_value_h, stride_d_value_l, stride_d_value_d,
    scale, H, K, L, D,
    HAS_MASK: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    b, h, tile = head_program(H, L, BLOCK_L)
    offs_l = tile_indices(tile, BLOCK_L, WIDE)
    offs_k = indices(BLOCK_K, WIDE)
    offs_d = indices(BLOCK_D, WIDE)
    in_l = offs_l < L

    query_ptr += b * stride_query_b + h * stride_query_h
    d_out_ptr += b * stride_d_out_b + h * stride_d_out_h
    lse_ptr += (b * H + h) * K
    delta_ptr += (b * H + h) * K
    keep = attended(mask_ptr + b * stride_mask_b, offs_l, stride_mask_l, L, HAS_MASK)
    key_ptr += b * stride_key_b + h * stride_key_h
    k = load_rows(key_ptr, offs_l, offs_d, stride_key_l, stride_key_d, keep, D)
    value_ptr += b * stride_value_b + h * stride_value_h
    v = load_rows(value_ptr, offs_l, offs_d, stride_value_l, stride_value_d, keep, D)
    scale_log2 = scale * LOG2E
    d_k = tl.zeros((BLOCK_L, BLOCK_D), tl.float32)
    d_v = tl.zeros((BLOCK_L, BLOCK_D), tl.float32)

    for start in tl.range(0, K, BLOCK_K, disable_licm=PRECISION != "ieee" and BLOCK_D > 64):
        rows = start + offs_k
        in_k = rows < K
        q = load_rows(query_ptr, rows, offs_d, stride_query_k, stride_query_d, in_k, D)
        d_o = load_rows(d_out_ptr, rows, offs_d, stride_d_out_k, stride_d_out_d, in_k, D)
        lse = load_lse(lse_ptr + rows, in_k)
        delta = tl.load(delta_ptr + rows, mask=in_k, other=0.0)
        p = tl.exp2(dot(k, tl.trans(q), PRECISION) * scale_log2 - lse[None, :])
        p = tl.where(keep[:, None], p, 0.0)  # [BLOCK_L, BLOCK_K]
        d_v += dot(p.to(d_o.dtype), d_o, PRECISION)
        d_p = dot(v, tl.trans(d_o), PRECISION)
        d_s = p * (d_p - delta[None, :])
        d_k += dot(d_s.to(q.dtype), q, PRECISION)

    # a masked column has gradient 0 even where a query or an incoming gradient is NaN
    d_k = tl.where(keep[:, None], d_k * scale, 0.0)
    d_v = tl.where(keep[:, None], d_v, 0.0)
    d_key_ptr += b * stride_d_key_b + h * stride_d_key_h
    store_rows(d_key_ptr, d_k, offs_l, offs_d, stride_d_key_l, stride_d_key_d, in_l, D)
    d_value_ptr += b * stride_d_value_b + h * stride_d_value_h
    store_rows(d_value_ptr, d_v, offs_l, offs_d, stride_d_value_l, stride_d_value_d, in_l, D)


def cross_attn_bwd(grad_out, grad_lse, query, key, value, key_mask, out, lse, scale):
    """(d_query, d_key, d_value), each over [., K or L, H, d] memory; d_query shared if query is."""
    B, H, L, d = key.shape
    K = query.shape[2]
    _configs.check("cross_attn", query, d, _limits.MAX_HEAD_WIDTH)
    d_query = query.new_empty((query.shape[0], K, H, d)).transpose(1, 2)
    d_key = key.new_empty((B, L, H, d)).transpose(1, 2)
    d_value = value.new_empty((B, L, H, d)).transpose(1, 2)
    delta = torch.empty_like(lse)
    mask, mask_strides = _configs.mask_argument(key_mask, lse)
    tile, precision, target = _tiles.plan("bwd_query", query, (B, H, K, L, d))
    settings = {"HAS_MASK": key_mask is not None, "PRECISION": precision}
    settings["BLOCK_D"] = _configs.padded(d)
    settings["WIDE"] = _configs.wide(grad_out, query, key, value, key_mask, out, d_key)

    programs = H * triton.cdiv(K, tile.block_k)
    held = _tiles.resident("bwd_query", query.dtype, d, target)
    shared = query.shape[0] == 1
    images = _configs.images_per_program(B, programs, target, held) if shared else 1
    chunks = triton.cdiv(B, images)
    partial = _configs.query_slices(d_query, chunks)
    d_lse, d_lse_strides = (lse, (0, 0, 0)) if grad_lse is None else (grad_lse, grad_lse.stride())
    with torch.cuda.device_of(query):
        if programs * chunks:
            cross_attn_bwd_query_kernel[(programs * chunks,)](
                grad_out, d_lse, query, key, value, mask, out, lse, delta, partial,
                *grad_out.stride(), *d_lse_strides, *_configs.query_strides(query), *key.stride(),
                *value.stride(), *mask_strides, *out.stride(), *partial.stride(),
                scale, B, H, K, L, d, images,
                HAS_D_LSE=grad_lse is not None,
                BLOCK_K=tile.block_k, BLOCK_L=tile.block_l, **settings, **tile.launch,
            )  # fmt: skip
        sum_partials(partial, d_query)
        if B * H * L:
            tile, _, _ = _tiles.plan("bwd_key", query, (B, H, K, L, d))
            cross_attn_bwd_key_kernel[(B * H * triton.cdiv(L, tile.block_l),)](
                grad_out, query, key, value, mask, lse, delta, d_key, d_value,
                *grad_out.stride(), *_configs.query_strides(query), *key.stride(), *value.stride(),
                *mask_strides, *d_key.stride(), *d_value.stride(),
                scale, H, K, L, d,
                BLOCK_K=tile.block_k, BLOCK_L=tile.block_l, **settings, **tile.launch,
            )  # fmt: skip
    return d_query, d_key, d_value
