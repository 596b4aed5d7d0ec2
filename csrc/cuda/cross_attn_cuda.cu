// SPDX-License-Identifier: Apache-2.0
// cross_attn_fwd and cross_attn_bwd for CUDA tensors.
#include <optional>
#include <tuple>

#include "common/register.h"
#include "cross_attn_block.h"
#include "cross_attn_bwd_block.h"
#include "cuda/block/attn_host.cuh"

namespace vtclip::cuda {
namespace {

std::tuple<Tensor, Tensor> cross_attn_fwd(const Tensor& query, const Tensor& key,
                                          const Tensor& value, std::optional<Tensor> key_mask,
                                          double scale) {
  const char* op = "cross_attn_fwd";
  const AttnShape n = attn_shape(op, query, key, key_mask);
  check_same(op, "value", value, query, query.scalar_type(), {n.B, n.H, n.L, n.d});
  const torch::stable::accelerator::DeviceGuard guard(query.get_device_index());
  Tensor out = new_heads(query, n.B, n.H, n.K, n.d);
  Tensor lse = new_empty(query, {n.B, n.H, n.K}, acc_type(query.scalar_type()));
  const int64_t images =
      query.size(0) == 1 ? images_per_block(n.B, n.H * ceil_div(n.K, 64)) : 1;
  with_dtype_and_width(op, query, n.d, [&]<class T, class Width>(T, Width) {
    using Body = CrossAttnForward<T, Width::value>;
    const CrossAttnArgs<T> args{
        n, heads_of<T>(query), heads_of<T>(key), heads_of<T>(value), heads_of<T>(out),
        data_of<AccOf<T>>(lse), static_cast<AccOf<T>>(scale), images};
    launch<Body>(op, Body::blocks(args), query, args);
  });
  return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor> cross_attn_bwd(const Tensor& grad_out,
                                                  std::optional<Tensor> grad_lse,
                                                  const Tensor& query, const Tensor& key,
                                                  const Tensor& value,
                                                  std::optional<Tensor> key_mask,
                                                  const Tensor& out, const Tensor& lse,
                                                  double scale) {
  const char* op = "cross_attn_bwd";
  const AttnShape n = attn_shape(op, query, key, key_mask);
  const ScalarType acc = acc_type(query.scalar_type());
  check_same(op, "value", value, query, query.scalar_type(), {n.B, n.H, n.L, n.d});
  check_same(op, "grad_out", grad_out, query, query.scalar_type(), {n.B, n.H, n.K, n.d});
  check_same(op, "out", out, query, query.scalar_type(), {n.B, n.H, n.K, n.d});
  check_same(op, "lse", lse, query, acc, {n.B, n.H, n.K});
  if (grad_lse.has_value()) {
    check_same(op, "grad_lse", *grad_lse, query, acc, {n.B, n.H, n.K});
  }
  const torch::stable::accelerator::DeviceGuard guard(query.get_device_index());
  Tensor d_query = new_heads(query, query.size(0), n.H, n.K, n.d);
  Tensor d_key = new_heads(key, n.B, n.H, n.L, n.d);
  Tensor d_value = new_heads(value, n.B, n.H, n.L, n.d);
  Tensor delta = new_empty(query, {n.B, n.H, n.K}, acc);
  QueryPartials partials(query, n);
  with_dtype_and_width(op, query, n.d, [&]<class T, class Width>(T, Width) {
    using Acc = AccOf<T>;
    using Query = CrossAttnQueryGradient<T, Width::value>;
    using Key = CrossAttnKeyGradient<T, Width::value>;
    CrossAttnBackwardArgs<T> args{
        gradient_args<T>(n, query, key, delta, d_query, partials, d_key, scale),
        heads_of<T>(grad_out), heads_of<T>(value), heads_of<T>(out),
        {}, statistics_of<Acc>(lse), heads_of<T>(d_value)};
    if (grad_lse.has_value()) args.d_lse = statistics_of<Acc>(*grad_lse);
    launch<Query>(op, Query::blocks(args), query, args);
    partials.add<T>(op, d_query);
    launch<Key>(op, Key::blocks(args), query, args);
  });
  return {d_query, d_key, d_value};
}

}  // namespace
}  // namespace vtclip::cuda

VTCLIP_REGISTER(CUDA, cuda, cross_attn)
