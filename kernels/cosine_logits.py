# SPDX-License-Identifier: Apache-2.0
"""logits[b, k] = scale * <x_b, t_k> / (|x_b| |t_k|), texts shared or one set per image.

Shared texts are a matrix product. Its operands are the rows times the power of two next to their
reciprocal norm: exact in every dtype, and products of entries like 1e30 stay in range. The rest of
the norm, a factor in [1, 2), multiplies the result. A zero row has reciprocal norm 0, hence logit
and gradient 0.
"""

import torch
import triton
import triton.language as tl

from vtclip.kernels import _configs, _limits, _tiles
from vtclip.kernels._math import (
    cast,
    dot,
    load_row,
    load_rows,
    power_of_two,
    product,
    reciprocal_norm,
    row_program,
    store_rows,
    vector_reciprocal_norm,
)
from vtclip.kernels.cosine_logits_bwd import cosine_logits_bwd

__all__ = ["cosine_logits_bwd", "cosine_logits_fwd"]


@triton.jit(do_not_specialize=["N"])
def reciprocal_norm_kernel(
    x_ptr,  # [N, D]
    rnorm_ptr,  # [N] float32: written
    stride_x_n, stride_x_d,
    N, D,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    offs_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, BLOCK_D).to(tl.int64)
    in_n = offs_n < N
    x = load_rows(x_ptr, offs_n, offs_d, stride_x_n, stride_x_d, in_n, D).to(tl.float32)
    tl.store(rnorm_ptr + offs_n, reciprocal_norm(x), mask=in_n)


@triton.jit(do_not_specialize=["B", "K"])
def cosine_logits_fwd_kernel(
    image_ptr,  # [B, D]
    text_ptr,  # [K, D]
    image_rnorm_ptr,  # [B] float32
    text_rnorm_ptr,  # [K] float32
    logits_ptr,  # [B, K], contiguous: written
    stride_image_b, stride_image_d,
    stride_text_k, stride_text_d,
    scale, B, K, D,
    PRECISION: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    # program = (image tile, class tile)
    pid = tl.program_id(0)
    num_tiles = tl.cdiv(K, BLOCK_K)
    offs_b = (pid // num_tiles).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    offs_k = (pid % num_tiles).to(tl.int64) * BLOCK_K + tl.arange(0, BLOCK_K)
    offs_d = tl.arange(0, BLOCK_D).to(tl.int64)
    in_b = offs_b < B
    in_k = offs_k < K
    rnorm_b = tl.load(image_rnorm_ptr + offs_b, mask=in_b, other=0.0)
    rnorm_k = tl.load(text_rnorm_ptr + offs_k, mask=in_k, other=0.0)
    unit_b = power_of_two(rnorm_b)
    unit_k = power_of_two(rnorm_k)

    acc = tl.zeros((BLOCK_B, BLOCK_K), tl.float32)
    for start in range(0, D, BLOCK_D):
        cols = start + offs_d
        x = load_rows(image_ptr, offs_b, cols, stride_image_b, stride_image_d, in_b, D)
        t = load_rows(text_ptr, offs_k, cols, stride_text_k, stride_text_d, in_k, D)
        x = cast(x.to(tl.float32) * unit_b[:, None], image_ptr.dtype.element_ty)
        t = cast(t.to(tl.float32) * unit_k[:, None], text_ptr.dtype.element_ty)
        acc += dot(x, tl.trans(t), PRECISION)
    acc *= (rnorm_b / unit_b * scale)[:, None] * (rnorm_k / unit_k)[None, :]
    store_rows(logits_ptr, acc, offs_b, offs_k, K, 1, in_b, K)


@triton.jit(do_not_specialize=["K"])
def cosine_logits_paired_fwd_kernel(
    image_ptr,  # [B, D]
    text_ptr,  # [B, K, D]
    logits_ptr,  # [B, K], contiguous: written
    image_rnorm_ptr,  # [B] float32: written
    text_rnorm_ptr,  # [B, K] float32, contiguous: written
    stride_image_b, stride_image_d,
    stride_text_b, stride_text_k, stride_text_d,
    scale, K, D,
    BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    # program = (image, class tile); a program holds whole rows
    b, tile = row_program(K, BLOCK_K)
    offs_k = tile * BLOCK_K + tl.arange(0, BLOCK_K)
    offs_d = tl.arange(0, BLOCK_D).to(tl.int64)
    in_k = offs_k < K
    x = load_row(image_ptr + b * stride_image_b, offs_d, stride_image_d, D)
    rnorm_b = vector_reciprocal_norm(x)
    x *= rnorm_b
    text_ptr += b * stride_text_b
    t = load_rows(text_ptr, offs_k, offs_d, stride_text_k, stride_text_d, in_k, D).to(tl.float32)
    rnorm_k = reciprocal_norm(t)  # [BLOCK_K]
    logits = scale * tl.sum(product(x[None, :], t * rnorm_k[:, None]), axis=1)
    tl.store(logits_ptr + b * K + offs_k, cast(logits, logits_ptr.dtype.element_ty), mask=in_k)
    tl.store(text_rnorm_ptr + b * K + offs_k, rnorm_k, mask=in_k)
    tl.store(image_rnorm_ptr + b, rnorm_b, mask=tile == 0)


def reciprocal_norms(x):
    """1 / |row| of x [N, D], float32."""
    N, D = x.shape
    rnorm = x.new_empty((N,), dtype=torch.float32)
    rows, block_d, num_warps = _configs.row_tile(D, 8192)
    if N:
        reciprocal_norm_kernel[(triton.cdiv(N, rows),)](
            x, rnorm, *x.stride(), N, D,
            BLOCK_N=rows, BLOCK_D=block_d, num_warps=num_warps, enable_fp_fusion=True,
        )  # fmt: skip
    return rnorm


def cosine_logits_fwd(image, text, scale):
    """(logits [B, K], image_rnorm [B] float32, text_rnorm [K] or [B, K] float32)."""
    B, D = image.shape
    K = text.shape[-2]
    _configs.check("cosine_logits", image, D, _limits.MAX_WIDTH)
    logits = image.new_empty((B, K))
    with torch.cuda.device_of(image):
        if text.dim() == 2:
            image_rnorm, text_rnorm = reciprocal_norms(image), reciprocal_norms(text)
            if B * K:
                tile, precision, _ = _tiles.plan("cosine_fwd", image, (B, K, D))
                grid = (triton.cdiv(B, tile.block_n) * triton.cdiv(K, tile.block_j),)
                cosine_logits_fwd_kernel[grid](
                    image, text, image_rnorm, text_rnorm, logits,
                    *image.stride(), *text.stride(), scale, B, K, D,
                    PRECISION=precision,
                    BLOCK_B=tile.block_n, BLOCK_K=tile.block_j, BLOCK_D=tile.block_d,
                    **tile.launch,
                )  # fmt: skip
            return logits, image_rnorm, text_rnorm
        image_rnorm = image.new_empty((B,), dtype=torch.float32)
        text_rnorm = image.new_empty((B, K), dtype=torch.float32)
        rows, block_d, num_warps = _configs.row_tile(D, 8192)
        if B:
            cosine_logits_paired_fwd_kernel[(B * max(1, triton.cdiv(K, rows)),)](
                image, text, logits, image_rnorm, text_rnorm,
                *image.stride(), *text.stride(), scale, K, D,
                BLOCK_K=rows, BLOCK_D=block_d, num_warps=num_warps, enable_fp_fusion=True,
            )  # fmt: skip
    return logits, image_rnorm, text_rnorm
