// SPDX-License-Identifier: Apache-2.0
// Global memory of the stand-in: every block torch takes for a tensor, with its exact bounds.
//
// torch takes tensors of the CPU by posix_memalign at 64 bytes. While a call is watched, a new block
// is filled with kPoison, so that a byte nobody wrote since can be told; behind every block lies a
// gap that belongs to no tensor, so that an overrun meets no other one.
#include <dlfcn.h>

#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <cstring>

namespace {

constexpr size_t kGap = 256, kAlignment = 64, kSlots = 1 << 16;
constexpr int kPoison = 0xff;

struct Slot {
  uintptr_t address;  // 0: never used, 1: freed
  uint64_t size, serial;
};

Slot slots[kSlots];
std::atomic<uint64_t> serials{0}, lost{0};
std::atomic<bool> watched{false};
std::atomic_flag busy = ATOMIC_FLAG_INIT;

struct Hold {
  Hold() {
    while (busy.test_and_set(std::memory_order_acquire)) {
    }
  }
  ~Hold() { busy.clear(std::memory_order_release); }
};

size_t first_slot(uintptr_t address) {
  return static_cast<size_t>((address >> 6) * 0x9E3779B97F4A7C15ull >> 48);
}

void remember(uintptr_t address, size_t size) {
  Hold hold;
  size_t i = first_slot(address);
  for (size_t n = 0; n < kSlots; ++n, i = (i + 1) % kSlots) {
    if (slots[i].address <= 1) {
      slots[i] = {address, size, ++serials};
      return;
    }
  }
  ++lost;
}

void forget(uintptr_t address) {
  Hold hold;
  size_t i = first_slot(address);
  for (size_t n = 0; n < kSlots && slots[i].address != 0; ++n, i = (i + 1) % kSlots) {
    if (slots[i].address == address) {
      slots[i].address = 1;
      return;
    }
  }
}

}  // namespace

extern "C" {

void __libc_free(void*);

int posix_memalign(void** out, size_t alignment, size_t size) {
  using Function = int (*)(void**, size_t, size_t);
  static const auto real = reinterpret_cast<Function>(dlsym(RTLD_NEXT, "posix_memalign"));
  if (alignment != kAlignment || size == 0) return real(out, alignment, size);
  const int failed = real(out, alignment, size + kGap);
  if (failed) return failed;
  if (watched) std::memset(*out, kPoison, size + kGap);
  remember(reinterpret_cast<uintptr_t>(*out), size);
  return 0;
}

void free(void* block) {
  const auto address = reinterpret_cast<uintptr_t>(block);
  if (address != 0 && address % kAlignment == 0) forget(address);
  __libc_free(block);
}

// Fills blocks from now on, or no more; the serial number of the last block before.
uint64_t standin_watch(int on) {
  watched = on != 0;
  return serials;
}

// (address, size, serial) of the blocks that live, at most `limit`; how many.
uint64_t standin_blocks(uint64_t* out, uint64_t limit) {
  Hold hold;
  uint64_t count = 0;
  for (const Slot& slot : slots) {
    if (slot.address <= 1) continue;
    if (count < limit) {
      out[3 * count] = slot.address;
      out[3 * count + 1] = slot.size;
      out[3 * count + 2] = slot.serial;
    }
    ++count;
  }
  return count;
}

// Blocks for which there was no room in the table: 0, or bounds are not known.
uint64_t standin_lost() { return lost; }
}
