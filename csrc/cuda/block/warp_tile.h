// SPDX-License-Identifier: Apache-2.0
// WarpTile<T, M, N>: an M x N matrix of sums held by one warp, in float (double for double), with
// products of tiles of T in shared memory: on tensor cores for half types, by multiply-adds
// otherwise. M and N are multiples of 16, so is the summed dimension of a half type, of 4 that of
// the others; leading dimensions are those of `tile_stride`, tiles start at multiples of 16 bytes.
//
//   tile.fill(x)                            every element becomes x
//   tile.add_product<AT, BT>(a, lda, b, ldb, k)
//                                           += a b; a is stored [M, k], or [k, M] with AT,
//                                           b is stored [k, N], or [N, k] with BT
//   tile.add_product(a, p, ldp, b, ldb)     += a b, a another warp tile, its elements converted to
//                                           T; p [M, ldp] is shared memory of the warp
//   tile.each(f)                            f(spot, element&): spot.row, spot.column
//   tile.with(other, f)                     f(spot, element&, element of other)
//   tile.store(to, ld)                      to[row * ld + column], converted; then warp.sync
//   tile.store<W>(to, ld, first, factor)    of W columns from `first` on, times a factor
//   RowValues<Acc, M>                       one value per row: v[spot], each(f), store
//   tile.sum_rows(v), max_rows(v)           of the elements of each row
//
// Everything is a call of the whole warp. On a GPU an element belongs to one lane, a row to four,
// which hold the same RowValues; on the host one call does the work of all lanes.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <type_traits>

#include "block.h"
#include "mma.h"

namespace vtclip::cuda {

using Half = torch::headeronly::Half;
using BFloat16 = torch::headeronly::BFloat16;

// On a GPU `slot` counts the rows a lane holds; f must not use it.
struct Spot {
  int row, column, slot;
};

#ifdef __CUDACC__

// Whether products of T run on tensor cores in the code being compiled.
template <class T>
struct TensorCores {
  static constexpr bool value = false;
};
template <>
struct TensorCores<Half> {
  static constexpr bool value = true;
};
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
template <>
struct TensorCores<BFloat16> {
  static constexpr bool value = true;
};
#endif

// two neighbours of a row, written in one instruction
template <class S>
struct alignas(2 * sizeof(S)) Pair {
  S first, second;
};
template <class S, class Acc>
VTCLIP_DEVICE void store_pair(S* to, Acc first, Acc second) {
  if constexpr (std::is_same_v<S, Half>) {
    *reinterpret_cast<unsigned*>(to) = packed_half(first, second);
  } else if constexpr (std::is_same_v<S, BFloat16>) {
    *reinterpret_cast<unsigned*>(to) = packed_bfloat16(first, second);
  } else {
    *reinterpret_cast<Pair<S>*>(to) = {static_cast<S>(first), static_cast<S>(second)};
  }
}

VTCLIP_DEVICE int lane_of_warp() { return static_cast<int>(threadIdx.x) % kWarpSize; }

// four elements from a multiple of four, in as few loads as 16 bytes each allow
template <class T>
VTCLIP_DEVICE void load_four(AccOf<T> (&to)[4], const T* from) {
  struct alignas(lesser<int>(16, 4 * sizeof(T))) Packed {
    T element[lesser<int>(4, 16 / sizeof(T))];
  };
  constexpr int kPacked = lesser<int>(4, 16 / sizeof(T));
  VTCLIP_UNROLL
  for (int first = 0; first < 4; first += kPacked) {
    const Packed packed = *reinterpret_cast<const Packed*>(from + first);
    VTCLIP_UNROLL
    for (int i = 0; i < kPacked; ++i) to[first + i] = static_cast<AccOf<T>>(packed.element[i]);
  }
}

template <class Acc, int M>
class RowValues {
 public:
  VTCLIP_DEVICE void fill(Acc value) {
    VTCLIP_UNROLL
    for (int slot = 0; slot < M / 8; ++slot) own_[slot] = value;
  }
  VTCLIP_DEVICE Acc& operator[](const Spot& spot) { return own_[spot.slot]; }
  VTCLIP_DEVICE const Acc& operator[](const Spot& spot) const { return own_[spot.slot]; }
  // f(spot, value&) for every row; spot.column is 0
  template <class F>
  VTCLIP_DEVICE void each(F f) {
    VTCLIP_UNROLL
    for (int slot = 0; slot < M / 8; ++slot) {
      f(Spot{lane_of_warp() / 4 + 8 * slot, 0, slot}, own_[slot]);
    }
  }
  // f(spot, value) once for every row
  template <class F>
  VTCLIP_DEVICE void once(F f) const {
    VTCLIP_UNROLL
    for (int slot = 0; slot < M / 8; ++slot) {
      if (lane_of_warp() % 4 == 0) f(Spot{lane_of_warp() / 4 + 8 * slot, 0, slot}, own_[slot]);
    }
    __syncwarp();
  }

 private:
  Acc own_[M / 8];
};

template <class T, int M, int N>
class WarpTile {
  static_assert(M % kFragment == 0 && N % kFragment == 0, "tiles are made of 16 x 16 fragments");

 public:
  using Acc = AccOf<T>;

  VTCLIP_DEVICE void fill(Acc value) {
    each([&](const Spot&, Acc& element) { element = value; });
  }

  template <class F>
  VTCLIP_DEVICE void each(F f) {
    with(*this, [&](const Spot& at, Acc& element, const Acc&) { f(at, element); });
  }

  template <class F>
  VTCLIP_DEVICE void with(const WarpTile& other, F f) {
    VTCLIP_UNROLL
    for (int m = 0; m < M / 16; ++m) {
      VTCLIP_UNROLL
      for (int n = 0; n < N / 8; ++n) {
        VTCLIP_UNROLL
        for (int i = 0; i < 4; ++i) {
          const Place at = accumulator_place(lane_of_warp(), i);
          f(Spot{16 * m + at.row, 8 * n + at.column, 2 * m + i / 2}, own_[m][n][i],
            other.own_[m][n][i]);
        }
      }
    }
  }

  template <bool kATransposed, bool kBTransposed>
  VTCLIP_DEVICE void add_product(const T* a, int lda, const T* b, int ldb, int k) {
    if constexpr (TensorCores<T>::value) {
      add_mma<kATransposed, kBTransposed>(a, lda, b, ldb, k);
    } else {
      add_fma<kATransposed, kBTransposed>(a, lda, b, ldb, k);
    }
  }

  template <int kK>
  VTCLIP_DEVICE void add_product(WarpTile<T, M, kK>& a, T* p, int ldp, const T* b, int ldb) {
    if constexpr (TensorCores<T>::value) {
      const Place in_b = row_of_b(lane_of_warp());
      b += in_b.row * ldb + in_b.column;
      VTCLIP_UNROLL
      for (int from = 0; from < kK; from += 16) {
        unsigned fragment_a[M / 16][4];
        a.fragments(fragment_a, from);
        add_fragments<false>(fragment_a, b + from * ldb, ldb);
      }
    } else {
      a.store(p, ldp);
      add_fma<false, false>(p, ldp, b, ldb, kK);
      __syncwarp();
    }
  }

  template <class S>
  VTCLIP_DEVICE void store(S* to, int ld) {
    store<N>(to, ld, 0, 1);
  }
  template <int kWide, class S>
  VTCLIP_DEVICE void store(S* to, int ld, int first, Acc factor) {
    to += lane_of_warp() / 4 * ld + lane_of_warp() % 4 * 2;
    VTCLIP_UNROLL
    for (int m = 0; m < M / 16; ++m) {
      VTCLIP_UNROLL
      for (int n = 0; n < kWide / 8; ++n) {
        VTCLIP_UNROLL
        for (int i = 0; i < 4; i += 2) {
          const Acc* pair = &own_[m][first / 8 + n][i];
          store_pair(to + (16 * m + 4 * i) * ld + 8 * n, pair[0] * factor, pair[1] * factor);
        }
      }
    }
    __syncwarp();
  }

  VTCLIP_DEVICE void sum_rows(RowValues<Acc, M>& sums) {
    sums.fill(0);
    each([&](const Spot& at, Acc& element) { sums[at] += element; });
    sums.each([&](const Spot&, Acc& sum) {
      sum += __shfl_xor_sync(0xffffffffu, sum, 1);
      sum += __shfl_xor_sync(0xffffffffu, sum, 2);
    });
  }

  VTCLIP_DEVICE void max_rows(RowValues<Acc, M>& tops) {
    tops.fill(-infinity<Acc>());
    each([&](const Spot& at, Acc& element) { tops[at] = larger(tops[at], element); });
    tops.each([&](const Spot&, Acc& top) {
      top = larger(top, __shfl_xor_sync(0xffffffffu, top, 1));
      top = larger(top, __shfl_xor_sync(0xffffffffu, top, 2));
    });
  }

 private:
  template <class, int, int>
  friend class WarpTile;

  // columns from .. from + 15 as operand a
  VTCLIP_DEVICE void fragments(unsigned (&to)[M / 16][4], int from) const {
    VTCLIP_UNROLL
    for (int m = 0; m < M / 16; ++m) {
      VTCLIP_UNROLL
      for (int reg = 0; reg < 4; ++reg) {
        const Accumulators held = accumulators_of_a(reg);
        const Acc* pair = &own_[m][from / 8 + held.n][held.i];
        if constexpr (std::is_same_v<T, BFloat16>) {
          to[m][reg] = packed_bfloat16(pair[0], pair[1]);
        } else {
          to[m][reg] = packed_half(pair[0], pair[1]);
        }
      }
    }
  }

  // += a b for 16 rows of b, from the element of b that this lane names
  template <bool kBTransposed>
  VTCLIP_DEVICE void add_fragments(const unsigned (&a)[M / 16][4], const T* b, int ldb) {
    VTCLIP_UNROLL
    for (int n = 0; n < N / 16; ++n) {
      unsigned fragment_b[4];
      ldmatrix<!kBTransposed>(fragment_b, b + 16 * n * (kBTransposed ? ldb : 1));
      VTCLIP_UNROLL
      for (int m = 0; m < M / 16; ++m) {
        mma<std::is_same_v<T, BFloat16>>(own_[m][2 * n], a[m], fragment_b[0], fragment_b[1]);
        mma<std::is_same_v<T, BFloat16>>(own_[m][2 * n + 1], a[m], fragment_b[2], fragment_b[3]);
      }
    }
  }

  template <bool kATransposed, bool kBTransposed>
  VTCLIP_DEVICE void add_mma(const T* a, int lda, const T* b, int ldb, int k) {
    const int lane = lane_of_warp();
    const Place in_a = kATransposed ? row_of_a_transposed(lane) : row_of_a(lane);
    const Place in_b = kBTransposed ? row_of_b_transposed(lane) : row_of_b(lane);
    a += in_a.row * lda + in_a.column;
    b += in_b.row * ldb + in_b.column;
    // a chunk of 64 in whole; a further copy would only be code
    _Pragma("unroll 4") for (int from = 0; from < k; from += 16) {
      unsigned fragment_a[M / 16][4];
      VTCLIP_UNROLL
      for (int m = 0; m < M / 16; ++m) {
        ldmatrix<kATransposed>(fragment_a[m],
                               kATransposed ? a + from * lda + 16 * m : a + 16 * m * lda + from);
      }
      add_fragments<kBTransposed>(fragment_a, b + from * (kBTransposed ? 1 : ldb), ldb);
    }
  }

  template <bool kATransposed, bool kBTransposed>
  VTCLIP_DEVICE void add_fma(const T* a, int lda, const T* b, int ldb, int k) {
    const int row = lane_of_warp() / 4, column = lane_of_warp() % 4 * 2;
    // not unrolled further: operands loaded ahead would spill
    _Pragma("unroll 1") for (int from = 0; from < k; from += 4) {
      Acc row_a[M / 8][4];
      VTCLIP_UNROLL
      for (int m = 0; m < M / 8; ++m) {
        if constexpr (kATransposed) {
          VTCLIP_UNROLL
          for (int i = 0; i < 4; ++i) {
            row_a[m][i] = static_cast<Acc>(a[(from + i) * lda + row + 8 * m]);
          }
        } else {
          load_four(row_a[m], a + (row + 8 * m) * lda + from);
        }
      }
      VTCLIP_UNROLL
      for (int n = 0; n < N / 8; ++n) {
        Acc column_b[2][4];
        VTCLIP_UNROLL
        for (int j = 0; j < 2; ++j) {
          if constexpr (kBTransposed) {
            load_four(column_b[j], b + (column + 8 * n + j) * ldb + from);
          } else {
            VTCLIP_UNROLL
            for (int i = 0; i < 4; ++i) {
              column_b[j][i] = static_cast<Acc>(b[(from + i) * ldb + column + 8 * n + j]);
            }
          }
        }
        // four products by themselves first: a quarter of the roundings of a long sum
        VTCLIP_UNROLL
        for (int m = 0; m < M / 8; ++m) {
          VTCLIP_UNROLL
          for (int j = 0; j < 2; ++j) {
            Acc part = row_a[m][0] * column_b[j][0];
            VTCLIP_UNROLL
            for (int i = 1; i < 4; ++i) part += row_a[m][i] * column_b[j][i];
            own_[m / 2][n][m % 2 * 2 + j] += part;
          }
        }
      }
    }
  }

  Acc own_[M / 16][N / 8][4];
};

#else  // on the host

template <class Acc, int M>
class RowValues {
 public:
  RowValues() { fill(static_cast<Acc>(NAN)); }
  void fill(Acc value) {
    for (Acc& row : all_) row = value;
  }
  Acc& operator[](const Spot& spot) { return all_[spot.row]; }
  const Acc& operator[](const Spot& spot) const { return all_[spot.row]; }
  template <class F>
  void each(F f) {
    in_turn(M, [&](int row) { f(Spot{row, 0, -1}, all_[row]); });
  }
  template <class F>
  void once(F f) const {
    in_turn(M, [&](int row) { f(Spot{row, 0, -1}, all_[row]); });
  }

 private:
  Acc all_[M];
};

template <class T, int M, int N>
class WarpTile {
  static_assert(M % kFragment == 0 && N % kFragment == 0, "tiles are made of 16 x 16 fragments");

 public:
  using Acc = AccOf<T>;

  WarpTile() { fill(static_cast<Acc>(NAN)); }
  void fill(Acc value) {
    each([&](const Spot&, Acc& element) { element = value; });
  }

  template <class F>
  void each(F f) {
    in_turn(M * N, [&](int i) {
      f(Spot{i / N, i % N, -1}, all_[i / N][i % N]);
    });
  }
  template <class F>
  void with(const WarpTile& other, F f) {
    each([&](const Spot& at, Acc& element) { f(at, element, other.all_[at.row][at.column]); });
  }

  template <bool kATransposed, bool kBTransposed>
  void add_product(const T* a, int lda, const T* b, int ldb, int k) {
    // what one step of a GPU adds at once: 16 products on tensor cores, 4 by multiply-adds; in
    // double, where a product of floats is exact
    constexpr int kAtOnce = sizeof(T) == 2 ? 16 : 4;
    for (int row = 0; row < M; ++row) {
      for (int column = 0; column < N; ++column) {
        for (int from = 0; from < k; from += kAtOnce) {
          double part = 0;
          for (int i = from; i < from + kAtOnce; ++i) {
            const T left = kATransposed ? a[i * lda + row] : a[row * lda + i];
            const T right = kBTransposed ? b[column * ldb + i] : b[i * ldb + column];
            part += static_cast<double>(static_cast<Acc>(left)) * static_cast<Acc>(right);
          }
          all_[row][column] += static_cast<Acc>(part);
        }
      }
    }
  }

  template <int kK>
  void add_product(WarpTile<T, M, kK>& a, T* p, int ldp, const T* b, int ldb) {
    a.store(p, ldp);
    add_product<false, false>(p, ldp, b, ldb, kK);
  }

  template <class S>
  void store(S* to, int ld) { store<N>(to, ld, 0, 1); }
  template <int kWide, class S>
  void store(S* to, int ld, int first, Acc factor) {
    in_turn(M * kWide, [&](int i) {
      const int row = i / kWide, column = i % kWide;
      to[row * ld + column] = static_cast<S>(all_[row][first + column] * factor);
    });
  }

  // four lanes hold the columns 8 n + 2 lane + {0, 1} of a row
  void sum_rows(RowValues<Acc, M>& sums) {
    sums.each([&](const Spot& at, Acc& sum) {
      Acc part[4] = {};
      for (int column = 0; column < N; ++column) part[column % 8 / 2] += all_[at.row][column];
      sum = (part[0] + part[1]) + (part[2] + part[3]);
    });
  }

  void max_rows(RowValues<Acc, M>& tops) {
    tops.each([&](const Spot& at, Acc& top) {
      top = -infinity<Acc>();
      for (int column = 0; column < N; ++column) top = larger(top, all_[at.row][column]);
    });
  }

 private:
  Acc all_[M][N];
};

#endif

}  // namespace vtclip::cuda
