// SPDX-License-Identifier: Apache-2.0
// What both directions of rational_attn share. With S_x = scale q_x k^T for x in image, text, pair
//
//   A_x = K exp(S_x) / sum of exp(S_x) over its rows and columns;  A_image, of one row: without K
//   out = share * sum_x A_x v                                      share = 1 / number of queries
//
// Exponentials are powers of two: base = max(S) log2(e) and total = sum 2^(S log2(e) - base) of a
// map are all that the backward needs to recompute A.
// A block has four warps and 64 rows, 16 to a warp, past which it streams `kStep` rows of the other
// kind. A head is taken in chunks of kC columns; a block computes kC columns of its results. All
// bodies fit into the 64 KiB of sm_75.
#pragma once

#include <cstdint>
#include <type_traits>

#include "cuda/block/block.h"
#include "cuda/block/tile_io.h"
#include "cuda/block/warp_tile.h"

namespace vtclip::cuda {

constexpr int kRationalRows = 64;  // of a block
constexpr int kImage = 0, kText = 1, kPair = 2, kQueryKinds = 3;

// Rows of a step that leave room in registers for `results` results of kC columns.
template <class T>
VTCLIP_BOTH constexpr int rational_step(int columns, int results) {
  if (sizeof(T) == 8 || columns * results > 128) return 16;
  if (sizeof(T) == 4) return results == 1 ? 32 : 16;
  return columns * results == 64 ? 64 : 32;
}

template <class T>
struct RationalInputs {
  int64_t B, H, K, d;
  bool has[kQueryKinds];
  Heads<const T> query[kQueryKinds];  // [B, H, 1, d], [B|1, H, K, d], [B, H, K, d]
  Heads<const T> key, value;          // [B, H, K, d]
  AccOf<T> scale, share;

  VTCLIP_BOTH int maps() const { return has[kText] + has[kPair]; }
  VTCLIP_DEVICE AccOf<T> scale_log2() const {
    return scale * static_cast<AccOf<T>>(1.4426950408889634074);
  }
};

template <class T, int kColumns, int kStepOf>
struct RationalTile {
  static constexpr int kC = kColumns;
  static constexpr int kRows = kRationalRows;
  static constexpr int kWarps = kRows / 16;
  static constexpr int kStep = kStepOf;
  static constexpr int kLd = tile_stride<T>(kC);
  static constexpr int kLdStep = tile_stride<T>(kStep);

  // of a head; `with_columns` gives 64 columns of a half type to heads they hold
  static VTCLIP_BOTH int chunks(const RationalInputs<T>& n) {
    if constexpr (sizeof(T) == 2 && kC == 64) return 1;
    return static_cast<int>(larger<int64_t>(1, ceil_div(n.d, kC)));
  }
  // rows of a warp that exist, of `rows` from the block's first
  static VTCLIP_DEVICE bool idle(const Warp& warp, int64_t rows) {
    return 16 * warp.index >= rows;
  }
  // Loads are copies: they are there after block.arrive().
  //
  // chunk c of a block's own rows, of which `rows` exist
  static VTCLIP_DEVICE void load_own(const Block<kWarps>& block, T* to, const Rows<const T>& from,
                                     int64_t rows, int64_t d, int c) {
    copy_tile<kRows, kC>(block.loose(), to, kLd, from.from(0, int64_t{c} * kC), d - c * kC,
                         [&](int r) { return r < rows; });
  }
  // chunk c of the rows that pass
  static VTCLIP_DEVICE void load_step(const Block<kWarps>& block, T* to, const Rows<const T>& from,
                                      int64_t rows, int64_t d, int c) {
    copy_tile<kStep, kC>(block.loose(), to, kLd, from.from(0, int64_t{c} * kC), d - c * kC,
                         [&](int r) { return r < rows; });
  }
  // columns of chunk c a product sums over
  static VTCLIP_DEVICE int summed(int64_t d, int c) {
    return static_cast<int>(lesser<int64_t>(kC, ceil_div(d - c * kC, kFragment) * kFragment));
  }
};

// run(std::integral_constant<int, kC>{}) for heads of width d
template <class T, class Run>
void with_columns(int64_t d, Run run) {
  if constexpr (sizeof(T) == 2) {
    if (d > 64) return run(std::integral_constant<int, 128>{});
    return run(std::integral_constant<int, 64>{});
  } else {
    return run(std::integral_constant<int, sizeof(T) == 4 ? 64 : 32>{});
  }
}

// 2^(s scale_log2 - base), the product not rounded before the difference
VTCLIP_DEVICE float power(float s, float scale_log2, float base) {
  return exp2f(fmaf(s, scale_log2, -base));
}
VTCLIP_DEVICE double power(double s, double scale_log2, double base) {
  return exp2(fma(s, scale_log2, -base));
}

}  // namespace vtclip::cuda
