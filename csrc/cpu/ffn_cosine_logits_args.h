// SPDX-License-Identifier: Apache-2.0
// Arguments of the ffn_cosine_logits kernels.
#pragma once

#include "cpu/common/norm_cosine_args.h"

namespace vtclip::cpu {

// Numbers kept per row, in this order. kShift is what rounding left out of the mean.
enum FfnStat { kMean, kShift, kRstd, kRnorm, kCosine, kMeanG, kMeanGz, kFfnStats };

struct FfnCosine {
  NormCosine tail;  // sizes, norm, text and image; its hidden is z = residual_input + hidden W^T +
                    // bias, of which one block of rows exists at a time
  int64_t F;
  RowsView hidden, weight, bias, residual_input;
  void* weight_t;     // packed weight^T: element (f, c), for z
  void* weight_pack;  // backward only: packed weight: element (c, f), for d_hidden = d_z weight
};

struct FfnCosineForward {
  FfnCosine sizes;
  int64_t row_block;
  char* logits;  // [B, K] contiguous
  void* stats;   // [kFfnStats, B, K] acc
};

struct FfnCosineBackward {
  FfnCosine sizes;
  NormGradients grads;  // of the tail; of texts and images if feature_grads
  bool feature_grads;
  int64_t row_block;  // rows of a unit in one round
  int64_t round;      // a unit's rows round * row_block .. are in the works
  RowsView grad_logits;
  RowsView stats;  // [kFfnStats, B, K]
  RowsView d_hidden, d_weight, d_residual_input;
  char* d_bias;
  void* d_z;           // [units, row_block, C padded] acc: d_z of this round
  void* hidden;        // [units, row_block, F padded] acc: the same rows of hidden
  void* d_weight_sum;  // [C, F padded] acc
  void* d_bias_sum;    // [C padded] acc
};

}  // namespace vtclip::cpu
