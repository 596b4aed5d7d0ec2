// SPDX-License-Identifier: Apache-2.0
// cross_attn_weights_fwd and cross_attn_weights_bwd for CPU tensors.
#include <optional>
#include <tuple>

#include "common/register.h"
#include "cpu/common/attn_host.h"

#define VTCLIP_KERNEL "cpu/cross_attn_weights_kernel.h"
#include "cpu/common/foreach_capability.h"

namespace vtclip::cpu {
namespace {

Tensor cross_attn_weights_fwd(Tensor query, Tensor key, std::optional<Tensor> key_mask,
                              double scale) {
  WeightsForward p{};
  p.shape = attn_shape("cross_attn_weights_fwd", query, key, key_mask, scale);
  const AttnShape& s = p.shape;
  Tensor weights = new_empty(query, {s.B, s.H, s.K, s.L});
  if (s.B * s.H * s.K * s.L == 0) return weights;
  p.query = heads_view(query);
  p.key = heads_view(key);
  p.weights = static_cast<char*>(weights.data_ptr());
  const Tensor pack = pack_shared_query(s, query, p.query_pack);
  run(VTCLIP_PICK(weights_fwd_units), p, s.B * s.H * s.num_blocks(), 2 * block_work(s));
  return weights;
}

std::tuple<Tensor, Tensor> cross_attn_weights_bwd(Tensor grad_weights, Tensor weights, Tensor query,
                                                  Tensor key, double scale) {
  const char* op = "cross_attn_weights_bwd";
  WeightsBackward p{};
  p.shape = attn_shape(op, query, key, std::nullopt, scale);
  const AttnShape& s = p.shape;
  check_same(op, "grad_weights", grad_weights, query.scalar_type(), {s.B, s.H, s.K, s.L});
  check_same(op, "weights", weights, query.scalar_type(), {s.B, s.H, s.K, s.L});
  Tensor d_query = new_heads(query, query.size(0), s.H, s.K, s.d);
  Tensor d_key = new_heads(key, s.B, s.H, s.L, s.d);
  if (s.B * s.H * s.K * s.L == 0) {
    zero_all({&d_query, &d_key});
    return {d_query, d_key};
  }
  p.weights = heads_view(weights);
  p.grad_weights = heads_view(grad_weights);
  const auto [query_rows, partials] = set_gradients(p, query, key, d_query, d_key);
  run(VTCLIP_PICK(weights_bwd_units), p, s.H * p.num_chunks,
      3 * p.chunk_images * s.num_blocks() * block_work(s));
  if (s.query_shared) sum_partials(s, partials, p.num_chunks, d_query);
  return {d_query, d_key};
}

}  // namespace
}  // namespace vtclip::cpu

VTCLIP_REGISTER(CPU, cpu, cross_attn_weights)
