// SPDX-License-Identifier: Apache-2.0
// norm_cosine_logits_fwd and norm_cosine_logits_bwd for CPU tensors.
#include <tuple>

#include "common/register.h"
#include "cpu/common/norm_cosine_host.h"
#include "cpu/common/parallel.h"

#define VTCLIP_KERNEL "cpu/norm_cosine_logits_kernel.h"
#include "cpu/common/foreach_capability.h"

namespace vtclip::cpu {
namespace {

NormCosine norm_sizes(const char* op, const Tensor& hidden, const NormTail& tail) {
  const ScalarType type = check_float(op, "hidden", hidden);
  check_rank(op, "hidden", hidden, 3);
  NormCosine s = norm_cosine(op, type, hidden.size(0), hidden.size(1), hidden.size(2),
                             {"weight", "bias"}, tail);
  s.hidden = rows_view(hidden);
  return s;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> norm_cosine_logits_fwd(
    Tensor hidden, Tensor weight, Tensor bias, Tensor text, Tensor image, double residual,
    double scale, double eps) {
  NormCosineForward p{};
  p.sizes = norm_sizes("norm_cosine_logits_fwd", hidden,
                       {weight, bias, text, image, residual, scale, eps});
  NormCosine& s = p.sizes;
  Tensor logits = new_empty(hidden, {s.B, s.K});
  Tensor mean = new_acc(hidden, {s.B, s.K});
  Tensor rstd = new_acc(hidden, {s.B, s.K});
  Tensor row_rnorm = new_acc(hidden, {s.B, s.K});
  Tensor image_rnorm = new_acc(hidden, {s.B});
  Workspace workspace(hidden);
  s.image_unit = workspace.take({s.B, row_width(s.C)});
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
RowChunks least_chunks(int64_t B, int64_t K) {
  RowChunks c{};
  int64_t best = 0;
  for (int64_t split = 1; split <= 32; split *= 2) {
    const int64_t text_chunks = std::min(K, split);
    const int64_t image_chunks = std::min(B, ceil_div(32, text_chunks));
    const int64_t rows = text_chunks * B + image_chunks * K;
    if (best == 0 || rows < best) {
      best = rows;
      c.text_chunk = ceil_div(K, text_chunks);
      c.image_chunk = ceil_div(B, image_chunks);
    }
  }
  c.text_chunks = ceil_div(K, c.text_chunk);
  c.image_chunks = ceil_div(B, c.image_chunk);
  return c;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> norm_cosine_logits_bwd(
    Tensor grad_logits, Tensor hidden, Tensor weight, Tensor bias, Tensor text, Tensor image,
    Tensor logits, Tensor mean, Tensor rstd, Tensor image_rnorm, Tensor row_rnorm, double residual,
    double scale, double eps) {
  const char* op = "norm_cosine_logits_bwd";
  const NormTail tail{weight, bias, text, image, residual, scale, eps};
  NormCosineBackward p{};
  p.sizes = norm_sizes(op, hidden, tail);
  NormCosine& s = p.sizes;
  const ScalarType type = hidden.scalar_type(), acc = acc_type(type);
  p.grad_logits = checked_view(op, "grad_logits", grad_logits, type, {s.B, s.K});
  checked_view(op, "logits", logits, type, {s.B, s.K});
  p.mean = checked_view(op, "mean", mean, acc, {s.B, s.K});
  p.rstd = checked_view(op, "rstd", rstd, acc, {s.B, s.K});
  checked_view(op, "image_rnorm", image_rnorm, acc, {s.B});
  p.row_rnorm = checked_view(op, "row_rnorm", row_rnorm, acc, {s.B, s.K});
  Tensor d_hidden = new_empty(hidden, {s.B, s.K, s.C});
  NormOutputs out(tail, s, true);
  if (s.B * s.K * s.C == 0) {
    zero_all({&d_hidden, &out.weight, &out.bias, &out.text, &out.image});
    return {d_hidden, out.weight, out.bias, out.text, out.image};
  }
  p.d_hidden = rows_view(d_hidden);
  const RowChunks chunks = least_chunks(s.B, s.K);
  Workspace workspace(hidden);
  set_gradients(p.grads, s, workspace, out, true, chunks);
  run(VTCLIP_PICK(norm_cosine_images), s, s.B, 4 * s.C);
  run(VTCLIP_PICK(norm_cosine_bwd), p, chunks.units(),
      32 * chunks.text_chunk * chunks.image_chunk * s.C);
  run(VTCLIP_PICK(norm_cosine_finish), p, 2 + s.K + s.B,
      8 * (chunks.text_chunks + chunks.image_chunks) * s.C);
  return {d_hidden, out.weight, out.bias, out.text, out.image};
}

}  // namespace
}  // namespace vtclip::cpu

VTCLIP_REGISTER(CPU, cpu, norm_cosine_logits)
