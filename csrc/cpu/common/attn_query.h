// SPDX-License-Identifier: Apache-2.0
// Buffers of a query that all images share: packed before the main kernel, summed after it.
#pragma once

#include "attn_args.h"
#include "attn_host.h"

namespace vtclip {
namespace cpu {

// The query as the right operand of the scores, [H, blocks, D, query_block].
Tensor pack_shared_query(const AttnShape& shape, const Tensor& query);

// The scaled query as the right operand of dK, [H, K, D].
Tensor pack_shared_query_rows(const AttnShape& shape, const Tensor& query);

// Room for dQ of every chunk of images, [chunks, H, K, D].
Tensor new_partials(const AttnShape& shape, const Tensor& query, int64_t num_chunks);

// d_query = scale * sum over the chunks.
void sum_partials(const AttnShape& shape, const Tensor& partials, int64_t num_chunks,
                  const Tensor& d_query);

}  // namespace cpu
}  // namespace vtclip
