# SPDX-License-Identifier: Apache-2.0
"""v = sqrt(s) image / |image|, t = sqrt(s) text / |text|, products[b, k] = v[b] * t[k]; backward.

Bound by the memory of the products, and where classes are few by the number of launches: the
forward is one. Each of its programs recomputes the unit rows it needs; they lie in the caches. A
backward program keeps one tile of texts and streams images past it, as in rational_logits.py.
"""

import math

import torch
import triton
import triton.language as tl

from vtclip.kernels import _configs, _limits, _tiles
from vtclip.kernels._math import (
    cast,
    column_program,
    load_row,
    load_rows,
    product,
    row_program,
    store_rows,
    unit_rows,
    unit_vector,
)
from vtclip.kernels.cosine_logits import reciprocal_norms
from vtclip.kernels.cosine_logits_bwd import project


@triton.jit(do_not_specialize=["B", "K"])
def unit_products_fwd_kernel(
    image_ptr,  # [B, D]
    text_ptr,  # [K, D]
    v_ptr,  # [B, D], contiguous: written
    t_ptr,  # [K, D], contiguous: written
    products_ptr,  # [B, K, D], contiguous: written
    stride_image_b, stride_image_d,
    stride_text_k, stride_text_d,
    root, B, K, D,
    BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    # program = (image, class tile), at least one of either; it holds whole rows
    b, tile = row_program(K, BLOCK_K)
    offs_k = tile * BLOCK_K + tl.arange(0, BLOCK_K)
    offs_d = tl.arange(0, BLOCK_D).to(tl.int64)
    in_k = offs_k < K
    width = tl.where(b < B, D, 0)
    v = unit_vector(load_row(image_ptr + b * stride_image_b, offs_d, stride_image_d, width)) * root
    first = offs_d < tl.where(tile == 0, width, 0)
    tl.store(v_ptr + b * D + offs_d, cast(v, v_ptr.dtype.element_ty), mask=first)
    t = load_rows(text_ptr, offs_k, offs_d, stride_text_k, stride_text_d, in_k, D)
    t = unit_rows(t.to(tl.float32)) * root
    store_rows(t_ptr, t, offs_k, offs_d, D, 1, offs_k < tl.where(b == 0, K, 0), D)
    in_k = offs_k < tl.where(b < B, K, 0)
    store_rows(products_ptr + b * K * D, v[None, :] * t, offs_k, offs_d, D, 1, in_k, D)


@triton.jit(do_not_specialize=["B", "K", "images_per_program"])
def unit_products_bwd_kernel(
    grad_image_ptr,  # [B, D]
    grad_text_ptr,  # [K, D]
    grad_products_ptr,  # [B, K, D]
    image_ptr,  # [B, D]
    text_ptr,  # [K, D]
    image_rnorm_ptr,  # [B] float32
    text_rnorm_ptr,  # [K] float32
    sum_image_ptr,  # [tiles, B, D] float32, contiguous: written
    sum_text_ptr,  # [chunks, K, D] float32, contiguous: written
    stride_grad_image_b, stride_grad_image_d,
    stride_grad_text_k, stride_grad_text_d,
    stride_grad_products_b, stride_grad_products_k, stride_grad_products_d,
    stride_image_b, stride_image_d,
    stride_text_k, stride_text_d,
    root, B, K, D, images_per_program,
    BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    # program = (image chunk, class tile, column tile). The gradient of v is grad_image plus the
    # sum over classes of grad_products * t; the first tile starts from grad_image, and alike for t.
    chunk, tile, offs_d = column_program(K, D, BLOCK_K, BLOCK_D)
    first = chunk * images_per_program
    offs_k = tile * BLOCK_K + tl.arange(0, BLOCK_K)
    in_k = offs_k < K
    in_d = offs_d < D
    t = load_rows(text_ptr, offs_k, offs_d, stride_text_k, stride_text_d, in_k, D).to(tl.float32)
    t *= (tl.load(text_rnorm_ptr + offs_k, mask=in_k, other=0.0) * root)[:, None]
    sum_t = load_rows(
        grad_text_ptr, offs_k, offs_d, stride_grad_text_k, stride_grad_text_d,
        offs_k < tl.where(chunk == 0, K, 0), D,
    ).to(tl.float32)  # fmt: skip

    for i in range(0, tl.minimum(images_per_program, B - first)):
        b = first + i
        v = load_row(image_ptr + b * stride_image_b, offs_d, stride_image_d, D)
        v *= tl.load(image_rnorm_ptr + b) * root
        g = load_rows(
            grad_products_ptr + b * stride_grad_products_b, offs_k, offs_d,
            stride_grad_products_k, stride_grad_products_d, in_k, D,
        ).to(tl.float32)  # fmt: skip
        sum_t += g * v[None, :]
        grad_b = grad_image_ptr + b * stride_grad_image_b + offs_d * stride_grad_image_d
        own = tl.load(grad_b, mask=offs_d < tl.where(tile == 0, D, 0), other=0.0).to(tl.float32)
        sum_v = own + tl.sum(product(g, t), axis=0)
        tl.store(sum_image_ptr + (tile * B + b) * D + offs_d, sum_v, mask=in_d)
    store_rows(sum_text_ptr + chunk * K * D, sum_t, offs_k, offs_d, D, 1, in_k, D)


def unit_products_fwd(image, text, scale):
    """(v [B, D], t [K, D], products [B, K, D])"""
    (B, D), K = image.shape, text.shape[0]
    _configs.check("unit_products", image, D, _limits.MAX_WIDTH)
    v, t = image.new_empty((B, D)), text.new_empty((K, D))
    products = image.new_empty((B, K, D))
    tile = _tiles.choose("unit_products_fwd", image.dtype, "", (B, K, D), _configs.target_of(image))
    rows, block_d, num_warps = _configs.row_tile(D, tile.elements)
    if (B + K) * D:
        with torch.cuda.device_of(image):
            unit_products_fwd_kernel[(max(1, B) * max(1, triton.cdiv(K, rows)),)](
                image, text, v, t, products, *image.stride(), *text.stride(),
                math.sqrt(scale), B, K, D,
                BLOCK_K=rows, BLOCK_D=block_d, num_warps=num_warps, enable_fp_fusion=True,
            )  # fmt: skip
    return v, t, products


def unit_products_bwd(grad_image, grad_text, grad_products, image, text, scale):
    """(d_image [B, D], d_text [K, D]), contiguous."""
    B, K, D = grad_products.shape
    _configs.check("unit_products", image, D, _limits.MAX_WIDTH)
    target = _configs.target_of(image)
    sizes = grad_products.shape
    elements = _tiles.choose("unit_products_bwd", image.dtype, "", sizes, target).elements
    block_d = min(256, _configs.padded(D))
    rows = max(1, elements // block_d)
    tiles, columns = max(1, triton.cdiv(K, rows)), triton.cdiv(D, block_d)
    images = _configs.images_per_program(B, tiles * columns, target)
    chunks = max(1, triton.cdiv(B, images))
    sums_image = image.new_empty((tiles, B, D), dtype=torch.float32)
    sums_text = image.new_empty((chunks, K, D), dtype=torch.float32)
    root = math.sqrt(scale)
    with torch.cuda.device_of(image):
        rnorms = reciprocal_norms(image), reciprocal_norms(text)
        if (B + K) * D:
            unit_products_bwd_kernel[(chunks * tiles * columns,)](
                grad_image, grad_text, grad_products, image, text, *rnorms, sums_image, sums_text,
                *grad_image.stride(), *grad_text.stride(), *grad_products.stride(),
                *image.stride(), *text.stride(), root, B, K, D, images,
                BLOCK_K=rows, BLOCK_D=block_d, num_warps=4, enable_fp_fusion=True,
            )  # fmt: skip
        d_image = project(sums_image, image, rnorms[0], root)
        return d_image, project(sums_text, text, rnorms[1], root)
