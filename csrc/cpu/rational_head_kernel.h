// SPDX-License-Identifier: Apache-2.0
// Out-projection and masked logits of one instruction set. m = context weight^T + bias is formed
// for a block of rows that stays in the second-level cache, used there, and forgotten.
#include "cpu/common/simd.h"
#include "cpu/common/rows.h"
#include "cpu/common/unit_rows.h"
#include "cpu/common/rational_logits_rows.h"
#include "cpu/common/weight_panels.h"

template <class T>
static void pack_units(const RationalHead& s, int64_t begin, int64_t end) {
  pack_weight<T>(s.weight, s.D, s.D, s.dtype, s.weight_t, s.weight_pack, begin, end);
}

// c[rows, D padded] (+)= a[rows, D] times packed panels.
template <class T>
static void multiply_panels(const T* a, int64_t lda, int64_t rows, const T* pack, int64_t D, T* c,
                            int64_t ldc, bool accumulate) {
  const int64_t width = round_up(D, kLanes<T>);
  for (int64_t j = 0; j < width; j += kPanel) {
    const int64_t columns = min_of(kPanel, width - j);
    for (int64_t p = 0; p < D; p += kInner) {
      gemm(Gemm<T>{rows, columns, min_of(kInner, D - p), a + p, lda, false,
                   pack + j * D + p * kPanel, kPanel, c + j, ldc, accumulate || p != 0});
    }
  }
}

// m[r] = context row times weight^T + bias, for `rows` rows of packed context.
template <class T>
static void project(const RationalHead& s, const T* context, int64_t ld, int64_t rows,
                    const T* bias, T* m) {
  const int64_t width = round_up(s.D, kLanes<T>);
  for (int64_t r = 0; r < rows; ++r) {
    __builtin_memcpy(m + r * ld, bias, static_cast<size_t>(width) * sizeof(T));
  }
  multiply_panels<T>(context, ld, rows, static_cast<const T*>(s.weight_t), s.D, m, ld, true);
}

// Units are blocks of rows b * K + k.
template <class T, int kPenalty>
static void head_forward(const RationalHeadForward& p, int64_t begin, int64_t end) {
  const RationalHead& s = p.sizes;
  const int64_t ld = leading_dim<T>(s.D), width = round_up(s.D, kLanes<T>);
  const int64_t item = item_bytes(s.dtype), total = s.B * s.K;
  const Scratch<T> context(p.row_block * ld), m(p.row_block * ld);
  const Scratch<T> bias(width), image(s.D), text(s.D);
  load_row<T>(bias, s.D, width, s.bias.data, s.bias.column, s.dtype, T{1});
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t first = unit * p.row_block, rows = min_of(p.row_block, total - first);
    for (int64_t r = 0; r < rows; ++r) {
      load_row<T>(context + r * ld, s.D, width, s.context.at((first + r) / s.K, (first + r) % s.K),
                  s.context.column, s.dtype, T{1});
    }
    project<T>(s, context, ld, rows, bias, m);
    const T* v = nullptr;
    T largest = -1;
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t row = first + r, b = row / s.K, k = row % s.K;
      if (r == 0 || k == 0) {
        v = view_row<T>(image, s.D, s.image.at(0, b), s.image.column, s.dtype);
        largest = -1;
      }
      const T* t = view_row<T>(text, s.D, s.text.at(0, k), s.text.column, s.dtype);
      const MaskRow<T> result = mask_row<T, kPenalty>(m + r * ld, v, t, s.D);
      store_one<T>(p.logits + row * item, s.dtype, static_cast<T>(s.scale) * result.dot);
      if constexpr (kPenalty != kNoPenalty) static_cast<T*>(p.row_penalty)[row] = result.penalty;
      if constexpr (kPenalty == kLinf) {
        // rows that an earlier one of the image reaches cannot hold its first largest entry
        if (!(result.penalty <= largest)) {
          p.row_peak[row] = first_of_size<T>(m + r * ld, s.D, result.penalty);
          largest = result.penalty;
        }
      }
    }
  }
}

// run<kPenalty>()
template <class Run>
static void with_penalty(int penalty, Run run) {
  switch (penalty) {
    case kL1:
      return run.template operator()<kL1>();
    case kMse:
      return run.template operator()<kMse>();
    case kLinf:
      return run.template operator()<kLinf>();
    default:
      return run.template operator()<kNoPenalty>();
  }
}

template <class T>
static void head_forward_units(const RationalHeadForward& p, int64_t begin, int64_t end) {
  with_penalty(p.sizes.penalty, [&]<int kPenalty>() { head_forward<T, kPenalty>(p, begin, end); });
}

// Penalty of one image from its rows, in ascending order.
template <class T>
static void head_penalty_units(const RationalHeadForward& p, int64_t begin, int64_t end) {
  const RationalHead& s = p.sizes;
  for (int64_t b = begin; b < end; ++b) {
    const T* rows = static_cast<const T*>(p.row_penalty) + b * s.K;
    T* penalty = static_cast<T*>(p.penalty) + b;
    if (s.penalty == kLinf) {
      int64_t best = 0;
      for (int64_t k = 1; k < s.K && rows[best] == rows[best]; ++k) {
        if (!(rows[k] <= rows[best])) best = k;
      }
      *penalty = rows[best];
      p.peak[b] = best * s.D + p.row_peak[b * s.K + best];
    } else {
      double sum = 0;
      for (int64_t k = 0; k < s.K; ++k) sum += static_cast<double>(rows[k]);
      *penalty = static_cast<T>(sum / (static_cast<double>(s.K) * static_cast<double>(s.D)));
    }
  }
}

// What a unit of the backward adds to.
template <class T>
struct HeadSums {
  T* d_image;    // [B, D padded]
  T* d_text;     // [K, D padded]
  T* block_sum;  // [D padded]
};

// m becomes d_m, one row per (b, k), for the `rows` rows of a unit in this round.
template <class T, int kPenalty, bool kFeatures>
static void mask_block_grad(const RationalHeadBackward& p, const RowUnit& u, int64_t rows, T* m,
                            int64_t ld, T* image, T* text, const HeadSums<T>& sums) {
  const RationalHead& s = p.sizes;
  const int64_t texts = u.k1 - u.k0, first = p.round * p.row_block;
  const int64_t width = round_up(s.D, kLanes<T>);
  const T* v = nullptr;
  T lambda = 0, slope = 0;
  int64_t peak = -1;
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t b = u.b0 + (first + r) / texts, k = u.k0 + (first + r) % texts;
    const bool begins = r == 0 || k == u.k0;
    if (begins) {
      v = view_row<T>(image, s.D, s.image.at(0, b), s.image.column, s.dtype);
      if constexpr (kPenalty != kNoPenalty) {
        __builtin_memcpy(&lambda, p.grad_penalty.data + b * p.grad_penalty.column, sizeof lambda);
        slope = lambda * static_cast<T>((kPenalty == kMse ? 2.0 : 1.0) /
                                        (static_cast<double>(s.K) * static_cast<double>(s.D)));
      }
      if constexpr (kPenalty == kLinf) {
        __builtin_memcpy(&peak, p.peak.data + b * p.peak.column, sizeof peak);
      }
    }
    const T* t = view_row<T>(text, s.D, s.text.at(0, k), s.text.column, s.dtype);
    T* row = m + r * ld;
    T at_peak = 0;
    const bool has_peak = kPenalty == kLinf && peak >= k * s.D && peak < (k + 1) * s.D;
    if (has_peak) at_peak = row[peak - k * s.D];
    const T step = element<T>(p.grad_logits, b, k, s.dtype) * static_cast<T>(s.scale);
    if (kFeatures && (begins || r % kSumBlock == 0)) {
      __builtin_memset(sums.block_sum, 0, static_cast<size_t>(width) * sizeof(T));
    }
    mask_row_grad<T, kPenalty, kFeatures>(row, row, v, t, s.D, step, slope, sums.block_sum,
                                          sums.d_text + k * width);
    if (kFeatures && (r == rows - 1 || k == u.k1 - 1 || r % kSumBlock == kSumBlock - 1)) {
      add_row<T>(sums.d_image + b * width, T{1}, sums.block_sum, s.D);
    }
    if (has_peak && !(at_peak <= -1)) row[peak - k * s.D] += lambda * sign_of(at_peak);
  }
}

// One round of d_m and d_context. d_m and the packed context stay for d_weight, which is summed
// over all units at once: partial sums of d_weight per unit would cost more memory than the rows.
template <class T, int kPenalty, bool kFeatures>
static void head_backward(const RationalHeadBackward& p, int64_t begin, int64_t end) {
  const RationalHead& s = p.sizes;
  const RowChunks& c = p.chunks;
  const int64_t ld = leading_dim<T>(s.D), width = round_up(s.D, kLanes<T>);
  const int64_t first = p.round * p.row_block;
  const size_t row_bytes = static_cast<size_t>(width) * sizeof(T);
  const Scratch<T> d_context(p.row_block * ld);
  const Scratch<T> bias(width), image(s.D), text(s.D), block_sum(width);
  load_row<T>(bias, s.D, width, s.bias.data, s.bias.column, s.dtype, T{1});
  for (int64_t unit = begin; unit < end; ++unit) {
    const RowUnit u = row_unit(c, s.B, s.K, unit);
    const int64_t texts = u.k1 - u.k0, rows = u.rows_of_round(p.round, p.row_block);
    HeadSums<T> sums{nullptr, nullptr, block_sum};
    if constexpr (kFeatures) {
      sums.d_image = static_cast<T*>(p.d_image_partial) + unit % c.text_chunks * s.B * width;
      sums.d_text = static_cast<T*>(p.d_text_partial) + unit / c.text_chunks * s.K * width;
      if (p.round == 0) {
        __builtin_memset(sums.d_image + u.b0 * width, 0,
                         static_cast<size_t>(u.b1 - u.b0) * row_bytes);
        __builtin_memset(sums.d_text + u.k0 * width, 0, static_cast<size_t>(texts) * row_bytes);
      }
    }
    T* context = static_cast<T*>(p.context) + unit * p.row_block * ld;
    T* m = static_cast<T*>(p.d_mask) + unit * p.row_block * ld;
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t b = u.b0 + (first + r) / texts, k = u.k0 + (first + r) % texts;
      load_row<T>(context + r * ld, s.D, width, s.context.at(b, k), s.context.column, s.dtype,
                  T{1});
    }
    project<T>(s, context, ld, rows, bias, m);
    mask_block_grad<T, kPenalty, kFeatures>(p, u, rows, m, ld, image, text, sums);
    multiply_panels<T>(m, ld, rows, static_cast<const T*>(s.weight_pack), s.D, d_context, ld,
                       false);
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t b = u.b0 + (first + r) / texts, k = u.k0 + (first + r) % texts;
      store_row<T>(p.d_context.at(b, k), s.D, s.dtype, d_context + r * ld, 1);
    }
  }
}

template <class T>
static void head_weight_units(const RationalHeadBackward& p, int64_t begin, int64_t end) {
  const RationalHead& s = p.sizes;
  weight_grad_blocks<T>(p, p.chunks, s.B, s.K, p.d_mask, s.D, p.context, s.D, begin, end);
}

template <class T>
static void head_backward_units(const RationalHeadBackward& p, int64_t begin, int64_t end) {
  with_penalty(p.sizes.penalty, [&]<int kPenalty>() {
    if (p.feature_grads) {
      head_backward<T, kPenalty, true>(p, begin, end);
    } else {
      head_backward<T, kPenalty, false>(p, begin, end);
    }
  });
}

// Row r: d_weight for r < D, d_bias for r = D, then d_image and d_text.
template <class T>
static void head_finish_units(const RationalHeadBackward& p, int64_t begin, int64_t end) {
  const RationalHead& s = p.sizes;
  const int64_t width = round_up(s.D, kLanes<T>);
  const Scratch<T> total(width);
  for (int64_t r = begin; r < end; ++r) {
    if (r < s.D) {
      store_row<T>(p.d_weight.at(0, r), s.D, s.dtype,
                   static_cast<const T*>(p.d_weight_sum) + r * width, 1);
    } else if (r == s.D) {
      store_row<T>(p.d_bias, s.D, s.dtype, static_cast<const T*>(p.d_bias_sum), 1);
    } else {
      finish_features<T>(p.chunks, s.B, s.K, s.D, s.dtype, static_cast<const T*>(p.d_image_partial),
                         static_cast<const T*>(p.d_text_partial), r - s.D - 1, p.d_image, p.d_text,
                         total);
    }
  }
}

VTCLIP_BY_DTYPE(rational_head_pack, pack_units, RationalHead, dtype)
VTCLIP_BY_DTYPE(rational_head_fwd_units, head_forward_units, RationalHeadForward, sizes.dtype)
VTCLIP_BY_DTYPE(rational_head_penalty, head_penalty_units, RationalHeadForward, sizes.dtype)
VTCLIP_BY_DTYPE(rational_head_bwd_units, head_backward_units, RationalHeadBackward, sizes.dtype)
VTCLIP_BY_DTYPE(rational_head_weight, head_weight_units, RationalHeadBackward, sizes.dtype)
VTCLIP_BY_DTYPE(rational_head_finish, head_finish_units, RationalHeadBackward, sizes.dtype)
