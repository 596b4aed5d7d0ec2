# SPDX-License-Identifier: Apache-2.0
"""Sums over the rows of up to three matrices in one launch: the bias gradients of RAda's layers.

Made for few rows, where three launches cost more than the sums; always in the same order.
"""

import torch
import triton
import triton.language as tl

from vtclip.kernels._math import cast, load_rows


@triton.jit
def add_rows(
    x_ptr, out_ptr, stride_r, stride_n, R, N, tile, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr
):
    """out[n] = sum_r x[r, n] of one tile of columns."""
    cols = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    rows = tl.arange(0, BLOCK_R).to(tl.int64)
    total = tl.zeros((BLOCK_R, BLOCK_N), tl.float32)
    for start in range(0, R, BLOCK_R):
        total += load_rows(
            x_ptr, start + rows, cols, stride_r, stride_n, start + rows < R, N
        ).to(tl.float32)  # fmt: skip
    sums = cast(tl.sum(total, axis=0), out_ptr.dtype.element_ty)
    tl.store(out_ptr + cols, sums, mask=cols < N)


@triton.jit(do_not_specialize=["R0", "R1", "R2"])
def column_sums_kernel(
    x0_ptr, x1_ptr, x2_ptr,  # [R0, N0], [R1, N1], [R2, N2]
    out_ptr,  # [N0 + N1 + N2], contiguous: written
    stride_x0_r, stride_x0_n,
    stride_x1_r, stride_x1_n,
    stride_x2_r, stride_x2_n,
    R0, R1, R2, N0, N1, N2,
    BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    # program = column tile of one matrix. A loop for each, which knows its own strides: of strides
    # chosen at run time, none is known to be 1
    tile = tl.program_id(0).to(tl.int64)
    tiles_0 = tl.cdiv(N0, BLOCK_N)
    tiles_1 = tl.cdiv(N1, BLOCK_N)
    out_1 = tl.cast(N0, tl.int64)
    if tile < tiles_0:
        add_rows(x0_ptr, out_ptr, stride_x0_r, stride_x0_n, R0, N0, tile, BLOCK_R, BLOCK_N)
    elif tile < tiles_0 + tiles_1:
        tile -= tiles_0
        add_rows(x1_ptr, out_ptr + out_1, stride_x1_r, stride_x1_n, R1, N1, tile, BLOCK_R, BLOCK_N)
    else:
        tile -= tiles_0 + tiles_1
        out_ptr += out_1 + N1
        add_rows(x2_ptr, out_ptr, stride_x2_r, stride_x2_n, R2, N2, tile, BLOCK_R, BLOCK_N)


def column_sums(x0, x1, x2):
    """[R0, N0], [R1, N1], [R2, N2] -> [N0 + N1 + N2], the sum of each over its rows."""
    widths = x0.shape[1], x1.shape[1], x2.shape[1]
    out = x0.new_empty((sum(widths),))
    tiles = sum(triton.cdiv(width, 32) for width in widths)
    if tiles:
        with torch.cuda.device_of(x0):
            column_sums_kernel[(tiles,)](
                x0, x1, x2, out, *x0.stride(), *x1.stride(), *x2.stride(),
                x0.shape[0], x1.shape[0], x2.shape[0], *widths,
                BLOCK_R=256, BLOCK_N=32, num_warps=8, enable_fp_fusion=True,
            )  # fmt: skip
    return out
