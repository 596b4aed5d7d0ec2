// SPDX-License-Identifier: Apache-2.0
// Between strided global memory and tiles in shared memory. `team` is the block or one warp of it:
// whatever has each(n, f).
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cstdint>
#include <type_traits>

#include "block.h"

namespace vtclip::cuda {

// A strided matrix: element (r, c) is base[r * row + c * column]. Strides count elements; any are
// allowed, 0 too.
template <class T>
struct Rows {
  T* base;
  int64_t row, column;

  VTCLIP_DEVICE T& at(int64_t r, int64_t c) const { return base[r * row + c * column]; }
  VTCLIP_BOTH Rows from(int64_t r, int64_t c = 0) const {
    return {base + r * row + c * column, row, column};
  }
};

// The widest head the attention bodies take.
constexpr int kMaxHeadWidth = 256;

// A [B, H, N, d] view: the rows of one image and head are a matrix. A batch stride of 0 shares one
// image's rows with all.
template <class T>
struct Heads {
  T* base;
  int64_t batch, head, row, column;

  VTCLIP_DEVICE Rows<T> at(int64_t b, int64_t h) const {
    return {base + b * batch + h * head, row, column};
  }
};

// A [B, K, D] view: the rows of one image are a matrix.
template <class T>
struct Images {
  T* base;
  int64_t batch, row, column;

  VTCLIP_DEVICE Rows<T> at(int64_t b) const { return {base + b * batch, row, column}; }
};

// 16 bytes, read and written in one instruction
template <class T>
struct alignas(16) Vector {
  static constexpr int kSize = 16 / static_cast<int>(sizeof(T));
  T element[kSize];
};

template <class T>
VTCLIP_DEVICE bool vectors_fit(const Rows<T>& rows) {
  return rows.column == 1 && reinterpret_cast<uintptr_t>(rows.base) % 16 == 0 &&
         rows.row * static_cast<int64_t>(sizeof(T)) % 16 == 0;
}

template <class T>
VTCLIP_DEVICE Vector<T> zeros() {
  Vector<T> vector;
  VTCLIP_UNROLL
  for (int e = 0; e < Vector<T>::kSize; ++e) vector.element[e] = static_cast<T>(0.0f);
  return vector;
}
// elements column .. of the first row, where vectors fit
template <class T>
VTCLIP_DEVICE Vector<T> vector_at(const Rows<const T>& rows, int64_t column) {
  return *reinterpret_cast<const Vector<T>*>(rows.base + column);
}

// As load_tile, one element at a time.
template <int kRows, int kColumns, class Team, class S, class T, class Exists>
VTCLIP_DEVICE void load_elements(const Team& team, S* to, int ld, const Rows<const T>& from,
                                 int64_t columns, Exists exists) {
  team.each(kRows * kColumns, [&](int i) {
    const int r = i / kColumns, c = i % kColumns;
    S value = static_cast<S>(0.0f);
    if (c < columns && exists(r)) value = static_cast<S>(from.at(r, c));
    to[r * ld + c] = value;
  });
}

// to[r * ld + c] = from(r, c) for r < kRows, c < kColumns, converted to S; 0 where c >= columns or
// exists(r) is false: what lies there is never read. `from` is not written by the same kernel.
template <int kRows, int kColumns, class Team, class S, class T, class Exists>
VTCLIP_DEVICE void load_tile(const Team& team, S* to, int ld, const Rows<const T>& from,
                             int64_t columns, Exists exists) {
  using Packed = Vector<T>;
  constexpr int kSize = Packed::kSize;
  if constexpr (std::is_same_v<S, T> && kColumns % kSize == 0) {
    if (columns % kSize == 0 && vectors_fit(from)) {
      team.each(kRows * (kColumns / kSize), [&](int i) {
        const int r = i / (kColumns / kSize), c = i % (kColumns / kSize) * kSize;
        Packed packed = zeros<T>();
        if (c < columns && exists(r)) packed = *reinterpret_cast<const Packed*>(&from.at(r, c));
        *reinterpret_cast<Packed*>(to + r * ld + c) = packed;
      });
      return;
    }
  }
  load_elements<kRows, kColumns>(team, to, ld, from, columns, exists);
}

// As load_tile, by copies that are there after block.arrive(); `team` is block.loose(). `exists`
// may read what an earlier phase wrote.
template <int kRows, int kColumns, class Team, class T, class Exists>
VTCLIP_DEVICE void copy_tile(const Team& team, T* to, int ld, const Rows<const T>& from,
                             int64_t columns, Exists exists) {
  constexpr int kSize = Vector<T>::kSize, kGroups = kColumns / kSize;
  constexpr int kApart = Team::kThreads / kGroups;  // rows from one copy of a thread to its next
  static_assert(Team::kThreads % kGroups == 0 && kRows % kApart == 0, "a thread has one column");
  if (columns > 0 && columns % kSize == 0 && vectors_fit(from)) {
    team.each_thread([&](int i) {
      const int row = i / kGroups, column = i % kGroups * kSize;
      const T* at = from.base + row * from.row + column;
      T* place = to + row * ld + column;
      bool there[kRows / kApart];
      VTCLIP_UNROLL
      for (int r = 0; r < kRows; r += kApart) {
        there[r / kApart] = exists(row + r) && column < columns;
      }
      VTCLIP_UNROLL
      for (int r = 0; r < kRows; r += kApart) {
        copy_16(place + r * ld, at, there[r / kApart]);
        at += kApart * from.row;
      }
    });
    return;
  }
  load_elements<kRows, kColumns>(team, to, ld, from, columns, exists);
}

// to(r, c) = from[r * ld + c] for r < rows, c < columns, converted to T
template <int kRows, int kColumns, class Team, class S, class T>
VTCLIP_DEVICE void store_tile(const Team& team, const Rows<T>& to, int64_t rows, int64_t columns,
                              const S* from, int ld) {
  using Packed = Vector<T>;
  constexpr int kSize = Packed::kSize;
  if constexpr (kColumns % kSize == 0) {
    constexpr int kGroups = kColumns / kSize, kApart = Team::kThreads / kGroups;
    static_assert(Team::kThreads % kGroups == 0 && kRows % kApart == 0, "a thread has one column");
    if (columns % kSize == 0 && vectors_fit(to)) {
      team.each_thread([&](int i) {
        const int row = i / kGroups, column = i % kGroups * kSize;
        const int64_t left = column < columns ? rows - row : 0;
        T* at = to.base + row * to.row + column;
        VTCLIP_UNROLL
        for (int r = 0; r < kRows; r += kApart) {
          if (r >= left) break;
          Packed packed;
          const S* held = from + (row + r) * ld + column;
          if constexpr (std::is_same_v<S, T>) {
            packed = *reinterpret_cast<const Packed*>(held);
          } else {
            VTCLIP_UNROLL
            for (int e = 0; e < kSize; ++e) packed.element[e] = static_cast<T>(held[e]);
          }
          *reinterpret_cast<Packed*>(at) = packed;
          at += kApart * to.row;
        }
      });
      return;
    }
  }
  team.each(kRows * kColumns, [&](int i) {
    const int r = i / kColumns, c = i % kColumns;
    if (r < rows && c < columns) to.at(r, c) = static_cast<T>(from[r * ld + c]);
  });
}

}  // namespace vtclip::cuda
