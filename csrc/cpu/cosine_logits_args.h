// SPDX-License-Identifier: Apache-2.0
// Arguments of the cosine kernels: addresses, byte strides, sizes.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <vector>

#include "common/check.h"
#include "common/dtype.h"

namespace vtclip {
namespace cpu {

// [batch, rows, columns]; a matrix has batch stride 0. Strides in bytes.
struct RowsView {
  char* data;
  int64_t batch, row, column;
  char* at(int64_t b, int64_t i) const { return data + b * batch + i * row; }
};

inline RowsView rows_view(const Tensor& tensor) {
  const int64_t item = item_bytes(dtype_of(tensor.scalar_type()));
  const int64_t rank = tensor.dim();
  return {static_cast<char*>(tensor.data_ptr()), rank == 3 ? tensor.stride(0) * item : 0,
          rank >= 2 ? tensor.stride(rank - 2) * item : 0,
          rank >= 1 ? tensor.stride(rank - 1) * item : 0};
}

inline Tensor new_tensor(const Tensor& like, std::vector<int64_t> sizes) {
  return torch::stable::new_empty(like, sizes);
}

inline Tensor new_acc(const Tensor& like, std::vector<int64_t> sizes) {
  return torch::stable::new_empty(like, sizes, acc_type(like.scalar_type()));
}

// Upper bound of a row of n elements padded to whole vectors.
inline int64_t padded_row(int64_t n) { return (n + 15) / 16 * 16; }

struct Cosine {
  int64_t B, K, D;
  Dtype dtype;
  double scale;
  RowsView image, text;  // text.batch is 0 where the texts are shared by all images
  void* image_rnorm;     // [B] acc
  void* text_rnorm;      // [K] or [B, K] acc
  void* image_unit;      // [B, D padded] acc: image / |image|
  int64_t image_block;   // images per unit
  int64_t text_block;    // texts per unit
};

struct CosineForward {
  Cosine sizes;
  char* logits;  // [B, K] contiguous
};

struct CosineBackward {
  Cosine sizes;
  RowsView grad_logits;
  RowsView image_rnorm_in, text_rnorm_in;
  RowsView d_image, d_text;
  void* text_unit;  // shared texts: [K, D padded] acc
  void* grads;      // shared texts: [B, K] acc, times scale
  void* d_unit;     // [num_chunks, B, D padded] acc: gradient of image / |image|
  int64_t num_chunks;
};

}  // namespace cpu
}  // namespace vtclip
