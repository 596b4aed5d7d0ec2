// SPDX-License-Identifier: Apache-2.0
// Matrix products that are torch's, and the rounds in which a large problem goes through them.
#pragma once

#include <algorithm>
#include <array>

#include <torch/csrc/stable/library.h>

#include "launch.cuh"

namespace vtclip::cuda {

constexpr int64_t kWorkspaceRows = 16384;

// Images of a round: as many as a workspace of kWorkspaceRows rows holds, but at least one.
inline int64_t images_per_round(int64_t B, int64_t K) {
  return std::min(B, std::max<int64_t>(1, kWorkspaceRows / std::max<int64_t>(1, K)));
}

// out = left right; `out` has the shape of the product
inline void multiply(const Tensor& left, const Tensor& right, const Tensor& out) {
  using torch::stable::detail::from;
  std::array<StableIValue, 3> stack{from(left), from(right), from(out)};
  STABLE_TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::mm", "out", stack.data(), TORCH_ABI_VERSION));
  (void)torch::stable::detail::to<Tensor>(stack[0]);
}

// The same values; products into an `out` refuse what requires a gradient.
inline Tensor detached(const Tensor& tensor) {
  std::array<StableIValue, 1> stack{torch::stable::detail::from(tensor)};
  STABLE_TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::detach", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

// images first .. first + count - 1 of [B, K, D] as a matrix [count * K, D]
inline Tensor rows_between(const Tensor& tensor, int64_t first, int64_t count) {
  Tensor whole = tensor;
  const Tensor part = torch::stable::narrow(whole, 0, first, count);
  return torch::stable::reshape(part, {count * tensor.size(1), tensor.size(2)});
}

}  // namespace vtclip::cuda
