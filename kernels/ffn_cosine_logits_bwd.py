# SPDX-License-Identifier: Apache-2.0
"""Backward of ffn_cosine_logits.

torch.mm recomputes the product as in the forward, and z becomes d_z element by element from seven
numbers per row. d_z is the gradient of residual_input; the two matrix products with it, d_hidden =
d_z weight and d_weight = d_z^T hidden, are torch's. d_hidden takes the centred weight too: d_z sums
to 0 over C, but what a half type keeps of it does not.
"""

import torch
import triton
import triton.language as tl

from vtclip.kernels import _configs, _limits, _tiles
from vtclip.kernels._math import (
    column_program,
    load_row,
    load_rows,
    product,
    store_rows,
    sum_partials,
)
from vtclip.kernels.cosine_logits_bwd import project


@triton.jit(do_not_specialize=["C"])
def centred_kernel(
    weight_ptr,  # [C, F]
    out_ptr,  # [C, F], contiguous: written
    stride_weight_c, stride_weight_f,
    C, F,
    BLOCK_C: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    # out[c, f] = weight[c, f] - mean of weight[:, f];  program = column tile
    offs_f = tl.program_id(0).to(tl.int64) * BLOCK_F + tl.arange(0, BLOCK_F)
    offs_c = tl.arange(0, BLOCK_C).to(tl.int64)
    total = tl.zeros((BLOCK_F,), tl.float32)
    for start in range(0, C, BLOCK_C):
        rows = start + offs_c
        in_c = rows < C
        w = load_rows(weight_ptr, rows, offs_f, stride_weight_c, stride_weight_f, in_c, F)
        total += tl.sum(w.to(tl.float32), axis=0)
    mean = total / C.to(tl.float32)
    for start in range(0, C, BLOCK_C):
        rows = start + offs_c
        in_c = rows < C
        w = load_rows(weight_ptr, rows, offs_f, stride_weight_c, stride_weight_f, in_c, F)
        store_rows(out_ptr, w.to(tl.float32) - mean[None, :], rows, offs_f, F, 1, in_c, F)


@triton.jit
def pass_sums(x, PASSES: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """[ROWS / PASSES, COLUMNS] sums over rows that are ROWS / PASSES apart.

    A thread holds them all, so that nothing is exchanged before the loop ends.
    """
    return tl.sum(tl.reshape(x, (PASSES, ROWS // PASSES, COLUMNS)), axis=0)


@triton.jit(do_not_specialize=["B", "K", "images_per_program", "stride_stat"])
def ffn_cosine_logits_bwd_kernel(
    d_logits_ptr,  # [B, K]
    product_ptr,  # [B, K, C] hidden weight^T of the centred weight, contiguous
    bias_ptr,  # [C]
    state_ptr,  # [B, K, C] residual_input
    norm_weight_ptr,  # [C]
    norm_bias_ptr,  # [C]
    text_ptr,  # [K, C]
    image_ptr,  # [B, C]
    image_rnorm_ptr,  # [B] float32
    stats_ptr,  # [7, B, K] float32, slices of stride_stat
    d_z_ptr,  # [B, K, C], contiguous: written
    d_bias_ptr,  # [chunks, tiles, C] float32, contiguous: written
    d_norm_weight_ptr,  # [chunks, tiles, C] float32, contiguous: written
    d_norm_bias_ptr,  # [chunks, tiles, C] float32, contiguous: written
    d_text_ptr,  # [chunks, K, C] float32, contiguous: written if FEATURES
    d_unit_ptr,  # [tiles, B, C] float32, slices of stride_slice: written if FEATURES
    stride_d_logits_b, stride_d_logits_k,
    stride_bias_c,
    stride_state_b, stride_state_k, stride_state_c,
    stride_norm_weight_c, stride_norm_bias_c,
    stride_text_k, stride_text_c,
    stride_image_b, stride_image_c,
    stride_stat, stride_slice,
    residual, scale, B, K, C, images_per_program,
    FEATURES: tl.constexpr, PASSES: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    # program = (image chunk, class tile, column tile); with v = image / |image|, u = y / |y|:
    # d_y = step (v - cosine u),  step = scale d_logit / |y|,
    # d_z = rstd (residual norm_weight d_y - step mean_g - step mean_gz zh)
    chunk, tile, cols = column_program(K, C, BLOCK_K, BLOCK_N)
    first = chunk * images_per_program
    offs_k = tile * BLOCK_K + tl.arange(0, BLOCK_K)
    in_k = offs_k < K
    in_n = cols < C
    stride_stat = stride_stat.to(tl.int64)
    bias = load_row(bias_ptr, cols, stride_bias_c, C)
    norm_weight = load_row(norm_weight_ptr, cols, stride_norm_weight_c, C)
    norm_bias = load_row(norm_bias_ptr, cols, stride_norm_bias_c, C)
    d_bias = tl.zeros((BLOCK_K // PASSES, BLOCK_N), tl.float32)
    d_norm_weight = tl.zeros((BLOCK_K // PASSES, BLOCK_N), tl.float32)
    d_norm_bias = tl.zeros((BLOCK_K // PASSES, BLOCK_N), tl.float32)
    if FEATURES:
        d_text = tl.zeros((BLOCK_K, BLOCK_N), tl.float32)

    for i in range(0, tl.minimum(images_per_program, B - first)):
        b = first + i
        z = load_rows(product_ptr + b * K * C, offs_k, cols, C, 1, in_k, C).to(tl.float32)
        stats = stats_ptr + b * K + offs_k
        mean = tl.load(stats, mask=in_k, other=0.0)
        shift = tl.load(stats + stride_stat, mask=in_k, other=0.0)
        rstd = tl.load(stats + 2 * stride_stat, mask=in_k, other=0.0)
        rnorm = tl.load(stats + 3 * stride_stat, mask=in_k, other=0.0)
        cosine = tl.load(stats + 4 * stride_stat, mask=in_k, other=0.0)
        mean_g = tl.load(stats + 5 * stride_stat, mask=in_k, other=0.0)
        mean_gz = tl.load(stats + 6 * stride_stat, mask=in_k, other=0.0)
        g = load_row(d_logits_ptr + b * stride_d_logits_b, offs_k, stride_d_logits_k, K) * scale
        step = g * rnorm
        state_b = state_ptr + b * stride_state_b
        x = load_rows(state_b, offs_k, cols, stride_state_k, stride_state_c, in_k, C)
        x = x.to(tl.float32) + bias[None, :]
        zh = (z + (x - mean[:, None]) - shift[:, None]) * rstd[:, None]
        t = load_rows(text_ptr, offs_k, cols, stride_text_k, stride_text_c, in_k, C)
        y = t.to(tl.float32) + residual * (norm_weight[None, :] * zh + norm_bias[None, :])
        u = y * rnorm[:, None]
        v = load_row(image_ptr + b * stride_image_b, cols, stride_image_c, C)
        off = (v * tl.load(image_rnorm_ptr + b))[None, :] - cosine[:, None] * u
        d_y = product(step[:, None], off)
        d_z = residual * norm_weight[None, :] * off - mean_g[:, None] - zh * mean_gz[:, None]
        d_z = product(d_z, (step * rstd)[:, None])
        store_rows(d_z_ptr + b * K * C, d_z, offs_k, cols, C, 1, in_k, C)
        d_bias += pass_sums(d_z, PASSES, BLOCK_K, BLOCK_N)
        d_norm_weight += pass_sums(product(d_y, zh), PASSES, BLOCK_K, BLOCK_N)
        d_norm_bias += pass_sums(d_y, PASSES, BLOCK_K, BLOCK_N)
        if FEATURES:
            d_text += d_y
            d_unit = tl.sum(product(g[:, None], u), axis=0)
            tl.store(d_unit_ptr + tile * stride_slice + b * C + cols, d_unit, mask=in_n)

    slot = (chunk * tl.cdiv(K, BLOCK_K) + tile) * C + cols
    tl.store(d_bias_ptr + slot, tl.sum(d_bias, axis=0), mask=in_n)
    tl.store(d_norm_weight_ptr + slot, residual * tl.sum(d_norm_weight, axis=0), mask=in_n)
    tl.store(d_norm_bias_ptr + slot, residual * tl.sum(d_norm_bias, axis=0), mask=in_n)
    if FEATURES:
        store_rows(d_text_ptr + chunk * K * C, d_text, offs_k, cols, C, 1, in_k, C)


def centred(weight):
    """weight [C, F] less the mean of each column, in its own dtype, contiguous."""
    out = weight.new_empty(weight.shape)
    C, F = weight.shape
    if out.numel():
        centred_kernel[(triton.cdiv(F, 32),)](
            weight, out, *weight.stride(), C, F,
            BLOCK_C=64, BLOCK_F=32, num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip
    return out


def products(hidden, weight):
    """(slice of images, hidden weight^T [., K, C] of them) in turn, in one reused workspace."""
    B, K, F = hidden.shape
    batch = _tiles.images_at_a_time(B, K)
    workspace = hidden.new_empty((batch, K, weight.shape[0]))
    for start in range(0, B, batch):
        part = slice(start, start + batch)
        count = hidden[part].shape[0]
        product = workspace[:count]
        rows = hidden[part].reshape(count * K, F)
        torch.mm(rows, weight.t(), out=product.view(count * K, -1))
        yield part, product


def _passes(tile, tensor):
    """How often a block's threads, at 16 bytes each, go over the rows of a tile."""
    at_once = 32 * tile.num_warps * (16 // tensor.element_size())
    return max(1, tile.block_k * tile.block_n // at_once)


def ffn_cosine_logits_bwd(
    grad_logits, hidden, weight, bias, residual_input, norm_weight, norm_bias, text, image,
    stats, image_rnorm, residual, scale, features,
):  # fmt: skip
    """Gradients of hidden .. norm_bias, and of text and image if features, else [0]."""
    B, K, F = hidden.shape
    C = weight.shape[0]
    _configs.check("ffn_cosine_logits", hidden, C, _limits.MAX_WIDTH)
    layer = hidden, weight, bias, residual_input, norm_weight, norm_bias
    grads = [t.new_empty(t.shape) for t in layer]
    grads += [t.new_empty(t.shape if features else (0,)) for t in (text, image)]
    if residual_input.numel() == 0:
        for grad in grads:
            grad[:] = 0
        return tuple(grads)
    d_hidden, d_weight, d_bias, d_z, d_norm_weight, d_norm_bias, d_text, d_image = grads
    target = _configs.target_of(hidden)
    tile = _tiles.choose("ffn_cosine_bwd", hidden.dtype, "", (B, K, C), target)
    tiles, columns = triton.cdiv(K, tile.block_k), triton.cdiv(C, tile.block_n)
    batch = _tiles.images_at_a_time(B, K)
    images = _configs.images_per_program(batch, tiles * columns, target)
    chunks = [triton.cdiv(min(batch, B - start), images) for start in range(0, B, batch)]
    part_bias, part_weight, part_norm_bias = (
        hidden.new_empty((sum(chunks), tiles, C), dtype=torch.float32) for _ in range(3)
    )
    part_text = hidden.new_empty((sum(chunks) * features, K, C), dtype=torch.float32)
    part_unit = hidden.new_empty((tiles * features, B, C), dtype=torch.float32)
    done = 0
    with torch.cuda.device_of(hidden):
        centred_weight = centred(weight)
        for (part, product), count in zip(products(hidden, centred_weight), chunks, strict=True):
            grad, state, some = grad_logits[part], residual_input[part], image[part]
            ffn_cosine_logits_bwd_kernel[(count * tiles * columns,)](
                grad, product, bias, state, norm_weight, norm_bias,
                text, some, image_rnorm[part], stats[:, part], d_z[part],
                part_bias[done:], part_weight[done:], part_norm_bias[done:],
                part_text[done:], part_unit[:, part],
                *grad.stride(), *bias.stride(), *state.stride(), *norm_weight.stride(),
                *norm_bias.stride(), *text.stride(), *some.stride(), B * K, B * C,
                residual, scale, some.shape[0], K, C, images,
                FEATURES=features, PASSES=_passes(tile, hidden),
                BLOCK_K=tile.block_k, BLOCK_N=tile.block_n, **tile.launch,
            )  # fmt: skip
            done += count
        rows = d_z.view(-1, C)
        torch.mm(rows, centred_weight, out=d_hidden.view(B * K, F))
        torch.mm(rows.t(), hidden.reshape(B * K, F), out=d_weight)
        sum_partials(part_bias.view(-1, C), d_bias)
        sum_partials(part_weight.view(-1, C), d_norm_weight)
        sum_partials(part_norm_bias.view(-1, C), d_norm_bias)
        if features:
            sum_partials(part_text, d_text)
            d_image = project(part_unit, image, image_rnorm, 1.0)
    return d_hidden, d_weight, d_bias, d_z, d_norm_weight, d_norm_bias, d_text, d_image
