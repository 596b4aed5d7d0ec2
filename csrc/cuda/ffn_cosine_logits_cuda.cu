// SPDX-License-Identifier: Apache-2.0
// ffn_cosine_logits_fwd and ffn_cosine_logits_bwd for CUDA tensors.
//
// The products are torch's. That of z lies in a workspace: large problems go through it a few
// images at a time, the same ones in both directions. d_hidden = d_z weight takes the centred
// weight too: d_z sums to 0 over C, but what a half type keeps of it does not.
#include <tuple>

#include "common/register.h"
#include "cosine_logits_block.h"
#include "cuda/block/products.cuh"
#include "cuda/block/rows_launch.cuh"
#include "ffn_cosine_logits_block.h"

namespace vtclip::cuda {
namespace {

constexpr int64_t kStats = 7;

struct Inputs {
  const Tensor &hidden, &weight, &bias, &residual_input, &norm_weight, &norm_bias, &text, &image;
  double residual, scale, eps;
  int64_t B, K, C, F;

  // of images first, first + 1 ..; stats is [7, B, K]
  template <class T>
  NormArgs<T, FfnInput<T>> arguments(int64_t first, const T* product, const Tensor& image_rnorm,
                                     AccOf<T>* stats) const {
    using Acc = AccOf<T>;
    Images<const T> state = images_of<T>(residual_input);
    state.base += first * state.batch;
    const auto of_rows = [&](int64_t stat) { return stats + (stat * B + first) * K; };
    return {{product, state, data_of<T>(bias), bias.stride(0), K, C},
            rows_of<T>(text), rows_of<T>(image).from(first),
            {data_of<T>(norm_weight), 0, norm_weight.stride(0)},
            {data_of<T>(norm_bias), 0, norm_bias.stride(0)}, data_of<Acc>(image_rnorm) + first,
            {of_rows(0), of_rows(1), of_rows(2), of_rows(3), of_rows(4), of_rows(5), of_rows(6)},
            static_cast<Acc>(residual), static_cast<Acc>(scale), static_cast<Acc>(eps), K, C};
  }
};

Inputs check_inputs(const char* op, const Tensor& hidden, const Tensor& weight, const Tensor& bias,
                    const Tensor& residual_input, const Tensor& norm_weight,
                    const Tensor& norm_bias, const Tensor& text, const Tensor& image,
                    double residual, double scale, double eps) {
  check_rank(op, "hidden", hidden, 3);
  check_rank(op, "weight", weight, 2);
  const ScalarType type = hidden.scalar_type();
  const Inputs in{hidden,         weight,         bias,           residual_input, norm_weight,
                  norm_bias,      text,           image,          residual,       scale,
                  eps,            hidden.size(0), hidden.size(1), weight.size(0), hidden.size(2)};
  check_same(op, "weight", weight, hidden, type, {in.C, in.F});
  check_same(op, "bias", bias, hidden, type, {in.C});
  check_same(op, "residual_input", residual_input, hidden, type, {in.B, in.K, in.C});
  check_same(op, "norm_weight", norm_weight, hidden, type, {in.C});
  check_same(op, "norm_bias", norm_bias, hidden, type, {in.C});
  check_same(op, "text", text, hidden, type, {in.K, in.C});
  check_same(op, "image", image, hidden, type, {in.B, in.C});
  return in;
}

// The product of z, a round at a time.
template <class T>
class Product {
 public:
  Product(const char* op, const Inputs& in)
      : images(images_per_round(in.B, in.K)),
        rounds(ceil_div(in.B, images)),
        hidden_(detached(in.hidden)),
        weight_(new_empty(in.weight, {in.C, in.F})),
        product_(new_empty(in.hidden, {images, in.K, in.C})) {
    const typename CentredColumns<T>::Args args{rows_of<T>(in.weight), data_of<T>(weight_), in.C,
                                                in.F};
    launch<CentredColumns<T>>(op, args.blocks(), in.hidden, args);
  }

  // of images first .. first + count - 1
  const T* of(int64_t first, int64_t count) {
    multiply(rows_between(hidden_, first, count), torch::stable::transpose(weight_, 0, 1),
             rows_between(product_, 0, count));
    return data_of<T>(product_);
  }

  const Tensor& hidden() const { return hidden_; }
  const Tensor& weight() const { return weight_; }  // centred

  const int64_t images, rounds;

 private:
  const Tensor hidden_;
  Tensor weight_, product_;
};

std::tuple<Tensor, Tensor, Tensor> ffn_cosine_logits_fwd(
    const Tensor& hidden, const Tensor& weight, const Tensor& bias, const Tensor& residual_input,
    const Tensor& norm_weight, const Tensor& norm_bias, const Tensor& text, const Tensor& image,
    double residual, double scale, double eps) {
  const char* op = "ffn_cosine_logits_fwd";
  const Inputs in = check_inputs(op, hidden, weight, bias, residual_input, norm_weight, norm_bias,
                                 text, image, residual, scale, eps);
  const torch::stable::accelerator::DeviceGuard guard(hidden.get_device_index());
  Tensor logits = new_empty(hidden, {in.B, in.K});
  Tensor stats = new_acc(hidden, {kStats, in.B, in.K}), image_rnorm = new_acc(hidden, {in.B});
  if (in.B * in.K * in.C == 0) {
    zero_all({&logits, &stats, &image_rnorm});
    return {logits, stats, image_rnorm};
  }
  with_dtype(op, "hidden", hidden, [&]<class T>(T) {
    using Acc = AccOf<T>;
    launch<ReciprocalNorm<T>>(
        op, in.B, hidden,
        {{data_of<T>(image), 0, image.stride(0), image.stride(1)}, in.B, in.C,
         data_of<Acc>(image_rnorm)});
    Product<T> product(op, in);
    for (int64_t first = 0; first < in.B; first += product.images) {
      const int64_t count = std::min(product.images, in.B - first);
      const typename FfnForward<T>::Args args{
          in.arguments<T>(first, product.of(first, count), image_rnorm, data_of<Acc>(stats)),
          data_of<T>(logits) + first * in.K};
      launch<FfnForward<T>>(op, count * args.tiles(), hidden, args);
    }
  });
  return {logits, stats, image_rnorm};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> ffn_cosine_logits_bwd(
    const Tensor& grad_logits, const Tensor& hidden, const Tensor& weight, const Tensor& bias,
    const Tensor& residual_input, const Tensor& norm_weight, const Tensor& norm_bias,
    const Tensor& text, const Tensor& image, const Tensor& stats, const Tensor& image_rnorm,
    double residual, double scale, bool feature_grads) {
  const char* op = "ffn_cosine_logits_bwd";
  const Inputs in = check_inputs(op, hidden, weight, bias, residual_input, norm_weight, norm_bias,
                                 text, image, residual, scale, 0.0);
  const ScalarType type = hidden.scalar_type(), acc = acc_type(type);
  check_same(op, "grad_logits", grad_logits, hidden, type, {in.B, in.K});
  check_same(op, "stats", stats, hidden, acc, {kStats, in.B, in.K});
  check_same(op, "image_rnorm", image_rnorm, hidden, acc, {in.B});
  const torch::stable::accelerator::DeviceGuard guard(hidden.get_device_index());
  Tensor d_hidden = new_empty(hidden, {in.B, in.K, in.F});
  Tensor d_weight = new_empty(weight, {in.C, in.F});
  Tensor d_bias = new_empty(bias, {in.C});
  Tensor d_z = new_empty(residual_input, {in.B, in.K, in.C});
  Tensor d_norm_weight = new_empty(norm_weight, {in.C});
  Tensor d_norm_bias = new_empty(norm_bias, {in.C});
  Tensor d_text = feature_grads ? new_empty(text, {in.K, in.C}) : new_empty(text, {0});
  Tensor d_image = feature_grads ? new_empty(image, {in.B, in.C}) : new_empty(image, {0});
  if (in.B * in.K * in.C == 0) {
    zero_all(
        {&d_hidden, &d_weight, &d_bias, &d_z, &d_norm_weight, &d_norm_bias, &d_text, &d_image});
    return {d_hidden, d_weight, d_bias, d_z, d_norm_weight, d_norm_bias, d_text, d_image};
  }
  Tensor kept = torch::stable::contiguous(stats);
  const Tensor image_rnorms = torch::stable::contiguous(image_rnorm);
  with_dtype(op, "hidden", hidden, [&]<class T>(T) {
    using Acc = AccOf<T>;
    Product<T> product(op, in);
    const Walk<T> whole = walk_of<FfnGradient<T>, T>(product.images, in.K, in.C);
    // of each round but the last, which has as many or fewer
    const int64_t chunks = whole.chunks(), tiles = whole.tiles();
    const int64_t last = in.B - (product.rounds - 1) * product.images;
    const int64_t all_chunks = (product.rounds - 1) * chunks + ceil_div(last, whole.images);
    Tensor part_bias = new_acc(bias, {all_chunks * tiles, in.C});
    Tensor part_norm_weight = new_acc(bias, {all_chunks * tiles, in.C});
    Tensor part_norm_bias = new_acc(bias, {all_chunks * tiles, in.C});
    Tensor part_unit = new_acc(image, {feature_grads ? tiles : 0, in.B, in.C});
    Tensor part_text = new_acc(text, {feature_grads ? all_chunks : 0, in.K, in.C});
    for (int64_t round = 0; round < product.rounds; ++round) {
      const int64_t first = round * product.images;
      const Walk<T> walk{std::min(product.images, in.B - first), in.K, in.C, whole.images};
      const int64_t slot = round * chunks * tiles * in.C;
      launch<FfnGradient<T>>(
          op, walk.blocks(Block<FfnGradient<T>::kWarps>::kThreads), hidden,
          {in.arguments<T>(first, product.of(first, walk.B), image_rnorms, data_of<Acc>(kept)),
           rows_of<T>(grad_logits).from(first), data_of<T>(d_z) + first * in.K * in.C,
           feature_grads ? data_of<Acc>(part_unit) + first * in.C : nullptr,
           feature_grads ? data_of<Acc>(part_text) + round * chunks * in.K * in.C : nullptr,
           data_of<Acc>(part_norm_weight) + slot, data_of<Acc>(part_norm_bias) + slot,
           data_of<Acc>(part_bias) + slot, in.B * in.C, walk});
    }
    const Tensor rows = rows_between(d_z, 0, in.B);
    multiply(rows, product.weight(), rows_between(d_hidden, 0, in.B));
    multiply(torch::stable::transpose(rows, 0, 1), rows_between(product.hidden(), 0, in.B),
             d_weight);
    sum_columns<T>(
        op, hidden,
        {{{data_of<Acc>(part_bias), data_of<T>(d_bias), all_chunks * tiles, in.C},
          {data_of<Acc>(part_norm_weight), data_of<T>(d_norm_weight), all_chunks * tiles, in.C},
          {data_of<Acc>(part_norm_bias), data_of<T>(d_norm_bias), all_chunks * tiles, in.C},
          {data_of<Acc>(part_text), data_of<T>(d_text), all_chunks,
           feature_grads ? in.K * in.C : 0}}});
    launch<NormImageGradient<T>>(op, feature_grads ? in.B : 0, hidden,
                                 {rows_of<T>(image), data_of<Acc>(image_rnorms),
                                  data_of<Acc>(part_unit), data_of<T>(d_image), tiles, in.B, in.C});
  });
  return {d_hidden, d_weight, d_bias, d_z, d_norm_weight, d_norm_bias, d_text, d_image};
}

}  // namespace
}  // namespace vtclip::cuda

VTCLIP_REGISTER(CUDA, cuda, ffn_cosine_logits)
