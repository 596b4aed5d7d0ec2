// SPDX-License-Identifier: Apache-2.0
// Up to four sums out[n] = sum_p partial[p, n] in one launch. Unlike SumPartials, which gives a
// column to one thread, eight warps share the rows of 32 columns: for many rows of few columns.
#pragma once

#include "block.h"

namespace vtclip::cuda {

template <class T>
struct SumColumns {
  using Acc = AccOf<T>;
  static constexpr int kWarps = 8, kJobs = 4;

  struct Job {
    const Acc* partial;  // [P, N], contiguous
    T* out;              // [N], contiguous: written
    int64_t P, N;

    VTCLIP_BOTH int64_t blocks() const { return ceil_div(N, kWarpSize); }
  };
  struct Args {
    Job jobs[kJobs];  // those not needed have N = 0

    VTCLIP_BOTH int64_t blocks() const {
      int64_t total = 0;
      for (const Job& job : jobs) total += job.blocks();
      return total;
    }
  };
  struct Tiles {
    Shared& shared;
    Block<kWarps> block{shared};
    Acc* part = shared.take<Acc>(kWarps * kWarpSize);  // [kWarps, 32]
  };

  static VTCLIP_DEVICE void run(const Args& args, int64_t index, Tiles& tiles) {
    Job job = args.jobs[0];
    VTCLIP_UNROLL
    for (int j = 1; j < kJobs; ++j) {
      if (index < job.blocks()) break;
      index -= job.blocks();
      job = args.jobs[j];
    }
    const int64_t first = index * kWarpSize;
    const int columns = static_cast<int>(lesser<int64_t>(kWarpSize, job.N - first));
    tiles.block.each(static_cast<int>(Block<kWarps>::kThreads), [&](int i) {
      const int column = i % kWarpSize;
      Acc total = 0;
      if (column < columns) {
        const Acc* at = job.partial + first + column;
        for (int64_t p = i / kWarpSize; p < job.P; p += kWarps) total += at[p * job.N];
      }
      tiles.part[i] = total;
    });
    tiles.block.each_once(columns, [&](int column) {
      Acc total = 0;
      VTCLIP_UNROLL
      for (int warp = 0; warp < kWarps; ++warp) total += tiles.part[warp * kWarpSize + column];
      job.out[first + column] = static_cast<T>(total);
    });
  }
};

}  // namespace vtclip::cuda
