// SPDX-License-Identifier: Apache-2.0
// Arguments of the unit_products kernels, and how rows (image, class) are split into units.
#pragma once

#include "cpu/common/row_args.h"

namespace vtclip::cpu {

// Texts that stay in a second-level cache while images pass, and images per running sum of d_text.
constexpr int64_t kUnitBlock = 32;

struct UnitProducts {
  int64_t B, K, D;
  Dtype dtype;
  double root;  // sqrt(scale)
  RowsView image, text;
};

struct UnitProductsForward {
  UnitProducts sizes;
  RowsView image_out, text_out;
  char* products;              // [B, K, D] contiguous
  void *image_row, *text_row;  // [B, D], [K, D] acc: the outputs before rounding
};

struct UnitProductsBackward {
  UnitProducts sizes;
  RowsView grad_image, grad_text, grad_products, d_image, d_text;
  void *image_unit, *text_unit;    // [B, D padded], [K, D padded] acc: rows divided by length
  void *image_rnorm, *text_rnorm;  // [B], [K] acc
  RowChunks chunks;
  void* image_partial;  // [text_chunks, B, D padded] acc: sums of grad_products times text_unit
  void* text_partial;   // [image_chunks, K, D padded] acc
};

// Chunks of 16 texts or more, and where these are fewer than 32 of 16 images or more. A function of
// the shape, so the order of every sum is fixed.
inline RowChunks unit_chunks(int64_t B, int64_t K) {
  RowChunks c{};
  c.text_chunk = ceil_div(K, std::min<int64_t>(32, ceil_div(K, 16)));
  c.text_chunks = ceil_div(K, c.text_chunk);
  c.image_chunk = ceil_div(B, std::min(ceil_div(32, c.text_chunks), ceil_div(B, 16)));
  c.image_chunks = ceil_div(B, c.image_chunk);
  return c;
}

}  // namespace vtclip::cpu
