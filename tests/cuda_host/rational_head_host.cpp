// SPDX-License-Identifier: Apache-2.0
// rational_head, both directions: context, weight, bias, image, text, d_logits, d_penalty; penalty,
// images per chunk, features; scale. Of the backward it writes d_m, d_bias,
// d_image, d_text: the products with d_m are torch's.
#include "cuda/rational_head_block.h"
#include "rows_host.h"

namespace {

using namespace vtclip::cuda;

template <class T>
void run(const host::Input& in) {
  using Acc = AccOf<T>;
  const auto& all = in.tensors;
  const host::Tensor &context = all.at(0), &bias = all.at(2);
  const int64_t B = context.size(0), K = context.size(1), D = context.size(2);
  const int penalty = static_cast<int>(in.ints.at(0));
  const bool features = in.ints.at(2) != 0;
  const HeadArgs<T> common{host::images_of<T>(context),
                           host::rows_of<const T>(all.at(1)),
                           bias.data<T>(),
                           host::rows_of<const T>(all.at(3)),
                           host::rows_of<const T>(all.at(4)),
                           bias.stride(0),
                           B,
                           K,
                           D,
                           static_cast<Acc>(in.numbers.at(0)),
                           penalty};
  typename HeadForward<T>::Args args{common, nullptr, nullptr, nullptr};
  const auto part_logits = host::Tensor::empty<Acc>({common.column_tiles(), B * K});
  const auto part_size = host::Tensor::empty<Acc>({common.column_tiles(), B * K});
  const auto part_peak = host::Tensor::empty<int64_t>({common.column_tiles(), B * K});
  const auto logits = host::Tensor::empty<T>({B, K}), penalties = host::Tensor::empty<Acc>({B});
  const auto peak = host::Tensor::empty<int64_t>({penalty == kLinf ? B : 0});
  args.logits = part_logits.template data<Acc>();
  args.size = part_size.template data<Acc>();
  args.peak = part_peak.template data<int64_t>();
  host::launch<HeadForward<T>>(common.column_tiles() * args.row_tiles(), args);
  host::launch<HeadFinish<T>>(
      B, {args.logits, args.size, args.peak, logits.template data<T>(),
          penalties.template data<Acc>(), peak.template data<int64_t>(), common.column_tiles(), B, K,
          D, args.scale, penalty});
  logits.write();
  penalties.write();
  peak.write();

  const int64_t tiles = common.row_tiles();
  const auto d_m = host::Tensor::empty<T>({B, K, D}), d_bias = host::Tensor::empty<T>({D});
  const auto weighed = host::Tensor::empty<Acc>({features ? B : 0, K, D});
  const auto part_bias = host::Tensor::empty<Acc>({tiles, D});
  host::launch<HeadGradient<T>>(
      tiles * common.column_tiles(),
      {common, host::rows_of<const T>(all.at(5)),
       Rows<const Acc>{all.at(6).template data<Acc>(), all.at(6).stride(0), 0},
       Rows<const int64_t>{peak.template data<int64_t>(), 1, 0}, d_m.template data<T>(),
       features ? weighed.template data<Acc>() : nullptr, part_bias.template data<Acc>(),
       1 / static_cast<Acc>(K * D)});
  const Walk<T> walk{B, K, D, in.ints.at(1)};
  const int64_t slices = features ? walk.tiles() : 0, chunks = features ? walk.chunks() : 0;
  const auto d_image = host::Tensor::empty<T>({features ? B : 0, D});
  const auto d_text = host::Tensor::empty<T>({features ? K : 0, D});
  const auto part_image = host::Tensor::empty<Acc>({slices, B, D});
  const auto part_text = host::Tensor::empty<Acc>({chunks, K, D});
  if (features) {
    using Features = HeadFeatures<T>;
    host::launch<Features>(walk.blocks(Block<Features::kWarps>::kThreads),
                           {common.image, common.text, weighed.template data<Acc>(),
                            part_image.template data<Acc>(), part_text.template data<Acc>(), B * D,
                            walk});
  }
  host::sum_columns<T>(
      {{{part_bias.template data<Acc>(), d_bias.template data<T>(), tiles, D},
        {part_image.template data<Acc>(), d_image.template data<T>(), slices, d_image.numel()},
        {part_text.template data<Acc>(), d_text.template data<T>(), chunks, d_text.numel()}}});
  for (const auto* out : {&d_m, &d_bias, &d_image, &d_text}) out->write();
}

}  // namespace

int main() { return host::program([](auto t, auto& in) { run<decltype(t)>(in); }); }
