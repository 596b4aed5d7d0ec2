// SPDX-License-Identifier: Apache-2.0
// The kernel around a body (README.md), without torch.
#pragma once

#include <cstdint>

#include <cuda_runtime.h>

#include "block.h"

namespace vtclip::cuda {

// Bytes of shared memory a block of Body takes.
template <class Body>
int64_t shared_bytes() {
  Shared counter(nullptr);
  typename Body::Tiles tiles{counter};
  (void)tiles;
  return counter.bytes();
}

// Blocks of Body that registers leave room for on an SM, if it asks.
template <class Body>
constexpr int resident_blocks() {
  if constexpr (requires { Body::kResident; }) return Body::kResident;
  return 1;
}

template <class Body>
__global__ void __launch_bounds__(Body::kWarps* kWarpSize, resident_blocks<Body>())
    body_kernel(const __grid_constant__ typename Body::Args args) {
  extern __shared__ __align__(128) unsigned char raw[];
  Shared shared(raw);
  typename Body::Tiles tiles{shared};
  Body::run(args, static_cast<int64_t>(blockIdx.x), tiles);
}

}  // namespace vtclip::cuda
