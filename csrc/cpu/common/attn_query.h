// SPDX-License-Identifier: Apache-2.0
// Buffers of a query that all images share: packed before the main kernel, summed after it.
#pragma once

#include <utility>

#include "attn_args.h"
#include "attn_host.h"

namespace vtclip::cpu {

// The query as the right operand of the scores, [H, blocks, d, query_block].
Tensor pack_shared_query(const AttnShape& shape, const Tensor& query);

// Room for dQ of every chunk of images, [chunks, H, K, d].
Tensor new_partials(const AttnShape& shape, const Tensor& query, int64_t num_chunks);

// d_query = scale * sum over the chunks.
void sum_partials(const AttnShape& shape, const Tensor& partials, int64_t num_chunks,
                  const Tensor& d_query);

// Notes in the arguments of a backward kernel: views of query and key and of their gradients, the
// chunks of images and, for a shared query, scaled rows and partial sums. Returns these two.
std::pair<Tensor, Tensor> set_gradients(AttnGradients& p, const Tensor& query, const Tensor& key,
                                        const Tensor& d_query, const Tensor& d_key);

}  // namespace vtclip::cpu
