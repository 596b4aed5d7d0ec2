// SPDX-License-Identifier: Apache-2.0
// What the attention kernels of all instruction sets are given: addresses, byte strides, block
// sizes.
#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace vtclip {
namespace cpu {

// A [batch, H, rows, d] view; a shared batch has stride 0. Strides in bytes.
struct HeadsView {
  char* data;
  int64_t batch, head, row, column;
  char* at(int64_t b, int64_t h) const { return data + b * batch + h * head; }
};

// Sizes and blocking shared by every attention kernel. Blocks depend on the shape only, never on
// the number of threads, so results do not either.
struct AttnShape {
  int64_t B, H, K, L, D;
  Dtype dtype;
  bool query_shared;   // one query set for all images
  const char* mask;    // bool, or null: attend everywhere
  int64_t mask_batch;  // byte strides of the mask
  int64_t mask_column;
  double scale;
  int64_t query_block;  // queries per block, a multiple of 16
  int64_t key_tile;     // keys per tile of scores
  int64_t num_blocks() const { return (K + query_block - 1) / query_block; }
};

struct AttnForward {
  AttnShape shape;
  HeadsView query, key, value, out;
  void* lse;         // [B, H, K] acc
  void* query_pack;  // shared query only: [H, num_blocks, D, query_block padded] acc
};

struct AttnBackward {
  AttnShape shape;
  HeadsView query, key, value, grad_out;
  HeadsView d_query, d_key, d_value;
  const char* grad_lse;  // may be null
  int64_t grad_lse_batch, grad_lse_head, grad_lse_row;
  void* query_pack;
  void* query_rows;       // shared query only: [H, K, D padded] acc, times scale
  void* d_query_partial;  // shared query only: [num_chunks, H, K, D padded] acc
  int64_t chunk_images;   // images per task where the query is shared, else 1
  int64_t num_chunks;
};

struct WeightsForward {
  AttnShape shape;
  HeadsView query, key;
  char* weights;  // [B, H, K, L] contiguous
  void* query_pack;
};

struct WeightsBackward {
  AttnShape shape;
  HeadsView query, key, weights, grad_weights;
  HeadsView d_query, d_key;
  void* query_rows;
  void* d_query_partial;
  int64_t chunk_images;
  int64_t num_chunks;
};

}  // namespace cpu
}  // namespace vtclip
