// SPDX-License-Identifier: Apache-2.0
// Layer norm, residual and cosine of one instruction set; a row stays in the first-level cache
// between its passes.
#include "cpu/common/simd.h"
#include "cpu/common/rows.h"
#include "cpu/common/unit_rows.h"
#include "cpu/common/norm_cosine_rows.h"

template <class T>
static void norm_forward_units(const NormCosineForward& p, int64_t begin, int64_t end) {
  const NormCosine& s = p.sizes;
  const int64_t width = round_up(s.C, kLanes<T>);
  const int64_t item = item_bytes(s.dtype);
  const Scratch<T> hidden(s.C), text(s.C), weight(s.C), bias(s.C), y(s.C);
  NormRow<T> r = norm_row<T>(s, weight, bias);
  for (int64_t row = begin; row < end; ++row) {
    const int64_t b = row / s.K, k = row % s.K;
    r.hidden = view_row<T>(hidden, s.C, s.hidden.at(b, k), s.hidden.column, s.dtype);
    r.text = view_row<T>(text, s.C, s.text.at(0, k), s.text.column, s.dtype);
    r.image = static_cast<const T*>(s.image_unit) + b * width;
    r.mean = row_mean(r.hidden, s.C);
    const Spread<T> spread = row_spread(r.hidden, s.C, r.mean);
    r.rstd = 1 / square_root(spread.variance + static_cast<T>(s.eps));
    r.offset = -spread.shift * r.rstd;
    T square, dot, rnorm;
    mix_row<T>(r, s.C, y, &square, &dot);
    if (in_safe_range(square)) {
      rnorm = 1 / square_root(square);
      dot *= rnorm;
    } else {
      rnorm = unit_row_scaled<T>(y, y, s.C);
      dot = dot_rows<T>(y, r.image, s.C);
    }
    static_cast<T*>(p.mean)[row] = r.mean;
    static_cast<T*>(p.rstd)[row] = r.rstd;
    static_cast<T*>(p.row_rnorm)[row] = rnorm;
    store_one<T>(p.logits + row * item, s.dtype, static_cast<T>(s.scale) * dot);
  }
}

// u = y / |y|;  dy = step (image - cosine u), step = delta / |y|.
// Adds dy to d_text, delta u to d_unit, residual dy zh to d_weight; overwrites unit by
// g = residual weight dy and returns the means of g and g zh.
template <class T>
VTCLIP_INLINE void grad_row(const NormRow<T>& r, int64_t n, T* unit, T delta, T step, T cosine,
                            const NormSums<T>& sums, T* mean_g, T* mean_gz) {
  const Vec<T> mean = splat(r.mean), rstd = splat(r.rstd), offset = splat(r.offset);
  const Vec<T> residual = splat(r.residual);
  Vec<T> total_g{}, total_gz{};
  int64_t i = 0;
  for (; i + kLanes<T> <= n; i += kLanes<T>) {
    const Vec<T> u = load(unit + i);
    const Vec<T> zh = fma(load(r.hidden + i) - mean, rstd, offset);
    const Vec<T> dy = (load(r.image + i) - u * cosine) * step;
    const Vec<T> dz = dy * residual;
    const Vec<T> g = dz * load(r.weight + i);
    store(sums.d_text + i, load(sums.d_text + i) + dy);
    store(sums.d_unit + i, fma(splat(delta), u, load(sums.d_unit + i)));
    store(sums.d_weight + i, fma(dz, zh, load(sums.d_weight + i)));
    store(unit + i, g);
    total_g += g;
    total_gz = fma(g, zh, total_gz);
  }
  *mean_g = sum_lanes<T>(total_g);
  *mean_gz = sum_lanes<T>(total_gz);
  for (; i < n; ++i) {
    const T zh = (r.hidden[i] - r.mean) * r.rstd + r.offset;
    const T dy = (r.image[i] - unit[i] * cosine) * step;
    const T g = dy * r.residual * r.weight[i];
    sums.d_text[i] += dy;
    sums.d_unit[i] += delta * unit[i];
    sums.d_weight[i] += dy * r.residual * zh;
    unit[i] = g;
    *mean_g += g;
    *mean_gz += g * zh;
  }
  *mean_g /= static_cast<T>(n);
  *mean_gz /= static_cast<T>(n);
}

// d_hidden = rstd (g - mean(g) - zh mean(g zh)), in place on g.
template <class T>
VTCLIP_INLINE void hidden_grad_row(const NormRow<T>& r, int64_t n, T* g, T mean_g, T mean_gz) {
  const Vec<T> mean = splat(r.mean), rstd = splat(r.rstd), offset = splat(r.offset);
  int64_t i = 0;
  for (; i + kLanes<T> <= n; i += kLanes<T>) {
    const Vec<T> zh = fma(load(r.hidden + i) - mean, rstd, offset);
    store(g + i, (load(g + i) - mean_g - zh * mean_gz) * rstd);
  }
  for (; i < n; ++i) {
    const T zh = (r.hidden[i] - r.mean) * r.rstd + r.offset;
    g[i] = (g[i] - mean_g - zh * mean_gz) * r.rstd;
  }
}

template <class T>
static void norm_backward_units(const NormCosineBackward& p, int64_t begin, int64_t end) {
  const NormCosine& s = p.sizes;
  const int64_t width = round_up(s.C, kLanes<T>);
  const Scratch<T> hidden(s.C), text(s.C), weight(s.C), bias(s.C), y(s.C);
  NormRow<T> r = norm_row<T>(s, weight, bias);
  for (int64_t unit = begin; unit < end; ++unit) {
    const RowUnit u = row_unit(p.grads.chunks, s.B, s.K, unit);
    const NormSums<T> all = norm_sums<T, true>(s, p.grads, unit);
    clear_sums<T, true>(all, u, width);
    for (int64_t b = u.b0; b < u.b1; ++b) {
      r.image = static_cast<const T*>(s.image_unit) + b * width;
      for (int64_t k = u.k0; k < u.k1; ++k) {
        r.hidden = view_row<T>(hidden, s.C, s.hidden.at(b, k), s.hidden.column, s.dtype);
        r.text = view_row<T>(text, s.C, s.text.at(0, k), s.text.column, s.dtype);
        r.mean = element<T>(p.mean, b, k);
        r.rstd = element<T>(p.rstd, b, k);
        r.offset = -row_spread(r.hidden, s.C, r.mean).shift * r.rstd;
        const T rnorm = element<T>(p.row_rnorm, b, k);
        const T delta = element<T>(p.grad_logits, b, k, s.dtype) * static_cast<T>(s.scale);
        T square, dot, mean_g, mean_gz;
        mix_row<T>(r, s.C, y, &square, &dot);
        unit_row_known<T>(y, y, s.C, s.C, rnorm);
        const T cosine = in_safe_range(rnorm) ? dot * rnorm : dot_rows<T>(y, r.image, s.C);
        const NormSums<T> sums{all.d_text + k * width, all.d_unit + b * width, all.d_weight,
                               nullptr};
        grad_row<T>(r, s.C, y, delta, delta * rnorm, cosine, sums, &mean_g, &mean_gz);
        hidden_grad_row<T>(r, s.C, y, mean_g, mean_gz);
        store_row<T>(p.d_hidden.at(b, k), s.C, s.dtype, y, 1);
      }
    }
    // d_bias = residual * sum of dy over the chunk
    for (int64_t k = u.k0; k < u.k1; ++k) {
      add_row(all.d_bias, r.residual, all.d_text + k * width, s.C);
    }
  }
}

template <class T>
static void norm_finish_units(const NormCosineBackward& p, int64_t begin, int64_t end) {
  const Scratch<T> total(round_up(p.sizes.C, kLanes<T>));
  for (int64_t r = begin; r < end; ++r) finish_norm_row<T>(p.sizes, p.grads, r, total);
}

VTCLIP_BY_DTYPE(norm_cosine_images, unit_images, NormCosine, dtype)
VTCLIP_BY_DTYPE(norm_cosine_fwd, norm_forward_units, NormCosineForward, sizes.dtype)
VTCLIP_BY_DTYPE(norm_cosine_bwd, norm_backward_units, NormCosineBackward, sizes.dtype)
VTCLIP_BY_DTYPE(norm_cosine_finish, norm_finish_units, NormCosineBackward, sizes.dtype)
