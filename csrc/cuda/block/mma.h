// SPDX-License-Identifier: Apache-2.0
// Which element of a 16 x 16 tile a lane of a warp holds, by the fragment layouts of the PTX
// instructions ldmatrix and mma.m16n8k16 (PTX ISA, "Warp Level Matrix Multiply-Accumulate").
// The maps are plain functions: tests multiply with them by an emulation of both instructions.
#pragma once

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

#include "block.h"

namespace vtclip::cuda {

struct Place {
  int row, column;
};

// ldmatrix.x4 reads four 8 x 8 matrices. A lane names one row of eight 16-bit elements, and gets of
// each matrix the pair of elements (lane / 4, 2 * (lane % 4)), transposed first with .trans. Below,
// the first element of the row lane `lane` names, in a tile as it is stored.

// operand a [16, 16], stored [m, k], or [k, m] with .trans
VTCLIP_BOTH constexpr Place row_of_a(int lane) { return {lane % 16, lane / 16 * 8}; }
VTCLIP_BOTH constexpr Place row_of_a_transposed(int lane) {
  return {lane % 8 + lane / 16 * 8, lane / 8 % 2 * 8};
}
// two operands b [16, 8] side by side, stored [k, n] with .trans, or [n, k]
VTCLIP_BOTH constexpr Place row_of_b(int lane) { return {lane % 16, lane / 16 * 8}; }
VTCLIP_BOTH constexpr Place row_of_b_transposed(int lane) {
  return {lane % 8 + lane / 16 * 8, lane / 8 % 2 * 8};
}

// element i of the four accumulators of a lane in an 16 x 8 result
VTCLIP_BOTH constexpr Place accumulator_place(int lane, int i) {
  return {lane / 4 + i / 2 * 8, lane % 4 * 2 + i % 2};
}

// Accumulators of a 16 x 16 result, two of 16 x 8 side by side, are operand a of the next product:
// register `reg` of a lane holds elements i, i + 1 of result n.
struct Accumulators {
  int n, i;
};
VTCLIP_BOTH constexpr Accumulators accumulators_of_a(int reg) { return {reg / 2, reg % 2 * 2}; }

#ifdef __CUDACC__

// two of them, the first in the lower half
VTCLIP_DEVICE unsigned packed_half(float first, float second) {
  const __half2 pair = __floats2half2_rn(first, second);
  return reinterpret_cast<const unsigned&>(pair);
}
VTCLIP_DEVICE unsigned packed_bfloat16(float first, float second) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(first, second);
  return reinterpret_cast<const unsigned&>(pair);
}

template <bool kTransposed>
VTCLIP_DEVICE void ldmatrix(unsigned (&to)[4], const void* row) {
  const unsigned from = static_cast<unsigned>(__cvta_generic_to_shared(row));
  if constexpr (kTransposed) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(from)
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(from)
                 : "memory");
  }
}

// c [16, 8] += a [16, 16] b [16, 8]
template <bool kBFloat16>
VTCLIP_DEVICE void mma(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  if constexpr (kBFloat16) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, "
        "{%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, "
        "{%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
#else
  // sm_75 multiplies 8 columns of a at a time, in the same layout, and float16 only
  static_assert(!kBFloat16, "bfloat16 goes through float on sm_75");
  const unsigned b[2] = {b0, b1};
  VTCLIP_UNROLL
  for (int half = 0; half < 2; ++half) {
    asm volatile(
        "mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, "
        "{%4, %5}, {%6}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[2 * half]), "r"(a[2 * half + 1]), "r"(b[half]));
  }
#endif
}

#endif  // __CUDACC__

}  // namespace vtclip::cuda
