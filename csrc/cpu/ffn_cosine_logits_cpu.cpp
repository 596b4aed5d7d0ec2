// SPDX-License-Identifier: Apache-2.0
// ffn_cosine_logits_fwd and ffn_cosine_logits_bwd for CPU tensors.
#include <tuple>

#include "common/register.h"
#include "cpu/common/norm_cosine_host.h"
#include "cpu/common/parallel.h"

namespace vtclip::cpu {

// Numbers kept per row, in this order. kShift is what rounding left out of the mean.
enum FfnStat { kMean, kShift, kRstd, kRnorm, kCosine, kMeanG, kMeanGz, kFfnStats };

struct FfnCosine {
  NormCosine tail;  // sizes, norm, text and image; its hidden is z = residual_input + hidden W^T +
                    // bias, of which one block of rows exists at a time
  int64_t F;
  RowsView hidden, weight, bias, residual_input;
  void* weight_t;     // packed weight^T: element (f, c), for z
  void* weight_pack;  // backward only: packed weight: element (c, f), for d_hidden = d_z weight
};

struct FfnCosineForward {
  FfnCosine sizes;
  int64_t row_block;
  char* logits;  // [B, K] contiguous
  void* stats;   // [kFfnStats, B, K] acc
};

struct FfnCosineBackward {
  FfnCosine sizes;
  NormGradients grads;  // of the tail; of texts and images if feature_grads
  bool feature_grads;
  int64_t row_block;  // rows of a unit in one round
  int64_t round;      // a unit's rows round * row_block .. are in the works
  RowsView grad_logits;
  RowsView stats;  // [kFfnStats, B, K]
  RowsView d_hidden, d_weight, d_residual_input;
  char* d_bias;
  void* d_z;           // [units, row_block, C padded] acc: d_z of this round
  void* hidden;        // [units, row_block, F padded] acc: the same rows of hidden
  void* d_weight_sum;  // [C, F padded] acc
  void* d_bias_sum;    // [C padded] acc
};

}  // namespace vtclip::cpu

#define VTCLIP_KERNEL "cpu/ffn_cosine_logits_kernel.h"
#include "cpu/common/foreach_capability.h"

namespace vtclip::cpu {
namespace {

FfnCosine ffn_sizes(const char* op, const Tensor& hidden, const Tensor& weight, const Tensor& bias,
                    const Tensor& residual_input, const NormTail& tail) {
  const ScalarType type = check_float(op, "hidden", hidden);
  check_rank(op, "hidden", hidden, 3);
  check_rank(op, "weight", weight, 2);
  const int64_t B = hidden.size(0), K = hidden.size(1), C = weight.size(0);
  FfnCosine s{};
  s.F = hidden.size(2);
  s.hidden = rows_view(hidden);
  s.weight = checked_view(op, "weight", weight, type, {C, s.F});
  s.bias = checked_view(op, "bias", bias, type, {C});
  s.residual_input = checked_view(op, "residual_input", residual_input, type, {B, K, C});
  s.tail = norm_cosine(op, type, B, K, C, {"norm_weight", "norm_bias"}, tail);
  return s;
}

std::tuple<Tensor, Tensor, Tensor> ffn_cosine_logits_fwd(Tensor hidden, Tensor weight, Tensor bias,
                                                         Tensor residual_input, Tensor norm_weight,
                                                         Tensor norm_bias, Tensor text,
                                                         Tensor image, double residual,
                                                         double scale, double eps) {
  FfnCosineForward p{};
  p.sizes = ffn_sizes("ffn_cosine_logits_fwd", hidden, weight, bias, residual_input,
                      {norm_weight, norm_bias, text, image, residual, scale, eps});
  FfnCosine& s = p.sizes;
  NormCosine& t = s.tail;
  const int64_t rows = t.B * t.K;
  Tensor logits = new_empty(hidden, {t.B, t.K});
  Tensor stats = new_acc(hidden, {kFfnStats, t.B, t.K});
  Tensor image_rnorm = new_acc(hidden, {t.B});
  if (rows * t.C == 0) {
    zero_all({&logits, &stats, &image_rnorm});
    return {logits, stats, image_rnorm};
  }
  Workspace workspace(hidden);
  t.image_unit = workspace.take({t.B, row_width(t.C)});
  t.image_rnorm = image_rnorm.data_ptr();
  s.weight_t = workspace.take({panels_of(t.C), s.F, kPanel});
  p.logits = static_cast<char*>(logits.data_ptr());
  p.stats = stats.data_ptr();
  p.row_block = even_block(rows, 96);
  run(VTCLIP_PICK(ffn_cosine_images), s, t.B, 4 * t.C);
  run(VTCLIP_PICK(ffn_cosine_pack), s, panels_of(t.C), kPanel * s.F);
  run(VTCLIP_PICK(ffn_cosine_fwd), p, ceil_div(rows, p.row_block), p.row_block * (s.F + 32) * t.C);
  return {logits, stats, image_rnorm};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> ffn_cosine_logits_bwd(
    Tensor grad_logits, Tensor hidden, Tensor weight, Tensor bias, Tensor residual_input,
    Tensor norm_weight, Tensor norm_bias, Tensor text, Tensor image, Tensor stats,
    Tensor image_rnorm, double residual, double scale, bool feature_grads) {
  const char* op = "ffn_cosine_logits_bwd";
  const NormTail tail{norm_weight, norm_bias, text, image, residual, scale, 0.0};
  FfnCosineBackward p{};
  p.sizes = ffn_sizes(op, hidden, weight, bias, residual_input, tail);
  FfnCosine& s = p.sizes;
  NormCosine& t = s.tail;
  const ScalarType type = hidden.scalar_type(), acc = acc_type(type);
  const int64_t rows = t.B * t.K;
  p.grad_logits = checked_view(op, "grad_logits", grad_logits, type, {t.B, t.K});
  p.stats = checked_view(op, "stats", stats, acc, {kFfnStats, t.B, t.K});
  checked_view(op, "image_rnorm", image_rnorm, acc, {t.B});
  Tensor d_hidden = new_empty(hidden, {t.B, t.K, s.F});
  Tensor d_weight = new_empty(weight, {t.C, s.F});
  Tensor d_bias = new_empty(bias, {t.C});
  Tensor d_residual_input = new_empty(residual_input, {t.B, t.K, t.C});
  NormOutputs out(tail, t, feature_grads);
  if (rows * t.C == 0) {
    zero_all({&d_hidden, &d_weight, &d_bias, &d_residual_input, &out.weight, &out.bias, &out.text,
              &out.image});
    return {d_hidden,   d_weight, d_bias,   d_residual_input,
            out.weight, out.bias, out.text, out.image};
  }
  p.feature_grads = feature_grads;
  p.d_hidden = rows_view(d_hidden);
  p.d_weight = rows_view(d_weight);
  p.d_residual_input = rows_view(d_residual_input);
  p.d_bias = static_cast<char*>(d_bias.data_ptr());
  const RowChunks c = row_chunks(t.B, t.K, weight_units(rows));
  const int64_t unit_rows = c.image_chunk * c.text_chunk;
  p.row_block = even_block(unit_rows, 64);
  Workspace workspace(hidden);
  set_gradients(p.grads, t, workspace, out, feature_grads, c);
  s.weight_t = workspace.take({panels_of(t.C), s.F, kPanel});
  s.weight_pack = workspace.take({panels_of(s.F), t.C, kPanel});
  p.d_z = workspace.take({c.units(), p.row_block, panel_width(t.C)});
  p.hidden = workspace.take({c.units(), p.row_block, panel_width(s.F)});
  p.d_weight_sum = workspace.take({t.C, row_width(s.F)});
  p.d_bias_sum = workspace.take({row_width(t.C)});
  run(VTCLIP_PICK(ffn_cosine_images), s, t.B, 4 * t.C);
  run(VTCLIP_PICK(ffn_cosine_pack), s, panels_of(t.C) + panels_of(s.F), kPanel * (s.F + t.C) / 2);
  const int64_t rounds = ceil_div(unit_rows, p.row_block);
  for (p.round = 0; p.round < rounds; ++p.round) {
    run(VTCLIP_PICK(ffn_cosine_bwd), p, c.units(), 2 * p.row_block * (s.F + 32) * t.C);
    run(VTCLIP_PICK(ffn_cosine_weight), p, ceil_div(t.C, kSumRows),
        c.units() * p.row_block * kSumRows * (s.F + 1));
  }
  run(VTCLIP_PICK(ffn_cosine_finish), p, t.C + 3 + (feature_grads ? t.B + t.K : 0),
      2 * (s.F + t.C));
  return {d_hidden, d_weight, d_bias, d_residual_input, out.weight, out.bias, out.text, out.image};
}

}  // namespace
}  // namespace vtclip::cpu

VTCLIP_REGISTER(CPU, cpu, ffn_cosine_logits)
