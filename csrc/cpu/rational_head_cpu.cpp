// SPDX-License-Identifier: Apache-2.0
// rational_head_fwd and rational_head_bwd for CPU tensors.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Half.h>

#include <tuple>

#include "common/check.h"
#include "cpu/common/gemm.h"
#include "cpu/common/parallel.h"
#include "rational_head_args.h"
#include "cpu/common/scratch.h"

#define VTCLIP_KERNEL "cpu/rational_head_kernel.h"
#include "cpu/common/foreach_capability.h"

namespace vtclip {
namespace cpu {
namespace {

constexpr int kLinfCode = 3;

RationalHead head_sizes(const char* op, const Tensor& context, const Tensor& weight,
                        const Tensor& bias, const Tensor& image, const Tensor& text, double scale,
                        int64_t penalty) {
  const ScalarType type = check_float(op, "context", context);
  check_rank(op, "context", context, 3);
  RationalHead s{};
  s.B = context.size(0);
  s.K = context.size(1);
  s.D = context.size(2);
  check_same(op, "weight", weight, type);
  check_same(op, "bias", bias, type);
  check_same(op, "image", image, type);
  check_same(op, "text", text, type);
  check_shape(op, "weight", weight, {s.D, s.D});
  check_shape(op, "bias", bias, {s.D});
  check_shape(op, "image", image, {s.B, s.D});
  check_shape(op, "text", text, {s.K, s.D});
  if (penalty < 0 || penalty > kLinfCode) fail(op, "penalty must be 0, 1, 2 or 3, got ", penalty);
  s.dtype = dtype_of(type);
  s.scale = scale;
  s.penalty = static_cast<int>(penalty);
  s.context = rows_view(context);
  s.weight = rows_view(weight);
  s.bias = rows_view(bias);
  s.image = rows_view(image);
  s.text = rows_view(text);
  return s;
}

// Rows that share one block: at most `most`, evened out over all of them.
int64_t even_block(int64_t rows, int64_t most) { return ceil_div(rows, ceil_div(rows, most)); }

std::tuple<Tensor, Tensor, Tensor> rational_head_fwd(Tensor context, Tensor weight, Tensor bias,
                                                     Tensor image, Tensor text, double scale,
                                                     int64_t penalty) {
  RationalHeadForward p{};
  p.sizes = head_sizes("rational_head_fwd", context, weight, bias, image, text, scale, penalty);
  RationalHead& s = p.sizes;
  const bool linf = penalty == kLinfCode;
  Tensor logits = new_tensor(context, {s.B, s.K});
  Tensor penalties = new_acc(context, {s.B});
  const std::vector<int64_t> peaks{linf ? s.B : 0};
  Tensor peak = torch::stable::new_empty(context, peaks, ScalarType::Long);
  if (s.B * s.K * s.D == 0) {
    for (Tensor* out : {&logits, &penalties, &peak}) torch::stable::zero_(*out);
    return {logits, penalties, peak};
  }
  if (penalty == 0) torch::stable::zero_(penalties);
  Tensor weight_t = new_acc(context, {panels_of(s.D), s.D, kPanel});
  Tensor row_penalty = new_acc(context, {penalty == 0 ? 0 : s.B, s.K});
  const std::vector<int64_t> row_peaks{linf ? s.B : 0, s.K};
  Tensor row_peak = torch::stable::new_empty(context, row_peaks, ScalarType::Long);
  s.weight_t = weight_t.data_ptr();
  p.logits = static_cast<char*>(logits.data_ptr());
  p.row_penalty = row_penalty.data_ptr();
  p.row_peak = static_cast<int64_t*>(row_peak.data_ptr());
  p.penalty = penalties.data_ptr();
  p.peak = static_cast<int64_t*>(peak.data_ptr());
  p.row_block = even_block(s.B * s.K, 48);
  run(VTCLIP_PICK(rational_head_pack), s, panels_of(s.D), kPanel * s.D);
  run(VTCLIP_PICK(rational_head_fwd_units), p, ceil_div(s.B * s.K, p.row_block),
      p.row_block * s.D * s.D);
  if (penalty != 0) run(VTCLIP_PICK(rational_head_penalty), p, s.B, s.K);
  return {logits, penalties, peak};
}

// At most 16 units of at least 64 rows.
int64_t wanted_units(const RationalHead& s) {
  return std::max<int64_t>(1, std::min<int64_t>(16, s.B * s.K / 64));
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> rational_head_bwd(
    Tensor grad_logits, Tensor grad_penalty, Tensor context, Tensor weight, Tensor bias,
    Tensor image, Tensor text, Tensor peak, double scale, int64_t penalty, bool features) {
  const char* op = "rational_head_bwd";
  RationalHeadBackward p{};
  p.sizes = head_sizes(op, context, weight, bias, image, text, scale, penalty);
  RationalHead& s = p.sizes;
  const ScalarType type = context.scalar_type();
  const bool linf = penalty == kLinfCode;
  check_same(op, "grad_logits", grad_logits, type);
  check_same(op, "grad_penalty", grad_penalty, acc_type(type));
  check_same(op, "peak", peak, ScalarType::Long);
  check_shape(op, "grad_logits", grad_logits, {s.B, s.K});
  check_shape(op, "grad_penalty", grad_penalty, {s.B});
  check_shape(op, "peak", peak, {linf ? s.B : 0});
  Tensor d_context = new_tensor(context, {s.B, s.K, s.D});
  Tensor d_weight = new_tensor(weight, {s.D, s.D});
  Tensor d_bias = new_tensor(bias, {s.D});
  const std::vector<int64_t> none{0};
  Tensor d_image = features ? new_tensor(image, {s.B, s.D}) : new_tensor(image, none);
  Tensor d_text = features ? new_tensor(text, {s.K, s.D}) : new_tensor(text, none);
  if (s.B * s.K * s.D == 0) {
    for (Tensor* grad : {&d_context, &d_weight, &d_bias, &d_image, &d_text}) {
      torch::stable::zero_(*grad);
    }
    return {d_context, d_weight, d_bias, d_image, d_text};
  }
  p.features = features;
  p.grad_logits = rows_view(grad_logits);
  p.grad_penalty = rows_view(grad_penalty);
  p.peak = {static_cast<char*>(peak.data_ptr()), 0, 0, peak.stride(0) * 8};
  p.d_context = rows_view(d_context);
  p.d_weight = rows_view(d_weight);
  p.d_bias = static_cast<char*>(d_bias.data_ptr());
  p.chunks = row_chunks(s.B, s.K, wanted_units(s));
  const RowChunks& c = p.chunks;
  const int64_t width = padded_row(s.D), unit_rows = c.image_chunk * c.text_chunk;
  p.row_block = even_block(unit_rows, 128);
  const std::vector<int64_t> packed{panels_of(s.D), s.D, kPanel};
  Tensor weight_t = new_acc(context, packed), weight_pack = new_acc(context, packed);
  const int64_t row = width + 16;  // at least the leading dimension of the kernels
  Tensor d_mask = new_acc(context, {c.units(), p.row_block, row});
  Tensor packed_context = new_acc(context, {c.units(), p.row_block, row});
  Tensor d_weight_sum = new_acc(context, {s.D, width});
  Tensor d_bias_sum = new_acc(context, {width});
  Tensor d_image_partial = new_acc(context, {features ? c.text_chunks : 0, s.B, width});
  Tensor d_text_partial = new_acc(context, {features ? c.image_chunks : 0, s.K, width});
  if (features) {
    p.d_image = rows_view(d_image);
    p.d_text = rows_view(d_text);
  }
  s.weight_t = weight_t.data_ptr();
  s.weight_pack = weight_pack.data_ptr();
  p.d_mask = d_mask.data_ptr();
  p.context = packed_context.data_ptr();
  p.d_weight_sum = d_weight_sum.data_ptr();
  p.d_bias_sum = d_bias_sum.data_ptr();
  p.d_image_partial = d_image_partial.data_ptr();
  p.d_text_partial = d_text_partial.data_ptr();
  run(VTCLIP_PICK(rational_head_pack), s, 2 * panels_of(s.D), kPanel * s.D);
  const int64_t rounds = ceil_div(unit_rows, p.row_block);
  for (p.round = 0; p.round < rounds; ++p.round) {
    run(VTCLIP_PICK(rational_head_bwd_units), p, c.units(), 2 * p.row_block * s.D * s.D);
    run(VTCLIP_PICK(rational_head_weight), p, ceil_div(s.D, kSumRows),
        c.units() * p.row_block * kSumRows * s.D);
  }
  run(VTCLIP_PICK(rational_head_finish), p, s.D + 1 + (features ? s.B + s.K : 0), 2 * s.D);
  return {d_context, d_weight, d_bias, d_image, d_text};
}

}  // namespace
}  // namespace cpu
}  // namespace vtclip

STABLE_TORCH_LIBRARY_IMPL(vtclip, CPU, m) {
  m.impl("rational_head_fwd", TORCH_BOX(&vtclip::cpu::rational_head_fwd));
  m.impl("rational_head_bwd", TORCH_BOX(&vtclip::cpu::rational_head_bwd));
}
