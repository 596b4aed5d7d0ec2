// SPDX-License-Identifier: Apache-2.0
// The bodies of the norm_cosine_logits kernels: rows as in norm_row.h, where h is an input.
#pragma once

#include "cuda/block/norm_row.h"

namespace vtclip::cuda {

template <class T>
struct NormInput {
  using Acc = AccOf<T>;
  static constexpr bool kBias = false;

  Images<const T> hidden;  // [B, K, C]
  int64_t C;

  VTCLIP_DEVICE bool packed() const {
    return vectors_fit(hidden.at(0)) && vectors_fit(Rows<const T>{hidden.base, hidden.batch, 1});
  }
  template <bool kPacked, int N>
  VTCLIP_DEVICE void load(int64_t b, int64_t k, int64_t column, Acc mean, Acc (&to)[N]) const {
    Row<const T>(hidden.at(b), k, C).template load<kPacked>(column, to);
    VTCLIP_UNROLL
    for (int e = 0; e < N; ++e) to[e] = kPacked || column + e < C ? to[e] - mean : 0;
  }
};

// one block per image and tile of classes, one warp per row
template <class T>
struct NormForward {
  using Acc = AccOf<T>;
  static constexpr int kWarps = kNormWarps;
  using Tiles = NormTiles<T>;
  struct Args : NormArgs<T, NormInput<T>> {
    T* logits;  // [B, K], contiguous: written, as mean, rstd and rnorm
  };

  static VTCLIP_DEVICE void run(const Args& args, int64_t index, Tiles& tiles) {
    with_packed(args, [&](auto packed) { rows<packed.value>(args, index, tiles); });
  }

 private:
  template <bool kPacked>
  static VTCLIP_DEVICE void rows(const Args& args, int64_t index, Tiles& tiles) {
    tiles.each_row(index, args.K, [&](const auto& lanes, int64_t b, int64_t k, Acc* slots) {
      const NormRow<Acc> row = norm_row<kPacked>(lanes, slots, args, b, k);
      lanes.once([&] {
        const int64_t at = b * args.K + k;
        args.logits[at] = static_cast<T>(args.scale * row.cosine);
        args.stats.mean[at] = row.mean;
        args.stats.rstd[at] = row.rstd;
        args.stats.rnorm[at] = row.rnorm;
      });
    });
  }
};

// what the forward does not keep of a row: shift, cosine, mean_g, mean_gn
template <class T>
struct NormScalars {
  using Acc = AccOf<T>;
  static constexpr int kWarps = kNormWarps;
  using Tiles = NormTiles<T>;
  using Args = NormArgs<T, NormInput<T>>;

  static VTCLIP_DEVICE void run(const Args& args, int64_t index, Tiles& tiles) {
    with_packed(args, [&](auto packed) { rows<packed.value>(args, index, tiles); });
  }

 private:
  template <bool kPacked>
  static VTCLIP_DEVICE void rows(const Args& args, int64_t index, Tiles& tiles) {
    tiles.each_row(index, args.K, [&](const auto& lanes, int64_t b, int64_t k, Acc* slots) {
      const int64_t at = b * args.K + k;
      const Acc mean = args.stats.mean[at], rstd = args.stats.rstd[at];
      Acc spread[2];
      norm_spread<kPacked>(lanes, slots, args, b, k, mean, spread);
      const Acc shift = spread[0] / static_cast<Acc>(args.C);
      const Norm<Acc> norm{mean, rstd, -shift * rstd};
      const NormMeans<Acc> means =
          norm_means<kPacked>(lanes, slots, args, b, k, norm, args.stats.rnorm[at]);
      lanes.once([&] {
        args.stats.shift[at] = shift;
        args.stats.cosine[at] = means.cosine;
        args.stats.mean_g[at] = means.mean_g;
        args.stats.mean_gn[at] = means.mean_gn;
      });
    });
  }
};

template <class T>
struct NormGradient : NormRowGradient<T, NormInput<T>> {};

}  // namespace vtclip::cuda
