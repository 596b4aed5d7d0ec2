// SPDX-License-Identifier: Apache-2.0
// Memory for temporary panels: bounds and aligned allocation.
#pragma once

#include <cstddef>
#include <cstdint>
#include <new>

namespace vtclip::cpu {

// Upper bounds, for every instruction set, of a row of n elements: in whole vectors, and in an odd
// number of cache lines (leading_dim of the kernels).
inline int64_t row_width(int64_t n) { return (n + 15) / 16 * 16; }
inline int64_t panel_width(int64_t n) { return row_width(n) + 16; }

// From the start of a cache line.
inline void* scratch_alloc(int64_t bytes) {
  return ::operator new(static_cast<std::size_t>(bytes), std::align_val_t(64));
}

inline void scratch_free(void* p) { ::operator delete(p, std::align_val_t(64)); }

}  // namespace vtclip::cpu
