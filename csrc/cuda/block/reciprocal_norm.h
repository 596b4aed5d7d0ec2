// SPDX-License-Identifier: Apache-2.0
// 1 / |x| of vectors; 0 for a zero vector, NaN for one with a NaN or an infinite entry.
#pragma once

#include <cfloat>
#include <cstdint>

#include "block.h"
#include "row.h"
#include "tile_io.h"

namespace vtclip::cuda {

// A strided vector: element i is base[i * stride].
template <class T>
struct Strided {
  T* base;
  int64_t stride;
  VTCLIP_DEVICE T& operator[](int64_t i) const { return base[i * stride]; }
};

// row r of a matrix
template <class T>
VTCLIP_DEVICE Strided<T> vector_of(const Rows<T>& rows, int64_t r) {
  return {rows.base + r * rows.row, rows.column};
}

// A [G, N, D] view: vector (g, n) starts at base + g * group + n * row, strides in elements.
template <class T>
struct Vectors {
  T* base;
  int64_t group, row, column;
  VTCLIP_DEVICE Strided<T> at(int64_t g, int64_t n) const {
    return {base + g * group + n * row, column};
  }
  VTCLIP_DEVICE Rows<T> rows(int64_t g) const { return {base + g * group, row, column}; }
};

// Of x[0], .., x[D - 1], by a block or the lanes of a row. Entries are divided by the largest of
// them before they are squared. Of a vector shorter than the smallest normal number the result is
// the largest finite one.
template <class Team, class T>
VTCLIP_DEVICE AccOf<std::remove_const_t<T>> reciprocal_norm(const Team& team, const Strided<T>& x,
                                                           int64_t D) {
  using Acc = AccOf<std::remove_const_t<T>>;
  constexpr Acc kLargest = static_cast<Acc>(sizeof(Acc) == 8 ? DBL_MAX : FLT_MAX);
  const Acc largest = team.max(D, [&](int64_t i) {
    const Acc entry = static_cast<Acc>(x[i]);
    return entry < 0 ? -entry : entry;
  });
  const Acc nans = team.sum(D, [&](int64_t i) {
    const Acc entry = static_cast<Acc>(x[i]);
    return static_cast<Acc>(entry != entry);
  });
  if (nans != 0) return static_cast<Acc>(NAN);
  if (!(largest > 0)) return 0;
  const Acc square = team.sum(D, [&](int64_t i) {
    const Acc part = static_cast<Acc>(x[i]) / largest;
    return part * part;
  });
  return lesser(1 / sqrt_of(square) / largest, kLargest);
}

// Whether a sum of squares lost nothing to the range of its type.
template <class Acc>
VTCLIP_DEVICE bool square_in_range(Acc square) {
  return square > static_cast<Acc>(1e-25) && square < static_cast<Acc>(1e25);
}

// The same from a sum of squares of T, or again() where it left the range of its type.
template <class T, class Again>
VTCLIP_DEVICE AccOf<T> rnorm_of_square(AccOf<T> square, Again again) {
  if (square_in_range(square)) return 1 / sqrt_of(square);
  if constexpr (kSquaresFit<T>) {
    return square == 0 ? 0 : static_cast<AccOf<T>>(NAN);
  } else {
    return again();
  }
}

// The same of a row, in one pass where that serves.
template <class T>
VTCLIP_DEVICE AccOf<T> row_reciprocal_norm(const Lanes<kWarpSize>& lanes, const Rows<const T>& rows,
                                           int64_t r, int64_t D) {
  using Acc = AccOf<T>;
  constexpr int kColumns = kGroup<T>;
  const Row<const T> row(rows, r, D);
  const Acc square = lanes.sum(ceil_div(D, kColumns), [&](int64_t group) {
    Acc x[kColumns], sum = 0;
    row.load(group * kColumns, x);
    VTCLIP_UNROLL
    for (int e = 0; e < kColumns; ++e) sum += x[e] * x[e];
    return sum;
  });
  return rnorm_of_square<T>(square, [&] {
    return reciprocal_norm(lanes, vector_of(rows, r), D);
  });
}

// rnorm[row] of vectors [G, N, D], row = g * N + n. Block = one vector.
template <class T>
struct ReciprocalNorm {
  using Acc = AccOf<T>;
  static constexpr int kWarps = 4;
  using Tiles = BlockTiles<kWarps>;
  struct Args {
    Vectors<const T> vectors;
    int64_t N, D;
    Acc* rnorm;  // [G, N]: written
  };

  static VTCLIP_DEVICE void run(const Args& args, int64_t row, Tiles& tiles) {
    const Strided<const T> x = args.vectors.at(row / args.N, row % args.N);
    const Acc rnorm = reciprocal_norm(tiles.block, x, args.D);
    tiles.block.once([&] { args.rnorm[row] = rnorm; });
  }
};

}  // namespace vtclip::cuda
