// SPDX-License-Identifier: Apache-2.0
// rational_logits_fwd and rational_logits_bwd for CPU tensors.
#include <tuple>

#include "common/register.h"
#include "cpu/common/parallel.h"
#include "cpu/common/row_args.h"

namespace vtclip::cpu {

struct RationalLogits {
  int64_t B, K, D;
  Dtype dtype;
  double scale;
  RowsView image, text, mask;
};

struct RationalLogitsForward {
  RationalLogits sizes;
  char* logits;  // [B, K] contiguous
};

struct RationalLogitsBackward {
  RationalLogits sizes;
  RowsView grad_logits, d_image, d_text, d_mask;
  RowChunks chunks;
  void* d_image_partial;  // [text_chunks, B, D padded] acc
  void* d_text_partial;   // [image_chunks, K, D padded] acc
};

}  // namespace vtclip::cpu

#define VTCLIP_KERNEL "cpu/rational_logits_kernel.h"
#include "cpu/common/foreach_capability.h"

namespace vtclip::cpu {
namespace {

RationalLogits logits_sizes(const char* op, const Tensor& image, const Tensor& text,
                            const Tensor& mask, double scale) {
  const ScalarType type = check_float(op, "mask", mask);
  check_rank(op, "mask", mask, 3);
  RationalLogits s{};
  s.B = mask.size(0);
  s.K = mask.size(1);
  s.D = mask.size(2);
  s.image = checked_view(op, "image", image, type, {s.B, s.D});
  s.text = checked_view(op, "text", text, type, {s.K, s.D});
  s.dtype = dtype_of(type);
  s.scale = scale;
  s.mask = rows_view(mask);
  return s;
}

Tensor rational_logits_fwd(Tensor image, Tensor text, Tensor mask, double scale) {
  RationalLogitsForward p{};
  p.sizes = logits_sizes("rational_logits_fwd", image, text, mask, scale);
  const RationalLogits& s = p.sizes;
  Tensor logits = new_empty(image, {s.B, s.K});
  p.logits = static_cast<char*>(logits.data_ptr());
  run(VTCLIP_PICK(rational_logits_fwd_units), p, s.B * s.K, 4 * s.D);
  return logits;
}

std::tuple<Tensor, Tensor, Tensor> rational_logits_bwd(Tensor grad_logits, Tensor image,
                                                       Tensor text, Tensor mask, double scale) {
  const char* op = "rational_logits_bwd";
  RationalLogitsBackward p{};
  p.sizes = logits_sizes(op, image, text, mask, scale);
  const RationalLogits& s = p.sizes;
  p.grad_logits = checked_view(op, "grad_logits", grad_logits, mask.scalar_type(), {s.B, s.K});
  Tensor d_image = new_empty(image, {s.B, s.D});
  Tensor d_text = new_empty(text, {s.K, s.D});
  Tensor d_mask = new_empty(mask, {s.B, s.K, s.D});
  if (s.B * s.K * s.D == 0) {
    zero_all({&d_image, &d_text, &d_mask});
    return {d_image, d_text, d_mask};
  }
  p.d_image = rows_view(d_image);
  p.d_text = rows_view(d_text);
  p.d_mask = rows_view(d_mask);
  p.chunks = row_chunks(s.B, s.K, 32);
  const RowChunks& c = p.chunks;
  const int64_t width = row_width(s.D);
  Workspace workspace(image);
  p.d_image_partial = workspace.take({c.text_chunks, s.B, width});
  p.d_text_partial = workspace.take({c.image_chunks, s.K, width});
  run(VTCLIP_PICK(rational_logits_bwd_units), p, c.units(), 8 * c.image_chunk * c.text_chunk * s.D);
  run(VTCLIP_PICK(rational_logits_finish), p, s.B + s.K,
      4 * (c.image_chunks + c.text_chunks) * s.D);
  return {d_image, d_text, d_mask};
}

}  // namespace
}  // namespace vtclip::cpu

VTCLIP_REGISTER(CPU, cpu, rational_logits)
