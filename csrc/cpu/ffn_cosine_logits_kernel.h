// SPDX-License-Identifier: Apache-2.0
// Second feed-forward matrix, layer norm, residual and cosine of one instruction set.
//
// z = residual_input + hidden weight^T + bias is formed for a block of rows that stays in the
// second-level cache, used there, and forgotten. Whole rows of z are at hand, so mean and variance
// take a pass each and nothing has to be centred beforehand.
#include "cpu/common/simd.h"
#include "cpu/common/rows.h"
#include "cpu/common/unit_rows.h"
#include "cpu/common/norm_cosine_rows.h"
#include "cpu/common/weight_panels.h"

template <class T>
static void ffn_image_units(const FfnCosine& s, int64_t begin, int64_t end) {
  unit_images<T>(s.tail, begin, end);
}

template <class T>
static void ffn_pack_units(const FfnCosine& s, int64_t begin, int64_t end) {
  pack_weight<T>(s.weight, s.tail.C, s.F, s.tail.dtype, s.weight_t, s.weight_pack, begin, end);
}

// z[r, c] += sum over `inner` columns of a[r] times weight_t, from column `at` of F on.
template <class T>
VTCLIP_INLINE void add_product(const FfnCosine& s, const T* a, int64_t lda, int64_t rows,
                               int64_t at, int64_t inner, T* z, int64_t ldz) {
  const int64_t width = round_up(s.tail.C, kLanes<T>);
  const T* pack = static_cast<const T*>(s.weight_t) + at * kPanel;
  for (int64_t j = 0; j < width; j += kPanel) {
    gemm(Gemm<T>{rows, min_of(kPanel, width - j), inner, a, lda, false, pack + j * s.F, kPanel,
                 z + j, ldz, true});
  }
}

// z row = residual_input row + bias.
template <class T>
VTCLIP_INLINE void start_row(const FfnCosine& s, int64_t b, int64_t k, const T* bias, T* z) {
  const int64_t width = round_up(s.tail.C, kLanes<T>);
  load_row<T>(z, s.tail.C, width, s.residual_input.at(b, k), s.residual_input.column, s.tail.dtype,
              T{1});
  add_row<T>(z, T{1}, bias, s.tail.C);
}

// The row's statistics, its unit row y / |y| in `unit`, and the cosine.
template <class T>
struct FfnRow {
  NormRow<T> norm;
  T rnorm, cosine;
};

template <class T>
VTCLIP_INLINE void unit_of_row(FfnRow<T>& row, int64_t n, T* unit) {
  T square, dot;
  mix_row<T>(row.norm, n, unit, &square, &dot);
  if (in_safe_range(square)) {
    row.rnorm = 1 / square_root(square);
    row.cosine = dot * row.rnorm;
    scale_row(unit, unit, n, row.rnorm);
  } else {
    row.rnorm = unit_row_scaled<T>(unit, unit, n);
    row.cosine = dot_rows<T>(unit, row.norm.image, n);
  }
}

// Means of g and g zh, g = residual weight (image - cosine unit).
template <class T>
VTCLIP_INLINE void grad_means(const FfnRow<T>& row, int64_t n, const T* unit, T* mean_g,
                              T* mean_gz) {
  const NormRow<T>& r = row.norm;
  const Vec<T> mean = splat(r.mean), rstd = splat(r.rstd), offset = splat(r.offset);
  const Vec<T> cosine = splat(row.cosine);
  Vec<T> total_g{}, total_gz{};
  int64_t i = 0;
  for (; i + kLanes<T> <= n; i += kLanes<T>) {
    const Vec<T> zh = fma(load(r.hidden + i) - mean, rstd, offset);
    const Vec<T> g = (load(r.image + i) - load(unit + i) * cosine) * load(r.weight + i);
    total_g += g;
    total_gz = fma(g, zh, total_gz);
  }
  T sum_g = sum_lanes<T>(total_g), sum_gz = sum_lanes<T>(total_gz);
  for (; i < n; ++i) {
    const T zh = (r.hidden[i] - r.mean) * r.rstd + r.offset;
    const T g = (r.image[i] - unit[i] * row.cosine) * r.weight[i];
    sum_g += g;
    sum_gz += g * zh;
  }
  *mean_g = r.residual * sum_g / static_cast<T>(n);
  *mean_gz = r.residual * sum_gz / static_cast<T>(n);
}

// Units are blocks of rows b * K + k.
template <class T>
static void ffn_forward_units(const FfnCosineForward& p, int64_t begin, int64_t end) {
  const FfnCosine& s = p.sizes;
  const NormCosine& t = s.tail;
  const int64_t ldz = leading_dim<T>(t.C), lda = leading_dim<T>(kInner);
  const int64_t width = round_up(t.C, kLanes<T>), item = item_bytes(t.dtype), total = t.B * t.K;
  const Scratch<T> z(p.row_block * ldz), a(p.row_block * lda);
  const Scratch<T> bias(width), text(t.C), norm_weight(t.C), norm_bias(t.C), unit_y(t.C);
  load_row<T>(bias, t.C, width, s.bias.data, s.bias.column, t.dtype, T{1});
  FfnRow<T> row{};
  NormRow<T>& r = row.norm;
  r = norm_row<T>(t, norm_weight, norm_bias);
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t first = unit * p.row_block, rows = min_of(p.row_block, total - first);
    for (int64_t i = 0; i < rows; ++i) {
      start_row<T>(s, (first + i) / t.K, (first + i) % t.K, bias, z + i * ldz);
    }
    for (int64_t at = 0; at < s.F; at += kInner) {
      const int64_t inner = min_of(kInner, s.F - at);
      for (int64_t i = 0; i < rows; ++i) {
        load_row<T>(a + i * lda, inner, inner,
                    s.hidden.at((first + i) / t.K, (first + i) % t.K) + at * s.hidden.column,
                    s.hidden.column, t.dtype, T{1});
      }
      add_product<T>(s, a, lda, rows, at, inner, z, ldz);
    }
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t n = first + i, b = n / t.K, k = n % t.K;
      r.hidden = z + i * ldz;
      r.text = view_row<T>(text, t.C, t.text.at(0, k), t.text.column, t.dtype);
      r.image = static_cast<const T*>(t.image_unit) + b * width;
      r.mean = row_mean(r.hidden, t.C);
      const Spread<T> spread = row_spread(r.hidden, t.C, r.mean);
      r.rstd = 1 / square_root(spread.variance + static_cast<T>(t.eps));
      r.offset = -spread.shift * r.rstd;
      unit_of_row<T>(row, t.C, unit_y);
      T* stats = static_cast<T*>(p.stats) + n;
      stats[kMean * total] = r.mean;
      stats[kShift * total] = spread.shift;
      stats[kRstd * total] = r.rstd;
      stats[kRnorm * total] = row.rnorm;
      stats[kCosine * total] = row.cosine;
      grad_means<T>(row, t.C, unit_y, stats + kMeanG * total, stats + kMeanGz * total);
      store_one<T>(p.logits + n * item, t.dtype, static_cast<T>(t.scale) * row.cosine);
    }
  }
}

// z becomes d_z = rstd (g - mean_g - zh mean_gz), g = residual weight dy,
// dy = step (image - cosine unit), step = delta / |y|; the means are of g / step.
template <class T, bool kFeatures>
VTCLIP_INLINE void row_grad(const FfnRow<T>& row, int64_t n, T* z, const T* unit, T delta, T mean_g,
                            T mean_gz, const NormSums<T>& sums) {
  const NormRow<T>& r = row.norm;
  const T step = delta * row.rnorm;
  const Vec<T> mean = splat(r.mean), rstd = splat(r.rstd), offset = splat(r.offset);
  const Vec<T> cosine = splat(row.cosine), steps = splat(step), deltas = splat(delta);
  const Vec<T> residual = splat(r.residual);
  int64_t i = 0;
  for (; i + kLanes<T> <= n; i += kLanes<T>) {
    const Vec<T> u = load(unit + i);
    const Vec<T> zh = fma(load(z + i) - mean, rstd, offset);
    const Vec<T> off = load(r.image + i) - u * cosine;
    const Vec<T> dn = off * steps * residual;
    store(sums.d_bias + i, load(sums.d_bias + i) + dn);
    store(sums.d_weight + i, fma(dn, zh, load(sums.d_weight + i)));
    if constexpr (kFeatures) {
      store(sums.d_text + i, fma(off, steps, load(sums.d_text + i)));
      store(sums.d_unit + i, fma(deltas, u, load(sums.d_unit + i)));
    }
    store(z + i, (off * residual * load(r.weight + i) - mean_g - zh * mean_gz) * steps * rstd);
  }
  for (; i < n; ++i) {
    const T u = unit[i], zh = (z[i] - r.mean) * r.rstd + r.offset;
    const T off = r.image[i] - u * row.cosine, dn = off * step * r.residual;
    sums.d_bias[i] += dn;
    sums.d_weight[i] += dn * zh;
    if constexpr (kFeatures) {
      sums.d_text[i] += off * step;
      sums.d_unit[i] += delta * u;
    }
    z[i] = (off * r.residual * r.weight[i] - mean_g - zh * mean_gz) * step * r.rstd;
  }
}

// One round of d_z and d_hidden. d_z and the packed hidden rows stay for d_weight, which is summed
// over all units at once: partial sums of d_weight per unit would cost more memory than the rows.
template <class T, bool kFeatures>
static void ffn_backward(const FfnCosineBackward& p, int64_t begin, int64_t end) {
  const FfnCosine& s = p.sizes;
  const NormCosine& t = s.tail;
  const int64_t ldz = leading_dim<T>(t.C), ldh = leading_dim<T>(s.F);
  const int64_t width = round_up(t.C, kLanes<T>), item = item_bytes(t.dtype);
  const int64_t first = p.round * p.row_block;
  const Scratch<T> bias(width), text(t.C), norm_weight(t.C), norm_bias(t.C), unit_y(t.C);
  const Scratch<T> d_hidden(p.row_block * kPanel);
  load_row<T>(bias, t.C, width, s.bias.data, s.bias.column, t.dtype, T{1});
  FfnRow<T> row{};
  NormRow<T>& r = row.norm;
  r = norm_row<T>(t, norm_weight, norm_bias);
  for (int64_t unit = begin; unit < end; ++unit) {
    const RowUnit u = row_unit(p.grads.chunks, t.B, t.K, unit);
    const int64_t rows = u.rows_of_round(p.round, p.row_block), texts = u.k1 - u.k0;
    const NormSums<T> all = norm_sums<T, kFeatures>(t, p.grads, unit);
    NormSums<T> sums = all;
    if (p.round == 0) clear_sums<T, kFeatures>(all, u, width);
    T* hidden = static_cast<T*>(p.hidden) + unit * p.row_block * ldh;
    T* z = static_cast<T*>(p.d_z) + unit * p.row_block * ldz;
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t b = u.b0 + (first + i) / texts, k = u.k0 + (first + i) % texts;
      start_row<T>(s, b, k, bias, z + i * ldz);
      load_row<T>(hidden + i * ldh, s.F, round_up(s.F, kLanes<T>), s.hidden.at(b, k),
                  s.hidden.column, t.dtype, T{1});
    }
    for (int64_t at = 0; at < s.F; at += kInner) {
      add_product<T>(s, hidden + at, ldh, rows, at, min_of(kInner, s.F - at), z, ldz);
    }
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t b = u.b0 + (first + i) / texts, k = u.k0 + (first + i) % texts;
      const auto stat = [&](int which) {
        T x;
        __builtin_memcpy(&x, p.stats.at(which, b) + k * p.stats.column, sizeof x);
        return x;
      };
      r.hidden = z + i * ldz;
      r.text = view_row<T>(text, t.C, t.text.at(0, k), t.text.column, t.dtype);
      r.image = static_cast<const T*>(t.image_unit) + b * width;
      r.mean = stat(kMean);
      r.rstd = stat(kRstd);
      r.offset = -stat(kShift) * r.rstd;
      T square, dot;
      mix_row<T>(r, t.C, unit_y, &square, &dot);
      row.rnorm = stat(kRnorm);
      row.cosine = stat(kCosine);
      unit_row_known<T>(unit_y, unit_y, t.C, t.C, row.rnorm);
      if constexpr (kFeatures) {
        sums.d_text = all.d_text + k * width;
        sums.d_unit = all.d_unit + b * width;
      }
      const T delta = element<T>(p.grad_logits, b, k, t.dtype) * static_cast<T>(t.scale);
      row_grad<T, kFeatures>(row, t.C, z + i * ldz, unit_y, delta, stat(kMeanG), stat(kMeanGz),
                             sums);
      store_row<T>(p.d_residual_input.at(b, k), t.C, t.dtype, z + i * ldz, 1);
    }
    for (int64_t j = 0; j < s.F; j += kPanel) {
      const int64_t columns = min_of(kPanel, s.F - j), vectors = round_up(columns, kLanes<T>);
      for (int64_t at = 0; at < t.C; at += kInner) {
        gemm(Gemm<T>{rows, vectors, min_of(kInner, t.C - at), z + at, ldz, false,
                     static_cast<const T*>(s.weight_pack) + j * t.C + at * kPanel, kPanel, d_hidden,
                     kPanel, at != 0});
      }
      for (int64_t i = 0; i < rows; ++i) {
        const int64_t b = u.b0 + (first + i) / texts, k = u.k0 + (first + i) % texts;
        store_row<T>(p.d_hidden.at(b, k) + j * item, columns, t.dtype, d_hidden + i * kPanel, 1);
      }
    }
  }
}

template <class T>
static void ffn_weight_units(const FfnCosineBackward& p, int64_t begin, int64_t end) {
  const NormCosine& t = p.sizes.tail;
  weight_grad_blocks<T>(p, p.grads.chunks, t.B, t.K, p.d_z, t.C, p.hidden, p.sizes.F, begin, end);
}

// Row r: d_weight for r < C, d_bias, then those of the tail.
template <class T>
static void ffn_finish_units(const FfnCosineBackward& p, int64_t begin, int64_t end) {
  const FfnCosine& s = p.sizes;
  const NormCosine& t = s.tail;
  const int64_t ldw = round_up(s.F, kLanes<T>);
  const Scratch<T> total(round_up(t.C, kLanes<T>));
  for (int64_t r = begin; r < end; ++r) {
    if (r < t.C) {
      store_row<T>(p.d_weight.at(0, r), s.F, t.dtype,
                   static_cast<const T*>(p.d_weight_sum) + r * ldw, 1);
    } else if (r == t.C) {
      store_row<T>(p.d_bias, t.C, t.dtype, static_cast<const T*>(p.d_bias_sum), 1);
    } else {
      finish_norm_row<T>(t, p.grads, r - t.C - 1, total);
    }
  }
}

template <class T>
static void ffn_backward_units(const FfnCosineBackward& p, int64_t begin, int64_t end) {
  if (p.feature_grads) {
    ffn_backward<T, true>(p, begin, end);
  } else {
    ffn_backward<T, false>(p, begin, end);
  }
}

VTCLIP_BY_DTYPE(ffn_cosine_images, ffn_image_units, FfnCosine, tail.dtype)
VTCLIP_BY_DTYPE(ffn_cosine_pack, ffn_pack_units, FfnCosine, tail.dtype)
VTCLIP_BY_DTYPE(ffn_cosine_fwd, ffn_forward_units, FfnCosineForward, sizes.tail.dtype)
VTCLIP_BY_DTYPE(ffn_cosine_bwd, ffn_backward_units, FfnCosineBackward, sizes.tail.dtype)
VTCLIP_BY_DTYPE(ffn_cosine_weight, ffn_weight_units, FfnCosineBackward, sizes.tail.dtype)
VTCLIP_BY_DTYPE(ffn_cosine_finish, ffn_finish_units, FfnCosineBackward, sizes.tail.dtype)
