// SPDX-License-Identifier: Apache-2.0
// Packing and score tiles of rational_attn. Included once per instruction set, after simd.h,
// exp2.h, rows.h and attn_panels.h.
//
// Scores are kept as they are read, S [queries, keys]: the softmax is joint over the whole map, so
// a tile has one maximum and one sum whichever way it lies, and the keys and values of an (image,
// head), packed once, serve both kinds of query. `stats` holds a maximum that the backward subtracts
// from bit-equal scores, so that the top weight is exactly 1.

template <class T>
constexpr T kLowest = -static_cast<T>(__builtin_inf());

// columns[j][i] = row first + i of the view, element j, for i < n; zero up to a whole vector.
template <class T>
static void pack_transposed(const AttnShape& s, T* columns, int64_t ldc, const HeadsView& view,
                            int64_t b, int64_t h, int64_t n, T* rows) {
  constexpr int64_t kRows = 64;
  const int64_t ldr = leading_dim<T>(s.d);
  for (int64_t first = 0; first < n; first += kRows) {
    const int64_t count = min_of(kRows, n - first);
    pack_block<T>(s, rows, ldr, view, b, h, first, count, 1);
    pack_columns<T>(s, columns + first, ldc, rows, ldr, count);
  }
}

// out[rows, keys l .. l + n) = rows of a panel times packed columns.
template <class T>
static void score_rows(const AttnShape& s, T* out, int64_t ldo, const T* rows, int64_t count,
                       const T* columns, int64_t ldc, int64_t l, int64_t n) {
  gemm(Gemm<T>{count, round_up(n, kLanes<T>), s.d, rows, leading_dim<T>(s.d), false, columns + l,
               ldc, out, ldo, false});
}

// Lanes of the last vector of a row of n elements that lie behind its end: all ones.
template <class T>
VTCLIP_INLINE auto lanes_behind(int64_t n) {
  T index[kLanes<T>];
  for (int64_t i = 0; i < kLanes<T>; ++i) index[i] = static_cast<T>(i);
  const int64_t last = n - (round_up(n, kLanes<T>) - kLanes<T>);
  return load(static_cast<const T*>(index)) >= splat(static_cast<T>(last));
}

template <class T>
VTCLIP_INLINE T exp2_one(T x) {
  return exp2(splat(x))[0];
}

template <class T>
VTCLIP_INLINE T exp_below_one(T x, T top) {
  return exp2_one<T>((x - top) * static_cast<T>(kLog2E));
}

// Largest of `top` and all scores but NaN; writes -inf behind the end of every row.
template <class T>
static T top_of_tile(T* scores, int64_t ld, int64_t rows, int64_t n, T top) {
  const auto behind = lanes_behind<T>(n);
  const int64_t last = round_up(n, kLanes<T>) - kLanes<T>;
  Vec<T> best[4];
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) best[j] = splat(top);
  for (int64_t q = 0; q < rows; ++q) {
    T* row = scores + q * ld;
    int64_t c = 0;
    for (; c + 4 * kLanes<T> <= last; c += 4 * kLanes<T>) {
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) best[j] = max(load(row + c + j * kLanes<T>), best[j]);
    }
    for (; c < last; c += kLanes<T>) best[0] = max(load(row + c), best[0]);
    const Vec<T> tail = behind ? splat(kLowest<T>) : load(row + last);
    store(row + last, tail);
    best[1] = max(tail, best[1]);
  }
  return max_lanes<T>(max(max(best[0], best[1]), max(best[2], best[3])));
}

// In place: score -> exp(score - top), 0 behind the end of every row; returns the sum. Row sums are
// added, so that rounding grows with rows + columns and not with their product.
template <class T>
static T exp_of_tile(T* scores, int64_t ld, int64_t rows, int64_t n, T top) {
  const Vec<T> shift = splat(top);
  Vec<T> total{};
  for (int64_t q = 0; q < rows; ++q) {
    T* row = scores + q * ld;
    Vec<T> sum{};
    for (int64_t c = 0; c < n; c += kLanes<T>) {
      const Vec<T> p = exp_below<T>(load(row + c), shift);
      store(row + c, p);
      sum += p;
    }
    total += sum;
  }
  return sum_lanes<T>(total);
}
