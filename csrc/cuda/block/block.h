// SPDX-License-Identifier: Apache-2.0
// What the body of a block is written in. A body is a sequence of phases, each of which ends at a
// barrier; a phase hands work to threads, warps or rows. On a GPU a phase is run by every thread of
// the block for its own share; compiled without nvcc it runs all shares one after another, so that
// the same loops, masks and reductions run on the host under a sanitizer (block_host.h).
//
//   block.each(n, f)            f(i) for 0 <= i < n, over all threads
//   block.each_once(n, f)       the same for n <= kThreads
//   block.loose().each(n, f)    the first without a barrier: what may share the next phase's
//   copy_16(to, from, exists)   16 bytes into shared memory, by themselves from sm_80 on
//   block.arrive()              a barrier behind which all copies are there
//   block.each_warp(f)          f(warp) for every warp
//   block.each_row<P>(n, f)     f(lanes, row) for 0 <= row < n, each row by P neighbouring lanes
//   block.sum(n, f), max(n, f)  of f(i) over 0 <= i < n, for all threads the same value
//   lanes.each, sum, max        the same inside a row; a warp is the 32 lanes of one
//
// Between phases a body holds values that are the same for all threads in plain locals, what
// belongs to one warp in PerWarp, and what belongs to one thread of each(kThreads, f) in PerThread.
// Sums run in an order that depends on n and the block only; max ignores NaN and is -inf for
// n = 0.
#pragma once

#include <cassert>
#include <cmath>
#include <cstdint>

#include "common/ceil_div.h"

#ifdef __CUDACC__
#define VTCLIP_DEVICE __device__ __forceinline__
#define VTCLIP_UNROLL _Pragma("unroll")
#define VTCLIP_ROLLED _Pragma("unroll 1")  // copies of a large body would only take registers
// what the compiler cannot know and would write code for; the host's tests check it
#define VTCLIP_ASSUME(fact) __builtin_assume(fact)
#else
#define VTCLIP_DEVICE inline
#define VTCLIP_UNROLL
#define VTCLIP_ROLLED
#define VTCLIP_ASSUME(fact) assert(fact)
#endif

namespace vtclip::cuda {

constexpr int kWarpSize = 32;

// Whether there are registers for what the compiler unrolls once it knows the sizes of loops: on 7.5
// two kernels of wide heads would spill.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
constexpr bool kKnownSizesFit = false;
#else
constexpr bool kKnownSizesFit = true;
#endif

// a warp's share of a matrix product is made of 16 x 16 tiles
constexpr int kFragment = 16;

template <class T>
VTCLIP_BOTH constexpr T lesser(T a, T b) { return b < a ? b : a; }

// ignores a NaN in b
template <class T>
VTCLIP_BOTH constexpr T larger(T a, T b) { return b > a ? b : a; }

// Elements from one row of a shared tile to the next: whole 16-byte steps, and an odd number of
// them, so that the same column of eight rows lies in eight different groups of banks.
template <class T>
VTCLIP_BOTH constexpr int tile_stride(int columns) {
  constexpr int kStep = 16 / static_cast<int>(sizeof(T));
  const int steps = (columns + kStep - 1) / kStep;
  return (steps + 1 - steps % 2) * kStep;
}

// The type that sums are computed in: double for double, float for everything narrower.
template <class T>
struct Accumulator {
  using type = float;
};
template <>
struct Accumulator<double> {
  using type = double;
};
template <class T>
using AccOf = typename Accumulator<T>::type;

VTCLIP_DEVICE float exp2_of(float x) { return exp2f(x); }
VTCLIP_DEVICE double exp2_of(double x) { return exp2(x); }
VTCLIP_DEVICE float log2_of(float x) { return log2f(x); }
VTCLIP_DEVICE double log2_of(double x) { return log2(x); }
VTCLIP_DEVICE float sqrt_of(float x) { return sqrtf(x); }
VTCLIP_DEVICE double sqrt_of(double x) { return sqrt(x); }

template <class T>
VTCLIP_DEVICE constexpr T smallest_normal() {
  return static_cast<T>(sizeof(T) == 8 ? 2.2250738585072014e-308 : 1.1754943508222875e-38);
}

template <class T>
VTCLIP_DEVICE T infinity() { return static_cast<T>(INFINITY); }

}  // namespace vtclip::cuda

#ifdef __CUDACC__
#include "block_gpu.h"
#else
#include "block_host.h"
#endif

namespace vtclip::cuda {

// The shared memory of a body that keeps nothing but what reductions need.
template <int kWarps>
struct BlockTiles {
  Shared& shared;
  Block<kWarps> block{shared};
};

}  // namespace vtclip::cuda
