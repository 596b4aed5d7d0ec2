// SPDX-License-Identifier: Apache-2.0
// Arguments of the rational_logits kernels.
#pragma once

#include "cpu/common/row_args.h"

namespace vtclip::cpu {

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

}  // namespace vtclip::cpu
