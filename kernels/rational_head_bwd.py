# SPDX-License-Identifier: Apache-2.0
"""Backward of rational_head.

m is recomputed; the kernel writes d_m and leaves what is summed from it element by element. The two
matrix products with d_m, d_context = d_m weight and d_weight = d_m^T context, are torch's. d_m lies
in a workspace of some thousand rows: large problems go through it a few images at a time.
"""

import torch
import triton
import triton.language as tl

from vtclip.kernels import _configs, _limits, _tiles
from vtclip.kernels._math import (
    cast,
    column_program,
    dot,
    load_row,
    load_rows,
    opened,
    product,
    store_rows,
    sum_partials,
)


@triton.jit(do_not_specialize=["B", "K", "images_per_program"])
def rational_head_bwd_kernel(
    d_logits_ptr,  # [B, K]
    d_penalty_ptr,  # [B]
    context_ptr,  # [B, K, D]
    weight_ptr,  # [D, D]
    bias_ptr,  # [D]
    image_ptr,  # [B, D]
    text_ptr,  # [K, D]
    peak_ptr,  # [B] int64, read if PENALTY == 3
    d_m_ptr,  # [B, K, D], contiguous: written
    d_bias_ptr,  # [chunks, tiles, D] float32, contiguous: written
    d_image_ptr,  # [tiles, B, D], slices of stride_slice: written if FEATURES
    d_text_ptr,  # [chunks, K, D] float32, contiguous: written if FEATURES
    stride_d_logits_b, stride_d_logits_k, stride_d_penalty_b,
    stride_context_b, stride_context_k, stride_context_d,
    stride_weight_n, stride_weight_d, stride_bias_d,
    stride_image_b, stride_image_d,
    stride_text_k, stride_text_d,
    stride_peak_b, stride_slice,
    scale, mean, B, K, D, images_per_program,
    PENALTY: tl.constexpr, FEATURES: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    chunk, tile, offs_n = column_program(K, D, BLOCK_K, BLOCK_N)
    first = chunk * images_per_program
    offs_k = tile * BLOCK_K + tl.arange(0, BLOCK_K)
    offs_d = tl.arange(0, BLOCK_D).to(tl.int64)
    in_k = offs_k < K
    in_n = offs_n < D
    bias = load_row(bias_ptr, offs_n, stride_bias_d, D)
    # one row or, where registers allow, a tile whose rows are added up after the loop
    d_bias = tl.zeros((1 if PENALTY == 3 else BLOCK_K, BLOCK_N), tl.float32)
    if FEATURES:
        d_text = tl.zeros((BLOCK_K, BLOCK_N), tl.float32)

    for i in range(0, tl.minimum(images_per_program, B - first)):
        b = first + i
        context_b = context_ptr + b * stride_context_b
        m = tl.zeros((BLOCK_K, BLOCK_N), tl.float32)
        for start in range(0, D, BLOCK_D):
            inner = start + offs_d
            c = load_rows(context_b, offs_k, inner, stride_context_k, stride_context_d, in_k, D)
            w = load_rows(weight_ptr, offs_n, inner, stride_weight_n, stride_weight_d, in_n, D)
            m += dot(c, tl.trans(w), PRECISION)
        m += bias[None, :]
        x = load_row(image_ptr + b * stride_image_b, offs_n, stride_image_d, D)
        t = load_rows(text_ptr, offs_k, offs_n, stride_text_k, stride_text_d, in_k, D)
        t = t.to(tl.float32)
        g = load_row(d_logits_ptr + b * stride_d_logits_b, offs_k, stride_d_logits_k, K) * scale
        d_m = (g[:, None] * x[None, :]) * t
        if PENALTY != 0:
            rho = tl.load(d_penalty_ptr + b * stride_d_penalty_b).to(tl.float32)
            sign = tl.where(m > 0.0, 1.0, tl.where(m < 0.0, -1.0, 0.0))
            if PENALTY == 1:
                d_m += (rho * mean) * sign
            elif PENALTY == 2:
                d_m += (2.0 * rho * mean) * m
            else:
                peak = tl.load(peak_ptr + b * stride_peak_b)
                at_peak = offs_k[:, None] * D + offs_n[None, :] == peak
                d_m += tl.where(at_peak, rho * sign, 0.0)
        # relu has slope 0 at 0; rows that do not exist have no gradient
        d_m = tl.where((m <= -1.0) | (offs_k >= K)[:, None], 0.0, d_m)
        store_rows(d_m_ptr + b * K * D, d_m, offs_k, offs_n, D, 1, in_k, D)
        if PENALTY == 3:
            d_bias += tl.sum(d_m, axis=0)[None, :]
        else:
            d_bias += d_m
        if FEATURES:
            weighed = g[:, None] * opened(m)
            d_text += weighed * x[None, :]
            d_x = cast(tl.sum(product(weighed, t), axis=0), d_image_ptr.dtype.element_ty)
            tl.store(d_image_ptr + tile * stride_slice + b * D + offs_n, d_x, mask=in_n)

    slot = (chunk * tl.cdiv(K, BLOCK_K) + tile) * D + offs_n
    tl.store(d_bias_ptr + slot, tl.sum(d_bias, axis=0), mask=in_n)
    if FEATURES:
        store_rows(d_text_ptr + chunk * K * D, d_text, offs_k, offs_n, D, 1, in_k, D)


def rational_head_bwd(
    grad_logits, grad_penalty, context, weight, bias, image, text, peak, scale, penalty, features
):
    """(d_context [B, K, D], d_weight [D, D], d_bias [D], d_image [B, D], d_text [K, D])"""
    B, K, D = context.shape
    _configs.check("rational_head", context, D, _limits.MAX_WIDTH)
    grads = [t.new_empty(t.shape) for t in (context, weight, bias)]
    grads += [t.new_empty(t.shape if features else (0,)) for t in (image, text)]
    if context.numel() == 0:
        for grad in grads:
            grad[:] = 0
        return tuple(grads)
    d_context, d_weight, d_bias, d_image, d_text = grads
    tile, precision, target = _tiles.plan("head_bwd", context, (B, K, D))
    tiles, columns = triton.cdiv(K, tile.block_k), triton.cdiv(D, tile.block_n)
    batch = _tiles.images_at_a_time(B, K)
    images = _configs.images_per_program(batch, tiles * columns, target)
    starts = range(0, B, batch)
    chunks = [triton.cdiv(min(batch, B - start), images) for start in starts]
    d_m = context.new_empty((batch, K, D))
    products = d_weight[None]
    if len(chunks) > 1:
        products = weight.new_empty((len(chunks), D, D))
    slices_bias = bias.new_empty((sum(chunks), tiles, D), dtype=torch.float32)
    slices_image, slices_text = d_image, d_text
    if features:
        slices_image = _configs.slices(d_image, tiles)
        slices_text = _configs.slices(d_text, sum(chunks))
    done = 0
    with torch.cuda.device_of(context):
        for i, start in enumerate(starts):
            part = slice(start, start + batch)
            count = min(batch, B - start)
            seen = context[part], weight, bias, image[part], text
            grad = grad_logits[part], grad_penalty[part]
            places = peak[part] if penalty == 3 else peak
            left = d_m[:count], slices_bias[done:], slices_image, slices_text
            if features:
                left = *left[:2], slices_image[..., start:, :], slices_text.view(-1, K, D)[done:]
            rational_head_bwd_kernel[(chunks[i] * tiles * columns,)](
                *grad, *seen, places, *left,
                *(length for tensor in (*grad, *seen) for length in tensor.stride()),
                *places.stride(), B * D,
                scale, 1.0 / (K * D), count, K, D, images,
                PENALTY=penalty, FEATURES=features,
                PRECISION=precision,
                BLOCK_K=tile.block_k, BLOCK_N=tile.block_n, BLOCK_D=tile.block_d, **tile.launch,
            )  # fmt: skip
            rows = d_m[:count].view(-1, D)
            torch.mm(rows, weight, out=d_context[part].view(-1, D))
            torch.mm(rows.t(), context[part].reshape(-1, D), out=products[i])
            done += chunks[i]
        if len(chunks) > 1:
            torch.sum(products, 0, out=d_weight)
        sum_partials(slices_bias.view(-1, D), d_bias)
        for slices, out in ((slices_image, d_image), (slices_text, d_text)):
            sum_partials(slices, out)
    return tuple(grads)
