// SPDX-License-Identifier: Apache-2.0
// The block model of block.h on a GPU. Included by block.h.
#pragma once

namespace vtclip::cuda {

// Hands out pieces of a block's shared memory, each from a multiple of 128 bytes. On the host, made
// from a null pointer, it counts the bytes a launch must ask for.
class Shared {
 public:
  VTCLIP_BOTH explicit Shared(void* base) : base_(static_cast<unsigned char*>(base)) {}

  template <class T>
  VTCLIP_BOTH T* take(int64_t count) {
#ifdef __CUDA_ARCH__
    // without a test for null, behind which ptxas no longer sees that this is shared memory
    T* start = reinterpret_cast<T*>(base_ + bytes_);
#else
    T* start = base_ == nullptr ? nullptr : reinterpret_cast<T*>(base_ + bytes_);
#endif
    bytes_ += ceil_div(count * static_cast<int64_t>(sizeof(T)), 128) * 128;
    return start;
  }
  VTCLIP_BOTH int64_t bytes() const { return bytes_; }

 private:
  unsigned char* base_;
  int64_t bytes_ = 0;
};

// Puts 16 bytes on their way from global to shared memory, or zeros unless `exists`; they are there
// after block.arrive().
VTCLIP_DEVICE void copy_16(void* to, const void* from, bool exists) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
               :
               : "r"(static_cast<unsigned>(__cvta_generic_to_shared(to))),
                 "l"(__cvta_generic_to_global(from)), "r"(exists ? 16 : 0)
               : "memory");
#else
  uint4 words = {};
  if (exists) words = *static_cast<const uint4*>(from);
  *static_cast<uint4*>(to) = words;
#endif
}

// P neighbouring lanes of a warp, P a power of two.
template <int P>
class Lanes {
 public:
  static constexpr int kThreads = P;
  template <class I, class F>
  VTCLIP_DEVICE void each(I n, F f) const {
    _Pragma("unroll 2") for (I i = lane(); i < n; i += P) f(i);
    sync();
  }
  template <class I, class F>
  VTCLIP_DEVICE auto sum(I n, F f) const {
    decltype(f(n)) total = 0;
    for (I i = lane(); i < n; i += P) total += f(i);
    VTCLIP_UNROLL
    for (int step = P / 2; step > 0; step /= 2) total += __shfl_xor_sync(members(), total, step);
    return total;
  }
  template <class I, class F>
  VTCLIP_DEVICE auto max(I n, F f) const {
    auto top = -infinity<decltype(f(n))>();
    for (I i = lane(); i < n; i += P) top = larger(top, f(i));
    VTCLIP_UNROLL
    for (int step = P / 2; step > 0; step /= 2) {
      top = larger(top, __shfl_xor_sync(members(), top, step));
    }
    return top;
  }
  // f(lane) for every lane
  template <class F>
  VTCLIP_DEVICE void each_thread(F f) const {
    f(lane());
    sync();
  }
  VTCLIP_DEVICE void sync() const { __syncwarp(members()); }
  // f() once, on the first lane
  template <class F>
  VTCLIP_DEVICE void once(F f) const {
    if (lane() == 0) f();
  }

 private:
  VTCLIP_DEVICE static int lane() { return static_cast<int>(threadIdx.x) % P; }
  VTCLIP_DEVICE static unsigned members() {
    if (P == kWarpSize) return 0xffffffffu;
    return ((1u << (P % kWarpSize)) - 1u) << (threadIdx.x % kWarpSize / P * P);
  }
};

struct Warp : Lanes<kWarpSize> {
  int index;
  VTCLIP_DEVICE explicit Warp(int index) : index(index) {}
};

template <class T, int kWarps>
class PerWarp {
 public:
  VTCLIP_DEVICE T& operator[](const Warp&) { return own_; }

 private:
  T own_;
};

template <class T, int kThreads>
class PerThread {
 public:
  VTCLIP_DEVICE T& operator[](int) { return own_; }

 private:
  T own_;
};

template <int kWarpsOfBlock>
class Block {
 public:
  static constexpr int kWarps = kWarpsOfBlock;
  static constexpr int kThreads = kWarps * kWarpSize;

  VTCLIP_BOTH explicit Block(Shared& shared) : slots_(shared.take<double>(kWarps)) {}

  // `each`, `each_warp`, `each_row` without the barrier at their end
  struct Loose {
    static constexpr int kThreads = Block::kThreads;
    template <class F>
    VTCLIP_DEVICE void each_thread(F f) const {
      f(static_cast<int>(threadIdx.x));
    }
    template <class I, class F>
    VTCLIP_DEVICE void each(I n, F f) const {
      _Pragma("unroll 2") for (I i = static_cast<int>(threadIdx.x); i < n; i += kThreads) f(i);
    }
    template <class F>
    VTCLIP_DEVICE void each_warp(F f) const {
      f(Warp(static_cast<int>(threadIdx.x) / kWarpSize));
    }
    template <int P, class I, class F>
    VTCLIP_DEVICE void each_row(I n, F f) const {
      for (I row = static_cast<int>(threadIdx.x) / P; row < n; row += kThreads / P) {
        f(Lanes<P>(), row);
      }
    }
  };
  VTCLIP_DEVICE Loose loose() const { return {}; }
  template <class F>
  VTCLIP_DEVICE void each_thread(F f) const {
    f(static_cast<int>(threadIdx.x));
    sync();
  }

  // a barrier before which every copy has landed
  VTCLIP_DEVICE void arrive() const {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    asm volatile("cp.async.commit_group;" ::: "memory");
    asm volatile("cp.async.wait_group 0;" ::: "memory");
#endif
    sync();
  }

  template <class I, class F>
  VTCLIP_DEVICE void each(I n, F f) const {
    loose().each(n, f);
    sync();
  }
  // the same for n <= kThreads, which leaves no loop
  template <class I, class F>
  VTCLIP_DEVICE void each_once(I n, F f) const {
    const int i = static_cast<int>(threadIdx.x);
    if (i < n) f(i);
    sync();
  }
  template <class F>
  VTCLIP_DEVICE void each_warp(F f) const {
    loose().each_warp(f);
    sync();
  }
  template <int P, class I, class F>
  VTCLIP_DEVICE void each_row(I n, F f) const {
    loose().template each_row<P>(n, f);
    sync();
  }
  template <class I, class F>
  VTCLIP_DEVICE auto sum(I n, F f) const {
    decltype(f(n)) total = 0;
    for (I i = static_cast<int>(threadIdx.x); i < n; i += kThreads) total += f(i);
    return meet(total, [](auto a, auto b) { return a + b; });
  }
  template <class I, class F>
  VTCLIP_DEVICE auto max(I n, F f) const {
    auto top = -infinity<decltype(f(n))>();
    for (I i = static_cast<int>(threadIdx.x); i < n; i += kThreads) top = larger(top, f(i));
    return meet(top, [](auto a, auto b) { return larger(a, b); });
  }
  // f() once, on the first thread
  template <class F>
  VTCLIP_DEVICE void once(F f) const {
    if (threadIdx.x == 0) f();
  }

  VTCLIP_DEVICE static void sync() { __syncthreads(); }

 private:
  template <class Acc, class Combine>
  VTCLIP_DEVICE Acc meet(Acc value, Combine combine) const {
    VTCLIP_UNROLL
    for (int step = kWarpSize / 2; step > 0; step /= 2) {
      value = combine(value, __shfl_xor_sync(0xffffffffu, value, step));
    }
    Acc* slots = reinterpret_cast<Acc*>(slots_);
    if (threadIdx.x % kWarpSize == 0) slots[threadIdx.x / kWarpSize] = value;
    sync();
    Acc total = slots[0];
    VTCLIP_UNROLL
    for (int warp = 1; warp < kWarps; ++warp) total = combine(total, slots[warp]);
    sync();  // the next reduction writes the slots
    return total;
  }

  double* slots_;  // [kWarps]
};

}  // namespace vtclip::cuda
