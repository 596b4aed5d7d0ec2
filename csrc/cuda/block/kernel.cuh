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

template <class Body>
__global__ void __launch_bounds__(Body::kWarps* kWarpSize, 1)
    body_kernel(const __grid_constant__ typename Body::Args args) {
  // The compiler does not take this from the launch bounds, and gives a loop over the threads that
  // has one trip code for more.
  if constexpr (kKnownSizesFit) VTCLIP_ASSUME(threadIdx.x < Body::kWarps * kWarpSize);
  extern __shared__ __align__(128) unsigned char raw[];
  Shared shared(raw);
  typename Body::Tiles tiles{shared};
  Body::run(args, static_cast<int64_t>(blockIdx.x), tiles);
}

}  // namespace vtclip::cuda
