// SPDX-License-Identifier: Apache-2.0
// cross_attn_weights_fwd and cross_attn_weights_bwd for CPU tensors.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Half.h>

#include <optional>
#include <tuple>

#include "cpu/common/attn_args.h"
#include "cpu/common/attn_host.h"
#include "cpu/common/attn_query.h"
#include "common/check.h"
#include "cpu/common/gemm.h"
#include "cpu/common/scratch.h"

#define VTCLIP_KERNEL "cpu/cross_attn_weights_kernel.h"
#include "cpu/common/foreach_capability.h"

namespace vtclip {
namespace cpu {
namespace {

Tensor cross_attn_weights_fwd(Tensor query, Tensor key, std::optional<Tensor> key_mask,
                              double scale) {
  WeightsForward p{};
  p.shape = attn_shape("cross_attn_weights_fwd", query, key, key_mask, scale);
  const AttnShape& s = p.shape;
  const std::vector<int64_t> sizes{s.B, s.H, s.K, s.L};
  Tensor weights = torch::stable::new_empty(query, sizes);
  if (s.B * s.H * s.K * s.L == 0) return weights;
  p.query = heads_view(query);
  p.key = heads_view(key);
  p.weights = static_cast<char*>(weights.data_ptr());
  Tensor pack;
  if (s.query_shared) {
    pack = pack_shared_query(s, query);
    p.query_pack = pack.data_ptr();
  }
  run(VTCLIP_PICK(weights_fwd_units), p, s.B * s.H * s.num_blocks(), 2 * block_work(s));
  return weights;
}

std::tuple<Tensor, Tensor> cross_attn_weights_bwd(Tensor grad_weights, Tensor weights, Tensor query,
                                                  Tensor key, double scale) {
  const char* op = "cross_attn_weights_bwd";
  WeightsBackward p{};
  p.shape = attn_shape(op, query, key, std::nullopt, scale);
  const AttnShape& s = p.shape;
  check_same(op, "grad_weights", grad_weights, query.scalar_type());
  check_same(op, "weights", weights, query.scalar_type());
  check_shape(op, "grad_weights", grad_weights, {s.B, s.H, s.K, s.L});
  check_shape(op, "weights", weights, {s.B, s.H, s.K, s.L});
  Tensor d_query = new_heads(query, query.size(0), s.H, s.K, s.D);
  Tensor d_key = new_heads(key, s.B, s.H, s.L, s.D);
  if (s.B * s.H * s.K * s.L == 0) {
    torch::stable::zero_(d_query);
    torch::stable::zero_(d_key);
    return {d_query, d_key};
  }
  p.query = heads_view(query);
  p.key = heads_view(key);
  p.weights = heads_view(weights);
  p.grad_weights = heads_view(grad_weights);
  p.d_query = heads_view(d_query);
  p.d_key = heads_view(d_key);
  p.chunk_images = s.query_shared ? images_per_chunk(s) : 1;
  p.num_chunks = ceil_div(s.B, p.chunk_images);
  Tensor query_rows, partials;
  if (s.query_shared) {
    query_rows = pack_shared_query_rows(s, query);
    partials = new_partials(s, query, p.num_chunks);
    p.query_rows = query_rows.data_ptr();
    p.d_query_partial = partials.data_ptr();
  }
  run(VTCLIP_PICK(weights_bwd_units), p, s.H * p.num_chunks,
      3 * p.chunk_images * s.num_blocks() * block_work(s));
  if (s.query_shared) sum_partials(s, partials, p.num_chunks, d_query);
  return {d_query, d_key};
}

}  // namespace
}  // namespace cpu
}  // namespace vtclip

STABLE_TORCH_LIBRARY_IMPL(vtclip, CPU, m) {
  m.impl("cross_attn_weights_fwd", TORCH_BOX(&vtclip::cpu::cross_attn_weights_fwd));
  m.impl("cross_attn_weights_bwd", TORCH_BOX(&vtclip::cpu::cross_attn_weights_bwd));
}
