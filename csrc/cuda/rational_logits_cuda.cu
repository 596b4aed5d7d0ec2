// SPDX-License-Identifier: Apache-2.0
// rational_logits_fwd and rational_logits_bwd for CUDA tensors.
#include <tuple>

#include "common/register.h"
#include "cuda/block/rows_launch.cuh"
#include "rational_logits_block.h"

namespace vtclip::cuda {
namespace {

struct Sizes {
  int64_t B, K, D;
};

Sizes check_inputs(const char* op, const Tensor& image, const Tensor& text, const Tensor& mask) {
  check_rank(op, "mask", mask, 3);
  const Sizes n{mask.size(0), mask.size(1), mask.size(2)};
  check_same(op, "image", image, mask, mask.scalar_type(), {n.B, n.D});
  check_same(op, "text", text, mask, mask.scalar_type(), {n.K, n.D});
  return n;
}

template <class T>
RationalArgs<T> arguments(const Tensor& image, const Tensor& text, const Tensor& mask,
                          double scale) {
  return {rows_of<T>(image), rows_of<T>(text), images_of<T>(mask), static_cast<AccOf<T>>(scale)};
}

Tensor rational_logits_fwd(const Tensor& image, const Tensor& text, const Tensor& mask,
                           double scale) {
  const char* op = "rational_logits_fwd";
  const Sizes n = check_inputs(op, image, text, mask);
  const torch::stable::accelerator::DeviceGuard guard(mask.get_device_index());
  Tensor logits = new_empty(image, {n.B, n.K});
  with_dtype(op, "mask", mask, [&]<class T>(T) {
    const typename RationalForward<T>::Args args{arguments<T>(image, text, mask, scale),
                                                 data_of<T>(logits), n.K, n.D};
    launch<RationalForward<T>>(op, n.B * args.tiles(), mask, args);
  });
  return logits;
}

std::tuple<Tensor, Tensor, Tensor> rational_logits_bwd(const Tensor& grad_logits,
                                                       const Tensor& image, const Tensor& text,
                                                       const Tensor& mask, double scale) {
  const char* op = "rational_logits_bwd";
  const Sizes n = check_inputs(op, image, text, mask);
  check_same(op, "grad_logits", grad_logits, mask, mask.scalar_type(), {n.B, n.K});
  const torch::stable::accelerator::DeviceGuard guard(mask.get_device_index());
  Tensor d_image = new_empty(image, {n.B, n.D});
  Tensor d_text = new_empty(text, {n.K, n.D});
  Tensor d_mask = new_empty(mask, {n.B, n.K, n.D});
  if (n.B * n.K * n.D == 0) {
    zero_all({&d_image, &d_text, &d_mask});
    return {d_image, d_text, d_mask};
  }
  with_dtype(op, "mask", mask, [&]<class T>(T) {
    using Acc = AccOf<T>;
    const Walk<T> walk = walk_of<RationalGradient<T>, T>(n.B, n.K, n.D);
    Tensor part_image = new_acc(image, {walk.tiles(), n.B, n.D});
    Tensor part_text = new_acc(image, {walk.chunks(), n.K, n.D});
    launch<RationalGradient<T>>(
        op, walk.blocks(Block<RationalGradient<T>::kWarps>::kThreads), mask,
        {arguments<T>(image, text, mask, scale), rows_of<T>(grad_logits), data_of<T>(d_mask),
         data_of<Acc>(part_image), data_of<Acc>(part_text), walk});
    sum_columns<T>(
        op, mask,
        {{{data_of<Acc>(part_image), data_of<T>(d_image), walk.tiles(), n.B * n.D},
          {data_of<Acc>(part_text), data_of<T>(d_text), walk.chunks(), n.K * n.D}}});
  });
  return {d_image, d_text, d_mask};
}

}  // namespace
}  // namespace vtclip::cuda

VTCLIP_REGISTER(CUDA, cuda, rational_logits)
