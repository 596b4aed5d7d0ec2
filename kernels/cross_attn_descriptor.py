# SPDX-License-Identifier: Apache-2.0
"""cross_attn's forward with tensor descriptors: a variant to be measured, which no op calls.

Keys and values arrive through descriptors (on sm_90 and later by the tensor memory accelerator):
rows and columns that do not exist read as 0 without a mask. For a query shared by all images,
without key mask; memory as `usable` says. Not yet measured on a GPU.
"""

import torch
import triton
import triton.language as tl

from . import _configs, _tiles
from ._math import LN2, LOG2E, dot, load_rows, row_max, store_rows


@triton.jit(do_not_specialize=["B", "H", "K", "L", "images_per_program"])
def cross_attn_descriptor_fwd_kernel(
    query_ptr,  # [1, H, K, D]
    key_ptr,  # [B, H, L, D], last stride 1
    value_ptr,  # [B, H, L, D], last stride 1
    out_ptr,  # [B, H, K, D]: written
    lse_ptr,  # [B, H, K] float32, contiguous: written
    stride_query_h, stride_query_k, stride_query_d,
    stride_key_b, stride_key_h, stride_key_l,
    stride_value_b, stride_value_h, stride_value_l,
    stride_out_b, stride_out_h, stride_out_k, stride_out_d,
    scale, B, H, K, L, D, images_per_program,
    PRECISION: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    # program = (image chunk, head, query tile), as cross_attn_fwd_kernel
    pid = tl.program_id(0)
    num_tiles = tl.cdiv(K, BLOCK_K)
    head = pid // num_tiles % H
    h = head.to(tl.int64)
    first = pid // num_tiles // H * images_per_program
    offs_k = (pid % num_tiles).to(tl.int64) * BLOCK_K + tl.arange(0, BLOCK_K)
    offs_d = tl.arange(0, BLOCK_D).to(tl.int64)
    in_k = offs_k < K
    key = tl.make_tensor_descriptor(
        key_ptr,
        shape=[B, H, L, D],
        strides=[
            stride_key_b.to(tl.int64),
            stride_key_h.to(tl.int64),
            stride_key_l.to(tl.int64),
            1,
        ],
        block_shape=[1, 1, BLOCK_L, BLOCK_D],
    )
    value = tl.make_tensor_descriptor(
        value_ptr,
        shape=[B, H, L, D],
        strides=[
            stride_value_b.to(tl.int64), stride_value_h.to(tl.int64), stride_value_l.to(tl.int64), 1
        ],
        block_shape=[1, 1, BLOCK_L, BLOCK_D],
    )  # fmt: skip
    query_ptr += h * stride_query_h
    q = load_rows(query_ptr, offs_k, offs_d, stride_query_k, stride_query_d, in_k, D)
    scale_log2 = scale * LOG2E

    for i in range(0, tl.minimum(images_per_program, B - first)):
        b = first + i
        top = tl.full((BLOCK_K,), float("-inf"), tl.float32)
        total = tl.zeros((BLOCK_K,), tl.float32)
        acc = tl.zeros((BLOCK_K, BLOCK_D), tl.float32)
        for start in range(0, L, BLOCK_L):
            keep = start + tl.arange(0, BLOCK_L) < L
            k = key.load([b, head, start, 0]).reshape(BLOCK_L, BLOCK_D)
            s = dot(q, tl.trans(k), PRECISION) * scale_log2  # [BLOCK_K, BLOCK_L]
            s = tl.where(keep[None, :], s, float("-inf"))
            new_top = tl.maximum(top, row_max(s))
            shift = tl.where(new_top == float("-inf"), 0.0, new_top)
            shrink = tl.exp2(top - shift)
            p = tl.exp2(s - shift[:, None])
            total = total * shrink + tl.sum(p, axis=1)
            v = value.load([b, head, start, 0]).reshape(BLOCK_L, BLOCK_D)
            acc = acc * shrink[:, None] + dot(p.to(v.dtype), v, PRECISION)
            top = new_top

        image = b.to(tl.int64)
        acc = acc / tl.where(total == 0.0, 1.0, total)[:, None]
        store_rows(
            out_ptr + image * stride_out_b + h * stride_out_h,
            acc, offs_k, offs_d, stride_out_k, stride_out_d, in_k, D,
        )  # fmt: skip
        lse = (top + tl.log2(total)) * LN2
        tl.store(lse_ptr + (image * H + h) * K + offs_k, lse, mask=in_k)


def usable(tensor):
    """Whether a descriptor can describe [B, H, L, D]: last stride 1, others and base 16-byte."""
    steps = [length * tensor.element_size() for length in tensor.stride()[:-1]]
    aligned = all(step > 0 and step % 16 == 0 for step in (*steps, tensor.data_ptr()))
    return tensor.numel() > 0 and tensor.stride(-1) == 1 and aligned


def _scratch(size, alignment, stream):
    """Where Triton keeps descriptors: torch's memory, so that a graph can be captured."""
    return torch.empty(size, dtype=torch.int8, device="cuda")


def cross_attn_descriptor_fwd(query, key, value, scale):
    """out [B, H, K, d] over [B, K, H, d] memory, lse [B, H, K] float32; query [1, H, K, d]."""
    B, H, L, d = key.shape
    K = query.shape[2]
    _configs.check("cross_attn", query, d, _configs.MAX_HEAD_DIM)
    if query.shape[0] != 1 or K == 0 or not (usable(key) and usable(value)):
        raise NotImplementedError(
            "cross_attn: tensor descriptors take a shared query and keys and values whose rows are "
            f"dense and 16-byte aligned, got strides {key.stride()} and {value.stride()}"
        )
    out = query.new_empty((B, K, H, d)).transpose(1, 2)
    lse = query.new_empty((B, H, K), dtype=torch.float32)
    target = _configs.target_of(query)
    precision = _configs.input_precision(query.dtype, target)
    tile = _tiles.choose("fwd", query.dtype, precision, (B, H, K, L, d), target)
    programs = H * triton.cdiv(K, tile.block_k)
    images = _configs.images_per_program(B, programs, target)
    if query.is_cuda:
        triton.set_allocator(_scratch)
    with torch.cuda.device_of(query):
        cross_attn_descriptor_fwd_kernel[(programs * triton.cdiv(B, images),)](
            query, key, value, out, lse,
            *query.stride()[1:], *key.stride()[:3], *value.stride()[:3], *out.stride(),
            scale, B, H, K, L, d, images, PRECISION=precision,
            BLOCK_K=tile.block_k, BLOCK_L=tile.block_l, BLOCK_D=_configs.padded(d),
            **tile.launch,
        )  # fmt: skip
    return out, lse
