// SPDX-License-Identifier: Apache-2.0
// One row of layer norm, residual and cosine. Included once per instruction set, after simd.h,
// rows.h and unit_rows.h.

// Rows of image / |image|.
template <class T>
static void unit_images(const NormCosine& s, int64_t begin, int64_t end) {
  unit_matrix<T>(s.image, s.C, s.dtype, s.image_unit, s.image_rnorm, begin, end);
}

template <class T>
VTCLIP_INLINE T row_mean(const T* x, int64_t n) {
  Vec<T> sums[4] = {};
  int64_t i = 0;
  for (; i + 4 * kLanes<T> <= n; i += 4 * kLanes<T>) {
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) sums[j] += load(x + i + j * kLanes<T>);
  }
  for (; i + kLanes<T> <= n; i += kLanes<T>) sums[0] += load(x + i);
  T total = sum_lanes<T>((sums[0] + sums[1]) + (sums[2] + sums[3]));
  for (; i < n; ++i) total += x[i];
  return n > 0 ? total / static_cast<T>(n) : T{0};
}

// What rounding left out of the mean, mean(x - mean), and the biased variance.
template <class T>
struct Spread {
  T shift, variance;
};

template <class T>
constexpr T kLargest = sizeof(T) == 4 ? static_cast<T>(__FLT_MAX__) : static_cast<T>(__DBL_MAX__);

template <class T>
VTCLIP_INLINE Spread<T> row_spread(const T* x, int64_t n, T mean) {
  const Vec<T> centre = splat(mean);
  Vec<T> sums[2] = {}, squares[2] = {};
  int64_t i = 0;
  for (; i + 2 * kLanes<T> <= n; i += 2 * kLanes<T>) {
#pragma GCC unroll 2
    for (int j = 0; j < 2; ++j) {
      const Vec<T> d = load(x + i + j * kLanes<T>) - centre;
      sums[j] += d;
      squares[j] = fma(d, d, squares[j]);
    }
  }
  T sum = sum_lanes<T>(sums[0] + sums[1]), square = sum_lanes<T>(squares[0] + squares[1]);
  for (; i < n; ++i) {
    const T d = x[i] - mean;
    sum += d;
    square += d * d;
  }
  const T count = static_cast<T>(max_of(n, 1));
  const T shift = sum / count, variance = square / count;
  // where the squares leave the range, inf - inf would be NaN
  return {shift, variance > kLargest<T> ? variance : variance - shift * shift};
}

// What one row computes with.
template <class T>
struct NormRow {
  const T* hidden;
  const T* text;
  const T* weight;
  const T* bias;
  const T* image;  // unit
  T mean, rstd, residual;
  T offset;  // -rstd * mean(hidden - mean): a mean far from 0 is not exact in its own type
};

// What all rows share; `weight` and `bias` [C] hold a converted copy where one is needed.
template <class T>
static NormRow<T> norm_row(const NormCosine& s, T* weight, T* bias) {
  NormRow<T> r{};
  r.weight = view_row<T>(weight, s.C, s.weight.data, s.weight.column, s.dtype);
  r.bias = view_row<T>(bias, s.C, s.bias.data, s.bias.column, s.dtype);
  r.residual = static_cast<T>(s.residual);
  return r;
}

// y = text + residual * (weight * zh + bias), zh = (hidden - mean) * rstd + offset; sums y^2 and y
// * image.
template <class T>
VTCLIP_INLINE void mix_row(const NormRow<T>& r, int64_t n, T* y, T* square, T* dot) {
  Vec<T> squares[2] = {}, dots[2] = {};
  const Vec<T> mean = splat(r.mean), rstd = splat(r.rstd), offset = splat(r.offset);
  const Vec<T> residual = splat(r.residual);
  int64_t i = 0;
  for (; i + 2 * kLanes<T> <= n; i += 2 * kLanes<T>) {
#pragma GCC unroll 2
    for (int j = 0; j < 2; ++j) {
      const int64_t at = i + j * kLanes<T>;
      const Vec<T> zh = fma(load(r.hidden + at) - mean, rstd, offset);
      const Vec<T> z = fma(load(r.weight + at), zh, load(r.bias + at));
      const Vec<T> v = fma(residual, z, load(r.text + at));
      squares[j] = fma(v, v, squares[j]);
      dots[j] = fma(v, load(r.image + at), dots[j]);
      store(y + at, v);
    }
  }
  *square = sum_lanes<T>(squares[0] + squares[1]);
  *dot = sum_lanes<T>(dots[0] + dots[1]);
  for (; i < n; ++i) {
    const T zh = (r.hidden[i] - r.mean) * r.rstd + r.offset;
    y[i] = r.text[i] + r.residual * (r.weight[i] * zh + r.bias[i]);
    *square += y[i] * y[i];
    *dot += y[i] * r.image[i];
  }
}

// What the rows of a unit add to.
template <class T>
struct NormSums {
  T *d_text, *d_unit;  // [K, C padded], [B, C padded]; none without feature_grads
  T *d_weight, *d_bias;
};

template <class T, bool kFeatures>
static NormSums<T> norm_sums(const NormCosine& s, const NormGradients& g, int64_t unit) {
  const int64_t width = round_up(s.C, kLanes<T>);
  NormSums<T> sums{};
  sums.d_weight = static_cast<T*>(g.d_weight_partial) + unit * width;
  sums.d_bias = static_cast<T*>(g.d_bias_partial) + unit * width;
  if constexpr (kFeatures) {
    const int64_t image_chunk = unit / g.chunks.text_chunks;
    const int64_t text_chunk = unit % g.chunks.text_chunks;
    sums.d_text = static_cast<T*>(g.d_text_partial) + image_chunk * s.K * width;
    sums.d_unit = static_cast<T*>(g.d_unit_partial) + text_chunk * s.B * width;
  }
  return sums;
}

template <class T, bool kFeatures>
static void clear_sums(const NormSums<T>& sums, const RowUnit& u, int64_t width) {
  const size_t row_bytes = static_cast<size_t>(width) * sizeof(T);
  __builtin_memset(sums.d_weight, 0, row_bytes);
  __builtin_memset(sums.d_bias, 0, row_bytes);
  if constexpr (kFeatures) {
    __builtin_memset(sums.d_text + u.k0 * width, 0, static_cast<size_t>(u.k1 - u.k0) * row_bytes);
    __builtin_memset(sums.d_unit + u.b0 * width, 0, static_cast<size_t>(u.b1 - u.b0) * row_bytes);
  }
}

// Row r: d_weight, d_bias, K rows of d_text, B rows of d_image.
template <class T>
static void finish_norm_row(const NormCosine& s, const NormGradients& g, int64_t r, T* total) {
  const int64_t width = round_up(s.C, kLanes<T>), k = r - 2, b = k - s.K;
  if (r < 2) {
    const void* partial = r == 0 ? g.d_weight_partial : g.d_bias_partial;
    sum_rows<T>(total, static_cast<const T*>(partial), g.chunks.units(), width, s.C);
    store_row<T>(r == 0 ? g.d_weight : g.d_bias, s.C, s.dtype, total, 1);
  } else if (k < s.K) {
    sum_rows<T>(total, static_cast<const T*>(g.d_text_partial) + k * width, g.chunks.image_chunks,
                s.K * width, s.C);
    store_row<T>(g.d_text.at(0, k), s.C, s.dtype, total, 1);
  } else {
    sum_rows<T>(total, static_cast<const T*>(g.d_unit_partial) + b * width, g.chunks.text_chunks,
                s.B * width, s.C);
    unit_row_grad<T>(total, static_cast<const T*>(s.image_unit) + b * width, s.C,
                     static_cast<const T*>(s.image_rnorm)[b]);
    store_row<T>(g.d_image.at(0, b), s.C, s.dtype, total, 1);
  }
}
