# SPDX-License-Identifier: Apache-2.0
"""The backward of relu(x W^T + b) up to its products, in one pass over the hidden units.

    d_sum = grad where hidden > 0, else 0          d_bias = sum of d_sum over rows

The hidden units are the largest tensor of VT-CLIP's step; torch reads the result of the first line
again for the second. Sums are always in the same order.
"""

import torch
import triton
import triton.language as tl

from vtclip.kernels import _configs
from vtclip.kernels._math import sum_partials

ROWS, COLUMNS = 32, 128  # of a step of a program


@triton.jit(do_not_specialize=["R", "rows_per_program"])
def relu_gradient_kernel(
    grad_ptr,  # [R, N]
    hidden_ptr,  # [R, N], contiguous
    d_sum_ptr,  # [R, N], contiguous: written
    partial_ptr,  # [programs of rows, N] float32: written
    stride_grad_r, stride_grad_n,
    R, N, rows_per_program,
    BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    # program = (chunk of rows, column tile); neighbours read neighbouring columns
    pid = tl.program_id(0)
    num_tiles = tl.cdiv(N, BLOCK_N)
    chunk = pid // num_tiles
    cols = (pid % num_tiles).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    in_n = cols < N
    first = chunk.to(tl.int64) * rows_per_program
    last = tl.minimum(first + rows_per_program, R)
    total = tl.zeros((BLOCK_R, BLOCK_N), tl.float32)
    for start in range(first, last, BLOCK_R):
        rows = start + tl.arange(0, BLOCK_R).to(tl.int64)
        mask = (rows < last)[:, None] & in_n[None, :]
        offs = rows[:, None] * N + cols[None, :]
        hidden = tl.load(hidden_ptr + offs, mask=mask, other=0.0)
        offs_grad = rows[:, None] * stride_grad_r + cols[None, :] * stride_grad_n
        grad = tl.load(grad_ptr + offs_grad, mask=mask, other=0.0)
        # a gradient at a hidden unit that is not a number passes, as in torch
        kept = tl.where(hidden <= 0, 0.0, grad)
        tl.store(d_sum_ptr + offs, kept.to(d_sum_ptr.dtype.element_ty), mask=mask)
        total += kept.to(tl.float32)
    sums = tl.sum(total, axis=0)
    tl.store(partial_ptr + chunk.to(tl.int64) * N + cols, sums, mask=in_n)


def relu_gradient(grad, hidden):
    """grad [R, N], hidden [R, N] contiguous -> d_sum [R, N], d_bias [N]."""
    R, N = hidden.shape
    d_sum, d_bias = hidden.new_empty((R, N)), hidden.new_empty((N,))
    target = _configs.target_of(hidden)
    tiles = triton.cdiv(N, COLUMNS)
    wanted = 4 if target.backend == "interpreter" else 16 * _configs.multiprocessors(target)
    chunks = max(1, min(triton.cdiv(R, ROWS), triton.cdiv(wanted, max(1, tiles))))
    rows = triton.cdiv(triton.cdiv(R, chunks), ROWS) * ROWS
    chunks = triton.cdiv(R, rows) if R else 0
    partial = hidden.new_empty((chunks, N), dtype=torch.float32)
    with torch.cuda.device_of(hidden):
        if R and N:
            relu_gradient_kernel[(tiles * chunks,)](
                grad, hidden, d_sum, partial, *grad.stride(), R, N, rows,
                BLOCK_R=ROWS, BLOCK_N=COLUMNS, num_warps=4, num_stages=3, enable_fp_fusion=True,
            )  # fmt: skip
        sum_partials(partial, d_bias)
    return d_sum, d_bias
