// SPDX-License-Identifier: Apache-2.0
// The block model of block.h on the host: every share of a phase in turn, forwards or, if
// `backwards` is set, from the last to the first. A body whose shares depend on each other within
// a phase, which is a missing barrier on a GPU, then gives two different results.
// Included by block.h.
#pragma once

#include <array>
#include <cassert>
#include <cstring>
#include <memory>
#include <new>
#include <vector>

namespace vtclip::cuda {

inline bool backwards = false;

// f(i) for 0 <= i < n in the order of the run
template <class I, class F>
void in_turn(I n, F f) {
  for (I i = 0; i < n; ++i) f(backwards ? n - 1 - i : i);
}

// Copies on their way to shared memory. A run forwards lets them land as late as a GPU may, when
// the block waits for them, a run backwards at once: a body that reads too early or overwrites what
// is still read gives two different results.
struct Copy {
  void* to;
  const void* from;
  bool exists;

  void land() const {
    if (exists) std::memcpy(to, from, 16);
    else std::memset(to, 0, 16);
  }
};
inline std::vector<Copy> copies;

inline void copy_16(void* to, const void* from, bool exists) {
  const Copy copy{to, from, exists};
  if (backwards) copy.land();
  else copies.push_back(copy);
}

// Each piece is a heap block of its own, filled with bytes that read as NaN, so that a sanitizer
// sees an index beyond it and a test sees a value that was never written.
class Shared {
 public:
  Shared() = default;

  template <class T>
  T* take(int64_t count) {
    const int64_t size = count * static_cast<int64_t>(sizeof(T));
    bytes_ += ceil_div(size, 128) * 128;
    auto* piece = static_cast<unsigned char*>(::operator new(size, std::align_val_t{128}));
    std::memset(piece, 0xff, static_cast<size_t>(size));
    pieces_.emplace_back(piece);
    return reinterpret_cast<T*>(piece);
  }
  int64_t bytes() const { return bytes_; }

 private:
  struct Free {
    void operator()(unsigned char* piece) const { ::operator delete(piece, std::align_val_t{128}); }
  };
  std::vector<std::unique_ptr<unsigned char, Free>> pieces_;
  int64_t bytes_ = 0;
};

// The butterfly of `count` lanes (a power of two), as each of them sees it: all the same value,
// because the combinations used here commute.
template <class T, class Combine>
T butterfly(T* part, int count, Combine combine) {
  for (int step = count / 2; step > 0; step /= 2) {
    for (int lane = 0; lane < step; ++lane) part[lane] = combine(part[lane], part[lane + step]);
  }
  return part[0];
}

template <int P, class I, class F>
auto strided_sums(I n, F f) {
  std::array<decltype(f(n)), P> part{};
  for (I i = 0; i < n; ++i) part[static_cast<size_t>(i % P)] += f(i);
  return part;
}

template <int P, class I, class F>
auto strided_tops(I n, F f) {
  std::array<decltype(f(n)), P> part;
  part.fill(-infinity<decltype(f(n))>());
  for (I i = 0; i < n; ++i) {
    auto& top = part[static_cast<size_t>(i % P)];
    top = larger(top, f(i));
  }
  return part;
}

template <int P>
class Lanes {
 public:
  static constexpr int kThreads = P;
  template <class F>
  void each_thread(F f) const { in_turn(P, f); }
  template <class I, class F>
  void each(I n, F f) const { in_turn(n, f); }
  template <class I, class F>
  auto sum(I n, F f) const {
    auto part = strided_sums<P>(n, f);
    return butterfly(part.data(), P, [](auto a, auto b) { return a + b; });
  }
  template <class I, class F>
  auto max(I n, F f) const {
    auto part = strided_tops<P>(n, f);
    return butterfly(part.data(), P, [](auto a, auto b) { return larger(a, b); });
  }
  void sync() const {}
  template <class F>
  void once(F f) const { f(); }
};

struct Warp : Lanes<kWarpSize> {
  int index;
  explicit Warp(int index) : index(index) {}
};

template <class T, int kWarps>
class PerWarp {
 public:
  PerWarp() : all_(kWarps) {}
  T& operator[](const Warp& warp) { return all_.at(static_cast<size_t>(warp.index)); }

 private:
  std::vector<T> all_;
};

template <class T, int kThreads>
class PerThread {
 public:
  PerThread() : all_(kThreads) {}
  T& operator[](int thread) { return all_.at(static_cast<size_t>(thread)); }

 private:
  std::vector<T> all_;
};

template <int kWarpsOfBlock>
class Block {
 public:
  static constexpr int kWarps = kWarpsOfBlock;
  static constexpr int kThreads = kWarps * kWarpSize;

  explicit Block(Shared& shared) { shared.take<double>(kWarps); }

  struct Loose {
    static constexpr int kThreads = Block::kThreads;
    template <class F>
    void each_thread(F f) const { in_turn(kThreads, f); }
    template <class I, class F>
    void each(I n, F f) const { in_turn(n, f); }
    template <class F>
    void each_warp(F f) const {
      in_turn(kWarps, [&](int warp) { f(Warp(warp)); });
    }
    template <int P, class I, class F>
    void each_row(I n, F f) const {
      in_turn(n, [&](I row) { f(Lanes<P>(), row); });
    }
  };
  Loose loose() const { return {}; }
  template <class F>
  void each_thread(F f) const { loose().each_thread(f); }

  void sync() const {}
  void arrive() const {
    for (const Copy& copy : copies) copy.land();
    copies.clear();
  }

  template <class I, class F>
  void each(I n, F f) const { in_turn(n, f); }
  template <class I, class F>
  void each_once(I n, F f) const {
    assert(n <= kThreads);
    in_turn(static_cast<int>(n), f);
  }
  template <class F>
  void each_warp(F f) const { loose().each_warp(f); }
  template <int P, class I, class F>
  void each_row(I n, F f) const { loose().template each_row<P>(n, f); }
  template <class I, class F>
  auto sum(I n, F f) const {
    auto part = strided_sums<kThreads>(n, f);
    return meet(part.data(), [](auto a, auto b) { return a + b; });
  }
  template <class I, class F>
  auto max(I n, F f) const {
    auto part = strided_tops<kThreads>(n, f);
    return meet(part.data(), [](auto a, auto b) { return larger(a, b); });
  }
  template <class F>
  void once(F f) const { f(); }

 private:
  template <class Acc, class Combine>
  static Acc meet(Acc* part, Combine combine) {
    Acc total = butterfly(part, kWarpSize, combine);
    for (int warp = 1; warp < kWarps; ++warp) {
      total = combine(total, butterfly(part + warp * kWarpSize, kWarpSize, combine));
    }
    return total;
  }
};

}  // namespace vtclip::cuda
