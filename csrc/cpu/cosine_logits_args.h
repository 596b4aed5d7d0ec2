// SPDX-License-Identifier: Apache-2.0
// Arguments of the cosine kernels: addresses, byte strides, sizes.
#pragma once

#include "cpu/common/row_args.h"

namespace vtclip::cpu {

struct Cosine {
  int64_t B, K, D;
  Dtype dtype;
  double scale;
  RowsView image, text;  // text.batch is 0 where the texts are shared by all images
  void* image_rnorm;     // [B] acc
  void* text_rnorm;      // [K] or [B, K] acc
  void* image_unit;      // [B, D padded] acc: image / |image|
  int64_t image_block;   // images per unit
  int64_t text_block;    // texts per unit
};

struct CosineForward {
  Cosine sizes;
  char* logits;  // [B, K] contiguous
};

struct CosineBackward {
  Cosine sizes;
  RowsView grad_logits;
  RowsView image_rnorm_in, text_rnorm_in;
  RowsView d_image, d_text;
  void* text_unit;  // shared texts: [K, D padded] acc
  void* grads;      // shared texts: [B, K] acc, times scale
  void* d_unit;     // [num_chunks, B, D padded] acc: gradient of image / |image|
  int64_t num_chunks;
};

}  // namespace vtclip::cpu
