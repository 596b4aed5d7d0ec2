// SPDX-License-Identifier: Apache-2.0
// What the ops over rows (image, class) share: views of rows, and how rows and weights are split.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <initializer_list>

#include "common/ceil_div.h"
#include "common/check.h"
#include "common/dtype.h"
#include "common/tensors.h"
#include "scratch.h"

namespace vtclip::cpu {

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

inline RowsView checked_view(const char* op, const char* name, const Tensor& tensor,
                             ScalarType type, std::initializer_list<int64_t> sizes) {
  check_same(op, name, tensor, type, sizes);
  return rows_view(tensor);
}

// Backward units: (chunk of images, chunk of texts). Sums over images (d_text) and over texts
// (d_image) are formed per unit and added in ascending order afterwards.
struct RowChunks {
  int64_t image_chunk, image_chunks;
  int64_t text_chunk, text_chunks;
  int64_t units() const { return image_chunks * text_chunks; }
};

// About `wanted` units, whole images first. A function of the shape, so the order of every sum is
// fixed.
inline RowChunks row_chunks(int64_t B, int64_t K, int64_t wanted) {
  RowChunks c{};
  c.image_chunk = ceil_div(B, std::min(B, wanted));
  c.image_chunks = ceil_div(B, c.image_chunk);
  c.text_chunk = ceil_div(K, std::min(K, ceil_div(wanted, c.image_chunks)));
  c.text_chunks = ceil_div(K, c.text_chunk);
  return c;
}

// Rows that share one block: at most `most`, evened out over all of them.
inline int64_t even_block(int64_t rows, int64_t most) {
  return ceil_div(rows, ceil_div(rows, most));
}

// Columns of a packed weight panel: [D, kPanel] of one panel after the other.
constexpr int64_t kPanel = 64;

// Rows of d_weight that one task sums.
constexpr int64_t kSumRows = 64;

inline int64_t panels_of(int64_t n) { return ceil_div(n, kPanel); }

// At most 16 units of at least 64 rows.
inline int64_t weight_units(int64_t rows) {
  return std::max<int64_t>(1, std::min<int64_t>(16, rows / 64));
}

}  // namespace vtclip::cpu
