# SPDX-License-Identifier: Apache-2.0
"""logits[b, k] = scale * sum_d relu(1 + mask[b, k, d]) image[b, d] text[k, d], and its backward.

Memory-bound: the mask is read once and its gradient written once. A backward program keeps one tile
of the text and of the sum of its gradient and streams images past them.
"""

import torch
import triton
import triton.language as tl

from vtclip.kernels import _configs, _limits, _tiles
from vtclip.kernels._math import (
    cast,
    column_program,
    load_row,
    load_rows,
    opened,
    product,
    row_program,
    store_rows,
    sum_partials,
)


@triton.jit(do_not_specialize=["K"])
def rational_logits_fwd_kernel(
    image_ptr,  # [B, D]
    text_ptr,  # [K, D]
    mask_ptr,  # [B, K, D]
    logits_ptr,  # [B, K], contiguous: written
    stride_image_b, stride_image_d,
    stride_text_k, stride_text_d,
    stride_mask_b, stride_mask_k, stride_mask_d,
    scale, K, D,
    BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    b, tile = row_program(K, BLOCK_K)
    offs_k = tile * BLOCK_K + tl.arange(0, BLOCK_K)
    offs_d = tl.arange(0, BLOCK_D).to(tl.int64)
    in_k = offs_k < K
    image_ptr += b * stride_image_b
    mask_ptr += b * stride_mask_b
    total = tl.zeros((BLOCK_K,), tl.float32)
    for start in range(0, D, BLOCK_D):
        cols = start + offs_d
        x = load_row(image_ptr, cols, stride_image_d, D)
        t = load_rows(text_ptr, offs_k, cols, stride_text_k, stride_text_d, in_k, D)
        m = load_rows(mask_ptr, offs_k, cols, stride_mask_k, stride_mask_d, in_k, D)
        total += tl.sum(product(opened(m.to(tl.float32)), x[None, :] * t.to(tl.float32)), axis=1)
    logits = cast(scale * total, logits_ptr.dtype.element_ty)
    tl.store(logits_ptr + b * K + offs_k, logits, mask=in_k)


@triton.jit(do_not_specialize=["B", "K", "images_per_program"])
def rational_logits_bwd_kernel(
    d_logits_ptr,  # [B, K]
    image_ptr,  # [B, D]
    text_ptr,  # [K, D]
    mask_ptr,  # [B, K, D]
    d_image_ptr,  # [tiles, B, D], contiguous, one slice per class tile: written
    d_text_ptr,  # [chunks, K, D], contiguous, one slice per image chunk: written
    d_mask_ptr,  # [B, K, D], contiguous: written
    stride_d_logits_b, stride_d_logits_k,
    stride_image_b, stride_image_d,
    stride_text_k, stride_text_d,
    stride_mask_b, stride_mask_k, stride_mask_d,
    scale, B, K, D, images_per_program,
    BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    chunk, tile, offs_d = column_program(K, D, BLOCK_K, BLOCK_D)
    first = chunk * images_per_program
    offs_k = tile * BLOCK_K + tl.arange(0, BLOCK_K)
    in_k = offs_k < K
    t = load_rows(text_ptr, offs_k, offs_d, stride_text_k, stride_text_d, in_k, D).to(tl.float32)
    d_text = tl.zeros((BLOCK_K, BLOCK_D), tl.float32)

    for i in range(0, tl.minimum(images_per_program, B - first)):
        b = first + i
        x = load_row(image_ptr + b * stride_image_b, offs_d, stride_image_d, D)
        g = load_row(d_logits_ptr + b * stride_d_logits_b, offs_k, stride_d_logits_k, K) * scale
        mask_b = mask_ptr + b * stride_mask_b
        m = load_rows(mask_b, offs_k, offs_d, stride_mask_k, stride_mask_d, in_k, D).to(tl.float32)
        weighed = g[:, None] * opened(m)
        d_text += weighed * x[None, :]
        d_m = tl.where(m <= -1.0, 0.0, (g[:, None] * x[None, :]) * t)
        store_rows(d_mask_ptr + b * K * D, d_m, offs_k, offs_d, D, 1, in_k, D)
        d_x = cast(tl.sum(product(weighed, t), axis=0), d_image_ptr.dtype.element_ty)
        tl.store(d_image_ptr + (tile * B + b) * D + offs_d, d_x, mask=offs_d < D)
    store_rows(d_text_ptr + chunk * K * D, d_text, offs_k, offs_d, D, 1, in_k, D)


def _tile(mask, target):
    """(rows, columns, num_warps)"""
    elements = _tiles.choose("rational_logits", mask.dtype, "", mask.shape, target).elements
    block_d = min(256, _configs.padded(mask.shape[2]))
    return max(1, elements // block_d), block_d, 4


def rational_logits_fwd(image, text, mask, scale):
    """logits [B, K]"""
    B, K, D = mask.shape
    _configs.check("rational_logits", mask, D, _limits.MAX_WIDTH)
    logits = image.new_empty((B, K))
    rows, block_d, num_warps = _tile(mask, _configs.target_of(mask))
    if B * K:
        with torch.cuda.device_of(mask):
            rational_logits_fwd_kernel[(B * triton.cdiv(K, rows),)](
                image, text, mask, logits, *image.stride(), *text.stride(), *mask.stride(),
                scale, K, D,
                BLOCK_K=rows, BLOCK_D=block_d, num_warps=num_warps, enable_fp_fusion=True,
            )  # fmt: skip
    return logits


def rational_logits_bwd(grad_logits, image, text, mask, scale):
    """(d_image [B, D], d_text [K, D], d_mask [B, K, D]), contiguous."""
    B, K, D = mask.shape
    _configs.check("rational_logits", mask, D, _limits.MAX_WIDTH)
    target = _configs.target_of(mask)
    rows, block_d, num_warps = _tile(mask, target)
    tiles, columns = triton.cdiv(K, rows), triton.cdiv(D, block_d)
    images = _configs.images_per_program(B, tiles * columns, target)
    chunks = triton.cdiv(B, images)
    d_image, d_text, d_mask = (t.new_empty(t.shape) for t in (image, text, mask))
    slices_image = _configs.slices(d_image, tiles)
    slices_text = _configs.slices(d_text, chunks)
    with torch.cuda.device_of(mask):
        if d_mask.numel():
            rational_logits_bwd_kernel[(chunks * tiles * columns,)](
                grad_logits, image, text, mask, slices_image, slices_text, d_mask,
                *grad_logits.stride(), *image.stride(), *text.stride(), *mask.stride(),
                scale, B, K, D, images,
                BLOCK_K=rows, BLOCK_D=block_d, num_warps=num_warps, enable_fp_fusion=True,
            )  # fmt: skip
        for slices, out in ((slices_image, d_image), (slices_text, d_text)):
            sum_partials(slices, out)
    return d_image, d_text, d_mask
