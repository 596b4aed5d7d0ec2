# SPDX-License-Identifier: Apache-2.0
"""logits[b, k] = scale * cos(image_b, y_bk),  y = text_k + residual * LayerNorm(hidden_bk).

y lives in registers only. A program keeps a tile of class rows (text, and in the backward the sum
of its gradient) and streams images past it, so text is read once per image chunk.
"""

import torch
import triton
import triton.language as tl

from vtclip.kernels import _configs, _limits, _tiles
from vtclip.kernels._math import (
    cast,
    load_row,
    load_rows,
    pair_sum,
    product,
    range_factor,
    reciprocal_root,
    row_max,
    row_program,
    store_rows,
    sum_partials,
    vector_reciprocal_norm,
)
from vtclip.kernels.cosine_logits_bwd import project

__all__ = ["norm_cosine_logits_bwd", "norm_cosine_logits_fwd"]


@triton.jit(do_not_specialize=["B", "K", "images_per_program"])
def norm_cosine_logits_fwd_kernel(
    hidden_ptr,  # [B, K, C]
    weight_ptr,  # [C]
    bias_ptr,  # [C]
    text_ptr,  # [K, C]
    image_ptr,  # [B, C]
    logits_ptr,  # [B, K], contiguous: written
    mean_ptr,  # [B, K] float32, contiguous: written
    rstd_ptr,  # [B, K] float32, contiguous: written
    image_rnorm_ptr,  # [B] float32: written
    row_rnorm_ptr,  # [B, K] float32, contiguous: written
    stride_hidden_b, stride_hidden_k, stride_hidden_c,
    stride_weight_c, stride_bias_c,
    stride_text_k, stride_text_c,
    stride_image_b, stride_image_c,
    residual, scale, eps, B, K, C, images_per_program,
    WHOLE: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    chunk, tile = row_program(K, BLOCK_K)
    first = chunk * images_per_program
    offs_k = tile * BLOCK_K + tl.arange(0, BLOCK_K)
    offs_c = tl.arange(0, BLOCK_C).to(tl.int64)
    in_k = offs_k < K
    in_c = offs_c < C
    share = 1.0 / tl.maximum(C, 1).to(tl.float32)
    # y = base + gain (hidden - mean) rstd; with |(hidden - mean) rstd| <= sqrt(C) its entries are
    # below 130 * bound, and `factor` lets its squares neither overflow nor, from 1e-30 bound on,
    # vanish
    gain = residual * load_row(weight_ptr, offs_c, stride_weight_c, C)
    bias = residual * load_row(bias_ptr, offs_c, stride_bias_c, C)
    text = load_rows(text_ptr, offs_k, offs_c, stride_text_k, stride_text_c, in_k, C)
    base = text.to(tl.float32) + bias[None, :]  # [BLOCK_K, BLOCK_C]
    bound = tl.maximum(row_max(tl.abs(base)), row_max(tl.abs(gain), axis=0))
    factor = range_factor(tl.maximum(bound, 8.271806125530277e-25)) * 1.099511627776e12

    for i in range(0, tl.minimum(images_per_program, B - first)):
        b = first + i
        x = load_row(image_ptr + b * stride_image_b, offs_c, stride_image_c, C)
        image_rnorm = vector_reciprocal_norm(x)
        hidden_b = hidden_ptr + b * stride_hidden_b
        hidden = load_rows(hidden_b, offs_k, offs_c, stride_hidden_k, stride_hidden_c, in_k, C)
        hidden = hidden.to(tl.float32)
        mean = tl.sum(hidden, axis=1) * share
        centred = hidden - mean[:, None]
        if not WHOLE:
            centred = tl.where(in_c[None, :], centred, 0.0)
        rstd = tl.rsqrt(tl.sum(product(centred, centred), axis=1) * share + eps)
        y = (base + centred * rstd[:, None] * gain[None, :]) * factor[:, None]
        x *= image_rnorm
        squares, cosine = pair_sum(product(y, y), product(x[None, :], y), axis=1)
        root = reciprocal_root(squares, factor)
        rows = b * K + offs_k
        logits = cast(scale * (cosine * root), logits_ptr.dtype.element_ty)
        tl.store(logits_ptr + rows, logits, mask=in_k)
        tl.store(mean_ptr + rows, mean, mask=in_k)
        tl.store(rstd_ptr + rows, rstd, mask=in_k)
        tl.store(row_rnorm_ptr + rows, root * factor, mask=in_k)
        tl.store(image_rnorm_ptr + b, image_rnorm, mask=tile == 0)


@triton.jit(do_not_specialize=["B", "K", "images_per_program"])
def norm_cosine_logits_bwd_kernel(
    d_logits_ptr,  # [B, K]
    hidden_ptr,  # [B, K, C]
    weight_ptr,  # [C]
    bias_ptr,  # [C]
    text_ptr,  # [K, C]
    image_ptr,  # [B, C]
    mean_ptr,  # [B, K] float32, contiguous
    rstd_ptr,  # [B, K] float32, contiguous
    image_rnorm_ptr,  # [B] float32
    row_rnorm_ptr,  # [B, K] float32, contiguous
    d_hidden_ptr,  # [B, K, C], contiguous: written
    d_weight_ptr,  # [programs, C] float32, contiguous: written
    d_bias_ptr,  # [programs, C] float32, contiguous: written
    d_text_ptr,  # [chunks, K, C] float32, contiguous: written
    d_unit_ptr,  # [tiles, B, C] float32, contiguous: written
    stride_d_logits_b, stride_d_logits_k,
    stride_hidden_b, stride_hidden_k, stride_hidden_c,
    stride_weight_c, stride_bias_c,
    stride_text_k, stride_text_c,
    stride_image_b, stride_image_c,
    residual, scale, B, K, C, images_per_program,
    WHOLE: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    # program = (image chunk, class tile); with unit rows x = image / |image| and y / |y|:
    # d_y = scale d_logit / |y| (x - cosine y),  d_z = residual d_y,
    # d_hidden = rstd (d_n - mean(d_n) - n mean(d_n n)),  d_n = weight d_z,
    # n = (hidden - mean) rstd;  residual is in `gain` and `base`
    chunk, tile = row_program(K, BLOCK_K)
    first = chunk * images_per_program
    offs_k = tile * BLOCK_K + tl.arange(0, BLOCK_K)
    offs_c = tl.arange(0, BLOCK_C).to(tl.int64)
    in_k = offs_k < K
    in_c = offs_c < C
    share = 1.0 / tl.maximum(C, 1).to(tl.float32)
    gain = residual * load_row(weight_ptr, offs_c, stride_weight_c, C)
    bias = residual * load_row(bias_ptr, offs_c, stride_bias_c, C)
    text = load_rows(text_ptr, offs_k, offs_c, stride_text_k, stride_text_c, in_k, C)
    base = text.to(tl.float32) + bias[None, :]  # [BLOCK_K, BLOCK_C]
    d_weight = tl.zeros((BLOCK_C,), tl.float32)
    d_text = tl.zeros((BLOCK_K, BLOCK_C), tl.float32)

    for i in range(0, tl.minimum(images_per_program, B - first)):
        b = first + i
        rows = b * K + offs_k
        x = load_row(image_ptr + b * stride_image_b, offs_c, stride_image_c, C)
        x = x * tl.load(image_rnorm_ptr + b)
        hidden_b = hidden_ptr + b * stride_hidden_b
        hidden = load_rows(hidden_b, offs_k, offs_c, stride_hidden_k, stride_hidden_c, in_k, C)
        hidden = hidden.to(tl.float32)
        mean = tl.load(mean_ptr + rows, mask=in_k, other=0.0)
        rstd = tl.load(rstd_ptr + rows, mask=in_k, other=0.0)
        row_rnorm = tl.load(row_rnorm_ptr + rows, mask=in_k, other=0.0)
        g = load_row(d_logits_ptr + b * stride_d_logits_b, offs_k, stride_d_logits_k, K) * scale

        n = (hidden - mean[:, None]) * rstd[:, None]
        if not WHOLE:
            n = tl.where(in_c[None, :], n, 0.0)
        y = (base + n * gain[None, :]) * row_rnorm[:, None]
        cosine = tl.sum(product(x[None, :], y), axis=1)
        d_unit = tl.sum(product(g[:, None], y), axis=0)  # [BLOCK_C]
        tl.store(d_unit_ptr + (tile * B + b) * C + offs_c, d_unit, mask=in_c)

        d_y = (g * row_rnorm)[:, None] * (x[None, :] - cosine[:, None] * y)
        d_text += d_y
        d_weight += tl.sum(product(d_y, n), axis=0)
        d_n = product(d_y, gain[None, :])
        sum_d, sum_dn = pair_sum(d_n, product(d_n, n), axis=1)
        d_hidden = d_n - (sum_d * share)[:, None] - n * (sum_dn * share)[:, None]
        d_hidden *= rstd[:, None]
        store_rows(d_hidden_ptr + b * K * C, d_hidden, offs_k, offs_c, C, 1, in_k, C)

    store_rows(d_text_ptr + chunk * K * C, d_text, offs_k, offs_c, C, 1, in_k, C)
    program = tl.program_id(0).to(tl.int64) * C + offs_c
    tl.store(d_weight_ptr + program, residual * d_weight, mask=in_c)
    # bias reaches y as residual * bias, text as it is
    tl.store(d_bias_ptr + program, residual * tl.sum(d_text, axis=0), mask=in_c)


def _tiling(kind, hidden, of_a_thread):
    B, K, C = hidden.shape
    _configs.check("norm_cosine_logits", hidden, C, _limits.MAX_WIDTH)
    target = _configs.target_of(hidden)
    tile = _tiles.choose(kind, hidden.dtype, "", (B, K, C), target)
    # of narrow rows no more than 16: a thread holds some numbers of each
    elements = min(tile.elements, 16 * _configs.padded(C))
    rows, block_c, num_warps = _configs.row_tile(C, elements, of_a_thread)
    tiles = max(1, triton.cdiv(K, rows))
    # more warps are there for one wide row, and fill a multiprocessor
    held = _tiles.resident(kind, hidden.dtype, C, target) if num_warps == 4 else None
    images = _configs.images_per_program(B, tiles, target, held)
    settings = {"BLOCK_K": rows, "BLOCK_C": block_c, "WHOLE": block_c == C}
    settings["num_warps"] = num_warps
    settings["enable_fp_fusion"] = True
    return tiles, images, triton.cdiv(B, images), settings


def norm_cosine_logits_fwd(hidden, weight, bias, text, image, residual, scale, eps):
    """(logits [B, K]; mean, rstd [B, K], image_rnorm [B], row_rnorm [B, K], all float32)."""
    B, K, C = hidden.shape
    tiles, images, chunks, settings = _tiling("norm_cosine_fwd", hidden, 16)
    logits = hidden.new_empty((B, K))
    mean, rstd, row_rnorm = (hidden.new_empty((B, K), dtype=torch.float32) for _ in range(3))
    image_rnorm = hidden.new_empty((B,), dtype=torch.float32)
    with torch.cuda.device_of(hidden):
        if chunks:
            norm_cosine_logits_fwd_kernel[(tiles * chunks,)](
                hidden, weight, bias, text, image, logits, mean, rstd, image_rnorm, row_rnorm,
                *hidden.stride(), *weight.stride(), *bias.stride(), *text.stride(),
                *image.stride(), residual, scale, eps, B, K, C, images, **settings,
            )  # fmt: skip
    return logits, mean, rstd, image_rnorm, row_rnorm


def norm_cosine_logits_bwd(
    grad_logits, hidden, weight, bias, text, image, logits, mean, rstd, image_rnorm, row_rnorm,
    residual, scale, eps,
):  # fmt: skip
    """(d_hidden [B, K, C], d_weight [C], d_bias [C], d_text [K, C], d_image [B, C])."""
    B, K, C = hidden.shape
    tiles, images, chunks, settings = _tiling("norm_cosine_bwd", hidden, 32)
    if K == 0:
        tiles = 0
    programs = tiles * chunks
    d_hidden = hidden.new_empty((B, K, C))
    d_weight, d_bias, d_text = (t.new_empty(t.shape) for t in (weight, bias, text))
    part_weight, part_bias, part_text, part_unit = (
        hidden.new_empty(shape, dtype=torch.float32)
        for shape in ((programs, C), (programs, C), (chunks, K, C), (tiles, B, C))
    )
    with torch.cuda.device_of(hidden):
        if programs:
            norm_cosine_logits_bwd_kernel[(programs,)](
                grad_logits, hidden, weight, bias, text, image,
                mean, rstd, image_rnorm, row_rnorm,
                d_hidden, part_weight, part_bias, part_text, part_unit,
                *grad_logits.stride(), *hidden.stride(), *weight.stride(), *bias.stride(),
                *text.stride(), *image.stride(), residual, scale, B, K, C, images, **settings,
            )  # fmt: skip
        sum_partials(part_weight, d_weight)
        sum_partials(part_bias, d_bias)
        sum_partials(part_text, d_text)
        d_image = project(part_unit, image, image_rnorm, 1.0)
    return d_hidden, d_weight, d_bias, d_text, d_image
