# SPDX-License-Identifier: Apache-2.0
"""Cross-attention of class queries to the spatial tokens of many images: forward.

A program keeps one tile of queries on chip and streams images past it. With one query set for all
images the query is read once per program and never copied per image. The backward is in
cross_attn_bwd.py.
"""

import torch
import triton
import triton.language as tl

from vtclip.kernels import _configs, _limits, _tiles
from vtclip.kernels._math import (
    LN2,
    LOG2E,
    dot,
    head_program,
    indices,
    load_rows,
    row_max,
    scores,
    softmax_step,
    store_rows,
    tile_indices,
)
from vtclip.kernels.cross_attn_bwd import cross_attn_bwd

__all__ = ["cross_attn_bwd", "cross_attn_fwd"]


@triton.jit(do_not_specialize=["B", "H", "K", "L", "images_per_program"])
def cross_attn_fwd_kernel(
    query_ptr,  # [B|1, H, K, D]
    key_ptr,  # [B, H, L, D]
    value_ptr,  # [B, H, L, D]
    mask_ptr,  # [B|1, L] uint8
    out_ptr,  # [B, H, K, D]
    lse_ptr,  # [B, H, K] float32, contiguous
    stride_query_b, stride_query_h, stride_query_k, stride_query_d,
    stride_key_b, stride_key_h, stride_key_l, stride_key_d,
    stride_value_b, stride_value_h, stride_value_l, stride_value_d,
    stride_mask_b, stride_mask_l,
    stride_out_b, stride_out_h, stride_out_k, stride_out_d,
    scale, B, H, K, L, D, images_per_program,
    SHARED_QUERY: tl.constexpr, HAS_MASK: tl.constexpr, ONE_TILE: tl.constexpr,
    PRECISION: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    # program = (image chunk, head, query tile); neighbours share the keys of an image and a head
    chunk, h, tile = head_program(H, K, BLOCK_K)
    first = chunk * images_per_program
    offs_k = tile_indices(tile, BLOCK_K, WIDE)
    offs_l = indices(BLOCK_L, WIDE)
    offs_d = indices(BLOCK_D, WIDE)
    in_k = offs_k < K

    query_ptr += h * stride_query_h
    key_ptr += h * stride_key_h
    value_ptr += h * stride_value_h
    out_ptr += h * stride_out_h
    lse_ptr += h * K
    if SHARED_QUERY:
        q = load_rows(query_ptr, offs_k, offs_d, stride_query_k, stride_query_d, in_k, D)
    scale_log2 = scale * LOG2E

    for i in range(0, tl.minimum(images_per_program, B - first)):
        b = first + i
        if not SHARED_QUERY:
            query_b = query_ptr + b * stride_query_b
            q = load_rows(query_b, offs_k, offs_d, stride_query_k, stride_query_d, in_k, D)
        key_b = key_ptr + b * stride_key_b
        value_b = value_ptr + b * stride_value_b
        mask_b = mask_ptr + b * stride_mask_b

        if ONE_TILE:
            s, keep = scores(
                q, key_b, mask_b, offs_l, offs_d, stride_key_l, stride_key_d, stride_mask_l,
                scale_log2, L, D, HAS_MASK, PRECISION,
            )  # fmt: skip
            top = row_max(s)
            top = tl.where(top == float("-inf"), 0.0, top)  # no column: exp2(-inf) = 0, not NaN
            p = tl.exp2(s - top[:, None])
            total = tl.sum(p, axis=1)
            v = load_rows(value_b, offs_l, offs_d, stride_value_l, stride_value_d, keep, D)
            acc = dot(p.to(v.dtype), v, PRECISION)  # [BLOCK_K, BLOCK_D]
        else:
            top = tl.full((BLOCK_K,), float("-inf"), tl.float32)
            total = tl.zeros((BLOCK_K,), tl.float32)
            acc = tl.zeros((BLOCK_K, BLOCK_D), tl.float32)
            for start in tl.range(0, L, BLOCK_L, disable_licm=BLOCK_D > 64):
                cols = start + offs_l
                s, keep = scores(
                    q, key_b, mask_b, cols, offs_d, stride_key_l, stride_key_d, stride_mask_l,
                    scale_log2, L, D, HAS_MASK, PRECISION,
                )  # fmt: skip
                p, shrink, top, total = softmax_step(s, top, total)
                v = load_rows(value_b, cols, offs_d, stride_value_l, stride_value_d, keep, D)
                acc = acc * shrink[:, None] + dot(p.to(v.dtype), v, PRECISION)
            top = tl.where(top == float("-inf"), 0.0, top)

        empty = total == 0.0
        total = tl.where(empty, 1.0, total)
        acc = acc * (1.0 / total)[:, None]  # one division a row, not one an element
        lse = tl.where(empty, float("-inf"), (top + tl.log2(total)) * LN2)
        out_b = out_ptr + b * stride_out_b
        store_rows(out_b, acc, offs_k, offs_d, stride_out_k, stride_out_d, in_k, D)
        tl.store(lse_ptr + b * H * K + offs_k, lse, mask=in_k)


def cross_attn_fwd(query, key, value, key_mask, scale):
    """out [B, H, K, d] over [B, K, H, d] memory, lse [B, H, K] float32."""
    B, H, L, d = key.shape
    K = query.shape[2]
    _configs.check("cross_attn", query, d, _limits.MAX_HEAD_WIDTH)
    out = query.new_empty((B, K, H, d)).transpose(1, 2)
    lse = query.new_empty((B, H, K), dtype=torch.float32)
    if lse.numel() == 0:
        return out, lse
    tile, precision, target = _tiles.plan("fwd", query, (B, H, K, L, d))
    if key_mask is not None and 80 <= target.capability < 100:
        # the masks of a tile that is loaded ahead would take more registers than there are
        tile = tile._replace(num_stages=1)
    programs = H * triton.cdiv(K, tile.block_k)
    shared = query.shape[0] == 1
    kind = "fwd" if key_mask is None else "masked fwd"
    held = _tiles.resident(kind, query.dtype, d, target)
    images = _configs.images_per_program(B, programs, target, held) if shared else 1
    mask, mask_strides = _configs.mask_argument(key_mask, lse)
    with torch.cuda.device_of(query):
        cross_attn_fwd_kernel[(programs * triton.cdiv(B, images),)](
            query, key, value, mask, out, lse,
            *query.stride(), *key.stride(), *value.stride(), *mask_strides, *out.stride(),
            scale, B, H, K, L, d, images,
            SHARED_QUERY=shared, HAS_MASK=key_mask is not None, ONE_TILE=tile.block_l >= L,
            PRECISION=precision, WIDE=_configs.wide(query, key, value, key_mask, out),
            BLOCK_K=tile.block_k, BLOCK_L=tile.block_l, BLOCK_D=_configs.padded(d),
            **tile.launch,
        )  # fmt: skip
    return out, lse
