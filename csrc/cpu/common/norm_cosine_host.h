// SPDX-License-Identifier: Apache-2.0
// From tensors to the arguments of the ops that end in a layer norm, a residual and a cosine.
#pragma once

#include <array>
#include <initializer_list>

#include "norm_cosine_args.h"

namespace vtclip::cpu {
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

// The memory it needs for that, noted in `s` and `g` with the outputs.
class NormWorkspace {
 public:
  NormWorkspace(NormOutputs& out, bool feature_grads, const RowChunks& chunks, NormCosine& s,
                NormGradients& g)
      : image_unit_(new_acc(out.image, {s.B, row_width(s.C)})),
        image_rnorm_(new_acc(out.image, {s.B})),
        text_(new_acc(out.text, {feature_grads ? chunks.image_chunks : 0, s.K, row_width(s.C)})),
        unit_(new_acc(out.image, {feature_grads ? chunks.text_chunks : 0, s.B, row_width(s.C)})),
        weight_(new_acc(out.weight, {chunks.units(), row_width(s.C)})),
        bias_(new_acc(out.bias, {chunks.units(), row_width(s.C)})) {
    s.image_unit = image_unit_.data_ptr();
    s.image_rnorm = image_rnorm_.data_ptr();
    g.chunks = chunks;
    if (feature_grads) {
      g.d_text = rows_view(out.text);
      g.d_image = rows_view(out.image);
    }
    g.d_weight = static_cast<char*>(out.weight.data_ptr());
    g.d_bias = static_cast<char*>(out.bias.data_ptr());
    g.d_text_partial = text_.data_ptr();
    g.d_unit_partial = unit_.data_ptr();
    g.d_weight_partial = weight_.data_ptr();
    g.d_bias_partial = bias_.data_ptr();
  }

 private:
  Tensor image_unit_, image_rnorm_, text_, unit_, weight_, bias_;
};

}  // namespace
}  // namespace vtclip::cpu
