// SPDX-License-Identifier: Apache-2.0
// norm_cosine_logits_fwd and norm_cosine_logits_bwd for CPU tensors.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Half.h>

#include <tuple>

#include "common/check.h"
#include "norm_cosine_args.h"
#include "parallel.h"
#include "scratch.h"

#define VTCLIP_KERNEL "norm_cosine_logits_kernel.h"
#include "foreach_capability.h"

namespace vtclip {
namespace cpu {
namespace {

NormCosine norm_sizes(const char* op, const Tensor& hidden, const Tensor& weight,
                      const Tensor& bias, const Tensor& text, const Tensor& image, double residual,
                      double scale, double eps) {
  const ScalarType type = check_float(op, "hidden", hidden);
  check_rank(op, "hidden", hidden, 3);
  NormCosine s{};
  s.B = hidden.size(0);
  s.K = hidden.size(1);
  s.C = hidden.size(2);
  check_same(op, "weight", weight, type);
  check_same(op, "bias", bias, type);
  check_same(op, "text", text, type);
  check_same(op, "image", image, type);
  check_shape(op, "weight", weight, {s.C});
  check_shape(op, "bias", bias, {s.C});
  check_shape(op, "text", text, {s.K, s.C});
  check_shape(op, "image", image, {s.B, s.C});
  s.dtype = dtype_of(type);
  s.residual = residual;
  s.scale = scale;
  s.eps = eps;
  s.hidden = rows_view(hidden);
  s.weight = rows_view(weight);
  s.bias = rows_view(bias);
  s.text = rows_view(text);
  s.image = rows_view(image);
  return s;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> norm_cosine_logits_fwd(
    Tensor hidden, Tensor weight, Tensor bias, Tensor text, Tensor image, double residual,
    double scale, double eps) {
  NormCosineForward p{};
  p.sizes =
      norm_sizes("norm_cosine_logits_fwd", hidden, weight, bias, text, image, residual, scale, eps);
  NormCosine& s = p.sizes;
  Tensor logits = new_tensor(hidden, {s.B, s.K});
  Tensor mean = new_acc(hidden, {s.B, s.K});
  Tensor rstd = new_acc(hidden, {s.B, s.K});
  Tensor row_rnorm = new_acc(hidden, {s.B, s.K});
  Tensor image_rnorm = new_acc(hidden, {s.B});
  Tensor image_unit = new_acc(hidden, {s.B, padded_row(s.C)});
  s.image_unit = image_unit.data_ptr();
  s.image_rnorm = image_rnorm.data_ptr();
  p.logits = static_cast<char*>(logits.data_ptr());
  p.mean = mean.data_ptr();
  p.rstd = rstd.data_ptr();
  p.row_rnorm = row_rnorm.data_ptr();
  run(VTCLIP_PICK(norm_cosine_images), s, s.B, 4 * s.C);
  run(VTCLIP_PICK(norm_cosine_fwd), p, s.B * s.K, 16 * s.C);
  return {logits, mean, rstd, image_rnorm, row_rnorm};
}

// About 32 units; of the ways to split texts and images, the one with the least memory for partial
// sums. A function of the shape, so the order of every sum is fixed.
void set_chunks(NormCosineBackward& p) {
  const NormCosine& s = p.sizes;
  int64_t best = 0;
  for (int64_t split = 1; split <= 32; split *= 2) {
    const int64_t text_chunks = std::min(s.K, split);
    const int64_t image_chunks = std::min(s.B, ceil_div(32, text_chunks));
    const int64_t rows = text_chunks * s.B + image_chunks * s.K;
    if (best == 0 || rows < best) {
      best = rows;
      p.text_chunk = ceil_div(s.K, text_chunks);
      p.image_chunk = ceil_div(s.B, image_chunks);
    }
  }
  p.text_chunks = ceil_div(s.K, p.text_chunk);
  p.image_chunks = ceil_div(s.B, p.image_chunk);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> norm_cosine_logits_bwd(
    Tensor grad_logits, Tensor hidden, Tensor weight, Tensor bias, Tensor text, Tensor image,
    Tensor logits, Tensor mean, Tensor rstd, Tensor image_rnorm, Tensor row_rnorm, double residual,
    double scale, double eps) {
  const char* op = "norm_cosine_logits_bwd";
  NormCosineBackward p{};
  p.sizes = norm_sizes(op, hidden, weight, bias, text, image, residual, scale, eps);
  NormCosine& s = p.sizes;
  const ScalarType type = hidden.scalar_type(), acc = acc_type(type);
  check_same(op, "grad_logits", grad_logits, type);
  check_same(op, "logits", logits, type);
  check_same(op, "mean", mean, acc);
  check_same(op, "rstd", rstd, acc);
  check_same(op, "image_rnorm", image_rnorm, acc);
  check_same(op, "row_rnorm", row_rnorm, acc);
  check_shape(op, "grad_logits", grad_logits, {s.B, s.K});
  check_shape(op, "logits", logits, {s.B, s.K});
  check_shape(op, "mean", mean, {s.B, s.K});
  check_shape(op, "rstd", rstd, {s.B, s.K});
  check_shape(op, "image_rnorm", image_rnorm, {s.B});
  check_shape(op, "row_rnorm", row_rnorm, {s.B, s.K});
  Tensor d_hidden = new_tensor(hidden, {s.B, s.K, s.C});
  Tensor d_weight = new_tensor(weight, {s.C});
  Tensor d_bias = new_tensor(bias, {s.C});
  Tensor d_text = new_tensor(text, {s.K, s.C});
  Tensor d_image = new_tensor(image, {s.B, s.C});
  if (s.B * s.K * s.C == 0) {
    for (Tensor* grad : {&d_hidden, &d_weight, &d_bias, &d_text, &d_image}) {
      torch::stable::zero_(*grad);
    }
    return {d_hidden, d_weight, d_bias, d_text, d_image};
  }
  p.grad_logits = rows_view(grad_logits);
  p.mean = rows_view(mean);
  p.rstd = rows_view(rstd);
  p.row_rnorm = rows_view(row_rnorm);
  p.d_hidden = rows_view(d_hidden);
  p.d_text = rows_view(d_text);
  p.d_image = rows_view(d_image);
  p.d_weight = static_cast<char*>(d_weight.data_ptr());
  p.d_bias = static_cast<char*>(d_bias.data_ptr());
  set_chunks(p);
  const int64_t width = padded_row(s.C), units = p.text_chunks * p.image_chunks;
  Tensor image_unit = new_acc(hidden, {s.B, width});
  Tensor unit_rnorm = new_acc(hidden, {s.B});
  Tensor d_text_partial = new_acc(hidden, {p.image_chunks, s.K, width});
  Tensor d_unit_partial = new_acc(hidden, {p.text_chunks, s.B, width});
  Tensor d_weight_partial = new_acc(hidden, {units, width});
  Tensor d_bias_partial = new_acc(hidden, {units, width});
  s.image_unit = image_unit.data_ptr();
  s.image_rnorm = unit_rnorm.data_ptr();
  p.d_text_partial = d_text_partial.data_ptr();
  p.d_unit_partial = d_unit_partial.data_ptr();
  p.d_weight_partial = d_weight_partial.data_ptr();
  p.d_bias_partial = d_bias_partial.data_ptr();
  run(VTCLIP_PICK(norm_cosine_images), s, s.B, 4 * s.C);
  run(VTCLIP_PICK(norm_cosine_bwd), p, units, 32 * p.text_chunk * p.image_chunk * s.C);
  run(VTCLIP_PICK(norm_cosine_finish), p, s.K + s.B + 2,
      8 * (p.text_chunks + p.image_chunks) * s.C);
  return {d_hidden, d_weight, d_bias, d_text, d_image};
}

}  // namespace
}  // namespace cpu
}  // namespace vtclip

STABLE_TORCH_LIBRARY_IMPL(vtclip, CPU, m) {
  m.impl("norm_cosine_logits_fwd", TORCH_BOX(&vtclip::cpu::norm_cosine_logits_fwd));
  m.impl("norm_cosine_logits_bwd", TORCH_BOX(&vtclip::cpu::norm_cosine_logits_bwd));
}
