// SPDX-License-Identifier: Apache-2.0
// Arguments of the attention kernels: addresses, byte strides, block sizes.
#pragma once

#include <cstdint>

#include "common/ceil_div.h"
#include "common/dtype.h"

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
  const char* grad_lse;  // may be null
  int64_t grad_lse_batch, grad_lse_head, grad_lse_row;
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

}  // namespace vtclip::cpu
