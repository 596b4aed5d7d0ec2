// SPDX-License-Identifier: Apache-2.0
// Cache-line aligned memory for temporary panels.
#pragma once

#include <cstddef>
#include <cstdint>
#include <new>

namespace vtclip {
namespace cpu {

inline void* scratch_alloc(int64_t bytes) {
  return ::operator new(static_cast<std::size_t>(bytes), std::align_val_t(64));
}

inline void scratch_free(void* p) { ::operator delete(p, std::align_val_t(64)); }

}  // namespace cpu
}  // namespace vtclip
