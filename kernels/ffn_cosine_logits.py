# SPDX-License-Identifier: Apache-2.0
"""logits[b, k] = scale * cos(image_b, y_bk),  y = text_k + residual * LayerNorm(z_bk).

z = residual_input + hidden weight^T + bias is never stored: a program adds up sums of its tiles,
from which follow the norm's statistics, |y| and the cosine. Weight and residual_input are centred
first, so sums of squares of z lose nothing to its mean; what rounding leaves of the mean is in
one more sum and taken out at the end. The product is made in the kernel or by torch.mm, some rows
at a time; _gemm_configs.stores_product chooses. The backward is in ffn_cosine_logits_bwd.py.
"""

import torch
import triton
import triton.language as tl

from . import _configs, _gemm_configs
from ._math import cast, load_row, load_rows, power_of_two, row_max
from .cosine_logits import reciprocal_norm_kernel
from .ffn_cosine_logits_bwd import centred, ffn_cosine_logits_bwd, product_tile

__all__ = ["ffn_cosine_logits_bwd", "ffn_cosine_logits_fwd"]

SUMS = 14  # numbers per row and split


@triton.jit
def store_stats(
    logits_ptr, stats_ptr, stride_stat, rows, in_k,
    s0, s1, s2, s3, s4, s5, dd, vd, nd, nv, nn, mean, size, gain,
    residual, scale, eps, width,
):  # fmt: skip
    """Logits and statistics of rows [BLOCK_K] from their sums.

    With z centred but for `shift`, n = norm_weight / gain, d = (text + residual norm_bias) / size,
    v = image / |image|: s0..s5 = sums of z z, (n z)^2, n v z, n d z, n n z, z; the other sums are
    of d d, v d, n d, n v, n n.
    """
    shift = s5 / width
    s0 -= shift * s5
    s1 += shift * (shift * nn - 2.0 * s4)
    s2 -= shift * nv
    s3 -= shift * nd
    s4 -= shift * nn
    rstd = 1.0 / tl.sqrt(s0 / width + eps)
    a = residual * gain / size * rstd
    dot = a * s2 + vd
    square = a * a * s1 + 2.0 * a * s3 + dd
    zero = square <= 0.0
    rnorm = tl.where(zero, 0.0, 1.0 / tl.sqrt(tl.where(zero, 1.0, square)))
    cosine = dot * rnorm
    kappa = cosine * rnorm
    factor = residual * gain / width
    tl.store(logits_ptr + rows, cast(scale * cosine, logits_ptr.dtype.element_ty), mask=in_k)
    tl.store(stats_ptr + rows, mean, mask=in_k)
    tl.store(stats_ptr + stride_stat + rows, shift, mask=in_k)
    tl.store(stats_ptr + 2 * stride_stat + rows, rstd, mask=in_k)
    tl.store(stats_ptr + 3 * stride_stat + rows, rnorm / size, mask=in_k)
    tl.store(stats_ptr + 4 * stride_stat + rows, cosine, mask=in_k)
    mean_g = factor * (nv - kappa * (nd + a * s4))
    mean_gz = factor * rstd * (s2 - kappa * (s3 + a * s1))
    tl.store(stats_ptr + 5 * stride_stat + rows, mean_g, mask=in_k)
    tl.store(stats_ptr + 6 * stride_stat + rows, mean_gz, mask=in_k)


@triton.jit(do_not_specialize=["B", "K", "columns", "stride_stat"])
def ffn_cosine_logits_fwd_kernel(
    hidden_ptr,  # [B, K, F], read if FUSED
    weight_ptr,  # [C, F] centred, contiguous, read if FUSED
    product_ptr,  # [B, K, C] hidden weight^T, contiguous, read if not FUSED
    bias_ptr,  # [C]
    state_ptr,  # [B, K, C] residual_input
    norm_weight_ptr,  # [C]
    norm_bias_ptr,  # [C]
    text_ptr,  # [K, C]
    image_ptr,  # [B, C]
    image_rnorm_ptr,  # [B] float32
    logits_ptr,  # [B, K], contiguous: written if not SPLIT
    stats_ptr,  # [7, B, K] float32, slices of stride_stat: written if not SPLIT
    sums_ptr,  # [splits, 14, B, K] float32, contiguous: written if SPLIT
    stride_hidden_b, stride_hidden_k, stride_hidden_f,
    stride_bias_c,
    stride_state_b, stride_state_k, stride_state_c,
    stride_norm_weight_c, stride_norm_bias_c,
    stride_text_k, stride_text_c,
    stride_image_b, stride_image_c,
    stride_stat,
    residual, scale, eps, B, K, C, F, columns,
    FUSED: tl.constexpr, SPLIT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    # program = (split, image, class tile); `columns` is the width of a split
    pid = tl.program_id(0)
    num_tiles = tl.cdiv(K, BLOCK_K)
    b = (pid // num_tiles % B).to(tl.int64)
    split = (pid // num_tiles // B).to(tl.int64)
    offs_k = (pid % num_tiles).to(tl.int64) * BLOCK_K + tl.arange(0, BLOCK_K)
    offs_n = tl.arange(0, BLOCK_N).to(tl.int64)
    in_k = offs_k < K
    hidden_ptr += b * stride_hidden_b
    product_ptr += b * K * C
    state_ptr += b * stride_state_b
    image_ptr += b * stride_image_b
    image_rnorm = tl.load(image_rnorm_ptr + b)
    width = tl.maximum(C, 1).to(tl.float32)

    mean = tl.zeros((BLOCK_K,), tl.float32)
    size = tl.zeros((BLOCK_K,), tl.float32)
    gain = tl.zeros((BLOCK_N,), tl.float32)
    for begin in range(0, C, BLOCK_N):
        cols = begin + offs_n
        x = load_rows(state_ptr, offs_k, cols, stride_state_k, stride_state_c, in_k, C)
        mean += tl.sum(x.to(tl.float32) + load_row(bias_ptr, cols, stride_bias_c, C), axis=1)
        t = load_rows(text_ptr, offs_k, cols, stride_text_k, stride_text_c, in_k, C)
        norm_bias = load_row(norm_bias_ptr, cols, stride_norm_bias_c, C)
        d = t.to(tl.float32) + residual * norm_bias[None, :]
        size = tl.maximum(size, row_max(tl.abs(d)))
        n = load_row(norm_weight_ptr, cols, stride_norm_weight_c, C)
        gain = tl.maximum(gain, tl.abs(n))
    mean /= width
    # powers of two that keep every square below in range
    largest = power_of_two(tl.max(gain, axis=0))
    size = power_of_two(tl.maximum(size, tl.abs(residual * largest)))

    s0 = tl.zeros((BLOCK_K,), tl.float32)
    s1 = tl.zeros((BLOCK_K,), tl.float32)
    s2 = tl.zeros((BLOCK_K,), tl.float32)
    s3 = tl.zeros((BLOCK_K,), tl.float32)
    s4 = tl.zeros((BLOCK_K,), tl.float32)
    s5 = tl.zeros((BLOCK_K,), tl.float32)
    dd = tl.zeros((BLOCK_K,), tl.float32)
    vd = tl.zeros((BLOCK_K,), tl.float32)
    nd = tl.zeros((BLOCK_K,), tl.float32)
    nv = tl.zeros((BLOCK_N,), tl.float32)
    nn = tl.zeros((BLOCK_N,), tl.float32)
    for begin in range(0, columns, BLOCK_N):
        cols = split * columns + begin + offs_n
        in_n = cols < C
        z = product_tile(
            hidden_ptr, weight_ptr, product_ptr, offs_k, cols, in_k, stride_hidden_k,
            stride_hidden_f, C, F, FUSED, PRECISION, BLOCK_K, BLOCK_N, BLOCK_D,
        )  # fmt: skip
        x = load_rows(state_ptr, offs_k, cols, stride_state_k, stride_state_c, in_k, C)
        x = x.to(tl.float32) + load_row(bias_ptr, cols, stride_bias_c, C)[None, :]
        z += tl.where(in_n[None, :], x - mean[:, None], 0.0)
        n = load_row(norm_weight_ptr, cols, stride_norm_weight_c, C) / largest
        v = load_row(image_ptr, cols, stride_image_c, C) * image_rnorm
        t = load_rows(text_ptr, offs_k, cols, stride_text_k, stride_text_c, in_k, C)
        norm_bias = load_row(norm_bias_ptr, cols, stride_norm_bias_c, C)
        d = (t.to(tl.float32) + residual * norm_bias[None, :]) / size[:, None]
        nz = n[None, :] * z
        s0 += tl.sum(z * z, axis=1)
        s1 += tl.sum(nz * nz, axis=1)
        s2 += tl.sum(nz * v[None, :], axis=1)
        s3 += tl.sum(nz * d, axis=1)
        s4 += tl.sum(nz * n[None, :], axis=1)
        s5 += tl.sum(z, axis=1)
        dd += tl.sum(d * d, axis=1)
        vd += tl.sum(d * v[None, :], axis=1)
        nd += tl.sum(d * n[None, :], axis=1)
        nv += n * v
        nn += n * n
    nv = tl.sum(nv, axis=0)
    nn = tl.sum(nn, axis=0)
    if SPLIT:
        total = B.to(tl.int64) * K
        ptrs = sums_ptr + split * 14 * total + b * K + offs_k
        tl.store(ptrs, s0, mask=in_k)
        tl.store(ptrs + total, s1, mask=in_k)
        tl.store(ptrs + 2 * total, s2, mask=in_k)
        tl.store(ptrs + 3 * total, s3, mask=in_k)
        tl.store(ptrs + 4 * total, s4, mask=in_k)
        tl.store(ptrs + 5 * total, s5, mask=in_k)
        tl.store(ptrs + 6 * total, dd, mask=in_k)
        tl.store(ptrs + 7 * total, vd, mask=in_k)
        tl.store(ptrs + 8 * total, nd, mask=in_k)
        tl.store(ptrs + 9 * total, tl.zeros_like(dd) + nv, mask=in_k)
        tl.store(ptrs + 10 * total, tl.zeros_like(dd) + nn, mask=in_k)
        tl.store(ptrs + 11 * total, mean, mask=in_k)
        tl.store(ptrs + 12 * total, size, mask=in_k)
        tl.store(ptrs + 13 * total, tl.zeros_like(dd) + largest, mask=in_k)
    else:
        store_stats(
            logits_ptr, stats_ptr, stride_stat.to(tl.int64), b * K + offs_k, in_k,
            s0, s1, s2, s3, s4, s5, dd, vd, nd, nv, nn, mean, size, largest,
            residual, scale, eps, width,
        )  # fmt: skip


@triton.jit(do_not_specialize=["N", "splits"])
def ffn_cosine_logits_finish_kernel(
    sums_ptr,  # [splits, 14, N] float32, contiguous
    logits_ptr,  # [N], contiguous: written
    stats_ptr,  # [7, N] float32, contiguous: written
    residual, scale, eps, N, C, splits,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    # adds what the splits left, in order;  program = tile of rows
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    in_n = rows < N
    total = N.to(tl.int64)
    s0 = tl.zeros((BLOCK_N,), tl.float32)
    s1 = tl.zeros((BLOCK_N,), tl.float32)
    s2 = tl.zeros((BLOCK_N,), tl.float32)
    s3 = tl.zeros((BLOCK_N,), tl.float32)
    s4 = tl.zeros((BLOCK_N,), tl.float32)
    s5 = tl.zeros((BLOCK_N,), tl.float32)
    dd = tl.zeros((BLOCK_N,), tl.float32)
    vd = tl.zeros((BLOCK_N,), tl.float32)
    nd = tl.zeros((BLOCK_N,), tl.float32)
    nv = tl.zeros((BLOCK_N,), tl.float32)
    nn = tl.zeros((BLOCK_N,), tl.float32)
    ptrs = sums_ptr + rows
    for _ in range(0, splits):
        s0 += tl.load(ptrs, mask=in_n, other=0.0)
        s1 += tl.load(ptrs + total, mask=in_n, other=0.0)
        s2 += tl.load(ptrs + 2 * total, mask=in_n, other=0.0)
        s3 += tl.load(ptrs + 3 * total, mask=in_n, other=0.0)
        s4 += tl.load(ptrs + 4 * total, mask=in_n, other=0.0)
        s5 += tl.load(ptrs + 5 * total, mask=in_n, other=0.0)
        dd += tl.load(ptrs + 6 * total, mask=in_n, other=0.0)
        vd += tl.load(ptrs + 7 * total, mask=in_n, other=0.0)
        nd += tl.load(ptrs + 8 * total, mask=in_n, other=0.0)
        nv += tl.load(ptrs + 9 * total, mask=in_n, other=0.0)
        nn += tl.load(ptrs + 10 * total, mask=in_n, other=0.0)
        ptrs += 14 * total
    mean = tl.load(sums_ptr + rows + 11 * total, mask=in_n, other=0.0)
    size = tl.load(sums_ptr + rows + 12 * total, mask=in_n, other=1.0)
    largest = tl.load(sums_ptr + rows + 13 * total, mask=in_n, other=1.0)
    store_stats(
        logits_ptr, stats_ptr, total, rows, in_n,
        s0, s1, s2, s3, s4, s5, dd, vd, nd, nv, nn, mean, size, largest,
        residual, scale, eps, tl.maximum(C, 1).to(tl.float32),
    )  # fmt: skip


def ffn_cosine_logits_fwd(
    hidden, weight, bias, residual_input, norm_weight, norm_bias, text, image, residual, scale, eps
):
    """(logits [B, K], stats [7, B, K] float32, image_rnorm [B] float32)"""
    B, K, F = hidden.shape
    C = weight.shape[0]
    _configs.check("ffn_cosine_logits", hidden, C, _configs.MAX_WIDTH)
    logits = hidden.new_empty((B, K))
    stats = hidden.new_empty((7, B, K), dtype=torch.float32)
    image_rnorm = hidden.new_empty((B,), dtype=torch.float32)
    if residual_input.numel() == 0:
        for tensor in (logits, stats, image_rnorm):
            tensor[:] = 0
        return logits, stats, image_rnorm
    target = _configs.target_of(hidden)
    fused = not _gemm_configs.stores_product(target)
    kind = "fwd" if fused else "sums"
    chosen = _gemm_configs.tile(kind, hidden.dtype, K, C, F, target)
    tiles = triton.cdiv(K, chosen.block_k)
    columns, splits, batch = triton.cdiv(C, chosen.block_n) * chosen.block_n, 1, B
    sums, product = stats, residual_input  # stand-ins that are not touched
    if fused:
        columns, splits = _gemm_configs.splits(B * tiles, C, F, chosen, target)
    else:
        batch = min(B, max(1, _gemm_configs.ROWS // K))
        product = hidden.new_empty((batch, K, C))
    if splits > 1:
        sums = hidden.new_empty((splits, SUMS, B, K), dtype=torch.float32)
    rows, block_d, num_warps = _configs.row_tile(C, 4096)
    with torch.cuda.device_of(hidden):
        reciprocal_norm_kernel[(triton.cdiv(B, rows),)](
            image, image_rnorm, *image.stride(), B, C,
            BLOCK_N=rows, BLOCK_D=block_d, num_warps=num_warps, enable_fp_fusion=True,
        )  # fmt: skip
        weight = centred(weight)
        for start in range(0, B, batch):
            part = slice(start, start + batch)
            count = min(batch, B - start)
            if not fused:
                out = product[:count].view(-1, C)
                torch.mm(hidden[part].reshape(count * K, F), weight.t(), out=out)
            state, images = residual_input[part], image[part]
            ffn_cosine_logits_fwd_kernel[(splits * count * tiles,)](
                hidden[part], weight, product, bias, state, norm_weight, norm_bias, text, images,
                image_rnorm[part], logits[part], stats[:, part], sums,
                *hidden.stride(), *bias.stride(), *state.stride(), *norm_weight.stride(),
                *norm_bias.stride(), *text.stride(), *images.stride(), B * K,
                residual, scale, eps, count, K, C, F, columns,
                FUSED=fused, SPLIT=splits > 1,
                PRECISION=_configs.input_precision(hidden.dtype, target),
                BLOCK_K=chosen.block_k, BLOCK_N=chosen.block_n, BLOCK_D=chosen.block_d,
                **chosen.launch,
            )  # fmt: skip
        if splits > 1:
            ffn_cosine_logits_finish_kernel[(triton.cdiv(B * K, 128),)](
                sums, logits, stats, residual, scale, eps, B * K, C, splits,
                BLOCK_N=128, num_warps=4, enable_fp_fusion=True,
            )  # fmt: skip
    return logits, stats, image_rnorm
