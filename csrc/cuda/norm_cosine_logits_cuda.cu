// SPDX-License-Identifier: Apache-2.0
// norm_cosine_logits_fwd and norm_cosine_logits_bwd for CUDA tensors.
#include <tuple>

#include "common/register.h"
#include "cosine_logits_block.h"
#include "cuda/block/rows_launch.cuh"
#include "norm_cosine_logits_block.h"

namespace vtclip::cuda {
namespace {

struct Inputs {
  const Tensor &hidden, &weight, &bias, &text, &image;
  double residual, scale, eps;
  int64_t B, K, C;

  template <class T>
  NormArgs<T, NormInput<T>> arguments(const Tensor& image_rnorm,
                                      const NormStats<AccOf<T>>& stats) const {
    using Acc = AccOf<T>;
    return {{images_of<T>(hidden), C}, rows_of<T>(text), rows_of<T>(image),
            {data_of<T>(weight), 0, weight.stride(0)}, {data_of<T>(bias), 0, bias.stride(0)},
            data_of<Acc>(image_rnorm), stats, static_cast<Acc>(residual), static_cast<Acc>(scale),
            static_cast<Acc>(eps), K, C};
  }
};

Inputs check_inputs(const char* op, const Tensor& hidden, const Tensor& weight, const Tensor& bias,
                    const Tensor& text, const Tensor& image, double residual, double scale,
                    double eps) {
  check_rank(op, "hidden", hidden, 3);
  const ScalarType type = hidden.scalar_type();
  const Inputs in{hidden,   weight, bias, text,           image,          residual,
                  scale,    eps,    hidden.size(0), hidden.size(1), hidden.size(2)};
  check_same(op, "weight", weight, hidden, type, {in.C});
  check_same(op, "bias", bias, hidden, type, {in.C});
  check_same(op, "text", text, hidden, type, {in.K, in.C});
  check_same(op, "image", image, hidden, type, {in.B, in.C});
  return in;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> norm_cosine_logits_fwd(
    const Tensor& hidden, const Tensor& weight, const Tensor& bias, const Tensor& text,
    const Tensor& image, double residual, double scale, double eps) {
  const char* op = "norm_cosine_logits_fwd";
  const Inputs in =
      check_inputs(op, hidden, weight, bias, text, image, residual, scale, eps);
  const torch::stable::accelerator::DeviceGuard guard(hidden.get_device_index());
  Tensor logits = new_empty(hidden, {in.B, in.K});
  Tensor mean = new_acc(hidden, {in.B, in.K}), rstd = new_acc(hidden, {in.B, in.K});
  Tensor image_rnorm = new_acc(hidden, {in.B}), row_rnorm = new_acc(hidden, {in.B, in.K});
  with_dtype(op, "hidden", hidden, [&]<class T>(T) {
    using Acc = AccOf<T>;
    launch<ReciprocalNorm<T>>(
        op, in.B, hidden,
        {{data_of<T>(image), 0, image.stride(0), image.stride(1)}, in.B, in.C,
         data_of<Acc>(image_rnorm)});
    const NormStats<Acc> stats{data_of<Acc>(mean), nullptr, data_of<Acc>(rstd),
                               data_of<Acc>(row_rnorm), nullptr, nullptr, nullptr};
    const typename NormForward<T>::Args args{in.arguments<T>(image_rnorm, stats),
                                             data_of<T>(logits)};
    launch<NormForward<T>>(op, in.B * args.tiles(), hidden, args);
  });
  return {logits, mean, rstd, image_rnorm, row_rnorm};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> norm_cosine_logits_bwd(
    const Tensor& grad_logits, const Tensor& hidden, const Tensor& weight, const Tensor& bias,
    const Tensor& text, const Tensor& image, const Tensor& logits, const Tensor& mean,
    const Tensor& rstd, const Tensor& image_rnorm, const Tensor& row_rnorm, double residual,
    double scale, double eps) {
  const char* op = "norm_cosine_logits_bwd";
  const Inputs in =
      check_inputs(op, hidden, weight, bias, text, image, residual, scale, eps);
  const ScalarType type = hidden.scalar_type(), acc = acc_type(type);
  check_same(op, "grad_logits", grad_logits, hidden, type, {in.B, in.K});
  check_same(op, "logits", logits, hidden, type, {in.B, in.K});
  check_same(op, "image_rnorm", image_rnorm, hidden, acc, {in.B});
  check_same(op, "mean", mean, hidden, acc, {in.B, in.K});
  check_same(op, "rstd", rstd, hidden, acc, {in.B, in.K});
  check_same(op, "row_rnorm", row_rnorm, hidden, acc, {in.B, in.K});
  const torch::stable::accelerator::DeviceGuard guard(hidden.get_device_index());
  Tensor d_hidden = new_empty(hidden, {in.B, in.K, in.C});
  Tensor d_weight = new_empty(weight, {in.C});
  Tensor d_bias = new_empty(bias, {in.C});
  Tensor d_text = new_empty(text, {in.K, in.C});
  Tensor d_image = new_empty(image, {in.B, in.C});
  if (in.B * in.K * in.C == 0) {
    zero_all({&d_hidden, &d_weight, &d_bias, &d_text, &d_image});
    return {d_hidden, d_weight, d_bias, d_text, d_image};
  }
  Tensor means = torch::stable::contiguous(mean), rstds = torch::stable::contiguous(rstd);
  Tensor row_rnorms = torch::stable::contiguous(row_rnorm);
  const Tensor image_rnorms = torch::stable::contiguous(image_rnorm);
  with_dtype(op, "hidden", hidden, [&]<class T>(T) {
    using Acc = AccOf<T>;
    Tensor scalars = new_acc(hidden, {4, in.B, in.K});
    Acc* scalar = data_of<Acc>(scalars);
    const int64_t rows = in.B * in.K;
    const NormArgs<T, NormInput<T>> common = in.arguments<T>(
        image_rnorms, {data_of<Acc>(means), scalar, data_of<Acc>(rstds), data_of<Acc>(row_rnorms),
                       scalar + rows, scalar + 2 * rows, scalar + 3 * rows});
    const Rows<const T> d_logits = rows_of<T>(grad_logits);
    const Walk<T> walk = walk_of<NormGradient<T>, T>(in.B, in.K, in.C);
    const int64_t slots = walk.chunks() * walk.tiles();
    Tensor part_unit = new_acc(hidden, {walk.tiles(), in.B, in.C});
    Tensor part_text = new_acc(hidden, {walk.chunks(), in.K, in.C});
    Tensor part_weight = new_acc(hidden, {slots, in.C}), part_bias = new_acc(hidden, {slots, in.C});
    launch<NormScalars<T>>(op, in.B * common.tiles(), hidden, common);
    launch<NormGradient<T>>(
        op, walk.blocks(Block<NormGradient<T>::kWarps>::kThreads), hidden,
        {common, d_logits, data_of<T>(d_hidden), data_of<Acc>(part_unit), data_of<Acc>(part_text),
         data_of<Acc>(part_weight), data_of<Acc>(part_bias), nullptr, in.B * in.C, walk});
    launch<NormImageGradient<T>>(op, in.B, hidden,
                                 {common.image, common.image_rnorm, data_of<Acc>(part_unit),
                                  data_of<T>(d_image), walk.tiles(), in.B, in.C});
    sum_columns<T>(
        op, hidden,
        {{{data_of<Acc>(part_text), data_of<T>(d_text), walk.chunks(), in.K * in.C},
          {data_of<Acc>(part_weight), data_of<T>(d_weight), slots, in.C},
          {data_of<Acc>(part_bias), data_of<T>(d_bias), slots, in.C}}});
  });
  return {d_hidden, d_weight, d_bias, d_text, d_image};
}

}  // namespace
}  // namespace vtclip::cuda

VTCLIP_REGISTER(CUDA, cuda, norm_cosine_logits)
