// SPDX-License-Identifier: Apache-2.0
// rational_head_fwd and rational_head_bwd for CPU tensors.
#include <tuple>

#include "common/register.h"
#include "cpu/common/parallel.h"
#include "cpu/common/row_args.h"

namespace vtclip::cpu {

struct RationalHead {
  int64_t B, K, D;
  Dtype dtype;
  double scale;
  int penalty;  // 0 none, 1 L1, 2 MSE, 3 L-infinity
  RowsView context, weight, bias, image, text;
  void* weight_t;     // packed weight^T: element (in, out), for m = context weight^T + bias
  void* weight_pack;  // backward only: packed weight: element (out, in), for d_context = d_m weight
};

struct RationalHeadForward {
  RationalHead sizes;
  int64_t row_block;
  char* logits;       // [B, K] contiguous
  void* row_penalty;  // [B, K] acc: sum over d, or largest; not read without a penalty
  int64_t* row_peak;  // [B, K], L-infinity only: first d of the row's largest
  void* penalty;      // [B] acc
  int64_t* peak;      // [B], L-infinity only
};

struct RationalHeadBackward {
  RationalHead sizes;
  bool feature_grads;
  RowChunks chunks;
  int64_t row_block;  // rows of a unit in one round
  int64_t round;      // a unit's rows round * row_block .. are in the works
  RowsView grad_logits, grad_penalty, peak;
  RowsView d_context, d_weight, d_image, d_text;
  char* d_bias;
  void* d_mask;           // [units, row_block, D padded] acc: d_m of this round
  void* context;          // the same rows of the context, packed
  void* d_weight_sum;     // [D, D padded] acc
  void* d_bias_sum;       // [D padded] acc
  void* d_image_partial;  // feature_grads: [text_chunks, B, D padded] acc
  void* d_text_partial;   // feature_grads: [image_chunks, K, D padded] acc
};

}  // namespace vtclip::cpu

#define VTCLIP_KERNEL "cpu/rational_head_kernel.h"
#include "cpu/common/foreach_capability.h"

namespace vtclip::cpu {
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
  s.weight = checked_view(op, "weight", weight, type, {s.D, s.D});
  s.bias = checked_view(op, "bias", bias, type, {s.D});
  s.image = checked_view(op, "image", image, type, {s.B, s.D});
  s.text = checked_view(op, "text", text, type, {s.K, s.D});
  if (penalty < 0 || penalty > kLinfCode) fail(op, "penalty must be 0, 1, 2 or 3, got ", penalty);
  s.dtype = dtype_of(type);
  s.scale = scale;
  s.penalty = static_cast<int>(penalty);
  s.context = rows_view(context);
  return s;
}

std::tuple<Tensor, Tensor, Tensor> rational_head_fwd(Tensor context, Tensor weight, Tensor bias,
                                                     Tensor image, Tensor text, double scale,
                                                     int64_t penalty) {
  RationalHeadForward p{};
  p.sizes = head_sizes("rational_head_fwd", context, weight, bias, image, text, scale, penalty);
  RationalHead& s = p.sizes;
  const bool linf = penalty == kLinfCode;
  Tensor logits = new_empty(context, {s.B, s.K});
  Tensor penalties = new_acc(context, {s.B});
  Tensor peak = new_empty(context, {linf ? s.B : 0}, ScalarType::Long);
  if (s.B * s.K * s.D == 0) {
    zero_all({&logits, &penalties, &peak});
    return {logits, penalties, peak};
  }
  if (penalty == 0) torch::stable::zero_(penalties);
  Workspace workspace(context);
  Tensor row_peak = new_empty(context, {linf ? s.B : 0, s.K}, ScalarType::Long);
  s.weight_t = workspace.take({panels_of(s.D), s.D, kPanel});
  p.logits = static_cast<char*>(logits.data_ptr());
  p.row_penalty = workspace.take({penalty == 0 ? 0 : s.B, s.K});
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

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> rational_head_bwd(
    Tensor grad_logits, Tensor grad_penalty, Tensor context, Tensor weight, Tensor bias,
    Tensor image, Tensor text, Tensor peak, double scale, int64_t penalty, bool feature_grads) {
  const char* op = "rational_head_bwd";
  RationalHeadBackward p{};
  p.sizes = head_sizes(op, context, weight, bias, image, text, scale, penalty);
  RationalHead& s = p.sizes;
  const ScalarType type = context.scalar_type();
  const bool linf = penalty == kLinfCode;
  p.grad_logits = checked_view(op, "grad_logits", grad_logits, type, {s.B, s.K});
  p.grad_penalty = checked_view(op, "grad_penalty", grad_penalty, acc_type(type), {s.B});
  check_same(op, "peak", peak, ScalarType::Long, {linf ? s.B : 0});
  Tensor d_context = new_empty(context, {s.B, s.K, s.D});
  Tensor d_weight = new_empty(weight, {s.D, s.D});
  Tensor d_bias = new_empty(bias, {s.D});
  Tensor d_image = feature_grads ? new_empty(image, {s.B, s.D}) : new_empty(image, {0});
  Tensor d_text = feature_grads ? new_empty(text, {s.K, s.D}) : new_empty(text, {0});
  if (s.B * s.K * s.D == 0) {
    zero_all({&d_context, &d_weight, &d_bias, &d_image, &d_text});
    return {d_context, d_weight, d_bias, d_image, d_text};
  }
  p.feature_grads = feature_grads;
  p.peak = {static_cast<char*>(peak.data_ptr()), 0, 0, peak.stride(0) * 8};
  p.d_context = rows_view(d_context);
  p.d_weight = rows_view(d_weight);
  p.d_bias = static_cast<char*>(d_bias.data_ptr());
  p.chunks = row_chunks(s.B, s.K, weight_units(s.B * s.K));
  const RowChunks& c = p.chunks;
  const int64_t width = row_width(s.D), unit_rows = c.image_chunk * c.text_chunk;
  p.row_block = even_block(unit_rows, 128);
  Workspace workspace(context);
  s.weight_t = workspace.take({panels_of(s.D), s.D, kPanel});
  s.weight_pack = workspace.take({panels_of(s.D), s.D, kPanel});
  p.d_mask = workspace.take({c.units(), p.row_block, panel_width(s.D)});
  p.context = workspace.take({c.units(), p.row_block, panel_width(s.D)});
  p.d_weight_sum = workspace.take({s.D, width});
  p.d_bias_sum = workspace.take({width});
  if (feature_grads) {
    p.d_image = rows_view(d_image);
    p.d_text = rows_view(d_text);
    p.d_image_partial = workspace.take({c.text_chunks, s.B, width});
    p.d_text_partial = workspace.take({c.image_chunks, s.K, width});
  }
  run(VTCLIP_PICK(rational_head_pack), s, 2 * panels_of(s.D), kPanel * s.D);
  const int64_t rounds = ceil_div(unit_rows, p.row_block);
  for (p.round = 0; p.round < rounds; ++p.round) {
    run(VTCLIP_PICK(rational_head_bwd_units), p, c.units(), 2 * p.row_block * s.D * s.D);
    run(VTCLIP_PICK(rational_head_weight), p, ceil_div(s.D, kSumRows),
        c.units() * p.row_block * kSumRows * s.D);
  }
  run(VTCLIP_PICK(rational_head_finish), p, s.D + 1 + (feature_grads ? s.B + s.K : 0), 2 * s.D);
  return {d_context, d_weight, d_bias, d_image, d_text};
}

}  // namespace
}  // namespace vtclip::cpu

VTCLIP_REGISTER(CPU, cpu, rational_head)
