// SPDX-License-Identifier: Apache-2.0
// Outputs and buffers of an operator.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <initializer_list>
#include <vector>

#include "dtype.h"

namespace vtclip {

using torch::stable::new_empty;
using torch::stable::Tensor;

// In the type that sums are computed in.
inline Tensor new_acc(const Tensor& like, std::initializer_list<int64_t> sizes) {
  return new_empty(like, sizes, acc_type(like.scalar_type()));
}

// Buffers of one call, in that type, for its kernels alone.
namespace {  // as hidden as torch's Tensor
class Workspace {
 public:
  explicit Workspace(const Tensor& like) : like_(like) {}
  void* take(std::initializer_list<int64_t> sizes) {
    buffers_.push_back(new_acc(like_, sizes));
    return buffers_.back().data_ptr();
  }

 private:
  const Tensor like_;
  std::vector<Tensor> buffers_;
};
}  // namespace

// Memory [B, rows, H, d], seen as [B, H, rows, d]: heads can be joined without a copy.
inline Tensor new_heads(const Tensor& like, int64_t B, int64_t H, int64_t rows, int64_t d) {
  return torch::stable::transpose(new_empty(like, {B, rows, H, d}), 1, 2);
}

inline void zero_all(std::initializer_list<Tensor*> tensors) {
  for (Tensor* tensor : tensors) torch::stable::zero_(*tensor);
}

}  // namespace vtclip
