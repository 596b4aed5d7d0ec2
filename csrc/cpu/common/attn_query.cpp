// SPDX-License-Identifier: Apache-2.0
#include "attn_host.h"

#define VTCLIP_KERNEL "cpu/common/attn_query_kernel.h"
#include "foreach_capability.h"

namespace vtclip::cpu {

Tensor pack_shared_query(const AttnShape& s, const Tensor& query, void*& query_pack) {
  if (!s.query_shared) return {};
  const int64_t units = s.H * s.num_blocks();
  Tensor pack = new_acc(query, {units * s.d * panel_width(s.query_block)});
  query_pack = pack.data_ptr();
  const SharedQuery args{s, heads_view(query), query_pack, 1};
  run(VTCLIP_PICK(pack_query_units), args, units, 4 * s.query_block * s.d);
  return pack;
}

Tensor new_partials(const AttnShape& s, const Tensor& query, int64_t num_chunks) {
  return new_acc(query, {num_chunks * s.H * s.K * panel_width(s.d)});
}

void sum_partials(const AttnShape& s, const Tensor& partials, int64_t num_chunks,
                  const Tensor& d_query) {
  const SharedQuery args{s, heads_view(d_query), partials.data_ptr(), num_chunks};
  run(VTCLIP_PICK(sum_chunk_units), args, s.H * s.K, 8 * num_chunks * s.d);
}

std::pair<Tensor, Tensor> set_gradients(AttnGradients& p, const Tensor& query, const Tensor& key,
                                        const Tensor& d_query, const Tensor& d_key) {
  const AttnShape& s = p.shape;
  p.query = heads_view(query);
  p.key = heads_view(key);
  p.d_query = heads_view(d_query);
  p.d_key = heads_view(d_key);
  p.chunk_images = s.query_shared ? images_per_chunk(s) : 1;
  p.num_chunks = ceil_div(s.B, p.chunk_images);
  if (!s.query_shared) return {};
  Tensor rows = new_acc(query, {s.H * s.K * panel_width(s.d)});
  Tensor partials = new_partials(s, query, p.num_chunks);
  p.query_rows = rows.data_ptr();
  p.d_query_partial = partials.data_ptr();
  const SharedQuery args{s, p.query, p.query_rows, 1};
  run(VTCLIP_PICK(pack_query_row_units), args, s.H * s.K, 4 * s.d);
  return {rows, partials};
}

}  // namespace vtclip::cpu
