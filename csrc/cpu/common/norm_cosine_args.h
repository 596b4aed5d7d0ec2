// SPDX-License-Identifier: Apache-2.0
// Arguments of the norm_cosine_logits kernels.
#pragma once

#include "row_args.h"

namespace vtclip::cpu {

struct NormCosine {
  int64_t B, K, C;
  Dtype dtype;
  double residual, scale, eps;
  RowsView hidden, weight, bias, text, image;
  void* image_unit;   // [B, C padded] acc: image / |image|
  void* image_rnorm;  // [B] acc
};

struct NormCosineForward {
  NormCosine sizes;
  char* logits;  // [B, K] contiguous
  void* mean;    // [B, K] acc, as rstd and row_rnorm
  void* rstd;
  void* row_rnorm;
};

// What all rows add to. Sums over images (d_text), texts (d_image) and both (the norm's) are made
// per unit and added in ascending order afterwards.
struct NormGradients {
  RowChunks chunks;
  RowsView d_text, d_image;
  char* d_weight;
  char* d_bias;
  void* d_text_partial;    // [image_chunks, K, C padded] acc
  void* d_unit_partial;    // [text_chunks, B, C padded] acc: gradient of image / |image|
  void* d_weight_partial;  // [units, C padded] acc
  void* d_bias_partial;    // [units, C padded] acc
};

struct NormCosineBackward {
  NormCosine sizes;
  NormGradients grads;
  RowsView grad_logits, mean, rstd, row_rnorm;
  RowsView d_hidden;
};

}  // namespace vtclip::cpu
