// SPDX-License-Identifier: Apache-2.0
// Splitting work over torch's threads.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>

#include "common/ceil_div.h"

namespace vtclip::cpu {

// Units per range, so that a range is worth waking a thread for: about 2^18 multiply-adds or, where
// memory sets the pace, a quarter as many elements.
inline int64_t grain_for(int64_t work_per_unit) {
  return std::max<int64_t>(1, (int64_t{1} << 18) / std::max<int64_t>(1, work_per_unit));
}

// fn(args, begin, end) over [0, units).
template <class Args>
void run(void (*fn)(const Args&, int64_t, int64_t), const Args& args, int64_t units,
         int64_t work_per_unit) {
  torch::stable::parallel_for(0, units, grain_for(work_per_unit),
                              [&](int64_t begin, int64_t end) { fn(args, begin, end); });
}

}  // namespace vtclip::cpu
