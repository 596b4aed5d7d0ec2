// SPDX-License-Identifier: Apache-2.0
// What a process does once for each device.
#pragma once

#include <atomic>
#include <cstdint>

namespace vtclip::cuda {

// once(device, f): f(), unless a call for this device has returned before.
class OncePerDevice {
 public:
  template <class F>
  void operator()(int device, F f) {
    const uint64_t bit = device < 64 ? uint64_t{1} << device : 0;
    if (done_.load(std::memory_order_acquire) & bit) return;
    f();
    done_.fetch_or(bit, std::memory_order_release);
  }

 private:
  std::atomic<uint64_t> done_{0};
};

}  // namespace vtclip::cuda
