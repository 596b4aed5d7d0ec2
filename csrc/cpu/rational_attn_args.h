// SPDX-License-Identifier: Apache-2.0
// Arguments of the rational_attn kernels. Strides in bytes.
#pragma once

#include "cpu/common/attn_args.h"

namespace vtclip::cpu {

constexpr int kMatrixKinds = 2;  // text, pair: queries with one row per class

// Queries, keys and values; shape.L == shape.K, shape.query_shared is about the text.
struct RationalInputs {
  AttnShape shape;
  bool has_image;
  bool has[kMatrixKinds];
  HeadsView image, query[kMatrixKinds], key, value;
  int64_t num_kinds;  // how many queries there are, the image's included
};

// A task is one (image, head) or, where these are few, a range of its query blocks.
struct RationalForward {
  RationalInputs in;
  HeadsView out;
  bool keep_parts;
  HeadsView parts[kMatrixKinds];
  void* image_out;  // [B, H, D] acc
  void* stats;      // [3, 2, B, H] acc
  int64_t num_chunks, chunk_blocks;
  void* block_stats;  // [B, H, kind, 2, blocks] acc: maximum and sum of every query block
  void* rows;         // more than one chunk only: [B, H, kind, K, D padded] acc
};

// A task is (head, chunk of images, chunk of query blocks); at most one of the chunks is split.
struct RationalBackward {
  RationalInputs in;
  HeadsView grad_out, parts[kMatrixKinds];
  HeadsView d_image, d_query[kMatrixKinds], d_key, d_value;
  const char* stats;  // [3, 2, B, H] acc
  int64_t stats_kind, stats_which, stats_batch, stats_head;
  int64_t chunk_images, num_image_chunks;
  int64_t num_chunks, chunk_blocks;
  void* means;         // [B, H, kind, blocks] double: c of every query block
  void* text_partial;  // shared text only: [image chunks, H, K, D padded] acc
  void* key_partial;   // more than one chunk only: [chunks, B, H, 2, K, D padded] acc
};

}  // namespace vtclip::cpu
