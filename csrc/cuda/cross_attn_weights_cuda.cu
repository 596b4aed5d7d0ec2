// SPDX-License-Identifier: Apache-2.0
// cross_attn_weights_fwd and cross_attn_weights_bwd for CUDA tensors.
#include <optional>
#include <tuple>

#include "common/register.h"
#include "cross_attn_weights_block.h"
#include "cuda/block/attn_host.cuh"

namespace vtclip::cuda {
namespace {

Tensor cross_attn_weights_fwd(const Tensor& query, const Tensor& key,
                              std::optional<Tensor> key_mask, double scale) {
  const char* op = "cross_attn_weights_fwd";
  const AttnShape n = attn_shape(op, query, key, key_mask);
  const torch::stable::accelerator::DeviceGuard guard(query.get_device_index());
  Tensor weights = new_empty(query, {n.B, n.H, n.K, n.L});
  with_dtype_and_width(op, query, n.d, [&]<class T, class Width>(T, Width) {
    using Body = AttnWeightsForward<T, Width::value>;
    const AttnWeightsArgs<T> args{n, heads_of<T>(query), heads_of<T>(key), data_of<T>(weights),
                                  static_cast<AccOf<T>>(scale)};
    launch<Body>(op, Body::blocks(args), query, args);
  });
  return weights;
}

std::tuple<Tensor, Tensor> cross_attn_weights_bwd(const Tensor& grad_weights,
                                                  const Tensor& weights, const Tensor& query,
                                                  const Tensor& key, double scale) {
  const char* op = "cross_attn_weights_bwd";
  const AttnShape n = attn_shape(op, query, key, std::nullopt);
  check_same(op, "grad_weights", grad_weights, query, query.scalar_type(), {n.B, n.H, n.K, n.L});
  check_same(op, "weights", weights, query, query.scalar_type(), {n.B, n.H, n.K, n.L});
  const torch::stable::accelerator::DeviceGuard guard(query.get_device_index());
  Tensor d_query = new_heads(query, query.size(0), n.H, n.K, n.d);
  Tensor d_key = new_heads(key, n.B, n.H, n.L, n.d);
  Tensor delta = new_empty(query, {n.B, n.H, n.K}, acc_type(query.scalar_type()));
  QueryPartials partials(query, n);
  with_dtype_and_width(op, query, n.d, [&]<class T, class Width>(T, Width) {
    using Query = AttnWeightsQueryGradient<T, Width::value>;
    using Key = AttnWeightsKeyGradient<T, Width::value>;
    const AttnWeightsBackwardArgs<T> args{
        gradient_args<T>(n, query, key, delta, d_query, partials, d_key, scale),
        heads_of<T>(grad_weights), heads_of<T>(weights)};
    launch<Query>(op, Query::blocks(args), query, args);
    partials.add<T>(op, d_query);
    launch<Key>(op, Key::blocks(args), query, args);
  });
  return {d_query, d_key};
}

}  // namespace
}  // namespace vtclip::cuda

VTCLIP_REGISTER(CUDA, cuda, cross_attn_weights)
