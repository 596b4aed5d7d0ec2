// SPDX-License-Identifier: Apache-2.0
// cosine_logits_fwd and cosine_logits_bwd for CPU tensors.
#include <tuple>

#include "common/register.h"
#include "cpu/common/parallel.h"
#include "cpu/common/row_args.h"

namespace vtclip::cpu {

struct Cosine {
  int64_t B, K, D;
  Dtype dtype;
  double scale;
  RowsView image, text;  // text.batch is 0 where the texts are shared by all images
  void* image_rnorm;     // [B] acc
  void* text_rnorm;      // [K] or [B, K] acc
  void* image_unit;      // [B, D padded] acc: image / |image|
  int64_t image_block;   // images per unit
  int64_t text_block;    // texts per unit
};

struct CosineForward {
  Cosine sizes;
  char* logits;  // [B, K] contiguous
};

struct CosineBackward {
  Cosine sizes;
  RowsView grad_logits;
  RowsView image_rnorm_in, text_rnorm_in;
  RowsView d_image, d_text;
  void* text_unit;  // shared texts: [K, D padded] acc
  void* grads;      // shared texts: [B, K] acc, times scale
  void* d_unit;     // [num_chunks, B, D padded] acc: gradient of image / |image|
  int64_t num_chunks;
};

}  // namespace vtclip::cpu

#define VTCLIP_KERNEL "cpu/cosine_logits_kernel.h"
#include "cpu/common/foreach_capability.h"

namespace vtclip::cpu {
namespace {

Cosine cosine_sizes(const char* op, const Tensor& image, const Tensor& text, double scale) {
  const ScalarType type = check_float(op, "image", image);
  check_same(op, "text", text, type);
  check_rank(op, "image", image, 2);
  Cosine s{};
  s.B = image.size(0);
  s.D = image.size(1);
  if (text.dim() == 3) {
    s.K = text.size(1);
    check_shape(op, "text", text, {s.B, s.K, s.D});
  } else {
    check_rank(op, "text", text, 2);
    s.K = text.size(0);
    check_shape(op, "text", text, {s.K, s.D});
  }
  s.dtype = dtype_of(type);
  s.scale = scale;
  s.image = rows_view(image);
  s.text = rows_view(text);
  s.image_block = std::max<int64_t>(1, std::min<int64_t>(s.B, 128));
  s.text_block = 32;
  return s;
}

std::tuple<Tensor, Tensor, Tensor> cosine_logits_fwd(Tensor image, Tensor text, double scale) {
  CosineForward p{};
  p.sizes = cosine_sizes("cosine_logits_fwd", image, text, scale);
  Cosine& s = p.sizes;
  const bool shared = text.dim() == 2;
  Tensor logits = new_empty(image, {s.B, s.K});
  Tensor image_rnorm = new_acc(image, {s.B});
  Tensor text_rnorm = shared ? new_acc(text, {s.K}) : new_acc(text, {s.B, s.K});
  Workspace workspace(image);
  s.image_rnorm = image_rnorm.data_ptr();
  s.text_rnorm = text_rnorm.data_ptr();
  s.image_unit = workspace.take({s.B, row_width(s.D)});
  p.logits = static_cast<char*>(logits.data_ptr());
  run(VTCLIP_PICK(cosine_images), s, s.B, 4 * s.D);
  if (!shared) {
    run(VTCLIP_PICK(cosine_own_fwd), p, s.B * s.K, 8 * s.D);
  } else {
    // With no image there still are norms of the texts.
    const int64_t image_blocks = std::max<int64_t>(1, ceil_div(s.B, s.image_block));
    run(VTCLIP_PICK(cosine_shared_fwd), p, image_blocks * ceil_div(s.K, s.text_block),
        s.text_block * (s.image_block + 8) * s.D);
  }
  return {logits, image_rnorm, text_rnorm};
}

std::tuple<Tensor, Tensor> cosine_logits_bwd(Tensor grad_logits, Tensor image, Tensor text,
                                             Tensor image_rnorm, Tensor text_rnorm, double scale) {
  const char* op = "cosine_logits_bwd";
  CosineBackward p{};
  p.sizes = cosine_sizes(op, image, text, scale);
  Cosine& s = p.sizes;
  const bool shared = text.dim() == 2;
  check_same(op, "text_rnorm", text_rnorm, acc_type(image.scalar_type()));
  p.grad_logits = checked_view(op, "grad_logits", grad_logits, image.scalar_type(), {s.B, s.K});
  p.image_rnorm_in =
      checked_view(op, "image_rnorm", image_rnorm, acc_type(image.scalar_type()), {s.B});
  if (shared) {
    check_shape(op, "text_rnorm", text_rnorm, {s.K});
  } else {
    check_shape(op, "text_rnorm", text_rnorm, {s.B, s.K});
  }
  Tensor d_image = new_empty(image, {s.B, s.D});
  Tensor d_text = shared ? new_empty(text, {s.K, s.D}) : new_empty(text, {s.B, s.K, s.D});
  if (s.B * s.K * s.D == 0) {
    zero_all({&d_image, &d_text});
    return {d_image, d_text};
  }
  p.text_rnorm_in = rows_view(text_rnorm);
  p.d_image = rows_view(d_image);
  p.d_text = rows_view(d_text);
  p.num_chunks = 1;
  if (!shared) {
    // About 64 units in all, of at least 16 texts; the split depends on the shape only.
    const int64_t chunks = std::min(ceil_div(64, s.B), ceil_div(s.K, 16));
    s.text_block = ceil_div(s.K, chunks);
    p.num_chunks = ceil_div(s.K, s.text_block);
  }
  const int64_t width = row_width(s.D);
  Workspace workspace(image);
  s.image_unit = workspace.take({s.B, width});
  p.d_unit = workspace.take({p.num_chunks, s.B, width});
  if (shared) {
    p.text_unit = workspace.take({s.K, width});
    p.grads = workspace.take({s.B, s.K});
    run(VTCLIP_PICK(cosine_prepare), p, s.B + s.K, 4 * s.D);
    const int64_t slices = ceil_div(width, 128);
    run(VTCLIP_PICK(cosine_shared_image), p, ceil_div(s.B, s.image_block) * slices,
        s.image_block * s.K * 128);
    run(VTCLIP_PICK(cosine_shared_text), p, ceil_div(s.K, s.text_block),
        s.text_block * (s.B + 8) * s.D);
  } else {
    run(VTCLIP_PICK(cosine_prepare), p, s.B, 4 * s.D);
    run(VTCLIP_PICK(cosine_own_bwd), p, s.B * p.num_chunks, 16 * s.text_block * s.D);
  }
  run(VTCLIP_PICK(cosine_finish_image), p, s.B, 4 * p.num_chunks * s.D);
  return {d_image, d_text};
}

}  // namespace
}  // namespace vtclip::cpu

VTCLIP_REGISTER(CPU, cpu, cosine_logits)
