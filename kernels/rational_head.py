# SPDX-License-Identifier: Apache-2.0
"""The end of RAda: output projection, mask, logits and penalty: forward.

m = context @ weight^T + bias exists one tile at a time, in registers; of it remain one sum per
class and one number per program for the penalty. Programs are (column range, image, class tile).
Where one program holds every class and column of an image it finishes by itself, in one launch;
else `finish` adds what the programs left, in order. The backward is in rational_head_bwd.py.
"""

import torch
import triton
import triton.language as tl

from vtclip.kernels import _configs, _limits, _tiles
from vtclip.kernels._math import cast, dot, load_row, load_rows, opened, product
from vtclip.kernels.rational_head_bwd import rational_head_bwd

__all__ = ["rational_head_bwd", "rational_head_fwd"]

LAST = tl.constexpr(2**62)  # above every index


@triton.jit
def largest(value, index):
    """(maximum, its first index, NaN if any is NaN else 0) of `value` [N] >= -1."""
    is_nan = value != value
    nan = tl.sum(tl.where(is_nan, value, 0.0), axis=0)
    value = tl.where(is_nan, float("inf"), value)
    top = tl.max(value, axis=0)
    return top, tl.min(tl.where(value == top, index, LAST), axis=0), nan


@triton.jit(do_not_specialize=["B", "K", "columns"])
def rational_head_fwd_kernel(
    context_ptr,  # [B, K, D]
    weight_ptr,  # [D, D]
    bias_ptr,  # [D]
    image_ptr,  # [B, D]
    text_ptr,  # [K, D]
    logits_ptr,  # [splits, B, K], contiguous, of one split the result, else float32: written
    penalty_ptr,  # [B, P] float32, P = tiles * splits, contiguous, of P = 1 the result: written
    peak_ptr,  # [B, P] int64, contiguous: written if PENALTY == 3
    stride_context_b, stride_context_k, stride_context_d,
    stride_weight_n, stride_weight_d, stride_bias_d,
    stride_image_b, stride_image_d,
    stride_text_k, stride_text_d,
    scale, mean, B, K, D, columns,
    PENALTY: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    # program = (split, image, class tile); `columns` is the width of a split
    pid = tl.program_id(0)
    num_tiles = tl.cdiv(K, BLOCK_K)
    tile = (pid % num_tiles).to(tl.int64)
    b = (pid // num_tiles % B).to(tl.int64)
    split = (pid // num_tiles // B).to(tl.int64)
    offs_k = tile * BLOCK_K + tl.arange(0, BLOCK_K)
    begun = split * columns
    if text_ptr.dtype.element_ty.primitive_bitwidth == 16:
        # `columns` is a multiple of BLOCK_N: said, or entries would be loaded one by one. Of
        # float32 that costs less than the registers of wide loads, which spill on sm_80.
        begun = tl.multiple_of(begun, BLOCK_N)
    offs_n = begun + tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, BLOCK_D).to(tl.int64)
    in_k = offs_k < K
    context_ptr += b * stride_context_b
    image_ptr += b * stride_image_b
    total = tl.zeros((BLOCK_K,), tl.float32)
    size = tl.zeros((BLOCK_K,), tl.float32)
    top = tl.full((BLOCK_K,), -1.0, tl.float32)  # [BLOCK_K] maxima and their columns
    where = tl.zeros((BLOCK_K,), tl.int64)

    for begin in range(0, columns, BLOCK_N):
        cols = begin + offs_n
        in_n = cols < D
        m = tl.zeros((BLOCK_K, BLOCK_N), tl.float32)
        for start in range(0, D, BLOCK_D):
            inner = start + offs_d
            c = load_rows(context_ptr, offs_k, inner, stride_context_k, stride_context_d, in_k, D)
            w = load_rows(weight_ptr, cols, inner, stride_weight_n, stride_weight_d, in_n, D)
            m += dot(c, tl.trans(w), PRECISION)
        m += load_row(bias_ptr, cols, stride_bias_d, D)[None, :]
        x = load_row(image_ptr, cols, stride_image_d, D)
        t = load_rows(text_ptr, offs_k, cols, stride_text_k, stride_text_d, in_k, D)
        total += tl.sum(product(opened(m), x[None, :] * t.to(tl.float32)), axis=1)
        if PENALTY != 0:
            # relu(1 + m) - 1, without the rounding of 1 + m
            off = tl.abs(tl.where(m <= -1.0, -1.0, m))
            there = in_k[:, None] & in_n[None, :]
            if PENALTY == 1:
                size += tl.sum(tl.where(there, off, 0.0), axis=1)
            elif PENALTY == 2:
                size += tl.sum(tl.where(there, product(off, off), 0.0), axis=1)
            else:
                is_nan = off != off
                size += tl.sum(tl.where(there & is_nan, off, 0.0), axis=1)
                off = tl.where(there, tl.where(is_nan, float("inf"), off), -1.0)
                row = tl.max(off, axis=1)
                first = tl.min(tl.where(off == row[:, None], cols[None, :], LAST), axis=1)
                where = tl.where(row > top, first, where)  # of equal ones the first stays
                top = tl.maximum(top, row)

    logits = cast(scale * total, logits_ptr.dtype.element_ty)
    tl.store(logits_ptr + (split * B + b) * K + offs_k, logits, mask=in_k)
    num_splits = tl.num_programs(0) // num_tiles // B
    slot = (b * num_splits + split) * num_tiles + tile
    if PENALTY == 3:
        top, index, nan = largest(top, offs_k * D + where)
        tl.store(penalty_ptr + slot, top + tl.sum(size, axis=0))
        tl.store(peak_ptr + slot, index)
    else:
        tl.store(penalty_ptr + slot, tl.sum(size, axis=0) * mean)


@triton.jit(do_not_specialize=["B", "K", "P", "splits"])
def rational_head_finish_kernel(
    partial_logits_ptr,  # [splits, B, K] float32, contiguous
    partial_penalty_ptr,  # [B, P] float32, contiguous
    partial_peak_ptr,  # [B, P] int64, contiguous
    logits_ptr,  # [B, K], contiguous: written if splits > 1
    penalty_ptr,  # [B] float32: written
    peak_ptr,  # [B] int64: written if PENALTY == 3
    B, K, P, splits,
    PENALTY: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    # program = (image, class tile); of splits == 1 there is one tile, and no logits
    pid = tl.program_id(0)
    num_tiles = tl.cdiv(K, BLOCK_K) if splits > 1 else 1
    tile = (pid % num_tiles).to(tl.int64)
    b = (pid // num_tiles).to(tl.int64)
    if splits > 1:
        offs_k = tile * BLOCK_K + tl.arange(0, BLOCK_K)
        in_k = offs_k < K
        total = tl.zeros((BLOCK_K,), tl.float32)
        for split in range(0, splits):
            rows = (split * B.to(tl.int64) + b) * K
            total += tl.load(partial_logits_ptr + rows + offs_k, mask=in_k, other=0.0)
        logits = cast(total, logits_ptr.dtype.element_ty)
        tl.store(logits_ptr + b * K + offs_k, logits, mask=in_k)
    if tile == 0:
        offs_p = tl.arange(0, BLOCK_P).to(tl.int64)
        in_p = offs_p < P
        slots = b * P + offs_p
        if PENALTY == 3:
            value = tl.load(partial_penalty_ptr + slots, mask=in_p, other=-1.0)
            index = tl.load(partial_peak_ptr + slots, mask=in_p, other=LAST)
            top, index, nan = largest(value, index)
            tl.store(penalty_ptr + b, top + nan)
            tl.store(peak_ptr + b, index)
        else:
            value = tl.load(partial_penalty_ptr + slots, mask=in_p, other=0.0)
            tl.store(penalty_ptr + b, tl.sum(value, axis=0))


def rational_head_fwd(context, weight, bias, image, text, scale, penalty):
    """(logits [B, K], penalty [B] float32, peak [B] int64 for linf, else [0])"""
    B, K, D = context.shape
    _configs.check("rational_head", context, D, _limits.MAX_WIDTH)
    logits = context.new_empty((B, K))
    size = context.new_empty((B,), dtype=torch.float32)
    peak = context.new_empty((B if penalty == 3 else 0,), dtype=torch.int64)
    if context.numel() == 0:
        for tensor in (logits, size, peak):
            tensor[:] = 0
        return logits, size, peak
    tile, precision, target = _tiles.plan("head_fwd", context, (B, K, D))
    tiles = triton.cdiv(K, tile.block_k)
    columns, splits = _tiles.head_splits(B * tiles, D, tile, target)
    outputs = [logits, size, peak]
    if splits > 1:
        outputs[0] = context.new_empty((splits, B, K), dtype=torch.float32)
    if splits * tiles > 1:
        slots = tiles * splits
        outputs[1] = context.new_empty((B, slots), dtype=torch.float32)
        outputs[2] = context.new_empty((peak.shape[0], slots), dtype=torch.int64)
    with torch.cuda.device_of(context):
        rational_head_fwd_kernel[(splits * B * tiles,)](
            context, weight, bias, image, text, *outputs,
            *context.stride(), *weight.stride(), *bias.stride(), *image.stride(), *text.stride(),
            scale, 1.0 / (K * D), B, K, D, columns,
            PENALTY=penalty, PRECISION=precision,
            BLOCK_K=tile.block_k, BLOCK_N=tile.block_n, BLOCK_D=tile.block_d, **tile.launch,
        )  # fmt: skip
        if splits * tiles > 1:
            block = 256
            grid = B * (triton.cdiv(K, block) if splits > 1 else 1)
            rational_head_finish_kernel[(grid,)](
                *outputs, logits, size, peak, B, K, tiles * splits, splits,
                PENALTY=penalty, BLOCK_K=block, BLOCK_P=_configs.padded(tiles * splits),
                num_warps=4, enable_fp_fusion=True,
            )  # fmt: skip
    return logits, size, peak
