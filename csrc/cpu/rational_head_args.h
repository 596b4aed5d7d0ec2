// SPDX-License-Identifier: Apache-2.0
// Arguments of the rational_head kernels.
#pragma once

#include "cpu/common/row_args.h"

namespace vtclip::cpu {

struct RationalHead {
  int64_t B, K, D;
  Dtype dtype;
  double scale;
  int penalty;  // 0 none, 1 L1, 2 MSE, 3 L-infinity
  RowsView context, weight, bias, image, text;
  void* weight_t;     // packed weight^T: element (in, out), for m = context weight^T + bias
  void* weight_pack;  // backward only: packed weight: element (out, in), for d_context = d_m weight
};

struct RationalHeadForward {
  RationalHead sizes;
  int64_t row_block;
  char* logits;       // [B, K] contiguous
  void* row_penalty;  // [B, K] acc: sum over d, or largest; not read without a penalty
  int64_t* row_peak;  // [B, K], L-infinity only: first d of the row's largest
  void* penalty;      // [B] acc
  int64_t* peak;      // [B], L-infinity only
};

struct RationalHeadBackward {
  RationalHead sizes;
  bool feature_grads;
  RowChunks chunks;
  int64_t row_block;  // rows of a unit in one round
  int64_t round;      // a unit's rows round * row_block .. are in the works
  RowsView grad_logits, grad_penalty, peak;
  RowsView d_context, d_weight, d_image, d_text;
  char* d_bias;
  void* d_mask;           // [units, row_block, D padded] acc: d_m of this round
  void* context;          // the same rows of the context, packed
  void* d_weight_sum;     // [D, D padded] acc
  void* d_bias_sum;       // [D padded] acc
  void* d_image_partial;  // feature_grads: [text_chunks, B, D padded] acc
  void* d_text_partial;   // feature_grads: [image_chunks, K, D padded] acc
};

}  // namespace vtclip::cpu
