// SPDX-License-Identifier: Apache-2.0
// A tile on its way from global to shared memory, held in the registers of a block's threads: the
// next step of a walk is read while the block multiplies this one.
//
//   PerThread<Stage<T, kRows, kColumns, kThreads>, kThreads> all;
//   block.loose().each(kThreads, [&](int i) { all[i].fetch(i, from, rows, columns); });
//   block.each(kThreads, [&](int i) { all[i].each(i, f); });   f(place, vector) puts it there
#pragma once

#include "block.h"
#include "mma.h"
#include "row.h"
#include "tile_io.h"

namespace vtclip::cuda {

// The first rows and columns of `from` as a tile; those that do not exist are 0 and never read.
// Where 16-byte vectors do not fit, nothing is held: elements are read when they are put.
template <class T, int kRows, int kColumns, int kThreads>
class Stage {
 public:
  using Packed = Vector<T>;
  static constexpr int kSize = Packed::kSize, kGroups = kColumns / kSize;
  static constexpr int kShare = kRows * kGroups / kThreads;  // vectors of one thread
  static constexpr int kApart = kThreads / kGroups;          // rows from one to the next
  static_assert(kColumns % kSize == 0 && kThreads % kGroups == 0 && kRows % kApart == 0,
                "a thread's vectors lie in one column");

  VTCLIP_DEVICE void fetch(int thread, const Rows<const T>& from, int64_t rows, int64_t columns) {
    from_ = from;
    rows_ = static_cast<int>(lesser<int64_t>(rows, kRows));
    columns_ = static_cast<int>(lesser<int64_t>(columns, kColumns));
    fits_ = columns_ % kSize == 0 && vectors_fit(from);
    if (!fits_) return;
    const Place first = place(thread, 0);
    const T* at = from.base + first.row * from.row + first.column;
    const int rows_left = first.column < columns_ ? rows_ - first.row : 0;
    VTCLIP_UNROLL
    for (int v = 0; v < kShare; ++v) {
      held_[v] = zeros<T>();
      if (v * kApart < rows_left) held_[v] = *reinterpret_cast<const Packed*>(at);
      at += kApart * from.row;
    }
  }

  template <class F>
  VTCLIP_DEVICE void each(int thread, F f) const {
    if (fits_) {
      VTCLIP_UNROLL
      for (int v = 0; v < kShare; ++v) f(place(thread, v), held_[v]);
      return;
    }
    VTCLIP_ROLLED
    for (int v = 0; v < kShare; ++v) {
      const Place at = place(thread, v);
      Packed packed = zeros<T>();
      VTCLIP_UNROLL
      for (int e = 0; e < kSize; ++e) {
        if (at.row < rows_ && at.column + e < columns_) {
          packed.element[e] = from_.at(at.row, at.column + e);
        }
      }
      f(at, packed);
    }
  }

 private:
  static VTCLIP_DEVICE Place place(int thread, int v) {
    return {thread / kGroups + v * kApart, thread % kGroups * kSize};
  }
  Packed held_[kShare];
  Rows<const T> from_;
  int rows_, columns_;
  bool fits_;
};

// *to = vector, 16 bytes
template <class T>
VTCLIP_DEVICE void put(T* to, const Vector<T>& vector) {
  *reinterpret_cast<Vector<T>*>(to) = vector;
}

}  // namespace vtclip::cuda
