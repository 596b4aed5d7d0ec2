// SPDX-License-Identifier: Apache-2.0
// rational_logits, both directions: image, text, mask, d_logits; images per chunk; scale.
#include "cuda/rational_logits_block.h"
#include "rows_host.h"

namespace {

using namespace vtclip::cuda;

template <class T>
void run(const host::Input& in) {
  using Acc = AccOf<T>;
  const host::Tensor &image = in.tensors.at(0), &text = in.tensors.at(1), &mask = in.tensors.at(2);
  const int64_t B = mask.size(0), K = mask.size(1), D = mask.size(2);
  const RationalArgs<T> common{host::rows_of<const T>(image), host::rows_of<const T>(text),
                               host::images_of<T>(mask), static_cast<Acc>(in.numbers.at(0))};
  const auto logits = host::Tensor::empty<T>({B, K});
  const typename RationalForward<T>::Args forward{common, logits.template data<T>(), K, D};
  host::launch<RationalForward<T>>(B * forward.tiles(), forward);
  logits.write();
  if (B * K * D == 0) return;

  using Gradient = RationalGradient<T>;
  const Walk<T> walk{B, K, D, in.ints.at(0)};
  const auto d_image = host::Tensor::empty<T>({B, D}), d_text = host::Tensor::empty<T>({K, D});
  const auto d_mask = host::Tensor::empty<T>({B, K, D});
  const auto part_image = host::Tensor::empty<Acc>({walk.tiles(), B, D});
  const auto part_text = host::Tensor::empty<Acc>({walk.chunks(), K, D});
  host::launch<Gradient>(
      walk.blocks(Block<Gradient::kWarps>::kThreads),
      {common, host::rows_of<const T>(in.tensors.at(3)), d_mask.template data<T>(),
       part_image.template data<Acc>(), part_text.template data<Acc>(), walk});
  host::sum_columns<T>(
      {{{part_image.template data<Acc>(), d_image.template data<T>(), walk.tiles(), B * D},
        {part_text.template data<Acc>(), d_text.template data<T>(), walk.chunks(), K * D}}});
  d_image.write();
  d_text.write();
  d_mask.write();
}

}  // namespace

int main() { return host::program([](auto t, auto& in) { run<decltype(t)>(in); }); }
