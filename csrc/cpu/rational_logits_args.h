// SPDX-License-Identifier: Apache-2.0
// Arguments of the rational_logits kernels, and how rows (image, class) are split into units.
#pragma once

#include "cosine_logits_args.h"
#include "cpu/common/parallel.h"

namespace vtclip {
namespace cpu {

// Backward units: (chunk of images, chunk of texts). Sums over images (d_text) and over texts
// (d_image) are made per unit and added in ascending order afterwards.
struct RowChunks {
  int64_t image_chunk, image_chunks;
  int64_t text_chunk, text_chunks;
  int64_t units() const { return image_chunks * text_chunks; }
};

// About `wanted` units, whole images first. A function of the shape, so the order of every sum is
// fixed.
inline RowChunks row_chunks(int64_t B, int64_t K, int64_t wanted) {
  RowChunks c{};
  c.image_chunk = ceil_div(B, std::min(B, wanted));
  c.image_chunks = ceil_div(B, c.image_chunk);
  c.text_chunk = ceil_div(K, std::min(K, ceil_div(wanted, c.image_chunks)));
  c.text_chunks = ceil_div(K, c.text_chunk);
  return c;
}

struct RationalLogits {
  int64_t B, K, D;
  Dtype dtype;
  double scale;
  RowsView image, text, mask;
};

struct RationalLogitsForward {
  RationalLogits sizes;
  char* logits;  // [B, K] contiguous
};

struct RationalLogitsBackward {
  RationalLogits sizes;
  RowsView grad_logits, d_image, d_text, d_mask;
  RowChunks chunks;
  void* d_image_partial;  // [text_chunks, B, D padded] acc
  void* d_text_partial;   // [image_chunks, K, D padded] acc
};

}  // namespace cpu
}  // namespace vtclip
