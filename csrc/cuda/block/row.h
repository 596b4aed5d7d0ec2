// SPDX-License-Identifier: Apache-2.0
// Rows in global memory, read and written a group of columns at a time, and sums over them.
#pragma once

#include "block.h"
#include "tile_io.h"

namespace vtclip::cuda {

// Columns of T in 16 bytes: what one thread takes of a row at a time.
template <class T>
inline constexpr int kGroup = Vector<T>::kSize;

// Whether sums of squares of T, in AccOf<T>, stay within its range: float16's go from 3.5e-15 to
// 4.3e9 for each element.
template <class T>
inline constexpr bool kSquaresFit = std::is_same_v<T, torch::headeronly::Half>;

// A strided row of n elements. Where it is dense and its address allows, groups are read and
// written 16 bytes at a time.
template <class T>
class Row {
  using Element = std::remove_const_t<T>;
  using Packed = Vector<Element>;
  static constexpr int kSize = Packed::kSize;

 public:
  using Acc = AccOf<Element>;

  VTCLIP_DEVICE Row(T* base, int64_t stride, int64_t n)
      : base_(base),
        stride_(stride),
        n_(n),
        packed_(stride == 1 && reinterpret_cast<uintptr_t>(base) % 16 == 0) {}
  VTCLIP_DEVICE Row(const Rows<T>& rows, int64_t r, int64_t n)
      : Row(rows.base + r * rows.row, rows.column, n) {}

  // elements first .. first + N - 1, 0 beyond the row; `first` is a multiple of N
  template <int N>
  VTCLIP_DEVICE void load(int64_t first, Acc (&to)[N]) const {
    if constexpr (N % kSize == 0) {
      if (packed_ && first + N <= n_) return load<true>(first, to);
    }
    load<false>(first, to);
  }
  // the same where the caller knows that the row is dense, aligned and as long as that, or takes it
  // element by element: without a test, loads of several rows are under way together
  template <bool kPacked, int N>
  VTCLIP_DEVICE void load(int64_t first, Acc (&to)[N]) const {
    if constexpr (kPacked) {
      static_assert(N % kSize == 0);
      VTCLIP_UNROLL
      for (int at = 0; at < N; at += kSize) {
        const Packed packed = *reinterpret_cast<const Packed*>(base_ + first + at);
        VTCLIP_UNROLL
        for (int e = 0; e < kSize; ++e) to[at + e] = static_cast<Acc>(packed.element[e]);
      }
    } else {
      // one address after the other: all of them would be kept over loops, and spill
      const int left = static_cast<int>(lesser<int64_t>(N, n_ - first));
      T* at = base_ + first * stride_;
      VTCLIP_UNROLL
      for (int e = 0; e < N; ++e) {
        to[e] = e < left ? static_cast<Acc>(*at) : 0;
        if (e + 1 < left) at += stride_;
      }
    }
  }

  // elements first .. first + N - 1 as far as the row goes
  template <int N>
  VTCLIP_DEVICE void store(int64_t first, const Acc (&from)[N]) const {
    if constexpr (N % kSize == 0) {
      if (packed_ && first + N <= n_) return store<true>(first, from);
    }
    store<false>(first, from);
  }
  template <bool kPacked, int N>
  VTCLIP_DEVICE void store(int64_t first, const Acc (&from)[N]) const {
    if constexpr (kPacked) {
      static_assert(N % kSize == 0);
      VTCLIP_UNROLL
      for (int at = 0; at < N; at += kSize) {
        Packed packed;
        VTCLIP_UNROLL
        for (int e = 0; e < kSize; ++e) packed.element[e] = static_cast<Element>(from[at + e]);
        *reinterpret_cast<Packed*>(base_ + first + at) = packed;
      }
    } else {
      const int left = static_cast<int>(lesser<int64_t>(N, n_ - first));
      T* at = base_ + first * stride_;
      VTCLIP_UNROLL
      for (int e = 0; e < N; ++e) {
        if (e >= left) break;
        *at = static_cast<Element>(from[e]);
        at += stride_;
      }
    }
  }

 private:
  T* base_;
  int64_t stride_, n_;
  bool packed_;
};

// totals[s] = the sum over 0 <= i < n of what f(i, part) adds to part[s], for all lanes of a warp,
// in one pass. `slots` [kSums, 32] is shared memory of this warp.
template <int kSums, class Acc, class F>
VTCLIP_DEVICE void row_sums(const Lanes<kWarpSize>& lanes, Acc* slots, int64_t n, F f,
                            Acc (&totals)[kSums]) {
  lanes.each_thread([&](int lane) {
    Acc part[kSums] = {};
    VTCLIP_ROLLED
    for (int64_t i = lane; i < n; i += kWarpSize) f(i, part);
    VTCLIP_UNROLL
    for (int s = 0; s < kSums; ++s) slots[s * kWarpSize + lane] = part[s];
  });
  VTCLIP_UNROLL
  for (int s = 0; s < kSums; ++s) {
    totals[s] = lanes.sum(kWarpSize, [&](int lane) { return slots[s * kWarpSize + lane]; });
  }
  lanes.sync();
}

}  // namespace vtclip::cuda
