# SPDX-License-Identifier: Apache-2.0
"""LayerNorm of a sum whose second part all images share, in one pass, and its backward in one.

    u_bk = product_bk + start_k      out = LayerNorm(u)      shifted = out + shift

u lives in registers only. A program keeps a tile of class rows of start, and in the backward of its
gradient, and streams images past it.
"""

import torch
import triton
import triton.language as tl

from vtclip.kernels import _configs, _limits
from vtclip.kernels._math import (
    load_row,
    load_rows,
    pair_sum,
    product,
    row_program,
    store_rows,
    sum_partials,
)

ELEMENTS = 2048  # of a tile of rows


@triton.jit(do_not_specialize=["B", "K", "images_per_program"])
def sum_norm_fwd_kernel(
    product_ptr,  # [B, K, C]
    start_ptr,  # [K, C]
    weight_ptr,  # [C]
    bias_ptr,  # [C]
    shift_ptr,  # [C]
    out_ptr,  # [B, K, C], contiguous: written
    shifted_ptr,  # [B, K, C], contiguous: written
    mean_ptr,  # [B, K] float32, contiguous: written
    rstd_ptr,  # [B, K] float32, contiguous: written
    stride_product_b, stride_product_k, stride_product_c,
    stride_start_k, stride_start_c,
    stride_weight_c, stride_bias_c, stride_shift_c,
    eps, B, K, C, images_per_program,
    HAS_SHIFT: tl.constexpr, WHOLE: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    # program = (image chunk, class tile)
    chunk, tile = row_program(K, BLOCK_K)
    first = chunk * images_per_program
    offs_k = tile * BLOCK_K + tl.arange(0, BLOCK_K)
    offs_c = tl.arange(0, BLOCK_C).to(tl.int64)
    in_k = offs_k < K
    in_c = offs_c < C
    share = 1.0 / tl.maximum(C, 1).to(tl.float32)
    weight = load_row(weight_ptr, offs_c, stride_weight_c, C)
    bias = load_row(bias_ptr, offs_c, stride_bias_c, C)
    if HAS_SHIFT:
        shift = load_row(shift_ptr, offs_c, stride_shift_c, C)
    start = load_rows(start_ptr, offs_k, offs_c, stride_start_k, stride_start_c, in_k, C)
    start = start.to(tl.float32)  # [BLOCK_K, BLOCK_C]

    for i in range(0, tl.minimum(images_per_program, B - first)):
        b = first + i
        product_b = product_ptr + b * stride_product_b
        u = load_rows(product_b, offs_k, offs_c, stride_product_k, stride_product_c, in_k, C)
        u = u.to(tl.float32) + start
        mean = tl.sum(u, axis=1) * share
        centred = u - mean[:, None]
        if not WHOLE:
            centred = tl.where(in_c[None, :], centred, 0.0)
        rstd = tl.rsqrt(tl.sum(product(centred, centred), axis=1) * share + eps)
        out = centred * rstd[:, None] * weight[None, :] + bias[None, :]
        store_rows(out_ptr + b * K * C, out, offs_k, offs_c, C, 1, in_k, C)
        if HAS_SHIFT:
            out += shift[None, :]
            store_rows(shifted_ptr + b * K * C, out, offs_k, offs_c, C, 1, in_k, C)
        tl.store(mean_ptr + b * K + offs_k, mean, mask=in_k)
        tl.store(rstd_ptr + b * K + offs_k, rstd, mask=in_k)


@triton.jit(do_not_specialize=["B", "K", "images_per_program"])
def sum_norm_bwd_kernel(
    d_out_ptr,  # [B, K, C]
    d_shifted_ptr,  # [B, K, C]
    product_ptr,  # [B, K, C]
    start_ptr,  # [K, C]
    weight_ptr,  # [C]
    mean_ptr,  # [B, K] float32, contiguous
    rstd_ptr,  # [B, K] float32, contiguous
    d_product_ptr,  # [B, K, C], contiguous: written
    d_start_ptr,  # [chunks, K, C], contiguous: written
    d_vectors_ptr,  # [programs, 3, C] float32, contiguous: written
    stride_d_out_b, stride_d_out_k, stride_d_out_c,
    stride_d_shifted_b, stride_d_shifted_k, stride_d_shifted_c,
    stride_product_b, stride_product_k, stride_product_c,
    stride_start_k, stride_start_c,
    stride_weight_c,
    B, K, C, images_per_program,
    WHOLE: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    # program = (image chunk, class tile); with n = (u - mean) rstd and d = d_out + d_shifted:
    # d_u = rstd (d_n - mean(d_n) - n mean(d_n n)),  d_n = weight d;
    # of the vectors: weight d n, bias d, shift d_shifted, summed over all rows
    chunk, tile = row_program(K, BLOCK_K)
    first = chunk * images_per_program
    offs_k = tile * BLOCK_K + tl.arange(0, BLOCK_K)
    offs_c = tl.arange(0, BLOCK_C).to(tl.int64)
    in_k = offs_k < K
    in_c = offs_c < C
    share = 1.0 / tl.maximum(C, 1).to(tl.float32)
    weight = load_row(weight_ptr, offs_c, stride_weight_c, C)
    start = load_rows(start_ptr, offs_k, offs_c, stride_start_k, stride_start_c, in_k, C)
    start = start.to(tl.float32)
    d_start = tl.zeros((BLOCK_K, BLOCK_C), tl.float32)
    d_weight = tl.zeros((BLOCK_K, BLOCK_C), tl.float32)
    d_bias = tl.zeros((BLOCK_K, BLOCK_C), tl.float32)
    d_shift = tl.zeros((BLOCK_K, BLOCK_C), tl.float32)

    for i in range(0, tl.minimum(images_per_program, B - first)):
        b = first + i
        rows = b * K + offs_k
        mean = tl.load(mean_ptr + rows, mask=in_k, other=0.0)
        rstd = tl.load(rstd_ptr + rows, mask=in_k, other=0.0)
        product_b = product_ptr + b * stride_product_b
        u = load_rows(product_b, offs_k, offs_c, stride_product_k, stride_product_c, in_k, C)
        d_out_b = d_out_ptr + b * stride_d_out_b
        d = load_rows(d_out_b, offs_k, offs_c, stride_d_out_k, stride_d_out_c, in_k, C)
        d_shifted_b = d_shifted_ptr + b * stride_d_shifted_b
        more = load_rows(
            d_shifted_b, offs_k, offs_c, stride_d_shifted_k, stride_d_shifted_c, in_k, C
        ).to(tl.float32)
        n = (u.to(tl.float32) + start - mean[:, None]) * rstd[:, None]
        if not WHOLE:
            n = tl.where(in_c[None, :], n, 0.0)
        d = d.to(tl.float32) + more
        d_shift += more
        d_bias += d
        d_weight += d * n
        d_n = product(d, weight[None, :])
        sum_d, sum_dn = pair_sum(d_n, product(d_n, n), axis=1)
        d_u = (d_n - (sum_d * share)[:, None] - n * (sum_dn * share)[:, None]) * rstd[:, None]
        d_start += d_u
        store_rows(d_product_ptr + b * K * C, d_u, offs_k, offs_c, C, 1, in_k, C)

    store_rows(d_start_ptr + chunk * K * C, d_start, offs_k, offs_c, C, 1, in_k, C)
    row = tl.program_id(0).to(tl.int64) * 3
    tl.store(d_vectors_ptr + row * C + offs_c, tl.sum(d_weight, axis=0), mask=in_c)
    tl.store(d_vectors_ptr + (row + 1) * C + offs_c, tl.sum(d_bias, axis=0), mask=in_c)
    tl.store(d_vectors_ptr + (row + 2) * C + offs_c, tl.sum(d_shift, axis=0), mask=in_c)


def _tiling(product):
    B, K, C = product.shape
    _configs.check("sum_norm", product, C, _limits.MAX_WIDTH)
    target = _configs.target_of(product)
    rows, block_c, num_warps = _configs.row_tile(C, min(ELEMENTS, 16 * _configs.padded(C)))
    tiles = triton.cdiv(K, rows)
    images = _configs.images_per_program(B, tiles, target)
    settings = {"BLOCK_K": rows, "BLOCK_C": block_c, "WHOLE": block_c == C}
    settings |= {"num_warps": num_warps, "enable_fp_fusion": True}
    return tiles, images, triton.cdiv(B, images), settings


def sum_norm_fwd(product, start, weight, bias, shift, eps):
    """(out, shifted [B K, C], or [0] without a shift; mean, rstd [B, K] float32)."""
    B, K, C = product.shape
    tiles, images, chunks, settings = _tiling(product)
    out = product.new_empty((B * K, C))
    shifted = product.new_empty((0,) if shift is None else (B * K, C))
    mean, rstd = (product.new_empty((B, K), dtype=torch.float32) for _ in range(2))
    given = bias if shift is None else shift
    with torch.cuda.device_of(product):
        if tiles * chunks:
            sum_norm_fwd_kernel[(tiles * chunks,)](
                product, start, weight, bias, given, out, shifted, mean, rstd,
                *product.stride(), *start.stride(), *weight.stride(), *bias.stride(),
                *given.stride(), eps, B, K, C, images, HAS_SHIFT=shift is not None, **settings,
            )  # fmt: skip
    return out, shifted, mean, rstd


def sum_norm_bwd(grad_out, grad_shifted, product, start, weight, mean, rstd):
    """(d_product [B, K, C], d_start [K, C]; [3, C]: of weight, bias, shift), all contiguous."""
    B, K, C = product.shape
    tiles, images, chunks, settings = _tiling(product)
    programs = tiles * chunks
    d_product, d_start = product.new_empty((B, K, C)), start.new_empty((K, C))
    d_vectors = weight.new_empty((3, C))
    part_start = _configs.slices(d_start, chunks)
    part_vectors = product.new_empty((programs, 3, C), dtype=torch.float32)
    with torch.cuda.device_of(product):
        if programs:
            sum_norm_bwd_kernel[(programs,)](
                grad_out, grad_shifted, product, start, weight, mean, rstd,
                d_product, part_start, part_vectors,
                *grad_out.stride(), *grad_shifted.stride(), *product.stride(), *start.stride(),
                *weight.stride(), B, K, C, images, **settings,
            )  # fmt: skip
        sum_partials(part_start, d_start)
        sum_partials(part_vectors, d_vectors)
    return d_product, d_start, d_vectors
