// SPDX-License-Identifier: Apache-2.0
// cross_attn_weights, both directions: query, key, key_mask, d_weights; scale; images of a block.
#include "attn_host.h"
#include "cuda/cross_attn_weights_block.h"

namespace {

using namespace vtclip::cuda;

template <class T, int kD>
void run(const host::Input& in) {
  using Acc = AccOf<T>;
  const host::Tensor &query = in.tensors.at(0), &key = in.tensors.at(1);
  const AttnShape n = host::attn_shape(query, key, in.tensors.at(2));
  const Acc scale = static_cast<Acc>(in.numbers.at(0));
  const host::QueryPartials<T> partials(query, n, in.ints.at(0));

  const auto weights = host::Tensor::empty<T>({n.B, n.H, n.K, n.L});
  using Forward = AttnWeightsForward<T, kD>;
  const AttnWeightsArgs<T> forward{n, host::heads_of<T>(query), host::heads_of<T>(key),
                                   weights.template data<T>(), scale};
  host::launch<Forward>(Forward::blocks(forward), forward);

  const auto d_query = host::Tensor::empty<T>({query.size(0), n.K, n.H, n.d});
  const auto d_key = host::Tensor::empty<T>({n.B, n.L, n.H, n.d});
  const auto delta = host::Tensor::empty<Acc>({n.B, n.H, n.K});
  AttnWeightsBackwardArgs<T> args{};
  args.shape = n;
  args.d_weights = host::heads_of<T>(in.tensors.at(3));
  args.weights = host::heads_of<T>(weights);
  args.query = forward.query;
  args.key = forward.key;
  args.delta = delta.template data<Acc>();
  args.d_query = host::output_heads<T>(d_query);
  args.partial = partials.heads();
  args.d_key = host::output_heads<T>(d_key);
  args.scale = scale;
  args.images = partials.images;
  using Query = AttnWeightsQueryGradient<T, kD>;
  using Key = AttnWeightsKeyGradient<T, kD>;
  host::launch<Query>(Query::blocks(args), args);
  partials.add(d_query);
  host::launch<Key>(Key::blocks(args), args);
  for (const host::Tensor& result : {weights, d_query, d_key}) result.write();
}

}  // namespace

int main() {
  const host::Input in;
  host::with_dtype_and_width(in.tensors.at(0), in.tensors.at(1).size(3), [&](auto t, auto width) {
    run<decltype(t), decltype(width)::value>(in);
  });
  return 0;
}
