// SPDX-License-Identifier: Apache-2.0
// cross_attn, both directions: query, key, value, key_mask, d_out, d_lse; scale; images of a block.
#include "attn_host.h"
#include "cuda/cross_attn_block.h"
#include "cuda/cross_attn_bwd_block.h"

namespace {

using namespace vtclip::cuda;

template <class T, int kD>
void run(const host::Input& in) {
  using Acc = AccOf<T>;
  const host::Tensor &query = in.tensors.at(0), &key = in.tensors.at(1), &value = in.tensors.at(2);
  const host::Tensor &d_out = in.tensors.at(4), &d_lse = in.tensors.at(5);
  const AttnShape n = host::attn_shape(query, key, in.tensors.at(3));
  const Acc scale = static_cast<Acc>(in.numbers.at(0));
  const host::QueryPartials<T> partials(query, n, in.ints.at(0));

  const auto out = host::Tensor::empty<T>({n.B, n.K, n.H, n.d});
  const auto lse = host::Tensor::empty<Acc>({n.B, n.H, n.K});
  using Forward = CrossAttnForward<T, kD>;
  const CrossAttnArgs<T> forward{n,
                                 host::heads_of<T>(query),
                                 host::heads_of<T>(key),
                                 host::heads_of<T>(value),
                                 host::output_heads<T>(out),
                                 lse.template data<Acc>(),
                                 scale,
                                 partials.images};
  host::launch<Forward>(Forward::blocks(forward), forward);

  const auto d_query = host::Tensor::empty<T>({query.size(0), n.K, n.H, n.d});
  const auto d_key = host::Tensor::empty<T>({n.B, n.L, n.H, n.d});
  const auto d_value = host::Tensor::empty<T>({n.B, n.L, n.H, n.d});
  const auto delta = host::Tensor::empty<Acc>({n.B, n.H, n.K});
  CrossAttnBackwardArgs<T> args{};
  args.shape = n;
  args.d_out = host::heads_of<T>(d_out);
  args.query = forward.query;
  args.key = forward.key;
  args.value = forward.value;
  args.out = {out.template data<T>(), out.stride(0), out.stride(2), out.stride(1), out.stride(3)};
  if (d_lse.given()) args.d_lse = host::statistics_of<Acc>(d_lse);
  args.lse = host::statistics_of<Acc>(lse);
  args.delta = delta.template data<Acc>();
  args.d_query = host::output_heads<T>(d_query);
  args.partial = partials.heads();
  args.d_key = host::output_heads<T>(d_key);
  args.d_value = host::output_heads<T>(d_value);
  args.scale = scale;
  args.images = partials.images;
  using Query = CrossAttnQueryGradient<T, kD>;
  using Key = CrossAttnKeyGradient<T, kD>;
  host::launch<Query>(Query::blocks(args), args);
  partials.add(d_query);
  host::launch<Key>(Key::blocks(args), args);
  for (const host::Tensor& result : {out, lse, d_query, d_key, d_value}) result.write();
}

}  // namespace

int main() {
  const host::Input in;
  host::with_dtype_and_width(in.tensors.at(0), in.tensors.at(1).size(3), [&](auto t, auto width) {
    run<decltype(t), decltype(width)::value>(in);
  });
  return 0;
}
