// SPDX-License-Identifier: Apache-2.0
// From a body (README.md) to a launch: grid, shared memory, stream, launch check, dtype switch.
#pragma once

#include <algorithm>
#include <cstdint>

#include <cuda_runtime.h>

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/Half.h>

#include "block.h"
#include "common/check.h"
#include "common/dtype.h"
#include "common/tensors.h"
#include "kernel.cuh"
#include "once_per_device.h"
#include "tile_io.h"

namespace vtclip::cuda {

// grid.x goes to 2^31 - 1; blocks always lie on it, never on grid.y or grid.z (65,535)
constexpr int64_t kMaxGridX = 2147483647;
// what a launch may ask for without raising the kernel's limit
constexpr int64_t kDefaultShared = 48 * 1024;

inline cudaStream_t current_stream(const Tensor& like) {
  void* stream = nullptr;
  aoti_torch_get_current_cuda_stream(like.get_device_index(), &stream);
  return static_cast<cudaStream_t>(stream);
}

inline void check_cuda(const char* op, const char* what, cudaError_t status) {
  if (status != cudaSuccess) fail(op, what, " failed: ", cudaGetErrorString(status));
}

// Shared memory a block may have on the device of `like`, in bytes.
inline int64_t shared_limit(const char* op, const Tensor& like) {
  int bytes = 0;
  check_cuda(op, "cudaDeviceGetAttribute",
             cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin,
                                    like.get_device_index()));
  return bytes;
}

// Body::run for 0 <= index < blocks, on the current stream.
template <class Body>
void launch(const char* op, int64_t blocks, const Tensor& like, const typename Body::Args& args) {
  if (blocks == 0) return;
  if (blocks > kMaxGridX) fail(op, "at most ", kMaxGridX, " blocks in one launch, got ", blocks);
  const int64_t bytes = shared_bytes<Body>();
  if (bytes > kDefaultShared) {
    static OncePerDevice raised;
    raised(like.get_device_index(), [&] {
      check_cuda(op, "cudaFuncSetAttribute",
                 cudaFuncSetAttribute(body_kernel<Body>,
                                      cudaFuncAttributeMaxDynamicSharedMemorySize,
                                      static_cast<int>(bytes)));
    });
  }
  body_kernel<Body><<<dim3(static_cast<unsigned>(blocks)), Body::kWarps * kWarpSize,
                      static_cast<size_t>(bytes), current_stream(like)>>>(args);
  check_cuda(op, "launch", cudaGetLastError());
}

// run(T{}) with the element type of `like`
template <class Run>
void with_dtype(const char* op, const char* name, const Tensor& like, Run run) {
  switch (like.scalar_type()) {
    case ScalarType::Float: return run(float{});
    case ScalarType::Half: return run(torch::headeronly::Half{});
    case ScalarType::BFloat16: return run(torch::headeronly::BFloat16{});
    default:
      fail(op, name, " must have dtype Float, Half or BFloat16, got ",
           torch::headeronly::toString(like.scalar_type()));
  }
}

template <class T>
const T* data_of(const Tensor& tensor) { return static_cast<const T*>(tensor.const_data_ptr()); }
template <class T>
T* data_of(Tensor& tensor) { return static_cast<T*>(tensor.mutable_data_ptr()); }

template <class T>
Heads<const T> heads_of(const Tensor& tensor) {
  return {data_of<T>(tensor), tensor.size(0) == 1 ? 0 : tensor.stride(0), tensor.stride(1),
          tensor.stride(2), tensor.stride(3)};
}
template <class T>
Heads<T> heads_of(Tensor& tensor) {
  return {data_of<T>(tensor), tensor.stride(0), tensor.stride(1), tensor.stride(2),
          tensor.stride(3)};
}

// How many images one block streams past what they share, where `blocks` blocks are needed per
// image: enough blocks stay to fill a large device about four times. A function of the shapes
// only, so the order of every sum is the same on every device.
inline int64_t images_per_block(int64_t B, int64_t blocks) {
  const int64_t wanted = ceil_div(512, std::max<int64_t>(1, blocks));
  const int64_t chunks = std::max<int64_t>(1, std::min(wanted, B));
  return std::max<int64_t>(1, ceil_div(B, chunks));
}

}  // namespace vtclip::cuda
