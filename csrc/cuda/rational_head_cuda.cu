// SPDX-License-Identifier: Apache-2.0
// rational_head_fwd and rational_head_bwd for CUDA tensors.
//
// The two products of the backward with d_m, d_context = d_m weight and d_weight = d_m^T context,
// are torch's. d_m lies in a workspace: large problems go through it a few images at a time.
#include <array>
#include <tuple>

#include "common/register.h"
#include "cuda/block/products.cuh"
#include "cuda/block/rows_launch.cuh"
#include "rational_head_block.h"

namespace vtclip::cuda {
namespace {

struct Inputs {
  const Tensor &context, &weight, &bias, &image, &text;
  double scale;
  int64_t penalty, B, K, D;

  // of images first .. first + count - 1
  template <class T>
  HeadArgs<T> arguments(int64_t first, int64_t count) const {
    Images<const T> contexts = images_of<T>(context);
    contexts.base += first * contexts.batch;
    return {contexts, rows_of<T>(weight), data_of<T>(bias), rows_of<T>(image).from(first),
            rows_of<T>(text), bias.stride(0), count, K, D, static_cast<AccOf<T>>(scale),
            static_cast<int>(penalty)};
  }
};

Inputs check_inputs(const char* op, const Tensor& context, const Tensor& weight,
                    const Tensor& bias, const Tensor& image, const Tensor& text, double scale,
                    int64_t penalty) {
  check_rank(op, "context", context, 3);
  const ScalarType type = context.scalar_type();
  const Inputs in{context, weight,  bias,            image,           text,
                  scale,   penalty, context.size(0), context.size(1), context.size(2)};
  check_same(op, "weight", weight, context, type, {in.D, in.D});
  check_same(op, "bias", bias, context, type, {in.D});
  check_same(op, "image", image, context, type, {in.B, in.D});
  check_same(op, "text", text, context, type, {in.K, in.D});
  if (penalty < 0 || penalty > kLinf) fail(op, "penalty must be 0, 1, 2 or 3, got ", penalty);
  return in;
}

std::tuple<Tensor, Tensor, Tensor> rational_head_fwd(const Tensor& context, const Tensor& weight,
                                                     const Tensor& bias, const Tensor& image,
                                                     const Tensor& text, double scale,
                                                     int64_t penalty) {
  const char* op = "rational_head_fwd";
  const Inputs in = check_inputs(op, context, weight, bias, image, text, scale, penalty);
  const torch::stable::accelerator::DeviceGuard guard(context.get_device_index());
  const bool linf = penalty == kLinf;
  Tensor logits = new_empty(context, {in.B, in.K});
  Tensor penalties = new_acc(context, {in.B});
  Tensor peak = new_empty(context, {linf ? in.B : 0}, ScalarType::Long);
  if (in.B * in.K * in.D == 0) {
    zero_all({&logits, &penalties, &peak});
    return {logits, penalties, peak};
  }
  with_dtype(op, "context", context, [&]<class T>(T) {
    using Acc = AccOf<T>;
    typename HeadForward<T>::Args args{in.arguments<T>(0, in.B), nullptr, nullptr, nullptr};
    const int64_t tiles = args.column_tiles();
    Tensor part_logits = new_acc(context, {tiles, args.rows()});
    Tensor part_size = new_acc(context, {tiles, args.rows()});
    Tensor part_peak = new_empty(context, {linf ? tiles : 0, args.rows()}, ScalarType::Long);
    args.logits = data_of<Acc>(part_logits);
    args.size = data_of<Acc>(part_size);
    args.peak = data_of<int64_t>(part_peak);
    launch<HeadForward<T>>(op, tiles * args.row_tiles(), context, args);
    launch<HeadFinish<T>>(op, in.B, context,
                          {args.logits, args.size, args.peak, data_of<T>(logits),
                           data_of<Acc>(penalties), data_of<int64_t>(peak), tiles, in.B, in.K, in.D,
                           args.scale, args.penalty});
  });
  return {logits, penalties, peak};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> rational_head_bwd(
    const Tensor& grad_logits, const Tensor& grad_penalty, const Tensor& context,
    const Tensor& weight, const Tensor& bias, const Tensor& image, const Tensor& text,
    const Tensor& peak, double scale, int64_t penalty, bool feature_grads) {
  const char* op = "rational_head_bwd";
  const Inputs in = check_inputs(op, context, weight, bias, image, text, scale, penalty);
  const ScalarType type = context.scalar_type();
  check_same(op, "grad_logits", grad_logits, context, type, {in.B, in.K});
  check_same(op, "grad_penalty", grad_penalty, context, acc_type(type), {in.B});
  check_same(op, "peak", peak, context, ScalarType::Long, {penalty == kLinf ? in.B : 0});
  const torch::stable::accelerator::DeviceGuard guard(context.get_device_index());
  Tensor d_context = new_empty(context, {in.B, in.K, in.D});
  Tensor d_weight = new_empty(weight, {in.D, in.D});
  Tensor d_bias = new_empty(bias, {in.D});
  Tensor d_image = feature_grads ? new_empty(image, {in.B, in.D}) : new_empty(image, {0});
  Tensor d_text = feature_grads ? new_empty(text, {in.K, in.D}) : new_empty(text, {0});
  if (in.B * in.K * in.D == 0) {
    zero_all({&d_context, &d_weight, &d_bias, &d_image, &d_text});
    return {d_context, d_weight, d_bias, d_image, d_text};
  }
  const Tensor right = detached(weight), contexts = detached(context);
  with_dtype(op, "context", context, [&]<class T>(T) {
    using Acc = AccOf<T>;
    const int64_t batch = images_per_round(in.B, in.K);
    const int64_t rounds = ceil_div(in.B, batch);
    // of each round but the last, which has as many or fewer
    const int64_t row_tiles = ceil_div(batch * in.K, kHeadTile);
    const int64_t images = walk_of<HeadFeatures<T>, T>(batch, in.K, in.D).images;
    const int64_t chunks = ceil_div(batch, images);
    const int64_t last = in.B - (rounds - 1) * batch;
    const int64_t all_tiles = (rounds - 1) * row_tiles + ceil_div(last * in.K, kHeadTile);
    const int64_t all_chunks = (rounds - 1) * chunks + ceil_div(last, images);
    const int64_t image_tiles = feature_grads ? ceil_div(in.K, Walk<T>::kClasses) : 0;
    Tensor d_m = new_empty(context, {batch, in.K, in.D});
    Tensor weighed = new_acc(context, {feature_grads ? batch : 0, in.K, in.D});
    Tensor products = new_empty(weight, {rounds > 1 ? rounds : 0, in.D, in.D});
    Tensor part_bias = new_acc(bias, {all_tiles, in.D});
    Tensor part_image = new_acc(image, {image_tiles, in.B, in.D});
    Tensor part_text = new_acc(text, {feature_grads ? all_chunks : 0, in.K, in.D});
    for (int64_t round = 0; round < rounds; ++round) {
      const int64_t first = round * batch, count = std::min(batch, in.B - first);
      const typename HeadGradient<T>::Args args{
          in.arguments<T>(first, count),
          rows_of<T>(grad_logits).from(first),
          Rows<const Acc>{data_of<Acc>(grad_penalty), grad_penalty.stride(0), 0}.from(first),
          Rows<const int64_t>{data_of<int64_t>(peak), peak.stride(0), 0}.from(first),
          data_of<T>(d_m),
          feature_grads ? data_of<Acc>(weighed) : nullptr,
          data_of<Acc>(part_bias) + round * row_tiles * in.D,
          static_cast<Acc>(1 / (static_cast<double>(in.K) * static_cast<double>(in.D)))};
      launch<HeadGradient<T>>(op, args.row_tiles() * args.column_tiles(), context, args);
      if (feature_grads) {
        const Walk<T> walk{count, in.K, in.D, images};
        launch<HeadFeatures<T>>(
            op, walk.blocks(Block<HeadFeatures<T>::kWarps>::kThreads), context,
            {args.image, args.text, args.weighed, data_of<Acc>(part_image) + first * in.D,
             data_of<Acc>(part_text) + round * chunks * in.K * in.D, in.B * in.D, walk});
      }
      const Tensor left = rows_between(d_m, 0, count);
      multiply(left, right, rows_between(d_context, first, count));
      multiply(torch::stable::transpose(left, 0, 1), rows_between(contexts, first, count),
               rounds > 1 ? torch::stable::select(products, 0, round) : d_weight);
    }
    const std::array<int64_t, 1> over{0};
    if (rounds > 1) torch::stable::sum_out(d_weight, products, over);
    sum_columns<T>(op, context,
                   {{{data_of<Acc>(part_bias), data_of<T>(d_bias), all_tiles, in.D},
                     {data_of<Acc>(part_image), data_of<T>(d_image), image_tiles,
                      feature_grads ? in.B * in.D : 0},
                     {data_of<Acc>(part_text), data_of<T>(d_text), all_chunks,
                      feature_grads ? in.K * in.D : 0}}});
  });
  return {d_context, d_weight, d_bias, d_image, d_text};
}

}  // namespace
}  // namespace vtclip::cuda

VTCLIP_REGISTER(CUDA, cuda, rational_head)
