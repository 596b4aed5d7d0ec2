// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <thread>

#include "tensor.h"

namespace torch::stable {

inline int64_t num_threads = 1;  // how many ranges parallel_for makes

inline uint32_t get_num_threads() { return static_cast<uint32_t>(num_threads); }

inline Tensor new_empty(const Tensor& like, std::initializer_list<int64_t> sizes,
                        std::optional<ScalarType> type = std::nullopt) {
  return contiguous(type.value_or(like.scalar_type()), sizes);
}

inline Tensor transpose(const Tensor& tensor, int64_t one, int64_t other) {
  return tensor.transposed(one, other);
}

inline void zero_(const Tensor& tensor) {  // of a dense tensor, as all that csrc/cpu fills are
  const int64_t bytes = tensor.numel() * item_bytes(tensor.scalar_type());
  if (bytes != 0) std::memset(tensor.data_ptr(), 0, static_cast<std::size_t>(bytes));
}

// Ranges of unequal lengths however little work there is, each on a thread of its own.
template <class F>
void parallel_for(int64_t begin, int64_t end, int64_t, const F& f) {
  std::vector<std::thread> threads;
  for (int64_t left = num_threads; begin < end; --left) {
    const int64_t rest = end - begin;
    const int64_t even = (rest + left - 1) / left;
    const int64_t odd = even + (left % 2 == 0 ? even / 2 : -(even / 3));
    const int64_t last = left <= 1 || odd >= rest ? end : begin + (odd < 1 ? 1 : odd);
    threads.emplace_back([&f, begin, last] { f(begin, last); });
    begin = last;
  }
  for (std::thread& thread : threads) thread.join();
}

}  // namespace torch::stable
