// SPDX-License-Identifier: Apache-2.0
// The work of one block of the cosine_logits kernels, free of torch and of CUDA's launch syntax: a
// block is `lanes` threads that meet only in Block::sum and Block::max, so that the same loops run
// on a GPU and, with one lane, on the host under a sanitizer.
//
//   logits[b,k] = scale * <x_b, t_k> * rx_b * rt_k,   r = 1 / |.| or 0 for a zero vector
//   d_x = rx * (g - xhat <xhat, g>),  g = scale * sum_k d_logits[b,k] that_k,  hat = r * vector
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define VTCLIP_DEVICE __device__ __forceinline__
#else
#include <cmath>
#define VTCLIP_DEVICE inline
#endif

namespace vtclip {

// a row of a strided matrix: element i is base[i * stride]
template <typename T>
struct Row {
  T* base;
  int64_t stride;
  VTCLIP_DEVICE T& operator[](int64_t i) const { return base[i * stride]; }
};

// 1 / |row|, with the row divided by its largest entry before squaring; 0 for a zero row
template <typename Acc, typename T, typename Block>
VTCLIP_DEVICE Acc reciprocal_norm(Row<const T> row, int64_t D, Block& block) {
  Acc largest = 0;
  bool nan = false;
  for (int64_t i = block.lane(); i < D; i += block.lanes()) {
    const Acc entry = static_cast<Acc>(row[i]);
    const Acc size = entry < 0 ? -entry : entry;
    nan = nan || entry != entry;
    largest = size > largest ? size : largest;
  }
  largest = block.max(largest);
  if (block.max(static_cast<Acc>(nan)) != 0) return static_cast<Acc>(NAN);
  if (largest == 0) return 0;
  Acc square = 0;
  for (int64_t i = block.lane(); i < D; i += block.lanes()) {
    const Acc part = static_cast<Acc>(row[i]) / largest;
    square += part * part;
  }
  return 1 / (largest * sqrt(block.sum(square)));
}

// <x, t> * rx * rt, multiplied so that neither huge nor tiny vectors overflow on the way
template <typename Acc, typename T, typename Block>
VTCLIP_DEVICE Acc cosine(Row<const T> x, Row<const T> t, Acc rx, Acc rt, int64_t D, Block& block) {
  Acc dot = 0;
  for (int64_t i = block.lane(); i < D; i += block.lanes()) {
    dot += (static_cast<Acc>(x[i]) * rx) * (static_cast<Acc>(t[i]) * rt);
  }
  return block.sum(dot);
}

// d_x of one vector x against `count` vectors t_j with weights w_j = scale * d_logits_j; `gradient`
// is scratch of D accumulators owned by this block
template <typename Acc, typename T, typename Block, typename Other, typename Weight>
VTCLIP_DEVICE void cosine_backward(Row<const T> x, Acc rx, int64_t count, Other other,
                                   Weight weight, int64_t D, Row<Acc> gradient, Row<T> d_x,
                                   Block& block) {
  Acc along = 0;
  for (int64_t i = block.lane(); i < D; i += block.lanes()) {
    Acc sum = 0;
    for (int64_t j = 0; j < count; ++j) sum += weight(j) * other(j, i);
    gradient[i] = sum;
    along += static_cast<Acc>(x[i]) * rx * sum;
  }
  along = block.sum(along);
  for (int64_t i = block.lane(); i < D; i += block.lanes()) {
    d_x[i] = static_cast<T>(rx * (gradient[i] - static_cast<Acc>(x[i]) * rx * along));
  }
}

}  // namespace vtclip
