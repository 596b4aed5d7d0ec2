// SPDX-License-Identifier: Apache-2.0
// norm_cosine_logits, both directions: hidden, weight, bias, text, image, d_logits; images per
// chunk; residual, scale, eps.
#include "cuda/cosine_logits_block.h"
#include "cuda/norm_cosine_logits_block.h"
#include "rows_host.h"

namespace {

using namespace vtclip::cuda;

template <class T>
void run(const host::Input& in) {
  using Acc = AccOf<T>;
  const auto& all = in.tensors;
  const host::Tensor &hidden = all.at(0), &weight = all.at(1), &bias = all.at(2);
  const host::Tensor &text = all.at(3), &image = all.at(4);
  const int64_t B = hidden.size(0), K = hidden.size(1), C = hidden.size(2);
  const auto number = [&](size_t i) { return static_cast<Acc>(in.numbers.at(i)); };
  const auto image_rnorm = host::Tensor::empty<Acc>({B});
  const auto mean = host::Tensor::empty<Acc>({B, K}), rstd = host::Tensor::empty<Acc>({B, K});
  const auto row_rnorm = host::Tensor::empty<Acc>({B, K});
  const auto scalars = host::Tensor::empty<Acc>({4, B, K});
  const auto logits = host::Tensor::empty<T>({B, K});
  host::launch<ReciprocalNorm<T>>(B, {{image.data<T>(), 0, image.stride(0), image.stride(1)}, B, C,
                                      image_rnorm.template data<Acc>()});
  Acc* scalar = scalars.template data<Acc>();
  const NormArgs<T, NormInput<T>> common{
      {host::images_of<T>(hidden), C},
      host::rows_of<const T>(text),
      host::rows_of<const T>(image),
      {weight.data<T>(), 0, weight.stride(0)},
      {bias.data<T>(), 0, bias.stride(0)},
      image_rnorm.template data<Acc>(),
      {mean.template data<Acc>(), scalar, rstd.template data<Acc>(), row_rnorm.template data<Acc>(),
       scalar + B * K, scalar + 2 * B * K, scalar + 3 * B * K},
      number(0),
      number(1),
      number(2),
      K,
      C};
  const typename NormForward<T>::Args forward{common, logits.template data<T>()};
  host::launch<NormForward<T>>(B * forward.tiles(), forward);
  logits.write();
  if (B * K * C == 0) return;

  using Gradient = NormGradient<T>;
  const Walk<T> walk{B, K, C, in.ints.at(0)};
  const int64_t slots = walk.chunks() * walk.tiles();
  const auto d_hidden = host::Tensor::empty<T>({B, K, C}), d_image = host::Tensor::empty<T>({B, C});
  const auto d_weight = host::Tensor::empty<T>({C}), d_bias = host::Tensor::empty<T>({C});
  const auto d_text = host::Tensor::empty<T>({K, C});
  const auto part_unit = host::Tensor::empty<Acc>({walk.tiles(), B, C});
  const auto part_text = host::Tensor::empty<Acc>({walk.chunks(), K, C});
  const auto part_weight = host::Tensor::empty<Acc>({slots, C});
  const auto part_bias = host::Tensor::empty<Acc>({slots, C});
  const Rows<const T> d_logits = host::rows_of<const T>(all.at(5));
  host::launch<NormScalars<T>>(B * common.tiles(), common);
  host::launch<Gradient>(
      walk.blocks(Block<Gradient::kWarps>::kThreads),
      {common, d_logits, d_hidden.template data<T>(), part_unit.template data<Acc>(),
       part_text.template data<Acc>(), part_weight.template data<Acc>(),
       part_bias.template data<Acc>(), nullptr, B * C, walk});
  host::launch<NormImageGradient<T>>(
      B, {common.image, common.image_rnorm, part_unit.template data<Acc>(),
          d_image.template data<T>(), walk.tiles(), B, C});
  host::sum_columns<T>(
      {{{part_text.template data<Acc>(), d_text.template data<T>(), walk.chunks(), K * C},
        {part_weight.template data<Acc>(), d_weight.template data<T>(), slots, C},
        {part_bias.template data<Acc>(), d_bias.template data<T>(), slots, C}}});
  for (const auto* out : {&d_hidden, &d_weight, &d_bias, &d_text, &d_image}) out->write();
}

}  // namespace

int main() { return host::program([](auto t, auto& in) { run<decltype(t)>(in); }); }
