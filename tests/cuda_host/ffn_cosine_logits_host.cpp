// SPDX-License-Identifier: Apache-2.0
// ffn_cosine_logits, both directions: hidden, weight, bias, residual_input, norm_weight, norm_bias,
// text, image, d_logits; images per chunk, features; residual, scale, eps. Torch's product is made
// here; those with d_z, which give the gradients of hidden and weight, are left out.
#include "cuda/cosine_logits_block.h"
#include "cuda/ffn_cosine_logits_block.h"
#include "rows_host.h"

namespace {

using namespace vtclip::cuda;

// hidden weight^T [B, K, C] in T; weight [C, F] is contiguous
template <class T>
host::Tensor product_of(const host::Tensor& hidden, const host::Tensor& weight) {
  using Acc = AccOf<T>;
  const int64_t B = hidden.size(0), K = hidden.size(1), F = hidden.size(2), C = weight.size(0);
  const auto product = host::Tensor::empty<T>({B, K, C});
  const Images<const T> rows = host::images_of<T>(hidden);
  for (int64_t i = 0; i < B * K * C; ++i) {
    const T* column = weight.data<T>() + i % C * F;
    Acc total = 0;
    for (int64_t f = 0; f < F; ++f) {
      const Acc entry = static_cast<Acc>(rows.at(i / C / K).at(i / C % K, f));
      total += entry * static_cast<Acc>(column[f]);
    }
    product.template data<T>()[i] = static_cast<T>(total);
  }
  return product;
}

template <class T>
void run(const host::Input& in) {
  using Acc = AccOf<T>;
  const auto& all = in.tensors;
  const host::Tensor &hidden = all.at(0), &weight = all.at(1), &bias = all.at(2);
  const host::Tensor &norm_weight = all.at(4), &norm_bias = all.at(5), &image = all.at(7);
  const int64_t B = hidden.size(0), K = hidden.size(1), C = weight.size(0), F = weight.size(1);
  const bool features = in.ints.at(1) != 0;
  const auto number = [&](size_t i) { return static_cast<Acc>(in.numbers.at(i)); };
  const auto centred = host::Tensor::empty<T>({C, F});
  const typename CentredColumns<T>::Args columns{host::rows_of<const T>(weight),
                                                 centred.template data<T>(), C, F};
  host::launch<CentredColumns<T>>(columns.blocks(), columns);
  const host::Tensor product = product_of<T>(hidden, centred);
  const auto image_rnorm = host::Tensor::empty<Acc>({B});
  const auto stats = host::Tensor::empty<Acc>({7, B, K}), logits = host::Tensor::empty<T>({B, K});
  host::launch<ReciprocalNorm<T>>(B, {{image.data<T>(), 0, image.stride(0), image.stride(1)}, B, C,
                                      image_rnorm.template data<Acc>()});
  const auto stat = [&](int64_t i) { return stats.template data<Acc>() + i * B * K; };
  const NormArgs<T, FfnInput<T>> common{
      {product.data<T>(), host::images_of<T>(all.at(3)), bias.data<T>(), bias.stride(0), K, C},
      host::rows_of<const T>(all.at(6)),
      host::rows_of<const T>(image),
      {norm_weight.data<T>(), 0, norm_weight.stride(0)},
      {norm_bias.data<T>(), 0, norm_bias.stride(0)},
      image_rnorm.template data<Acc>(),
      {stat(0), stat(1), stat(2), stat(3), stat(4), stat(5), stat(6)},
      number(0),
      number(1),
      number(2),
      K,
      C};
  const typename FfnForward<T>::Args forward{common, logits.template data<T>()};
  host::launch<FfnForward<T>>(B * forward.tiles(), forward);
  logits.write();
  stats.write();

  using Gradient = FfnGradient<T>;
  const Walk<T> walk{B, K, C, in.ints.at(0)};
  const int64_t slots = walk.chunks() * walk.tiles();
  const int64_t slices = features ? walk.tiles() : 0, chunks = features ? walk.chunks() : 0;
  const auto d_z = host::Tensor::empty<T>({B, K, C}), d_bias = host::Tensor::empty<T>({C});
  const auto d_norm_weight = host::Tensor::empty<T>({C}), d_norm_bias = host::Tensor::empty<T>({C});
  const auto d_text = host::Tensor::empty<T>({features ? K : 0, C});
  const auto d_image = host::Tensor::empty<T>({features ? B : 0, C});
  const auto part_bias = host::Tensor::empty<Acc>({slots, C});
  const auto part_norm_weight = host::Tensor::empty<Acc>({slots, C});
  const auto part_norm_bias = host::Tensor::empty<Acc>({slots, C});
  const auto part_text = host::Tensor::empty<Acc>({chunks, K, C});
  const auto part_unit = host::Tensor::empty<Acc>({slices, B, C});
  host::launch<Gradient>(
      walk.blocks(Block<Gradient::kWarps>::kThreads),
      {common, host::rows_of<const T>(all.at(8)), d_z.template data<T>(),
       features ? part_unit.template data<Acc>() : nullptr,
       features ? part_text.template data<Acc>() : nullptr,
       part_norm_weight.template data<Acc>(), part_norm_bias.template data<Acc>(),
       part_bias.template data<Acc>(), B * C, walk});
  host::sum_columns<T>(
      {{{part_bias.template data<Acc>(), d_bias.template data<T>(), slots, C},
        {part_norm_weight.template data<Acc>(), d_norm_weight.template data<T>(), slots, C},
        {part_norm_bias.template data<Acc>(), d_norm_bias.template data<T>(), slots, C},
        {part_text.template data<Acc>(), d_text.template data<T>(), chunks, d_text.numel()}}});
  host::launch<NormImageGradient<T>>(
      features ? B : 0, {common.image, common.image_rnorm, part_unit.template data<Acc>(),
                         d_image.template data<T>(), walk.tiles(), B, C});
  for (const auto* out : {&d_bias, &d_z, &d_norm_weight, &d_norm_bias, &d_text, &d_image}) {
    out->write();
  }
}

}  // namespace

int main() { return host::program([](auto t, auto& in) { run<decltype(t)>(in); }); }
