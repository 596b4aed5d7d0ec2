// SPDX-License-Identifier: Apache-2.0
#include "attn_query.h"

#include <torch/headeronly/util/Half.h>

#include "gemm.h"
#include "scratch.h"

#define VTCLIP_KERNEL "cpu/common/attn_query_kernel.h"
#include "foreach_capability.h"

namespace vtclip {
namespace cpu {

using torch::stable::parallel_for;

Tensor pack_shared_query(const AttnShape& shape, const Tensor& query) {
  const int64_t units = shape.H * shape.num_blocks();
  Tensor pack = new_buffer(query, units * shape.D * padded(shape.query_block));
  const HeadsView view = heads_view(query);
  void* data = pack.data_ptr();
  const auto run = VTCLIP_PICK(pack_query_units);
  parallel_for(0, units, grain_for(4 * shape.query_block * shape.D),
               [&](int64_t begin, int64_t end) { run(shape, view, data, begin, end); });
  return pack;
}

Tensor pack_shared_query_rows(const AttnShape& shape, const Tensor& query) {
  const int64_t rows = shape.H * shape.K;
  Tensor pack = new_buffer(query, rows * padded(shape.D));
  const HeadsView view = heads_view(query);
  void* data = pack.data_ptr();
  const auto run = VTCLIP_PICK(pack_query_row_units);
  parallel_for(0, rows, grain_for(4 * shape.D),
               [&](int64_t begin, int64_t end) { run(shape, view, data, begin, end); });
  return pack;
}

Tensor new_partials(const AttnShape& shape, const Tensor& query, int64_t num_chunks) {
  return new_buffer(query, num_chunks * shape.H * shape.K * padded(shape.D));
}

void sum_partials(const AttnShape& shape, const Tensor& partials, int64_t num_chunks,
                  const Tensor& d_query) {
  const HeadsView view = heads_view(d_query);
  const void* data = partials.data_ptr();
  const auto run = VTCLIP_PICK(sum_chunk_units);
  parallel_for(0, shape.H * shape.K, 64,
               [&](int64_t begin, int64_t end) { run(shape, view, data, num_chunks, begin, end); });
}

}  // namespace cpu
}  // namespace vtclip
