// SPDX-License-Identifier: Apache-2.0
// Arguments of the attention kernels (addresses, byte strides, block sizes), and from tensors to
// them: checks, views, blocking, buffers.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>
#include <utility>

#include "common/check.h"
#include "common/tensors.h"
#include "parallel.h"
#include "row_args.h"
#include "scratch.h"

namespace vtclip::cpu {

// A [batch, H, rows, d] view; a shared batch has stride 0. Strides in bytes.
struct HeadsView {
  char* data;
  int64_t batch, head, row, column;
  char* at(int64_t b, int64_t h) const { return data + b * batch + h * head; }
};

// Sizes and blocking shared by every attention kernel. Blocks depend on the shape only, never on
// the number of threads, so results do not either.
struct AttnShape {
  int64_t B, H, K, L, d;
  Dtype dtype;
  bool query_shared;   // one query set for all images
  const char* mask;    // bool, or null: attend everywhere
  int64_t mask_batch;  // byte strides of the mask
  int64_t mask_column;
  double scale;
  int64_t query_block;  // queries per block, a multiple of 16
  int64_t key_tile;     // keys per tile of scores
  int64_t num_blocks() const { return ceil_div(K, query_block); }
};

struct AttnForward {
  AttnShape shape;
  HeadsView query, key, value, out;
  void* lse;         // [B, H, K] acc
  void* query_pack;  // shared query only: [H, num_blocks, d, query_block padded] acc
};

// Gradients of query and key. A task is (head, chunk of images).
struct AttnGradients {
  AttnShape shape;
  HeadsView query, key, d_query, d_key;
  void* query_rows;       // shared query only: [H, K, d padded] acc, times scale
  void* d_query_partial;  // shared query only: [num_chunks, H, K, d padded] acc
  int64_t chunk_images;   // images per task where the query is shared, else 1
  int64_t num_chunks;
};

struct AttnBackward : AttnGradients {
  HeadsView value, grad_out, d_value;
  RowsView grad_lse;  // [B, H, K], data may be null
  void* query_pack;
};

struct WeightsForward {
  AttnShape shape;
  HeadsView query, key;
  char* weights;  // [B, H, K, L] contiguous
  void* query_pack;
};

struct WeightsBackward : AttnGradients {
  HeadsView weights, grad_weights;
};

// A query that all images share, or its gradient, on its way to or from packed rows.
struct SharedQuery {
  AttnShape shape;
  HeadsView query;
  void* rows;
  int64_t num_chunks;  // of the gradient
};

inline HeadsView heads_view(const Tensor& tensor) {
  const int64_t item = item_bytes(dtype_of(tensor.scalar_type()));
  const int64_t batch = tensor.size(0) == 1 ? 0 : tensor.stride(0) * item;
  return {static_cast<char*>(tensor.data_ptr()), batch, tensor.stride(1) * item,
          tensor.stride(2) * item, tensor.stride(3) * item};
}

// Blocks of at most 128 queries and tiles of at most 256 keys, evened out over the whole: a tile of
// scores (128 KiB in float32) stays in a second-level cache.
inline void set_blocks(AttnShape& shape) {
  const int64_t blocks = std::max<int64_t>(1, ceil_div(shape.K, 128));
  const int64_t queries = ceil_div(shape.K, blocks);
  shape.query_block = std::max<int64_t>(16, ceil_div(queries, 16) * 16);
  const int64_t tiles = std::max<int64_t>(1, ceil_div(shape.L, 256));
  shape.key_tile = std::max<int64_t>(1, ceil_div(shape.L, tiles));
}

inline AttnShape attn_shape(const char* op, const Tensor& query, const Tensor& key,
                            const std::optional<Tensor>& mask, double scale) {
  const ScalarType type = check_float(op, "query", query);
  check_same(op, "key", key, type);
  check_rank(op, "query", query, 4);
  check_rank(op, "key", key, 4);
  AttnShape shape{};
  shape.B = key.size(0);
  shape.H = key.size(1);
  shape.L = key.size(2);
  shape.d = key.size(3);
  shape.K = query.size(2);
  shape.dtype = dtype_of(type);
  shape.query_shared = query.size(0) == 1;
  shape.scale = scale;
  check_shape_or_shared(op, "query", query, {shape.B, shape.H, shape.K, shape.d});
  if (mask.has_value()) {
    check_same(op, "key_mask", *mask, ScalarType::Bool);
    check_shape_or_shared(op, "key_mask", *mask, {shape.B, shape.L});
    shape.mask = static_cast<const char*>(mask->data_ptr());
    shape.mask_batch = mask->size(0) == 1 ? 0 : mask->stride(0);
    shape.mask_column = mask->stride(1);
  }
  set_blocks(shape);
  return shape;
}

// Multiply-adds of one product between a query block and the keys of one image.
inline int64_t block_work(const AttnShape& shape) {
  return shape.query_block * (shape.L + 8) * (shape.d + 8);
}

// How many images one backward task takes where the query is shared: about 64 tasks in all, and at
// most 256 MiB of partial sums. A function of the shape, so the order of every sum is fixed.
inline int64_t images_per_chunk(const AttnShape& shape) {
  const int64_t item = shape.dtype == Dtype::kFloat64 ? 8 : 4;
  const int64_t bytes = std::max<int64_t>(1, shape.H * shape.K * shape.d * item);
  const int64_t wanted = ceil_div(64, std::max<int64_t>(1, shape.H));
  const int64_t affordable = std::max<int64_t>(1, (int64_t{256} << 20) / bytes);
  const int64_t chunks = std::max<int64_t>(1, std::min({wanted, affordable, shape.B}));
  return ceil_div(shape.B, chunks);
}

// A shared query as the right operand of the scores, [H, blocks, d, query_block], noted in
// `query_pack`; nothing where the query is not shared.
Tensor pack_shared_query(const AttnShape& shape, const Tensor& query, void*& query_pack);

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
