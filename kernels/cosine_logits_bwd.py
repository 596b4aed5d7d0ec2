# SPDX-License-Identifier: Apache-2.0
"""Backward of cosine_logits. With unit rows x, t and g = scale * d_logits:

    d_image_b = rnorm_b (u_b - <u_b, x_b> x_b),   u_b = sum_k g_bk t_k,   and alike for the texts.

The sums u are formed in float32 partials over fixed ranges, which are added in order.
"""

import torch
import triton
import triton.language as tl

from vtclip.kernels import _configs, _limits, _tiles
from vtclip.kernels._math import (
    add_dot,
    cast,
    load_row,
    load_rows,
    product,
    row_program,
    store_rows,
    sum_partials,
)

STEPS = 4  # of `project` over its partials; of more, a launch with more programs adds them first


@triton.jit(do_not_specialize=["N", "J", "rows_per_split"])
def cosine_logits_bwd_gather_kernel(
    g_ptr,  # [N, J] incoming gradient, either way round
    y_ptr,  # [J, D]
    rnorm_ptr,  # [J] float32
    partial_ptr,  # [splits, N, D] float32, contiguous: written
    stride_g_n, stride_g_j,
    stride_y_j, stride_y_d,
    N, J, D, rows_per_split,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    # partial[split, n] = sum_j g[n, j] y[j] rnorm[j];  program = (split, row tile, column tile)
    pid = tl.program_id(0)
    num_cols = tl.cdiv(D, BLOCK_D)
    num_rows = tl.cdiv(N, BLOCK_N)
    split = (pid // num_cols // num_rows).to(tl.int64)
    offs_n = (pid // num_cols % num_rows).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_d = (pid % num_cols).to(tl.int64) * BLOCK_D + tl.arange(0, BLOCK_D)
    offs_j = split * rows_per_split + tl.arange(0, BLOCK_J)
    in_n = offs_n < N
    stop = tl.minimum((split + 1) * rows_per_split, J)

    acc = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    for start in range(0, rows_per_split, BLOCK_J):
        rows = start + offs_j
        in_j = rows < stop
        g_offs = offs_n[:, None] * stride_g_n + rows[None, :] * stride_g_j
        g = tl.load(g_ptr + g_offs, mask=in_n[:, None] & in_j[None, :], other=0.0).to(tl.float32)
        y = load_rows(y_ptr, rows, offs_d, stride_y_j, stride_y_d, in_j, D).to(tl.float32)
        rnorm = tl.load(rnorm_ptr + rows, mask=in_j, other=0.0)
        acc = add_dot(acc, g, y * rnorm[:, None], PRECISION)
    store_rows(partial_ptr + split * N * D, acc, offs_n, offs_d, D, 1, in_n, D)


@triton.jit(do_not_specialize=["K"])
def cosine_logits_paired_bwd_kernel(
    g_ptr,  # [B, K] incoming gradient
    image_ptr,  # [B, D]
    text_ptr,  # [B, K, D]
    image_rnorm_ptr,  # [B] float32
    text_rnorm_ptr,  # [B, K] float32, contiguous
    partial_ptr,  # [tiles, B, D] float32, contiguous: written
    d_text_ptr,  # [B, K, D], contiguous: written
    stride_g_b, stride_g_k,
    stride_image_b, stride_image_d,
    stride_text_b, stride_text_k, stride_text_d,
    scale, B, K, D,
    BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    b, tile = row_program(K, BLOCK_K)
    offs_k = tile * BLOCK_K + tl.arange(0, BLOCK_K)
    offs_d = tl.arange(0, BLOCK_D).to(tl.int64)
    in_k = offs_k < K
    x = load_row(image_ptr + b * stride_image_b, offs_d, stride_image_d, D)
    x = x * tl.load(image_rnorm_ptr + b)
    text_ptr += b * stride_text_b
    t = load_rows(text_ptr, offs_k, offs_d, stride_text_k, stride_text_d, in_k, D).to(tl.float32)
    rnorm = tl.load(text_rnorm_ptr + b * K + offs_k, mask=in_k, other=0.0)
    t = t * rnorm[:, None]  # [BLOCK_K, BLOCK_D], unit rows
    g = tl.load(g_ptr + b * stride_g_b + offs_k * stride_g_k, mask=in_k, other=0.0).to(tl.float32)
    cosine = tl.sum(product(t, x[None, :]), axis=1)
    d_t = (scale * g * rnorm)[:, None] * (x[None, :] - cosine[:, None] * t)
    store_rows(d_text_ptr + b * K * D, d_t, offs_k, offs_d, D, 1, in_k, D)
    u = tl.sum(product(g[:, None], t), axis=0)  # [BLOCK_D]
    tl.store(partial_ptr + (tile * B + b) * D + offs_d, u, mask=offs_d < D)


@triton.jit(do_not_specialize=["P", "N"])
def project_kernel(
    partial_ptr,  # [P, N, D] float32, contiguous
    x_ptr,  # [N, D]
    rnorm_ptr,  # [N] float32
    d_x_ptr,  # [N, D], contiguous: written
    stride_x_n, stride_x_d,
    scale, P, N, D,
    BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    # d_x = scale rnorm (u - <u, x> x) with u = sum of the partials, x a unit row;  program = row
    n = tl.program_id(0).to(tl.int64)
    offs_p = tl.arange(0, BLOCK_P).to(tl.int64)
    offs_d = tl.arange(0, BLOCK_D).to(tl.int64)
    u = tl.zeros((BLOCK_D,), tl.float32)
    for start in range(0, P, BLOCK_P):
        rows = start + offs_p
        tile = load_rows(partial_ptr + n * D, rows, offs_d, N.to(tl.int64) * D, 1, rows < P, D)
        u += tl.sum(tile, axis=0)
    rnorm = tl.load(rnorm_ptr + n)
    x = load_row(x_ptr + n * stride_x_n, offs_d, stride_x_d, D) * rnorm
    d_x = (scale * rnorm) * (u - tl.sum(product(u, x), axis=0) * x)
    tl.store(d_x_ptr + n * D + offs_d, cast(d_x, d_x_ptr.dtype.element_ty), mask=offs_d < D)


def project(partial, x, rnorm, scale):
    """Gradient [N, D] of rows x from the gradient of their unit rows, partial [P, N, D] float32."""
    P, N, D = partial.shape
    d_x = x.new_empty((N, D))
    rows, block_d, num_warps = _configs.row_tile(D, 4096)
    block_p = min(rows, 16)
    if STEPS * block_p < P:
        partial, P = sum_partials(partial, x.new_empty((1, N, D), dtype=torch.float32)), 1
    if N:
        project_kernel[(N,)](
            partial, x, rnorm, d_x, *x.stride(), scale, P, N, D,
            BLOCK_P=block_p, BLOCK_D=block_d, num_warps=num_warps, enable_fp_fusion=True,
        )  # fmt: skip
    return d_x


def _gather(g, y, rnorm):
    """[splits, N, D] partials of g @ (y * rnorm) for g [N, J], y [J, D]."""
    (N, J), D = g.shape, y.shape[1]
    rows_per_split = max(256, triton.next_power_of_2(triton.cdiv(J, 16)))
    splits = triton.cdiv(J, rows_per_split)
    partial = y.new_empty((splits, N, D), dtype=torch.float32)
    if partial.numel():
        tile, precision, _ = _tiles.plan("cosine_gather", y, (N, J, D))
        grid = (splits * triton.cdiv(N, tile.block_n) * triton.cdiv(D, tile.block_d),)
        cosine_logits_bwd_gather_kernel[grid](
            g, y, rnorm, partial, *g.stride(), *y.stride(), N, J, D, rows_per_split,
            PRECISION=precision,
            BLOCK_N=tile.block_n, BLOCK_J=tile.block_j, BLOCK_D=tile.block_d, **tile.launch,
        )  # fmt: skip
    return partial


def cosine_logits_bwd(grad_logits, image, text, image_rnorm, text_rnorm, scale):
    """(d_image [B, D], d_text [K, D] or [B, K, D]), contiguous."""
    B, D = image.shape
    K = text.shape[-2]
    _configs.check("cosine_logits", image, D, _limits.MAX_WIDTH)
    with torch.cuda.device_of(image):
        if text.dim() == 2:
            d_image = project(_gather(grad_logits, text, text_rnorm), image, image_rnorm, scale)
            d_text = project(_gather(grad_logits.T, image, image_rnorm), text, text_rnorm, scale)
            return d_image, d_text
        d_text = text.new_empty((B, K, D))
        rows, block_d, num_warps = _configs.row_tile(D, 8192)
        tiles = triton.cdiv(K, rows)
        partial = image.new_empty((tiles, B, D), dtype=torch.float32)
        if B * tiles:
            cosine_logits_paired_bwd_kernel[(B * tiles,)](
                grad_logits, image, text, image_rnorm, text_rnorm, partial, d_text,
                *grad_logits.stride(), *image.stride(), *text.stride(), scale, B, K, D,
                BLOCK_K=rows, BLOCK_D=block_d, num_warps=num_warps, enable_fp_fusion=True,
            )  # fmt: skip
        return project(partial, image, image_rnorm, scale), d_text
