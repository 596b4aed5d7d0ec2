# SPDX-License-Identifier: Apache-2.0
"""Device functions of all kernels: masked tiles, casts, dots, norms, the fixed-order sum."""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
# The interpreter keeps bfloat16 as raw 16-bit integers: only conversions of it are right.
INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))


@triton.jit
def head_program(H, rows, BLOCK: tl.constexpr):
    """(image or chunk of images, head, tile of rows) of a program; neighbours share a head."""
    pid = tl.program_id(0)
    num_tiles = tl.cdiv(rows, BLOCK)
    chunk = (pid // num_tiles // H).to(tl.int64)
    return chunk, (pid // num_tiles % H).to(tl.int64), (pid % num_tiles).to(tl.int64)


@triton.jit
def row_program(K, BLOCK_K: tl.constexpr):
    """(image or chunk of images, class tile) of a program; without a class one tile."""
    pid = tl.program_id(0)
    num_tiles = tl.maximum(1, tl.cdiv(K, BLOCK_K))
    return (pid // num_tiles).to(tl.int64), (pid % num_tiles).to(tl.int64)


@triton.jit
def column_program(K, D, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr):
    """(chunk of images, class tile, columns [BLOCK_D]) of a program; without a class one tile."""
    pid = tl.program_id(0)
    num_cols = tl.cdiv(D, BLOCK_D)
    num_tiles = tl.maximum(1, tl.cdiv(K, BLOCK_K))
    chunk = (pid // num_cols // num_tiles).to(tl.int64)
    tile = (pid // num_cols % num_tiles).to(tl.int64)
    return chunk, tile, (pid % num_cols).to(tl.int64) * BLOCK_D + tl.arange(0, BLOCK_D)


@triton.jit
def indices(BLOCK: tl.constexpr, WIDE: tl.constexpr):
    """0, 1, .. [BLOCK]; in 32 bits where no offset within a matrix needs more (`_configs.wide`)."""
    offs = tl.arange(0, BLOCK)
    if WIDE:
        offs = offs.to(tl.int64)
    return offs


@triton.jit
def tile_indices(tile, BLOCK: tl.constexpr, WIDE: tl.constexpr):
    """The indices [BLOCK] of a tile of rows or columns."""
    offs = indices(BLOCK, WIDE)
    return (tile * BLOCK).to(offs.dtype) + offs


@triton.jit
def load_rows(ptr, offs_row, offs_d, stride_row, stride_d, in_row, D):
    """[rows, BLOCK_D] tile; rows and columns that do not exist read as 0 and are never touched."""
    offs = offs_row[:, None] * stride_row + offs_d[None, :] * stride_d
    return tl.load(ptr + offs, mask=in_row[:, None] & (offs_d < D)[None, :], other=0.0)


@triton.jit
def store_rows(ptr, tile, offs_row, offs_d, stride_row, stride_d, in_row, D):
    """Write a float32 [rows, BLOCK_D] tile in the dtype of `ptr`."""
    offs = offs_row[:, None] * stride_row + offs_d[None, :] * stride_d
    mask = in_row[:, None] & (offs_d < D)[None, :]
    tl.store(ptr + offs, cast(tile, ptr.dtype.element_ty), mask=mask)


@triton.jit
def load_row(ptr, offs_d, stride_d, D):
    """[BLOCK_D] float32 vector."""
    return tl.load(ptr + offs_d * stride_d, mask=offs_d < D, other=0.0).to(tl.float32)


@triton.jit
def cast(x, dtype: tl.constexpr):
    """float32 -> dtype, to nearest even; the interpreter alone would truncate towards bfloat16."""
    if INTERPRETED and dtype == tl.bfloat16:
        # in Triton 3.8 a sum times a Python float is float64 there
        bits = x.to(tl.float32).to(tl.int32, bitcast=True)
        odd = (bits >> 16) & 1
        # a NaN stays as it is: the increment could carry it into the sign bit
        bits = tl.where(x == x, bits + 0x7FFF + odd, bits)
        x = (bits & -65536).to(tl.float32, bitcast=True)
    return x.to(dtype)


@triton.jit
def dot(a, b, PRECISION: tl.constexpr):
    """a [M, N] @ b [N, P] -> float32 [M, P]."""
    if INTERPRETED:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, input_precision=PRECISION, out_dtype=tl.float32)


@triton.jit
def add_dot(acc, a, b, PRECISION: tl.constexpr):
    """acc + a @ b. Of float32 without tensor cores a @ b is summed by itself and then added.

    As one chain over all steps, each product would be rounded with the whole sum.
    """
    if PRECISION == "ieee" and a.dtype == tl.float32:
        return tl.fma(dot(a, b, PRECISION), 1.0, acc)  # a sum would be made one chain again
    return acc + dot(a, b, PRECISION)


@triton.jit
def attended(mask_ptr, offs_l, stride_l, L, HAS_MASK: tl.constexpr):
    """[BLOCK_L] bool: the column exists and may be attended to."""
    keep = offs_l < L
    if HAS_MASK:
        keep = keep & (tl.load(mask_ptr + offs_l * stride_l, mask=keep, other=0) != 0)
    return keep


@triton.jit
def row_max(x, axis: tl.constexpr = 1):
    """[rows] largest entry of x [rows, columns]; NaN is passed over."""
    if INTERPRETED:
        x = tl.where(x == x, x, float("-inf"))  # a row of NaN makes NumPy warn
    return tl.max(x, axis=axis)


@triton.jit
def scores(
    q, key_ptr, mask_ptr, cols, offs_d, stride_key_l, stride_key_d, stride_mask_l, scale_log2, L, D,
    HAS_MASK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """([BLOCK_K, BLOCK_L] scores in powers of two, -inf where not attended; attended [BLOCK_L])."""
    keep = attended(mask_ptr, cols, stride_mask_l, L, HAS_MASK)
    k = load_rows(key_ptr, cols, offs_d, stride_key_l, stride_key_d, keep, D)
    s = dot(q, tl.trans(k), PRECISION) * scale_log2
    # selected: -inf added to the NaN of a query that is not finite would leave it
    return tl.where(keep[None, :], s, float("-inf")), keep


@triton.jit
def softmax_step(s, top, total):
    """(exp2(s - new top), factor of what was summed before, new top, new total) of every row."""
    new_top = tl.maximum(top, row_max(s))
    shift = tl.where(new_top == float("-inf"), 0.0, new_top)  # no column: exp2(-inf) = 0, not NaN
    shrink = tl.exp2(top - shift)
    p = tl.exp2(s - shift[:, None])
    return p, shrink, new_top, total * shrink + tl.sum(p, axis=1)


@triton.jit
def fused(x, factor, shift):
    """x * factor - shift, rounded once; the interpreter has no such instruction."""
    if INTERPRETED:
        wide = x.to(tl.float64) * factor - shift
        return tl.where(wide > 120.0, 120.0, wide).to(tl.float32)  # NumPy would warn of overflow
    return tl.fma(x, factor, -shift)


@triton.jit
def opened(m):
    """relu(1 + m); NaN stays."""
    return tl.where(m <= -1.0, 0.0, 1.0 + m)


@triton.jit
def in_powers(natural):
    """log2 of exp(natural), rounded: not to be contracted with what it is subtracted from."""
    return tl.fma(natural, LOG2E, 0.0)


@triton.jit
def product(a, b):
    """a * b, rounded: what a sum over lanes adds up.

    The compiler contracts a * b + c. Where c comes from another lane, both lanes would round the
    other's product and not their own, and end with sums that differ in the last bit. `fma` is not
    contracted again, and adding +0 is no identity (of -0), so that it is not simplified either.
    """
    return tl.fma(a, b, 0.0)


@triton.jit
def add_pairs(a, b, more_a, more_b):
    return a + more_a, b + more_b


@triton.jit
def pair_sum(a, b, axis: tl.constexpr):
    """(sum of a, sum of b) over one axis, with one exchange between warps for both."""
    if INTERPRETED:  # which would call add_pairs for every entry
        return tl.sum(a, axis=axis), tl.sum(b, axis=axis)
    return tl.reduce((a, b), axis, add_pairs)


@triton.jit
def range_factor(top):
    """Power of two by which to multiply entries up to `top`, which then is in [1, 2).

    It loses no bits. Of a subnormal `top`, 2^126; of 0 and NaN, 1; of infinity, -infinity: what it
    multiplies has a norm of infinity, whose reciprocal times this is NaN.
    """
    bits = tl.maximum(top.to(tl.int32, bitcast=True) & 0x7F800000, 0x00800000)
    bits = 0x7F000000 - bits
    bits = tl.where(bits == 0, 0x00400000, bits)  # 2^-127 is subnormal
    return tl.where(top > 0, bits.to(tl.float32, bitcast=True), 1.0)


@triton.jit
def reciprocal_root(squares, factor):
    """1 / sqrt(squares), 0 of 0; times `factor` no more than 2^126.

    That bounds the reciprocal norm only of rows shorter than the smallest normal number, and
    leaves their gradients room.
    """
    zero = squares < 1.1754943508222875e-38  # what the device's rsqrt takes for 0
    root = tl.where(zero, 0.0, tl.rsqrt(tl.where(zero, 1.0, squares)))
    cap = 8.507059173023462e37 / tl.maximum(factor, 1.0)
    return tl.where(root > cap, cap, root)  # NaN stays


@triton.jit
def reciprocal_norm(x):
    """1 / |row| of x [rows, D] float32, 0 for a zero row; what it squares is below 2."""
    factor = range_factor(row_max(tl.abs(x)))
    scaled = x * factor[:, None]
    return reciprocal_root(tl.sum(product(scaled, scaled), axis=1), factor) * factor


@triton.jit
def vector_reciprocal_norm(x):
    """reciprocal_norm of one vector [D]: as a row [1, D] its layout would be exchanged."""
    factor = range_factor(row_max(tl.abs(x), axis=0))
    scaled = x * factor
    return reciprocal_root(tl.sum(product(scaled, scaled), axis=0), factor) * factor


@triton.jit
def unit_rows(x):
    """x / |row| of x [rows, D] float32, a zero row stays 0; what it squares is below 2."""
    scaled = x * range_factor(row_max(tl.abs(x)))[:, None]
    squares = tl.sum(product(scaled, scaled), axis=1)
    return scaled * reciprocal_root(squares, 1.0)[:, None]


@triton.jit
def unit_vector(x):
    """The same of one vector [D]."""
    scaled = x * range_factor(row_max(tl.abs(x), axis=0))
    return scaled * reciprocal_root(tl.sum(product(scaled, scaled), axis=0), 1.0)


@triton.jit
def power_of_two(x):
    """Power of two in (x/2, x] for x >= 2^-126; 1 for NaN. A factor that loses no bits."""
    bits = x.to(tl.int32, bitcast=True) & 0x7F800000
    bits = tl.where(bits < 0x00800000, 0x00800000, bits)
    return tl.where(x == x, bits.to(tl.float32, bitcast=True), 1.0)


@triton.jit(do_not_specialize=["P", "N"])
def sum_partials_kernel(
    partial_ptr,  # [P, N] float32, contiguous
    out_ptr,  # [N], contiguous
    P,
    N,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    # out[n] = sum_p partial[p, n], always in the same order
    offs_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_p = tl.arange(0, BLOCK_P).to(tl.int64)
    in_n = offs_n < N
    total = tl.zeros((BLOCK_N,), tl.float32)
    for start in range(0, P, BLOCK_P):
        rows = start + offs_p
        mask = (rows < P)[:, None] & in_n[None, :]
        tile = tl.load(partial_ptr + rows[:, None] * N + offs_n[None, :], mask=mask, other=0.0)
        total += tl.sum(tile, axis=0)
    tl.store(out_ptr + offs_n, cast(total, out_ptr.dtype.element_ty), mask=in_n)


def sum_partials(partial, out):
    """out = partial.sum(0), float32 [P, ...]; both in dense memory of the same order.

    Where the kernels wrote to `out` itself, `partial is out`, nothing is left to do.
    """
    P, size = partial.shape[0], out.numel()
    if size and partial is not out:
        # few long steps of a program, and programs for every multiprocessor where P is large
        block_p, block_n = (4, 1024) if P <= 4 else (16, 256) if P <= 32 else (128, 32)
        sum_partials_kernel[(triton.cdiv(size, block_n),)](
            partial, out, P, size, BLOCK_P=block_p, BLOCK_N=block_n,
            num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip
    return out
