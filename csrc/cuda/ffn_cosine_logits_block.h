// SPDX-License-Identifier: Apache-2.0
// The bodies of the ffn_cosine_logits kernels: rows as in norm_row.h of
//
//   z = residual_input + hidden weight^T + bias
//
// The product is torch's, stored in the type of the inputs, and of the centred weight: its rows
// have mean 0 but for rounding, so that no digits go to a mean. d_z is the gradient of
// residual_input, and its sum over rows that of bias; centring leaves it alone.
#pragma once

#include "cuda/block/norm_row.h"

namespace vtclip::cuda {

template <class T>
struct FfnInput {
  using Acc = AccOf<T>;
  static constexpr bool kBias = true;

  const T* product;       // [B, K, C], contiguous
  Images<const T> state;  // [B, K, C]: residual_input
  const T* bias;          // [C]
  int64_t bias_stride, K, C;

  VTCLIP_DEVICE bool packed() const {
    return vectors_fit(Rows<const T>{product, C, 1}) && vectors_fit(state.at(0)) &&
           vectors_fit(Rows<const T>{state.base, state.batch, 1}) &&
           vectors_fit(Rows<const T>{bias, 0, bias_stride});
  }
  template <bool kPacked, int N>
  VTCLIP_DEVICE void load(int64_t b, int64_t k, int64_t column, Acc mean, Acc (&to)[N]) const {
    Acc made[N], added[N];
    Row<const T>(state.at(b), k, C).template load<kPacked>(column, to);
    Row<const T>(product + (b * K + k) * C, 1, C).template load<kPacked>(column, made);
    Row<const T>(bias, bias_stride, C).template load<kPacked>(column, added);
    VTCLIP_UNROLL
    for (int e = 0; e < N; ++e) {
      // a large mean is gone before the product is added
      to[e] = kPacked || column + e < C ? (to[e] + added[e] - mean) + made[e] : 0;
    }
  }
};

// out = weight less the mean of each column. Block = 32 columns, whose rows eight warps share.
template <class T>
struct CentredColumns {
  using Acc = AccOf<T>;
  static constexpr int kWarps = 8;
  struct Args {
    Rows<const T> weight;  // [C, F]
    T* out;                // [C, F], contiguous: written
    int64_t C, F;
    VTCLIP_BOTH int64_t blocks() const { return ceil_div(F, kWarpSize); }
  };
  struct Tiles {
    Shared& shared;
    Block<kWarps> block{shared};
    Acc* part = shared.take<Acc>(kWarps * kWarpSize);  // [kWarps, 32]
    Acc* mean = shared.take<Acc>(kWarpSize);           // [32]
  };

  static VTCLIP_DEVICE void run(const Args& args, int64_t index, Tiles& tiles) {
    const int64_t first = index * kWarpSize;
    const int columns = static_cast<int>(lesser<int64_t>(kWarpSize, args.F - first));
    tiles.block.each(static_cast<int>(Block<kWarps>::kThreads), [&](int i) {
      const int column = i % kWarpSize;
      Acc total = 0;
      if (column < columns) {
        for (int64_t c = i / kWarpSize; c < args.C; c += kWarps) {
          total += static_cast<Acc>(args.weight.at(c, first + column));
        }
      }
      tiles.part[i] = total;
    });
    tiles.block.each_once(columns, [&](int column) {
      Acc total = 0;
      VTCLIP_UNROLL
      for (int warp = 0; warp < kWarps; ++warp) total += tiles.part[warp * kWarpSize + column];
      tiles.mean[column] = total / static_cast<Acc>(args.C);
    });
    tiles.block.each(args.C * kWarpSize, [&](int64_t i) {
      const int column = static_cast<int>(i % kWarpSize);
      if (column >= columns) return;
      const int64_t c = i / kWarpSize, f = first + column;
      const Acc weight = static_cast<Acc>(args.weight.at(c, f));
      args.out[c * args.F + f] = static_cast<T>(weight - tiles.mean[column]);
    });
  }
};

// one block per image and tile of classes, one warp per row
template <class T>
struct FfnForward {
  using Acc = AccOf<T>;
  static constexpr int kWarps = kNormWarps;
  using Tiles = NormTiles<T>;
  struct Args : NormArgs<T, FfnInput<T>> {
    T* logits;  // [B, K], contiguous: written, as all of stats
  };

  static VTCLIP_DEVICE void run(const Args& args, int64_t index, Tiles& tiles) {
    with_packed(args, [&](auto packed) { rows<packed.value>(args, index, tiles); });
  }

 private:
  template <bool kPacked>
  static VTCLIP_DEVICE void rows(const Args& args, int64_t index, Tiles& tiles) {
    tiles.each_row(index, args.K, [&](const auto& lanes, int64_t b, int64_t k, Acc* slots) {
      const NormRow<Acc> row = norm_row<kPacked>(lanes, slots, args, b, k);
      const NormMeans<Acc> means =
          norm_means<kPacked>(lanes, slots, args, b, k, row.norm(), row.rnorm);
      lanes.once([&] {
        const int64_t at = b * args.K + k;
        args.logits[at] = static_cast<T>(args.scale * row.cosine);
        args.stats.mean[at] = row.mean;
        args.stats.shift[at] = row.shift;
        args.stats.rstd[at] = row.rstd;
        args.stats.rnorm[at] = row.rnorm;
        args.stats.cosine[at] = means.cosine;
        args.stats.mean_g[at] = means.mean_g;
        args.stats.mean_gn[at] = means.mean_gn;
      });
    });
  }
};

template <class T>
struct FfnGradient : NormRowGradient<T, FfnInput<T>> {};

}  // namespace vtclip::cuda
