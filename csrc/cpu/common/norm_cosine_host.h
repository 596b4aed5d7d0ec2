// SPDX-License-Identifier: Apache-2.0
// Arguments of the ops that end in a layer norm, a residual and a cosine, and from tensors to them.
#pragma once

#include <array>
#include <initializer_list>

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

// What all rows add to. Sums over images (d_text), texts (d_image) and both (the norm's) are formed
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

namespace {

// What rows [B, K, C] meet: the norm's affine, the texts, the images.
struct NormTail {
  const Tensor &weight, &bias, &text, &image;
  double residual, scale, eps;
};

// `norm` names the norm's weight and bias.
inline NormCosine norm_cosine(const char* op, ScalarType type, int64_t B, int64_t K, int64_t C,
                              std::array<const char*, 2> norm, const NormTail& tail) {
  NormCosine s{};
  s.B = B;
  s.K = K;
  s.C = C;
  s.dtype = dtype_of(type);
  s.residual = tail.residual;
  s.scale = tail.scale;
  s.eps = tail.eps;
  s.weight = checked_view(op, norm[0], tail.weight, type, {C});
  s.bias = checked_view(op, norm[1], tail.bias, type, {C});
  s.text = checked_view(op, "text", tail.text, type, {K, C});
  s.image = checked_view(op, "image", tail.image, type, {B, C});
  return s;
}

// What a backward pass returns of the tail; of texts and images nothing unless `feature_grads`.
struct NormOutputs {
  Tensor weight, bias, text, image;

  NormOutputs(const NormTail& tail, const NormCosine& s, bool feature_grads)
      : weight(new_empty(tail.weight, {s.C})),
        bias(new_empty(tail.bias, {s.C})),
        text(feature_grads ? new_empty(tail.text, {s.K, s.C}) : new_empty(tail.text, {0})),
        image(feature_grads ? new_empty(tail.image, {s.B, s.C}) : new_empty(tail.image, {0})) {}
};

// Notes them and the memory that they are summed in.
inline void set_gradients(NormGradients& g, NormCosine& s, Workspace& workspace, NormOutputs& out,
                          bool feature_grads, const RowChunks& chunks) {
  const int64_t width = row_width(s.C);
  s.image_unit = workspace.take({s.B, width});
  s.image_rnorm = workspace.take({s.B});
  g.chunks = chunks;
  if (feature_grads) {
    g.d_text = rows_view(out.text);
    g.d_image = rows_view(out.image);
    g.d_text_partial = workspace.take({chunks.image_chunks, s.K, width});
    g.d_unit_partial = workspace.take({chunks.text_chunks, s.B, width});
  }
  g.d_weight = static_cast<char*>(out.weight.data_ptr());
  g.d_bias = static_cast<char*>(out.bias.data_ptr());
  g.d_weight_partial = workspace.take({chunks.units(), width});
  g.d_bias_partial = workspace.take({chunks.units(), width});
}

}  // namespace
}  // namespace vtclip::cpu
