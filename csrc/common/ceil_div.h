// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define VTCLIP_BOTH __host__ __device__ __forceinline__
#else
#define VTCLIP_BOTH inline
#endif

namespace vtclip {

VTCLIP_BOTH constexpr int64_t ceil_div(int64_t n, int64_t step) { return (n + step - 1) / step; }

}  // namespace vtclip
