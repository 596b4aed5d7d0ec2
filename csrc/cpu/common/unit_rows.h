// SPDX-License-Identifier: Apache-2.0
// Rows divided by their length. Included once per instruction set, after simd.h and rows.h.

template <class T>
VTCLIP_INLINE T element(const RowsView& view, int64_t i, int64_t j) {
  T x;
  __builtin_memcpy(&x, view.at(0, i) + j * view.column, sizeof(T));
  return x;
}

template <class T>
VTCLIP_INLINE T element(const RowsView& view, int64_t i, int64_t j, Dtype dtype) {
  return load_one<T>(view.at(0, i) + j * view.column, dtype);
}

// Images b0 <= b < b1 times texts k0 <= k < k1 of a unit.
struct RowUnit {
  int64_t b0, b1, k0, k1;

  // How many rows are in a round that takes `block` of them.
  int64_t rows_of_round(int64_t round, int64_t block) const {
    return max_of(0, min_of(block, (b1 - b0) * (k1 - k0) - round * block));
  }
};

VTCLIP_INLINE RowUnit row_unit(const RowChunks& c, int64_t B, int64_t K, int64_t unit) {
  const int64_t b0 = unit / c.text_chunks * c.image_chunk;
  const int64_t k0 = unit % c.text_chunks * c.text_chunk;
  return {b0, min_of(B, b0 + c.image_chunk), k0, min_of(K, k0 + c.text_chunk)};
}

template <class T>
VTCLIP_INLINE bool in_safe_range(T x) {
  return x > T(1e-30) && x < T(1e30);
}

template <class T>
VTCLIP_INLINE T square_root(T x) {
  return sizeof(T) == 4 ? static_cast<T>(__builtin_sqrtf(static_cast<float>(x)))
                        : static_cast<T>(__builtin_sqrt(static_cast<double>(x)));
}

template <class T>
VTCLIP_INLINE void scale_row(T* out, const T* x, int64_t n, T factor) {
  int64_t i = 0;
  for (; i + kLanes<T> <= n; i += kLanes<T>) store(out + i, load(x + i) * splat(factor));
  for (; i < n; ++i) out[i] = x[i] * factor;
}

// out = x / |x| and 1 / |x|, for rows whose squares leave the range of T: the largest entry is
// divided out first. A zero row gives zeros and 0. x and out may be the same row.
template <class T>
inline T unit_row_scaled(T* out, const T* x, int64_t n) {
  T largest = 0;
  for (int64_t i = 0; i < n; ++i) {
    const T size = x[i] < 0 ? -x[i] : x[i];
    if (!(size <= largest)) largest = size;  // NaN becomes the largest and stays
  }
  if (largest == 0) {
    for (int64_t i = 0; i < n; ++i) out[i] = 0;
    return 0;
  }
  for (int64_t i = 0; i < n; ++i) out[i] = x[i] / largest;
  const T rnorm = 1 / square_root(dot_rows(out, out, n));
  scale_row(out, out, n, rnorm);
  return rnorm / largest;
}

// out[0..n) = x / |x|, out[n..width) = 0; returns 1 / |x|, or 0 for a zero row.
template <class T>
inline T unit_row(T* out, const T* x, int64_t n, int64_t width) {
  const T square = dot_rows(x, x, n);
  T rnorm;
  if (in_safe_range(square)) {
    rnorm = 1 / square_root(square);
    scale_row(out, x, n, rnorm);
  } else {
    rnorm = unit_row_scaled(out, x, n);
  }
  for (int64_t i = n; i < width; ++i) out[i] = 0;
  return rnorm;
}

// units[i] = x / |x|, padded with 0, and rnorms[i] = 1 / |x| of rows begin <= i < end of a matrix.
template <class T>
static void unit_matrix(const RowsView& matrix, int64_t n, Dtype dtype, void* units, void* rnorms,
                        int64_t begin, int64_t end) {
  const int64_t width = round_up(n, kLanes<T>);
  const Scratch<T> buffer(n);
  for (int64_t i = begin; i < end; ++i) {
    const T* x = view_row<T>(buffer, n, matrix.at(0, i), matrix.column, dtype);
    static_cast<T*>(rnorms)[i] = unit_row(static_cast<T*>(units) + i * width, x, n, width);
  }
}

// As unit_row with 1 / |x| known, which is trusted only where x * rnorm cannot lose range.
template <class T>
inline void unit_row_known(T* out, const T* x, int64_t n, int64_t width, T rnorm) {
  if (in_safe_range(rnorm)) {
    scale_row(out, x, n, rnorm);
  } else {
    unit_row_scaled(out, x, n);
  }
  for (int64_t i = n; i < width; ++i) out[i] = 0;
}

// Gradient of x from that of u = x / |x|:  rnorm * (grad - u <grad, u>). In place on grad.
template <class T>
inline void unit_row_grad(T* grad, const T* unit, int64_t n, T rnorm) {
  const Vec<T> along = splat(-dot_rows(grad, unit, n));
  const Vec<T> factor = splat(rnorm);
  int64_t i = 0;
  for (; i + kLanes<T> <= n; i += kLanes<T>) {
    store(grad + i, fma(along, load(unit + i), load(grad + i)) * factor);
  }
  for (; i < n; ++i) grad[i] = (grad[i] + along[0] * unit[i]) * rnorm;
}

// y += a * x
template <class T>
VTCLIP_INLINE void add_row(T* y, T a, const T* x, int64_t n) {
  int64_t i = 0;
  for (; i + kLanes<T> <= n; i += kLanes<T>) {
    store(y + i, fma(splat(a), load(x + i), load(y + i)));
  }
  for (; i < n; ++i) y[i] += a * x[i];
}

// total = sum over `count` rows that are `step` elements apart, in ascending order.
template <class T>
inline void sum_rows(T* total, const T* rows, int64_t count, int64_t step, int64_t n) {
  for (int64_t i = 0; i < n; ++i) total[i] = rows[i];
  for (int64_t r = 1; r < count; ++r) add_row(total, T{1}, rows + r * step, n);
}
