// SPDX-License-Identifier: Apache-2.0
// Masked logits of one instruction set: one pass over the mask, which is all the memory there is.
#include "cpu/common/simd.h"
#include "cpu/common/rows.h"
#include "cpu/common/unit_rows.h"
#include "cpu/common/rational_logits_rows.h"

// Units are rows b * K + k.
template <class T>
static void logits_forward_units(const RationalLogitsForward& p, int64_t begin, int64_t end) {
  const RationalLogits& s = p.sizes;
  const int64_t item = item_bytes(s.dtype);
  const Scratch<T> image(s.D), text(s.D), mask(s.D);
  const T* v = nullptr;
  for (int64_t row = begin; row < end; ++row) {
    const int64_t b = row / s.K, k = row % s.K;
    if (row == begin || k == 0) {
      v = view_row<T>(image, s.D, s.image.at(0, b), s.image.column, s.dtype);
    }
    const T* t = view_row<T>(text, s.D, s.text.at(0, k), s.text.column, s.dtype);
    const T* m = view_row<T>(mask, s.D, s.mask.at(b, k), s.mask.column, s.dtype);
    const T dot = mask_row<T, kNoPenalty>(m, v, t, s.D).dot;
    store_one<T>(p.logits + row * item, s.dtype, static_cast<T>(s.scale) * dot);
  }
}

template <class T>
static void logits_backward_units(const RationalLogitsBackward& p, int64_t begin, int64_t end) {
  const RationalLogits& s = p.sizes;
  const RowChunks& c = p.chunks;
  const int64_t width = round_up(s.D, kLanes<T>);
  const size_t row_bytes = static_cast<size_t>(width) * sizeof(T);
  const Scratch<T> image(s.D), text(s.D), mask(s.D), grad(s.D), block_sum(width);
  for (int64_t unit = begin; unit < end; ++unit) {
    const auto [b0, b1, k0, k1] = row_unit(c, s.B, s.K, unit);
    T* d_image = static_cast<T*>(p.d_image_partial) + unit % c.text_chunks * s.B * width;
    T* d_text = static_cast<T*>(p.d_text_partial) + unit / c.text_chunks * s.K * width;
    __builtin_memset(d_image + b0 * width, 0, static_cast<size_t>(b1 - b0) * row_bytes);
    __builtin_memset(d_text + k0 * width, 0, static_cast<size_t>(k1 - k0) * row_bytes);
    for (int64_t b = b0; b < b1; ++b) {
      const T* v = view_row<T>(image, s.D, s.image.at(0, b), s.image.column, s.dtype);
      for (int64_t k = k0; k < k1; ++k) {
        if ((k - k0) % kSumBlock == 0) __builtin_memset(block_sum, 0, row_bytes);
        const T* t = view_row<T>(text, s.D, s.text.at(0, k), s.text.column, s.dtype);
        const T* m = view_row<T>(mask, s.D, s.mask.at(b, k), s.mask.column, s.dtype);
        const T step = element<T>(p.grad_logits, b, k, s.dtype) * static_cast<T>(s.scale);
        mask_row_grad<T, kNoPenalty, true>(grad, m, v, t, s.D, step, T{0}, block_sum,
                                           d_text + k * width);
        store_row<T>(p.d_mask.at(b, k), s.D, s.dtype, grad, 1);
        if ((k - k0) % kSumBlock == kSumBlock - 1 || k == k1 - 1) {
          add_row<T>(d_image + b * width, T{1}, block_sum, s.D);
        }
      }
    }
  }
}

template <class T>
static void logits_finish_units(const RationalLogitsBackward& p, int64_t begin, int64_t end) {
  const RationalLogits& s = p.sizes;
  const Scratch<T> total(s.D);
  for (int64_t r = begin; r < end; ++r) {
    finish_features<T>(p.chunks, s.B, s.K, s.D, s.dtype, static_cast<const T*>(p.d_image_partial),
                       static_cast<const T*>(p.d_text_partial), r, p.d_image, p.d_text, total);
  }
}

VTCLIP_BY_DTYPE(rational_logits_fwd_units, logits_forward_units, RationalLogitsForward, sizes.dtype)
VTCLIP_BY_DTYPE(rational_logits_bwd_units, logits_backward_units, RationalLogitsBackward,
                sizes.dtype)
VTCLIP_BY_DTYPE(rational_logits_finish, logits_finish_units, RationalLogitsBackward, sizes.dtype)
