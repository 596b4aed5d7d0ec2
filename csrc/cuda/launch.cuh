// SPDX-License-Identifier: Apache-2.0
// What every launch needs: the current stream, a device guard, a launch check.
#pragma once

#include <cstdint>

#include <cuda_runtime.h>

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

namespace vtclip {

// grid.x goes to 2^31 - 1; rows always lie on it, never on grid.y or grid.z (65,535)
constexpr int64_t kMaxGridX = 2147483647;

inline cudaStream_t current_stream(const torch::stable::Tensor& like) {
  void* stream = nullptr;
  aoti_torch_get_current_cuda_stream(like.get_device_index(), &stream);
  return static_cast<cudaStream_t>(stream);
}

inline void check_launch(const char* kernel) {
  const cudaError_t status = cudaGetLastError();
  STD_TORCH_CHECK(status == cudaSuccess, kernel, ": launch failed: ", cudaGetErrorString(status));
}

}  // namespace vtclip
