// SPDX-License-Identifier: Apache-2.0
// The base of the bodies by itself. The first int chooses what is run.
#include "host.h"
#include "cuda/block/mma.h"
#include "cuda/block/once_per_device.h"
#include "cuda/block/sum_partials.h"
#include "cuda/block/warp_tile.h"

namespace {

using namespace vtclip::cuda;

// out [m, n] = a b and, per row, the sum and the largest of its elements; a [m, k] or [k, m],
// b [k, n] or [n, k]; all at most 32 x 64 x 48. Rows of a beyond `visible` do not exist.
template <class T, bool kATransposed, bool kBTransposed>
struct Product {
  using Acc = AccOf<T>;
  static constexpr int kWarps = 2, kM = 32, kN = 64, kK = 48;
  static constexpr int kRowsA = kATransposed ? kK : kM, kColumnsA = kATransposed ? kM : kK;
  static constexpr int kRowsB = kBTransposed ? kN : kK, kColumnsB = kBTransposed ? kK : kN;
  static constexpr int kLdA = tile_stride<T>(kColumnsA), kLdB = tile_stride<T>(kColumnsB);
  static constexpr int kLdOut = tile_stride<Acc>(kN);

  struct Args {
    Rows<const T> a, b;
    Rows<T> out;
    Acc* sums;
    Acc* tops;
    int64_t m, n, k, visible;
  };
  struct Tiles {
    Shared& shared;
    Block<kWarps> block{shared};
    T* a = shared.take<T>(kRowsA * kLdA);
    T* b = shared.take<T>(kRowsB * kLdB);
    Acc* out = shared.take<Acc>(kM * kLdOut);
  };

  static void run(const Args& args, int64_t, Tiles& tiles) {
    const Block<kWarps>& block = tiles.block;
    load_tile<kRowsA, kColumnsA>(block, tiles.a, kLdA, args.a, kATransposed ? args.m : args.k,
                                 [&](int row) { return row < args.visible; });
    load_tile<kRowsB, kColumnsB>(block, tiles.b, kLdB, args.b, kBTransposed ? args.k : args.n,
                                 [&](int row) { return row < (kBTransposed ? args.n : args.k); });
    PerWarp<WarpTile<T, 16, kN>, kWarps> all;
    block.each_warp([&](const Warp& warp) { all[warp].fill(0); });
    block.each_warp([&](const Warp& warp) {
      auto& tile = all[warp];
      const int row = warp.index * 16;
      tile.template add_product<kATransposed, kBTransposed>(
          tiles.a + (kATransposed ? row : row * kLdA), kLdA, tiles.b, kLdB, kK);
      RowValues<Acc, 16> sums, tops;
      tile.sum_rows(sums);
      tile.max_rows(tops);
      const auto put = [&](Acc* to) {
        return [&args, to, row](const Spot& at, Acc value) {
          if (row + at.row < args.m) to[row + at.row] = value;
        };
      };
      sums.once(put(args.sums));
      tops.once(put(args.tops));
      tile.each([&](const Spot& at, Acc& element) { element *= 1 + at.row % 2; });
      tile.store(tiles.out + row * kLdOut, kLdOut);
    });
    store_tile<kM, kN>(block, args.out, args.m, args.n, tiles.out, kLdOut);
  }
};

template <class T, bool kATransposed, bool kBTransposed>
void product(const host::Input& in) {
  using Body = Product<T, kATransposed, kBTransposed>;
  const host::Tensor &a = in.tensors.at(0), &b = in.tensors.at(1);
  const int64_t m = a.size(kATransposed), k = a.size(!kATransposed), n = b.size(!kBTransposed);
  host::Tensor out = host::Tensor::empty<T>({m, n});
  host::Tensor sums = host::Tensor::empty<AccOf<T>>({m}), tops = sums.empty<AccOf<T>>({m});
  host::launch<Body>(1, {host::rows_of<const T>(a), host::rows_of<const T>(b),
                         host::rows_of<T>(out), sums.template data<AccOf<T>>(),
                         tops.template data<AccOf<T>>(), m, n, k, in.ints.at(3)});
  out.write();
  sums.write();
  tops.write();
}

// Reductions over x [n]: by the block, and by rows of 1, 4 and 32 lanes.
template <class T>
void reductions(const host::Input& in) {
  const host::Tensor& x = in.tensors.at(0);
  const int64_t n = x.size(0);
  const T* data = x.data<T>();
  host::Tensor out = host::Tensor::empty<T>({4, 2});
  T* to = out.data<T>();
  Shared shared;
  const Block<4> block(shared);
  const auto element = [&](int64_t i) { return data[i]; };
  const T sum = block.sum(n, element), top = block.max(n, element);
  block.once([&] { to[0] = sum; });
  block.once([&] { to[1] = top; });
  const auto row_of = [&](auto lanes, int64_t row) {
    const T row_sum = lanes.sum(n, element), row_top = lanes.max(n, element);
    lanes.once([&] { to[2 * row] = row_sum; });
    lanes.once([&] { to[2 * row + 1] = row_top; });
  };
  block.each_row<1>(1, [&](auto lanes, int) { row_of(lanes, 1); });
  block.each_row<4>(1, [&](auto lanes, int) { row_of(lanes, 2); });
  block.each_row<32>(1, [&](auto lanes, int) { row_of(lanes, 3); });
  out.write();
}

// a [16, 16] times b [16, 16] as a warp does it: by the rows that lanes name to ldmatrix, and the
// elements that ldmatrix and mma say a lane holds.
struct Fragment {
  float pair[32][4][2];  // [lane, register, element]
};

template <class RowOf>
Fragment ldmatrix(const float* stored, RowOf row_of, bool transposed) {
  Fragment to;
  for (int lane = 0; lane < 32; ++lane) {
    for (int matrix = 0; matrix < 4; ++matrix) {
      for (int element = 0; element < 2; ++element) {
        const int row = transposed ? lane % 4 * 2 + element : lane / 4;
        const int column = transposed ? lane / 4 : lane % 4 * 2 + element;
        const Place start = row_of(8 * matrix + row);
        to.pair[lane][matrix][element] = stored[start.row * 16 + start.column + column];
      }
    }
  }
  return to;
}

// what mma adds: element i of the accumulators n of a lane, of left [16, 16] right [16, 16]
struct Accumulated {
  float held[32][2][4];  // [lane, n, i]
};

Accumulated multiplied(const Fragment& a, const Fragment& b) {
  float left[16][16], right[16][16];
  for (int lane = 0; lane < 32; ++lane) {
    const int group = lane / 4, pair = lane % 4 * 2;
    for (int e = 0; e < 2; ++e) {
      for (int reg = 0; reg < 4; ++reg) {
        left[group + reg % 2 * 8][pair + reg / 2 * 8 + e] = a.pair[lane][reg][e];
        right[pair + reg % 2 * 8 + e][group + reg / 2 * 8] = b.pair[lane][reg][e];
      }
    }
  }
  Accumulated to{};
  for (int lane = 0; lane < 32; ++lane) {
    for (int n = 0; n < 2; ++n) {
      for (int i = 0; i < 4; ++i) {
        const Place at = accumulator_place(lane, i);
        float& sum = to.held[lane][n][i];
        for (int k = 0; k < 16; ++k) sum += left[at.row][k] * right[k][8 * n + at.column];
      }
    }
  }
  return to;
}

void write(const Accumulated& from) {
  host::Tensor out = host::Tensor::empty<float>({16, 16});
  for (int lane = 0; lane < 32; ++lane) {
    for (int n = 0; n < 2; ++n) {
      for (int i = 0; i < 4; ++i) {
        const Place at = accumulator_place(lane, i);
        out.data<float>()[at.row * 16 + 8 * n + at.column] = from.held[lane][n][i];
      }
    }
  }
  out.write();
}

// a b, and (a b) b by its accumulators as operand a
void emulated(const host::Input& in) {
  const bool a_transposed = in.ints.at(1) != 0, b_transposed = in.ints.at(2) != 0;
  const Fragment a = ldmatrix(in.tensors.at(0).data<float>(),
                              a_transposed ? row_of_a_transposed : row_of_a, a_transposed);
  const Fragment b = ldmatrix(in.tensors.at(1).data<float>(),
                              b_transposed ? row_of_b_transposed : row_of_b, !b_transposed);
  const Accumulated once = multiplied(a, b);
  Fragment again;
  for (int lane = 0; lane < 32; ++lane) {
    for (int reg = 0; reg < 4; ++reg) {
      const Accumulators from = accumulators_of_a(reg);
      for (int e = 0; e < 2; ++e) again.pair[lane][reg][e] = once.held[lane][from.n][from.i + e];
    }
  }
  write(once);
  write(multiplied(again, b));
}

template <class T>
void partials(const host::Input& in) {
  const host::Tensor& partial = in.tensors.at(0);
  host::Tensor out = host::Tensor::empty<T>({partial.size(1)});
  const typename SumPartials<T>::Args args{partial.data<AccOf<T>>(), out.template data<T>(),
                                           partial.size(0), partial.size(1)};
  host::launch<SumPartials<T>>(SumPartials<T>::blocks(args), args);
  out.write();
}

// Two faults that a run must show: an index beyond a piece of shared memory, and a share of a phase
// that reads what another share of it writes.
void fault(bool overrun) {
  Shared shared;
  const Block<1> block(shared);
  float* piece = shared.take<float>(8);
  host::Tensor out = host::Tensor::empty<float>({8});
  block.each(8, [&](int i) { piece[i] = 0; });
  if (overrun) block.each(9, [&](int i) { piece[i] = 1; });
  block.each(8, [&](int i) { piece[i] = i == 0 ? 1 : piece[i - 1] + 1; });
  block.each(8, [&](int i) { out.data<float>()[i] = piece[i]; });
  out.write();
}

// How often f is called for the devices given, one after the other; device -1 stands for a call
// that fails.
void once(const host::Input& in) {
  OncePerDevice once;
  host::Tensor out = host::Tensor::empty<float>({1});
  out.data<float>()[0] = 0;
  for (size_t i = 1; i < in.ints.size(); ++i) {
    const bool fails = in.ints.at(i) < 0;
    try {
      once(fails ? 0 : static_cast<int>(in.ints.at(i)), [&] {
        out.data<float>()[0] += 1;
        if (fails) throw 0;
      });
    } catch (int) {
    }
  }
  out.write();
}

// The first half of x [8] and zeros, copied into shared memory and read: right after
// block.arrive(), a fault without it, and another if a copy overwrites what is still read.
void copied(const host::Input& in) {
  const bool waits = in.ints.at(1) != 0, overwrites = in.ints.at(2) != 0;
  Shared shared;
  const Block<1> block(shared);
  float* piece = shared.take<float>(8);
  const float* x = in.tensors.at(0).data<float>();
  host::Tensor out = host::Tensor::empty<float>({8});
  block.each(8, [&](int i) { piece[i] = 0; });
  block.loose().each_thread([&](int i) {
    if (i < 2) copy_16(piece + 4 * i, x + 4 * i, i == 0);
  });
  if (waits) block.arrive();
  if (overwrites) copy_16(piece, x + 4, true);
  block.each(8, [&](int i) { out.data<float>()[i] = piece[i]; });
  block.arrive();
  out.write();
}

}  // namespace

int main() {
  const host::Input in;
  const int64_t what = in.ints.at(0);
  if (what == 0) {
    const bool a = in.ints.at(1) != 0, b = in.ints.at(2) != 0;
    host::with_dtype(in.tensors.at(0), [&](auto t) {
      using T = decltype(t);
      if (a && b) return product<T, true, true>(in);
      if (a) return product<T, true, false>(in);
      return b ? product<T, false, true>(in) : product<T, false, false>(in);
    });
  } else if (what == 1) {
    emulated(in);
  } else if (what == 2) {
    if (in.tensors.at(0).dtype == host::kFloat64) reductions<double>(in);
    else reductions<float>(in);
  } else if (what == 6) {
    once(in);
  } else if (what == 7) {
    copied(in);
  } else if (what >= 4) {
    fault(what == 4);
  } else {
    host::with_dtype(in.tensors.at(1), [&](auto t) { partials<decltype(t)>(in); });
  }
  return 0;
}
