// SPDX-License-Identifier: Apache-2.0
// cosine_logits_fwd and cosine_logits_bwd for CUDA tensors.
#include <tuple>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "cosine_logits_block.h"
#include "launch.cuh"

namespace vtclip::cuda {
namespace {

template <class T>
Vectors<const T> vectors_of(const Tensor& tensor) {
  return {data_of<T>(tensor), tensor.dim() == 3 ? tensor.stride(0) : 0, tensor.stride(-2),
          tensor.stride(-1)};
}

template <class T>
CosineArgs<T> arguments(const Tensor& image, const Tensor& text, const Tensor& image_rnorm,
                        const Tensor& text_rnorm, double scale) {
  const int64_t K = text.size(-2);
  return {vectors_of<T>(image),           vectors_of<T>(text),
          data_of<AccOf<T>>(image_rnorm), data_of<AccOf<T>>(text_rnorm),
          text.dim() == 3 ? K : 0,        K,
          image.size(1),                  static_cast<AccOf<T>>(scale)};
}

// B, K, D and the number of text rows, K or B * K
struct Sizes {
  int64_t B, K, D, text_rows;
};

Sizes check_inputs(const char* op, const Tensor& image, const Tensor& text) {
  check_rank(op, "image", image, 2);
  check_beside(op, "text", text, image, image.scalar_type());
  const int64_t B = image.size(0), D = image.size(1);
  if (text.dim() == 3) {
    check_shape(op, "text", text, {B, text.size(1), D});
    return {B, text.size(1), D, B * text.size(1)};
  }
  check_rank(op, "text", text, 2);
  check_shape(op, "text", text, {text.size(0), D});
  return {B, text.size(0), D, text.size(0)};
}

std::tuple<Tensor, Tensor, Tensor> cosine_logits_fwd(const Tensor& image, const Tensor& text,
                                                     double scale) {
  const char* op = "cosine_logits_fwd";
  const Sizes n = check_inputs(op, image, text);
  const torch::stable::accelerator::DeviceGuard guard(image.get_device_index());
  const ScalarType acc = acc_type(image.scalar_type());
  Tensor logits = torch::stable::new_empty(image, {n.B, n.K});
  Tensor image_rnorm = torch::stable::new_empty(image, {n.B}, acc);
  Tensor text_rnorm = text.dim() == 3 ? torch::stable::new_empty(text, {n.B, n.K}, acc)
                                      : torch::stable::new_empty(text, {n.K}, acc);
  with_dtype(op, "image", image, [&](auto t) {
    using T = decltype(t);
    launch<ReciprocalNorm<T>>(op, n.B, image,
                              {vectors_of<T>(image), n.B, n.D, data_of<AccOf<T>>(image_rnorm)});
    launch<ReciprocalNorm<T>>(op, n.text_rows, image,
                              {vectors_of<T>(text), n.K, n.D, data_of<AccOf<T>>(text_rnorm)});
    launch<CosineForward<T>>(op, n.B * n.K, image,
                             {arguments<T>(image, text, image_rnorm, text_rnorm, scale),
                              data_of<T>(logits)});
  });
  return {logits, image_rnorm, text_rnorm};
}

std::tuple<Tensor, Tensor> cosine_logits_bwd(const Tensor& grad_logits, const Tensor& image,
                                             const Tensor& text, const Tensor& image_rnorm,
                                             const Tensor& text_rnorm, double scale) {
  const char* op = "cosine_logits_bwd";
  const Sizes n = check_inputs(op, image, text);
  const ScalarType type = image.scalar_type(), acc = acc_type(type);
  check_beside(op, "grad_logits", grad_logits, image, type);
  check_shape(op, "grad_logits", grad_logits, {n.B, n.K});
  check_beside(op, "image_rnorm", image_rnorm, image, acc);
  check_shape(op, "image_rnorm", image_rnorm, {n.B});
  check_beside(op, "text_rnorm", text_rnorm, image, acc);
  const torch::stable::accelerator::DeviceGuard guard(image.get_device_index());
  Tensor d_image = torch::stable::new_empty(image, {n.B, n.D});
  Tensor d_text = text.dim() == 3 ? torch::stable::new_empty(text, {n.B, n.K, n.D})
                                  : torch::stable::new_empty(text, {n.K, n.D});
  Tensor gradient = torch::stable::new_empty(image, {n.B + n.text_rows, n.D}, acc);
  with_dtype(op, "image", image, [&](auto t) {
    using T = decltype(t);
    CosineBackwardArgs<T> args{arguments<T>(image, text, image_rnorm, text_rnorm, scale),
                               {data_of<T>(grad_logits), grad_logits.stride(0),
                                grad_logits.stride(1)},
                               text.dim() == 3 ? 1 : n.B,
                               data_of<AccOf<T>>(gradient),
                               data_of<T>(d_image)};
    launch<CosineImageGradient<T>>(op, n.B, image, args);
    args.gradient += n.B * n.D;
    args.out = data_of<T>(d_text);
    launch<CosineTextGradient<T>>(op, n.text_rows, image, args);
  });
  return {d_image, d_text};
}

}  // namespace
}  // namespace vtclip::cuda

STABLE_TORCH_LIBRARY_IMPL(vtclip, CUDA, m) {
  m.impl("cosine_logits_fwd", TORCH_BOX(&vtclip::cuda::cosine_logits_fwd));
  m.impl("cosine_logits_bwd", TORCH_BOX(&vtclip::cuda::cosine_logits_bwd));
}
