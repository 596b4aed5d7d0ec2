// SPDX-License-Identifier: Apache-2.0
// From tensors to the arguments of the ops that end in a layer norm, a residual and a cosine.
#pragma once

#include <array>
#include <initializer_list>

#include "norm_cosine_args.h"

namespace vtclip {
namespace cpu {
namespace {

inline RowsView checked_view(const char* op, const char* name, const Tensor& tensor,
                             ScalarType type, std::initializer_list<int64_t> sizes) {
  check_same(op, name, tensor, type);
  check_shape(op, name, tensor, sizes);
  return rows_view(tensor);
}

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

inline void zero_all(std::initializer_list<Tensor*> tensors) {
  for (Tensor* tensor : tensors) torch::stable::zero_(*tensor);
}

// What a backward pass returns of the tail; of texts and images nothing unless `features`.
struct NormOutputs {
  Tensor weight, bias, text, image;

  NormOutputs(const NormTail& tail, const NormCosine& s, bool features)
      : weight(new_tensor(tail.weight, {s.C})),
        bias(new_tensor(tail.bias, {s.C})),
        text(features ? new_tensor(tail.text, {s.K, s.C}) : new_tensor(tail.text, {0})),
        image(features ? new_tensor(tail.image, {s.B, s.C}) : new_tensor(tail.image, {0})) {}
};

// The memory it needs for that, noted in `s` and `g` with the outputs.
class NormWorkspace {
 public:
  NormWorkspace(NormOutputs& out, bool features, const RowChunks& chunks, NormCosine& s,
                NormGradients& g)
      : image_unit_(new_acc(out.image, {s.B, padded_row(s.C)})),
        image_rnorm_(new_acc(out.image, {s.B})),
        text_(new_acc(out.text, {features ? chunks.image_chunks : 0, s.K, padded_row(s.C)})),
        unit_(new_acc(out.image, {features ? chunks.text_chunks : 0, s.B, padded_row(s.C)})),
        weight_(new_acc(out.weight, {chunks.units(), padded_row(s.C)})),
        bias_(new_acc(out.bias, {chunks.units(), padded_row(s.C)})) {
    s.image_unit = image_unit_.data_ptr();
    s.image_rnorm = image_rnorm_.data_ptr();
    g.chunks = chunks;
    if (features) {
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
}  // namespace cpu
}  // namespace vtclip
