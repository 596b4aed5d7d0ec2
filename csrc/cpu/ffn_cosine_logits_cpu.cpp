// SPDX-License-Identifier: Apache-2.0
// ffn_cosine_logits_fwd and ffn_cosine_logits_bwd for CPU tensors.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Half.h>

#include <array>
#include <tuple>

#include "common/check.h"
#include "ffn_cosine_args.h"
#include "gemm.h"
#include "parallel.h"
#include "scratch.h"

#define VTCLIP_KERNEL "ffn_cosine_logits_kernel.h"
#include "foreach_capability.h"

namespace vtclip {
namespace cpu {
namespace {

// hidden, weight, bias, residual_input, norm_weight, norm_bias, text, image
using Inputs = std::array<Tensor, 8>;

FfnCosine ffn_sizes(const char* op, const Inputs& tensors, double residual, double scale,
                    double eps) {
  const auto& [hidden, weight, bias, residual_input, norm_weight, norm_bias, text, image] = tensors;
  const ScalarType type = check_float(op, "hidden", hidden);
  check_rank(op, "hidden", hidden, 3);
  check_rank(op, "weight", weight, 2);
  FfnCosine s{};
  NormCosine& t = s.tail;
  t.B = hidden.size(0);
  t.K = hidden.size(1);
  t.C = weight.size(0);
  s.F = hidden.size(2);
  check_same(op, "weight", weight, type);
  check_same(op, "bias", bias, type);
  check_same(op, "residual_input", residual_input, type);
  check_same(op, "norm_weight", norm_weight, type);
  check_same(op, "norm_bias", norm_bias, type);
  check_same(op, "text", text, type);
  check_same(op, "image", image, type);
  check_shape(op, "weight", weight, {t.C, s.F});
  check_shape(op, "bias", bias, {t.C});
  check_shape(op, "residual_input", residual_input, {t.B, t.K, t.C});
  check_shape(op, "norm_weight", norm_weight, {t.C});
  check_shape(op, "norm_bias", norm_bias, {t.C});
  check_shape(op, "text", text, {t.K, t.C});
  check_shape(op, "image", image, {t.B, t.C});
  t.dtype = dtype_of(type);
  t.residual = residual;
  t.scale = scale;
  t.eps = eps;
  s.hidden = rows_view(hidden);
  s.weight = rows_view(weight);
  s.bias = rows_view(bias);
  s.residual_input = rows_view(residual_input);
  t.weight = rows_view(norm_weight);
  t.bias = rows_view(norm_bias);
  t.text = rows_view(text);
  t.image = rows_view(image);
  return s;
}

// Rows that share one block: at most `most`, evened out over all of them.
int64_t even_block(int64_t rows, int64_t most) { return ceil_div(rows, ceil_div(rows, most)); }

std::tuple<Tensor, Tensor, Tensor> ffn_cosine_logits_fwd(Tensor hidden, Tensor weight, Tensor bias,
                                                         Tensor residual_input, Tensor norm_weight,
                                                         Tensor norm_bias, Tensor text,
                                                         Tensor image, double residual,
                                                         double scale, double eps) {
  FfnCosineForward p{};
  p.sizes = ffn_sizes(
      "ffn_cosine_logits_fwd",
      {hidden, weight, bias, residual_input, norm_weight, norm_bias, text, image}, residual, scale,
      eps);
  FfnCosine& s = p.sizes;
  NormCosine& t = s.tail;
  const int64_t rows = t.B * t.K;
  Tensor logits = new_tensor(hidden, {t.B, t.K});
  Tensor stats = new_acc(hidden, {kFfnStats, t.B, t.K});
  Tensor image_rnorm = new_acc(hidden, {t.B});
  if (rows * t.C == 0) {
    for (Tensor* out : {&logits, &stats, &image_rnorm}) torch::stable::zero_(*out);
    return {logits, stats, image_rnorm};
  }
  Tensor image_unit = new_acc(hidden, {t.B, padded_row(t.C)});
  Tensor weight_t = new_acc(hidden, {panels_of(t.C), s.F, kPanel});
  t.image_unit = image_unit.data_ptr();
  t.image_rnorm = image_rnorm.data_ptr();
  s.weight_t = weight_t.data_ptr();
  p.logits = static_cast<char*>(logits.data_ptr());
  p.stats = stats.data_ptr();
  p.row_block = even_block(rows, 96);
  run(VTCLIP_PICK(ffn_cosine_images), s, t.B, 4 * t.C);
  run(VTCLIP_PICK(ffn_cosine_pack), s, panels_of(t.C), kPanel * s.F);
  run(VTCLIP_PICK(ffn_cosine_fwd), p, ceil_div(rows, p.row_block), p.row_block * (s.F + 32) * t.C);
  return {logits, stats, image_rnorm};
}

// At most 16 units of at least 64 rows.
int64_t wanted_units(int64_t rows) {
  return std::max<int64_t>(1, std::min<int64_t>(16, rows / 64));
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> ffn_cosine_logits_bwd(
    Tensor grad_logits, Tensor hidden, Tensor weight, Tensor bias, Tensor residual_input,
    Tensor norm_weight, Tensor norm_bias, Tensor text, Tensor image, Tensor stats,
    Tensor image_rnorm, double residual, double scale, bool features) {
  const char* op = "ffn_cosine_logits_bwd";
  FfnCosineBackward p{};
  p.sizes = ffn_sizes(op,
                      {hidden, weight, bias, residual_input, norm_weight, norm_bias, text, image},
                      residual, scale, 0.0);
  FfnCosine& s = p.sizes;
  NormCosine& t = s.tail;
  const ScalarType type = hidden.scalar_type(), acc = acc_type(type);
  const int64_t rows = t.B * t.K;
  check_same(op, "grad_logits", grad_logits, type);
  check_same(op, "stats", stats, acc);
  check_same(op, "image_rnorm", image_rnorm, acc);
  check_shape(op, "grad_logits", grad_logits, {t.B, t.K});
  check_shape(op, "stats", stats, {kFfnStats, t.B, t.K});
  check_shape(op, "image_rnorm", image_rnorm, {t.B});
  const std::vector<int64_t> none{0};
  Tensor d_hidden = new_tensor(hidden, {t.B, t.K, s.F});
  Tensor d_weight = new_tensor(weight, {t.C, s.F});
  Tensor d_bias = new_tensor(bias, {t.C});
  Tensor d_residual_input = new_tensor(residual_input, {t.B, t.K, t.C});
  Tensor d_norm_weight = new_tensor(norm_weight, {t.C});
  Tensor d_norm_bias = new_tensor(norm_bias, {t.C});
  Tensor d_text = features ? new_tensor(text, {t.K, t.C}) : new_tensor(text, none);
  Tensor d_image = features ? new_tensor(image, {t.B, t.C}) : new_tensor(image, none);
  if (rows * t.C == 0) {
    for (Tensor* grad : {&d_hidden, &d_weight, &d_bias, &d_residual_input, &d_norm_weight,
                         &d_norm_bias, &d_text, &d_image}) {
      torch::stable::zero_(*grad);
    }
    return {d_hidden,      d_weight,    d_bias, d_residual_input,
            d_norm_weight, d_norm_bias, d_text, d_image};
  }
  p.features = features;
  p.grad_logits = rows_view(grad_logits);
  p.stats = rows_view(stats);
  p.d_hidden = rows_view(d_hidden);
  p.d_weight = rows_view(d_weight);
  p.d_residual_input = rows_view(d_residual_input);
  p.d_bias = static_cast<char*>(d_bias.data_ptr());
  p.d_norm_weight = static_cast<char*>(d_norm_weight.data_ptr());
  p.d_norm_bias = static_cast<char*>(d_norm_bias.data_ptr());
  p.chunks = row_chunks(t.B, t.K, wanted_units(rows));
  const RowChunks& c = p.chunks;
  const int64_t width = padded_row(t.C), hidden_width = padded_row(s.F);
  const int64_t unit_rows = c.image_chunk * c.text_chunk;
  p.row_block = even_block(unit_rows, 64);
  // rows of a workspace: at least the leading dimension of the kernels
  Tensor d_z = new_acc(hidden, {c.units(), p.row_block, width + 16});
  Tensor packed_hidden = new_acc(hidden, {c.units(), p.row_block, hidden_width + 16});
  Tensor weight_t = new_acc(hidden, {panels_of(t.C), s.F, kPanel});
  Tensor weight_pack = new_acc(hidden, {panels_of(s.F), t.C, kPanel});
  Tensor d_weight_sum = new_acc(hidden, {t.C, hidden_width});
  Tensor d_bias_sum = new_acc(hidden, {width});
  Tensor d_norm_partial = new_acc(hidden, {2, c.units(), width});
  Tensor d_text_partial = new_acc(hidden, {features ? c.image_chunks : 0, t.K, width});
  Tensor d_unit_partial = new_acc(hidden, {features ? c.text_chunks : 0, t.B, width});
  Tensor image_unit = new_acc(hidden, {t.B, width});
  Tensor unit_rnorm = new_acc(hidden, {t.B});
  if (features) {
    p.d_text = rows_view(d_text);
    p.d_image = rows_view(d_image);
  }
  t.image_unit = image_unit.data_ptr();
  t.image_rnorm = unit_rnorm.data_ptr();
  s.weight_t = weight_t.data_ptr();
  s.weight_pack = weight_pack.data_ptr();
  p.d_z = d_z.data_ptr();
  p.hidden = packed_hidden.data_ptr();
  p.d_weight_sum = d_weight_sum.data_ptr();
  p.d_bias_sum = d_bias_sum.data_ptr();
  const int64_t partial_bytes = c.units() * width * (acc == ScalarType::Double ? 8 : 4);
  p.d_norm_weight_partial = d_norm_partial.data_ptr();
  p.d_norm_bias_partial = static_cast<char*>(d_norm_partial.data_ptr()) + partial_bytes;
  p.d_text_partial = d_text_partial.data_ptr();
  p.d_unit_partial = d_unit_partial.data_ptr();
  run(VTCLIP_PICK(ffn_cosine_images), s, t.B, 4 * t.C);
  run(VTCLIP_PICK(ffn_cosine_pack), s, panels_of(t.C) + panels_of(s.F), kPanel * (s.F + t.C) / 2);
  const int64_t rounds = ceil_div(unit_rows, p.row_block);
  for (p.round = 0; p.round < rounds; ++p.round) {
    run(VTCLIP_PICK(ffn_cosine_bwd), p, c.units(), 2 * p.row_block * (s.F + 32) * t.C);
    run(VTCLIP_PICK(ffn_cosine_weight), p, ceil_div(t.C, kSumRows),
        c.units() * p.row_block * kSumRows * (s.F + 1));
  }
  run(VTCLIP_PICK(ffn_cosine_finish), p, t.C + 3 + (features ? t.B + t.K : 0), 2 * (s.F + t.C));
  return {d_hidden,      d_weight,    d_bias, d_residual_input,
          d_norm_weight, d_norm_bias, d_text, d_image};
}

}  // namespace
}  // namespace cpu
}  // namespace vtclip

STABLE_TORCH_LIBRARY_IMPL(vtclip, CPU, m) {
  m.impl("ffn_cosine_logits_fwd", TORCH_BOX(&vtclip::cpu::ffn_cosine_logits_fwd));
  m.impl("ffn_cosine_logits_bwd", TORCH_BOX(&vtclip::cpu::ffn_cosine_logits_bwd));
}
