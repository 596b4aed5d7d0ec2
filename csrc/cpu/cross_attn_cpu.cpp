// SPDX-License-Identifier: Apache-2.0
// cross_attn_fwd and cross_attn_bwd for CPU tensors.
#include <optional>
#include <tuple>

#include "common/register.h"
#include "cpu/common/attn_host.h"
#include "cpu/cross_attn_pairs.h"

#define VTCLIP_KERNEL "cpu/cross_attn_kernel.h"
#include "cpu/common/foreach_capability.h"

namespace vtclip::cpu {
namespace {

std::tuple<Tensor, Tensor> cross_attn_fwd(Tensor query, Tensor key, Tensor value,
                                          std::optional<Tensor> key_mask, double scale) {
  const char* op = "cross_attn_fwd";
  AttnForward p{};
  p.shape = attn_shape(op, query, key, key_mask, scale);
  const AttnShape& s = p.shape;
  check_same(op, "value", value, query.scalar_type(), {s.B, s.H, s.L, s.d});

  Tensor out = new_heads(query, s.B, s.H, s.K, s.d);
  Tensor lse = new_empty(query, {s.B, s.H, s.K}, acc_type(query.scalar_type()));
  if (s.B * s.H * s.K == 0) return {out, lse};
  p.query = heads_view(query);
  p.key = heads_view(key);
  p.value = heads_view(value);
  p.out = heads_view(out);
  p.lse = lse.data_ptr();
  if (has_pairs(s)) {
    cross_attn_pairs_fwd(p, query);
    return {out, lse};
  }
  const Tensor pack = pack_shared_query(s, query, p.query_pack);
  run(VTCLIP_PICK(cross_attn_fwd_units), p, s.B * s.H * s.num_blocks(), 2 * block_work(s));
  return {out, lse};
}

// out and lse are not needed: the kernel recomputes the softmax.
std::tuple<Tensor, Tensor, Tensor> cross_attn_bwd(Tensor grad_out, std::optional<Tensor> grad_lse,
                                                  Tensor query, Tensor key, Tensor value,
                                                  std::optional<Tensor> key_mask, Tensor out,
                                                  Tensor lse, double scale) {
  const char* op = "cross_attn_bwd";
  AttnBackward p{};
  p.shape = attn_shape(op, query, key, key_mask, scale);
  const AttnShape& s = p.shape;
  const ScalarType type = query.scalar_type();
  check_same(op, "value", value, type, {s.B, s.H, s.L, s.d});
  check_same(op, "grad_out", grad_out, type, {s.B, s.H, s.K, s.d});
  check_same(op, "out", out, type, {s.B, s.H, s.K, s.d});
  check_same(op, "lse", lse, acc_type(type), {s.B, s.H, s.K});
  if (grad_lse.has_value()) {
    p.grad_lse = checked_view(op, "grad_lse", *grad_lse, acc_type(type), {s.B, s.H, s.K});
  }
  Tensor d_query = new_heads(query, query.size(0), s.H, s.K, s.d);
  Tensor d_key = new_heads(key, s.B, s.H, s.L, s.d);
  Tensor d_value = new_heads(value, s.B, s.H, s.L, s.d);
  if (s.B * s.H * s.K * s.L == 0) {
    zero_all({&d_query, &d_key, &d_value});
    return {d_query, d_key, d_value};
  }
  p.value = heads_view(value);
  p.grad_out = heads_view(grad_out);
  p.d_value = heads_view(d_value);
  const auto [query_rows, partials] = set_gradients(p, query, key, d_query, d_key);
  const Tensor pack = pack_shared_query(s, query, p.query_pack);
  run(VTCLIP_PICK(cross_attn_bwd_units), p, s.H * p.num_chunks,
      5 * p.chunk_images * s.num_blocks() * block_work(s));
  if (s.query_shared) sum_partials(s, partials, p.num_chunks, d_query);
  return {d_query, d_key, d_value};
}

}  // namespace
}  // namespace vtclip::cpu

VTCLIP_REGISTER(CPU, cpu, cross_attn)
