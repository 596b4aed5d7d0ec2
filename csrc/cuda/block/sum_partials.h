// SPDX-License-Identifier: Apache-2.0
// out[n] = sum_p partial[p, n] for p = 0, 1, ...: what several blocks contribute to, added in an
// order that depends on nothing.
#pragma once

#include "block.h"

namespace vtclip::cuda {

template <class T>
struct SumPartials {
  using Acc = AccOf<T>;
  static constexpr int kWarps = 4;

  struct Args {
    const Acc* partial;  // [P, N], contiguous
    T* out;              // [N], contiguous: written
    int64_t P, N;
  };
  using Tiles = BlockTiles<kWarps>;

  static VTCLIP_BOTH int64_t blocks(const Args& args) {
    return ceil_div(args.N, Block<kWarps>::kThreads);
  }
  static VTCLIP_DEVICE void run(const Args& args, int64_t index, Tiles& tiles) {
    constexpr int kColumns = Block<kWarps>::kThreads;
    const int64_t first = index * kColumns;
    tiles.block.each_once(lesser<int64_t>(kColumns, args.N - first), [&](int i) {
      Acc total = 0;
      for (int64_t p = 0; p < args.P; ++p) total += args.partial[p * args.N + first + i];
      args.out[first + i] = static_cast<T>(total);
    });
  }
};

}  // namespace vtclip::cuda
