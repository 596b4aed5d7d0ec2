// SPDX-License-Identifier: Apache-2.0
// One row (image b, class k) of the mask: relu(1 + m), its logit, its distance from 1, gradients.
// Included once per instruction set, after simd.h and rows.h.
//
// max(a, b) returns b where either is NaN, so m stands second: a NaN stays one.

// |relu(1 + m) - 1| and its square need no 1 + m: relu(1 + m) - 1 = max(-1, m), without rounding.
enum { kNoPenalty = 0, kL1 = 1, kMse = 2, kLinf = 3 };

// Rows of d_image are sums of sums of this many texts, so that rounding grows with neither count.
constexpr int64_t kSumBlock = 32;

template <class T>
VTCLIP_INLINE T sign_of(T x) {
  return static_cast<T>(x > 0) - static_cast<T>(x < 0);
}

template <class T>
struct MaskRow {
  T dot;      // sum relu(1 + m) image text
  T penalty;  // sum |max(-1, m)|, sum max(-1, m)^2 or the largest |max(-1, m)|; NaN if m has one
};

template <class T, int kPenalty>
VTCLIP_INLINE MaskRow<T> mask_row(const T* m, const T* image, const T* text, int64_t n) {
  constexpr int kSums = 2;
  const Vec<T> zero{}, one = splat(T{1}), floor = splat(T{-1});
  Vec<T> dots[kSums] = {}, sizes[kSums] = {};
  Vec<T> not_a_number{};
  int64_t i = 0;
  for (; i + kSums * kLanes<T> <= n; i += kSums * kLanes<T>) {
#pragma GCC unroll 2
    for (int j = 0; j < kSums; ++j) {
      const int64_t at = i + j * kLanes<T>;
      const Vec<T> x = load(m + at);
      const Vec<T> product = load(image + at) * load(text + at);
      dots[j] = fma(max(zero, one + x), product, dots[j]);
      const Vec<T> off = max(floor, x);
      if constexpr (kPenalty == kL1) sizes[j] += max(zero - off, off);
      if constexpr (kPenalty == kMse) sizes[j] = fma(off, off, sizes[j]);
      if constexpr (kPenalty == kLinf) {
        sizes[j] = max(max(zero - off, off), sizes[j]);
        not_a_number += x != x ? one : zero;
      }
    }
  }
  MaskRow<T> row{sum_lanes<T>(dots[0] + dots[1]), T{0}};
  if constexpr (kPenalty == kL1 || kPenalty == kMse) {
    row.penalty = sum_lanes<T>(sizes[0] + sizes[1]);
  }
  bool nan = false;
  if constexpr (kPenalty == kLinf) {
    row.penalty = max_lanes<T>(max(sizes[0], sizes[1]));
    nan = sum_lanes<T>(not_a_number) > 0;
  }
  for (; i < n; ++i) {
    const T x = m[i], open = 1 + x, off = x < -1 ? T{-1} : x, size = off < 0 ? -off : off;
    row.dot += (open < 0 ? T{0} : open) * (image[i] * text[i]);
    if constexpr (kPenalty == kL1) row.penalty += size;
    if constexpr (kPenalty == kMse) row.penalty += off * off;
    if constexpr (kPenalty == kLinf) {
      if (size > row.penalty) row.penalty = size;
      nan = nan || x != x;
    }
  }
  if (nan) row.penalty = static_cast<T>(__builtin_nan(""));
  return row;
}

// The first i where |max(-1, m[i])| is `size`, or is NaN if `size` is.
template <class T>
inline int64_t first_of_size(const T* m, int64_t n, T size) {
  for (int64_t i = 0; i < n; ++i) {
    const T off = m[i] < -1 ? T{-1} : m[i];
    if ((off < 0 ? -off : off) == size || (m[i] != m[i] && size != size)) return i;
  }
  return 0;
}

// d_m = [m > -1] (step image text + penalty's gradient): slope sign(m) for L1, slope m for MSE.
// With kFeatures, d_image += step relu(1 + m) text and d_text += step relu(1 + m) image.
// d_m may be m.
template <class T, int kPenalty, bool kFeatures>
VTCLIP_INLINE void mask_row_grad(T* d_m, const T* m, const T* image, const T* text, int64_t n,
                                 T step, T slope, T* d_image, T* d_text) {
  const Vec<T> zero{}, one = splat(T{1}), floor = splat(T{-1});
  const Vec<T> steps = splat(step), slopes = splat(slope);
  int64_t i = 0;
  for (; i + kLanes<T> <= n; i += kLanes<T>) {
    const Vec<T> x = load(m + i), v = load(image + i), t = load(text + i);
    if constexpr (kFeatures) {
      const Vec<T> open = max(zero, one + x) * steps;
      store(d_image + i, fma(open, t, load(d_image + i)));
      store(d_text + i, fma(open, v, load(d_text + i)));
    }
    Vec<T> grad = steps * (v * t);
    if constexpr (kPenalty == kL1) {
      grad += x > zero ? slopes : zero;
      grad -= x < zero ? slopes : zero;
    }
    if constexpr (kPenalty == kMse) grad = fma(slopes, x, grad);
    store(d_m + i, x <= floor ? zero : grad);
  }
  for (; i < n; ++i) {
    const T x = m[i];
    if constexpr (kFeatures) {
      const T open = (1 + x < 0 ? T{0} : 1 + x) * step;
      d_image[i] += open * text[i];
      d_text[i] += open * image[i];
    }
    T grad = step * (image[i] * text[i]);
    if constexpr (kPenalty == kL1) grad += slope * sign_of(x);
    if constexpr (kPenalty == kMse) grad += slope * x;
    d_m[i] = x <= -1 ? T{0} : grad;
  }
}

// Rows of d_image (r < B) and d_text (r - B < K) from their partial sums.
template <class T>
static void finish_features(const RowChunks& chunks, int64_t B, int64_t K, int64_t D, Dtype dtype,
                            const T* d_image_partial, const T* d_text_partial, int64_t r,
                            const RowsView& d_image, const RowsView& d_text, T* total) {
  const int64_t width = round_up(D, kLanes<T>);
  if (r < B) {
    sum_rows<T>(total, d_image_partial + r * width, chunks.text_chunks, B * width, D);
    store_row<T>(d_image.at(0, r), D, dtype, total, 1);
  } else {
    const int64_t k = r - B;
    sum_rows<T>(total, d_text_partial + k * width, chunks.image_chunks, K * width, D);
    store_row<T>(d_text.at(0, k), D, dtype, total, 1);
  }
}
