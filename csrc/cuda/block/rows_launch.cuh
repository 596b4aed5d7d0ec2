// SPDX-License-Identifier: Apache-2.0
// What the launchers of ops over rows (b, k) share.
#pragma once

#include "launch.cuh"
#include "sum_columns.h"
#include "tile_io.h"
#include "walk.h"

namespace vtclip::cuda {

template <class T>
Rows<const T> rows_of(const Tensor& tensor) {
  return {data_of<T>(tensor), tensor.stride(0), tensor.stride(1)};
}

template <class T>
Images<const T> images_of(const Tensor& tensor) {
  return {data_of<T>(tensor), tensor.stride(0), tensor.stride(1), tensor.stride(2)};
}

// The walk of a body over B images; its chunks are a function of the shape only.
template <class Body, class T>
Walk<T> walk_of(int64_t B, int64_t K, int64_t D) {
  Walk<T> walk{B, K, D, 1};
  walk.images = images_per_block(B, walk.blocks_per_chunk(Body::kWarps * kWarpSize));
  return walk;
}

template <class T>
void sum_columns(const char* op, const Tensor& like, const typename SumColumns<T>::Args& args) {
  launch<SumColumns<T>>(op, args.blocks(), like, args);
}

}  // namespace vtclip::cuda
