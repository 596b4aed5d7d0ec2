// SPDX-License-Identifier: Apache-2.0
// Views and sums for programs over rows (b, k).
#pragma once

#include "host.h"
#include "cuda/rational_logits_block.h"
#include "cuda/block/sum_columns.h"

namespace host {

template <class T>
vtclip::cuda::Images<const T> images_of(const Tensor& tensor) {
  return {tensor.data<T>(), tensor.stride(0), tensor.stride(1), tensor.stride(2)};
}

template <class T>
void sum_columns(const typename vtclip::cuda::SumColumns<T>::Args& args) {
  launch<vtclip::cuda::SumColumns<T>>(args.blocks(), args);
}

}  // namespace host
