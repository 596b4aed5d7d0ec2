// SPDX-License-Identifier: Apache-2.0
// cosine_logits_fwd and cosine_logits_bwd for CUDA tensors.
//
// The products of shared texts are not torch's: in a half type it would round the sums before they
// are scaled, and overflow; in float32 it may be told to round what it multiplies to TF32.
#include <tuple>

#include "common/register.h"
#include "cosine_logits_block.h"
#include "cosine_logits_bwd_block.h"
#include "cuda/block/rows_launch.cuh"

namespace vtclip::cuda {
namespace {

// of tiles of 64 x 64, so many leave no device idle
constexpr int64_t kEnoughTiles = 128;

template <class T>
Vectors<const T> vectors(const Tensor& tensor) {
  return {data_of<T>(tensor), tensor.stride(0), tensor.stride(1), tensor.stride(2)};
}

struct Sizes {
  int64_t B, K, D;
  bool paired;  // texts are [B, K, D]
};

Sizes check_inputs(const char* op, const Tensor& image, const Tensor& text) {
  check_rank(op, "image", image, 2);
  check_same(op, "text", text, image, image.scalar_type());
  const int64_t B = image.size(0), D = image.size(1);
  if (text.dim() == 3) {
    check_shape(op, "text", text, {B, text.size(1), D});
    return {B, text.size(1), D, true};
  }
  check_rank(op, "text", text, 2);
  check_shape(op, "text", text, {text.size(0), D});
  return {B, text.size(0), D, false};
}

template <class T, int kSide>
void launch_forward(const char* op, const Tensor& image, const Tensor& text,
                    const Tensor& image_rnorm, const Tensor& text_rnorm, Tensor& logits,
                    const Sizes& n, double scale) {
  const typename CosineForward<T, kSide>::Args args{
      rows_of<T>(image), rows_of<T>(text), data_of<AccOf<T>>(image_rnorm),
      data_of<AccOf<T>>(text_rnorm), data_of<T>(logits), n.B, n.K, n.D,
      static_cast<AccOf<T>>(scale)};
  launch<CosineForward<T, kSide>>(op, args.blocks(), image, args);
}

std::tuple<Tensor, Tensor, Tensor> cosine_logits_fwd(const Tensor& image, const Tensor& text,
                                                     double scale) {
  const char* op = "cosine_logits_fwd";
  const Sizes n = check_inputs(op, image, text);
  const torch::stable::accelerator::DeviceGuard guard(image.get_device_index());
  Tensor logits = new_empty(image, {n.B, n.K});
  Tensor image_rnorm = new_acc(image, {n.B});
  Tensor text_rnorm = n.paired ? new_acc(text, {n.B, n.K}) : new_acc(text, {n.K});
  with_dtype(op, "image", image, [&]<class T>(T) {
    using Acc = AccOf<T>;
    if (n.paired) {
      const typename CosinePairedForward<T>::Args args{
          rows_of<T>(image), vectors<T>(text), data_of<T>(logits), data_of<Acc>(image_rnorm),
          data_of<Acc>(text_rnorm), n.B, n.K, n.D, static_cast<Acc>(scale)};
      launch<CosinePairedForward<T>>(op, args.blocks(), image, args);
      return;
    }
    const typename CosineNorms<T>::Args norms{rows_of<T>(image), rows_of<T>(text),
                                              data_of<Acc>(image_rnorm), data_of<Acc>(text_rnorm),
                                              n.B, n.K, n.D};
    launch<CosineNorms<T>>(op, norms.blocks(), image, norms);
    const auto forward = ceil_div(n.B, 64) * ceil_div(n.K, 64) < kEnoughTiles
                             ? launch_forward<T, 32>
                             : launch_forward<T, 64>;
    forward(op, image, text, image_rnorm, text_rnorm, logits, n, scale);
  });
  return {logits, image_rnorm, text_rnorm};
}

std::tuple<Tensor, Tensor> cosine_logits_bwd(const Tensor& grad_logits, const Tensor& image,
                                             const Tensor& text, const Tensor& image_rnorm,
                                             const Tensor& text_rnorm, double scale) {
  const char* op = "cosine_logits_bwd";
  const Sizes n = check_inputs(op, image, text);
  const ScalarType type = image.scalar_type(), acc = acc_type(type);
  check_same(op, "grad_logits", grad_logits, image, type, {n.B, n.K});
  check_same(op, "image_rnorm", image_rnorm, image, acc, {n.B});
  check_same(op, "text_rnorm", text_rnorm, image, acc);
  if (n.paired) {
    check_shape(op, "text_rnorm", text_rnorm, {n.B, n.K});
  } else {
    check_shape(op, "text_rnorm", text_rnorm, {n.K});
  }
  const torch::stable::accelerator::DeviceGuard guard(image.get_device_index());
  Tensor d_image = new_empty(image, {n.B, n.D});
  Tensor d_text = n.paired ? new_empty(text, {n.B, n.K, n.D}) : new_empty(text, {n.K, n.D});
  if (n.B * n.K * n.D == 0) {
    zero_all({&d_image, &d_text});
    return {d_image, d_text};
  }
  const Tensor rx = torch::stable::contiguous(image_rnorm);
  const Tensor rt = torch::stable::contiguous(text_rnorm);
  with_dtype(op, "image", image, [&]<class T>(T) {
    using Acc = AccOf<T>;
    const Rows<const T> x = rows_of<T>(image), g = rows_of<T>(grad_logits);
    typename CosineProject<T>::Args project{
        {x, data_of<Acc>(rx), nullptr, data_of<T>(d_image), 0, n.B},
        {x, nullptr, nullptr, nullptr, 0, 0},
        n.D,
        static_cast<Acc>(scale)};
    if (n.paired) {
      typename CosinePairedGradient<T>::Args args{
          x, g, vectors<T>(text), data_of<Acc>(rx), data_of<Acc>(rt), nullptr, data_of<T>(d_text),
          n.B, n.K, n.D, static_cast<Acc>(scale)};
      Tensor partial = new_acc(image, {args.tiles(), n.B, n.D});
      args.partial = data_of<Acc>(partial);
      launch<CosinePairedGradient<T>>(op, args.blocks(), image, args);
      project.image.partial = args.partial;
      project.image.P = args.tiles();
      launch<CosineProject<T>>(op, project.blocks(), image, project);
      return;
    }
    const Rows<const T> y = rows_of<T>(text);
    typename CosineGather<T>::Args args{
        {g, y, data_of<Acc>(rt), nullptr, n.B, n.K, n.D, Gather<T>::range_of(n.B, n.K, n.D)},
        {g, x, data_of<Acc>(rx), nullptr, n.K, n.B, n.D, Gather<T>::range_of(n.K, n.B, n.D)}};
    Tensor for_image = new_acc(image, {args.image.ranges(), n.B, n.D});
    Tensor for_text = new_acc(image, {args.text.ranges(), n.K, n.D});
    args.image.partial = data_of<Acc>(for_image);
    args.text.partial = data_of<Acc>(for_text);
    launch<CosineGather<T>>(op, args.blocks(), image, args);
    project.image.partial = args.image.partial;
    project.image.P = args.image.ranges();
    project.text = {y,   data_of<Acc>(rt), args.text.partial, data_of<T>(d_text),
                    args.text.ranges(), n.K};
    launch<CosineProject<T>>(op, project.blocks(), image, project);
  });
  return {d_image, d_text};
}

}  // namespace
}  // namespace vtclip::cuda

VTCLIP_REGISTER(CUDA, cuda, cosine_logits)
