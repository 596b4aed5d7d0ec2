// SPDX-License-Identifier: Apache-2.0
// The bodies of the rational_logits kernels. The mask is read once, its gradient written once.
//
//   logits[b,k]   = scale * sum_i open * x_b t_k,   open = relu(1 + mask[b,k,i])
//   d_mask[b,k,i] = g x t where mask > -1, else 0,  g = scale * d_logits[b,k]
//   d_x = sum_k g open t,   d_t = sum_b g open x
#pragma once

#include "cuda/block/block.h"
#include "cuda/block/row.h"
#include "cuda/block/tile_io.h"
#include "cuda/block/walk.h"

namespace vtclip::cuda {

// relu(1 + m); NaN stays NaN
template <class Acc>
VTCLIP_DEVICE Acc opened(Acc m) { return 1 + m < 0 ? 0 : 1 + m; }

template <class T>
struct RationalArgs {
  Rows<const T> image, text;  // [B, D], [K, D]
  Images<const T> mask;       // [B, K, D]
  AccOf<T> scale;
};

// one block per image and tile of classes, one warp per class
template <class T>
struct RationalForward {
  using Acc = AccOf<T>;
  static constexpr int kWarps = 4, kClasses = 8;
  struct Args : RationalArgs<T> {
    T* logits;  // [B, K], contiguous: written
    int64_t K, D;

    VTCLIP_BOTH int64_t tiles() const { return ceil_div(K, kClasses); }
  };
  using Tiles = BlockTiles<kWarps>;

  static VTCLIP_DEVICE void run(const Args& args, int64_t index, Tiles& tiles) {
    constexpr int kColumns = kGroup<T>;
    const int64_t b = index / args.tiles(), k0 = index % args.tiles() * kClasses;
    const int classes = static_cast<int>(lesser<int64_t>(kClasses, args.K - k0));
    const Row<const T> image(args.image, b, args.D);
    tiles.block.template each_row<kWarpSize>(classes, [&](const auto& lanes, int r) {
      const Row<const T> text(args.text, k0 + r, args.D), mask(args.mask.at(b), k0 + r, args.D);
      const Acc total = lanes.sum(ceil_div(args.D, kColumns), [&](int64_t group) {
        Acc x[kColumns], t[kColumns], m[kColumns], sum = 0;
        image.load(group * kColumns, x);
        text.load(group * kColumns, t);
        mask.load(group * kColumns, m);
        VTCLIP_UNROLL
        for (int e = 0; e < kColumns; ++e) sum += opened(m[e]) * (x[e] * t[e]);
        return sum;
      });
      lanes.once([&] { args.logits[b * args.K + k0 + r] = static_cast<T>(args.scale * total); });
    });
  }
};

template <class T>
struct RationalGradient {
  using Acc = AccOf<T>;
  static constexpr int kWarps = 4, kColumns = kGroup<T>;
  struct Args : RationalArgs<T> {
    Rows<const T> d_logits;  // [B, K]
    T* d_mask;               // [B, K, D], contiguous: written
    Acc* d_image;            // [tiles, B, D], contiguous: written
    Acc* d_text;             // [chunks, K, D], contiguous: written
    Walk<T> walk;
  };
  using Tiles = WalkTiles<T, kWarps>;

  struct Unit {
    const Args& args;
    Acc x[kColumns];

    VTCLIP_DEVICE void image(int64_t b, int64_t column) {
      Row<const T>(args.image, b, args.walk.D).load(column, x);
    }
    VTCLIP_DEVICE void contribute(int64_t b, int64_t k, int64_t column, Acc (&to_image)[kColumns],
                                  Acc (&to_text)[kColumns]) {
      const int64_t D = args.walk.D;
      const Acc g = args.scale * static_cast<Acc>(args.d_logits.at(b, k));
      Acc m[kColumns], t[kColumns], d_m[kColumns];
      Row<const T>(args.mask.at(b), k, D).load(column, m);
      Row<const T>(args.text, k, D).load(column, t);
      VTCLIP_UNROLL
      for (int e = 0; e < kColumns; ++e) {
        const Acc weighed = g * opened(m[e]);
        to_image[e] = weighed * t[e];
        to_text[e] = weighed * x[e];
        d_m[e] = m[e] <= -1 ? 0 : g * (x[e] * t[e]);
      }
      Row<T>(args.d_mask + (b * args.walk.K + k) * D, 1, D).store(column, d_m);
    }
    VTCLIP_DEVICE void finish(int64_t, const Acc (&)[kColumns]) {}
  };

  static VTCLIP_DEVICE void run(const Args& args, int64_t index, Tiles& tiles) {
    args.walk.run(tiles.block, tiles.sums, index, args.d_image, args.walk.B * args.walk.D,
                  args.d_text, [&](int64_t) { return Unit{args, {}}; });
  }
};

}  // namespace vtclip::cuda
