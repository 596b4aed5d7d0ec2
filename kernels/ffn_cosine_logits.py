# SPDX-License-Identifier: Apache-2.0
"""logits[b, k] = scale * cos(image_b, y_bk),  y = text_k + residual * LayerNorm(z_bk).

z = residual_input + hidden weight^T + bias. torch.mm computes the product for some thousand rows at
a time, in the type of the inputs; the kernel reads it and adds up sums over its columns, from which
follow the norm's statistics, |y| and the cosine. Weight and residual_input are centred first, so
sums of squares of z lose nothing to its mean; what rounding leaves of the mean is in one more sum
and taken out at the end. The backward is in ffn_cosine_logits_bwd.py.

Why torch.mm: at 32000 rows, C = 1024 and F = 4096 in bfloat16 on an H100-class device, writing and
reading the product takes 30 us next to 340 us of tensor cores, so a kernel that keeps the product
on chip would have to reach about 90 % of the library's rate to win. By published numbers Triton
tiles without warp specialisation or persistence stay below that at these sizes.
"""

import torch
import triton
import triton.language as tl

from vtclip.kernels import _configs, _limits, _tiles
from vtclip.kernels._math import cast, load_row, load_rows, power_of_two, product, row_max
from vtclip.kernels.cosine_logits import reciprocal_norm_kernel
from vtclip.kernels.ffn_cosine_logits_bwd import centred, ffn_cosine_logits_bwd, products

__all__ = ["ffn_cosine_logits_bwd", "ffn_cosine_logits_fwd"]


@triton.jit
def group_sums(a, b, ROWS: tl.constexpr, COLUMNS: tl.constexpr, GROUP: tl.constexpr):
    """[ROWS, COLUMNS / GROUP] sums of a * b [ROWS, COLUMNS] over GROUP neighbouring columns.

    A thread holds such neighbours, so that nothing is exchanged before the loop ends.
    """
    return tl.sum(tl.reshape(product(a, b), (ROWS, COLUMNS // GROUP, GROUP)), axis=2)


@triton.jit(do_not_specialize=["K", "stride_stat"])
def ffn_cosine_logits_fwd_kernel(
    product_ptr,  # [B, K, C] hidden weight^T of the centred weight, contiguous
    bias_ptr,  # [C]
    state_ptr,  # [B, K, C] residual_input
    norm_weight_ptr,  # [C]
    norm_bias_ptr,  # [C]
    text_ptr,  # [K, C]
    image_ptr,  # [B, C]
    image_rnorm_ptr,  # [B] float32
    logits_ptr,  # [B, K], contiguous: written
    stats_ptr,  # [7, B, K] float32, slices of stride_stat: written
    stride_bias_c,
    stride_state_b, stride_state_k, stride_state_c,
    stride_norm_weight_c, stride_norm_bias_c,
    stride_text_k, stride_text_c,
    stride_image_b, stride_image_c,
    stride_stat,
    residual, scale, eps, K, C,
    WHOLE: tl.constexpr, GROUP: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    # program = (image, class tile). With z centred but for `shift`, n = norm_weight / largest,
    # d = (text + residual norm_bias) / size and v = image / |image|, it sums z z, (n z)^2, n v z,
    # n d z, n n z and z into s0..s5, and d d, v d, n d, n v, n n into those names.
    # not by row_program: its bound costs registers here, which spill on sm_100
    pid = tl.program_id(0)
    num_tiles = tl.cdiv(K, BLOCK_K)
    b = (pid // num_tiles).to(tl.int64)
    offs_k = (pid % num_tiles).to(tl.int64) * BLOCK_K + tl.arange(0, BLOCK_K)
    offs_n = tl.arange(0, BLOCK_N).to(tl.int64)
    in_k = offs_k < K
    product_ptr += b * K * C
    state_ptr += b * stride_state_b
    image_ptr += b * stride_image_b
    image_rnorm = tl.load(image_rnorm_ptr + b)
    width = tl.maximum(C, 1).to(tl.float32)

    mean = tl.zeros((BLOCK_K, BLOCK_N // GROUP), tl.float32)
    size = tl.zeros((BLOCK_K, BLOCK_N // GROUP), tl.float32)
    gain = tl.zeros((BLOCK_N,), tl.float32)
    for begin in range(0, C, BLOCK_N):
        cols = begin + offs_n
        x = load_rows(state_ptr, offs_k, cols, stride_state_k, stride_state_c, in_k, C)
        x = x.to(tl.float32) + load_row(bias_ptr, cols, stride_bias_c, C)
        mean += tl.sum(tl.reshape(x, (BLOCK_K, BLOCK_N // GROUP, GROUP)), axis=2)
        t = load_rows(text_ptr, offs_k, cols, stride_text_k, stride_text_c, in_k, C)
        norm_bias = load_row(norm_bias_ptr, cols, stride_norm_bias_c, C)
        d = tl.abs(t.to(tl.float32) + residual * norm_bias[None, :])
        d = row_max(tl.reshape(d, (BLOCK_K, BLOCK_N // GROUP, GROUP)), axis=2)
        size = tl.maximum(size, d)
        n = load_row(norm_weight_ptr, cols, stride_norm_weight_c, C)
        gain = tl.maximum(gain, tl.abs(n))
    mean = tl.sum(mean, axis=1) / width
    # powers of two that keep every square below in range
    largest = power_of_two(row_max(gain, axis=0))
    size = power_of_two(tl.maximum(row_max(size), tl.abs(residual * largest)))
    to_n = 1.0 / largest
    to_d = 1.0 / size

    s0 = tl.zeros((BLOCK_K, BLOCK_N // GROUP), tl.float32)
    s1 = tl.zeros((BLOCK_K, BLOCK_N // GROUP), tl.float32)
    s2 = tl.zeros((BLOCK_K, BLOCK_N // GROUP), tl.float32)
    s3 = tl.zeros((BLOCK_K, BLOCK_N // GROUP), tl.float32)
    s4 = tl.zeros((BLOCK_K, BLOCK_N // GROUP), tl.float32)
    s5 = tl.zeros((BLOCK_K, BLOCK_N // GROUP), tl.float32)
    dd = tl.zeros((BLOCK_K, BLOCK_N // GROUP), tl.float32)
    vd = tl.zeros((BLOCK_K, BLOCK_N // GROUP), tl.float32)
    nd = tl.zeros((BLOCK_K, BLOCK_N // GROUP), tl.float32)
    nv = tl.zeros((BLOCK_N,), tl.float32)
    nn = tl.zeros((BLOCK_N,), tl.float32)
    for begin in range(0, C, BLOCK_N):
        cols = begin + offs_n
        z = load_rows(product_ptr, offs_k, cols, C, 1, in_k, C).to(tl.float32)
        x = load_rows(state_ptr, offs_k, cols, stride_state_k, stride_state_c, in_k, C)
        x = x.to(tl.float32) + load_row(bias_ptr, cols, stride_bias_c, C)[None, :]
        x -= mean[:, None]
        if not WHOLE:
            x = tl.where((cols < C)[None, :], x, 0.0)
        z += x
        n = load_row(norm_weight_ptr, cols, stride_norm_weight_c, C) * to_n
        v = load_row(image_ptr, cols, stride_image_c, C) * image_rnorm
        t = load_rows(text_ptr, offs_k, cols, stride_text_k, stride_text_c, in_k, C)
        norm_bias = load_row(norm_bias_ptr, cols, stride_norm_bias_c, C)
        d = (t.to(tl.float32) + residual * norm_bias[None, :]) * to_d[:, None]
        nz = n[None, :] * z
        s0 += group_sums(z, z, BLOCK_K, BLOCK_N, GROUP)
        s1 += group_sums(nz, nz, BLOCK_K, BLOCK_N, GROUP)
        s2 += group_sums(nz, v[None, :], BLOCK_K, BLOCK_N, GROUP)
        s3 += group_sums(nz, d, BLOCK_K, BLOCK_N, GROUP)
        s4 += group_sums(nz, n[None, :], BLOCK_K, BLOCK_N, GROUP)
        s5 += tl.sum(tl.reshape(z, (BLOCK_K, BLOCK_N // GROUP, GROUP)), axis=2)
        dd += group_sums(d, d, BLOCK_K, BLOCK_N, GROUP)
        vd += group_sums(d, v[None, :], BLOCK_K, BLOCK_N, GROUP)
        nd += group_sums(d, n[None, :], BLOCK_K, BLOCK_N, GROUP)
        nv += n * v
        nn += n * n
    s0 = tl.sum(s0, axis=1)
    s1 = tl.sum(s1, axis=1)
    s2 = tl.sum(s2, axis=1)
    s3 = tl.sum(s3, axis=1)
    s4 = tl.sum(s4, axis=1)
    s5 = tl.sum(s5, axis=1)
    dd = tl.sum(dd, axis=1)
    vd = tl.sum(vd, axis=1)
    nd = tl.sum(nd, axis=1)
    nv = tl.sum(nv, axis=0)
    nn = tl.sum(nn, axis=0)

    shift = s5 / width
    s0 -= shift * s5
    s1 += shift * (shift * nn - 2.0 * s4)
    s2 -= shift * nv
    s3 -= shift * nd
    s4 -= shift * nn
    rstd = 1.0 / tl.sqrt(s0 / width + eps)
    a = residual * largest / size * rstd
    dot = a * s2 + vd
    square = a * a * s1 + 2.0 * a * s3 + dd
    zero = square <= 0.0
    rnorm = tl.where(zero, 0.0, 1.0 / tl.sqrt(tl.where(zero, 1.0, square)))
    cosine = dot * rnorm
    kappa = cosine * rnorm
    factor = residual * largest / width
    mean_g = factor * (nv - kappa * (nd + a * s4))
    mean_gz = factor * rstd * (s2 - kappa * (s3 + a * s1))
    rows = b * K + offs_k
    stride_stat = stride_stat.to(tl.int64)
    tl.store(logits_ptr + rows, cast(scale * cosine, logits_ptr.dtype.element_ty), mask=in_k)
    tl.store(stats_ptr + rows, mean, mask=in_k)
    tl.store(stats_ptr + stride_stat + rows, shift, mask=in_k)
    tl.store(stats_ptr + 2 * stride_stat + rows, rstd, mask=in_k)
    tl.store(stats_ptr + 3 * stride_stat + rows, rnorm / size, mask=in_k)
    tl.store(stats_ptr + 4 * stride_stat + rows, cosine, mask=in_k)
    tl.store(stats_ptr + 5 * stride_stat + rows, mean_g, mask=in_k)
    tl.store(stats_ptr + 6 * stride_stat + rows, mean_gz, mask=in_k)


def ffn_cosine_logits_fwd(
    hidden, weight, bias, residual_input, norm_weight, norm_bias, text, image, residual, scale, eps
):
    """(logits [B, K], stats [7, B, K] float32, image_rnorm [B] float32)"""
    B, K, _ = hidden.shape
    C = weight.shape[0]
    _configs.check("ffn_cosine_logits", hidden, C, _limits.MAX_WIDTH)
    logits = hidden.new_empty((B, K))
    stats = hidden.new_empty((7, B, K), dtype=torch.float32)
    image_rnorm = hidden.new_empty((B,), dtype=torch.float32)
    if residual_input.numel() == 0:
        for tensor in (logits, stats, image_rnorm):
            tensor[:] = 0
        return logits, stats, image_rnorm
    tile = _tiles.choose("ffn_cosine_fwd", hidden.dtype, "", (B, K, C), _configs.target_of(hidden))
    tiles = triton.cdiv(K, tile.block_k)
    rows, block_d, num_warps = _configs.row_tile(C, 4096)
    with torch.cuda.device_of(hidden):
        reciprocal_norm_kernel[(triton.cdiv(B, rows),)](
            image, image_rnorm, *image.stride(), B, C,
            BLOCK_N=rows, BLOCK_D=block_d, num_warps=num_warps, enable_fp_fusion=True,
        )  # fmt: skip
        for part, product in products(hidden, centred(weight)):
            state, images = residual_input[part], image[part]
            ffn_cosine_logits_fwd_kernel[(images.shape[0] * tiles,)](
                product, bias, state, norm_weight, norm_bias, text, images,
                image_rnorm[part], logits[part], stats[:, part],
                *bias.stride(), *state.stride(), *norm_weight.stride(), *norm_bias.stride(),
                *text.stride(), *images.stride(), B * K, residual, scale, eps, K, C,
                WHOLE=C % tile.block_n == 0, GROUP=16 // hidden.element_size(),
                BLOCK_K=tile.block_k, BLOCK_N=tile.block_n, **tile.launch,
            )  # fmt: skip
    return logits, stats, image_rnorm
