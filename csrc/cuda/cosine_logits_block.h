// SPDX-License-Identifier: Apache-2.0
// The bodies of cosine_logits' forward.
//
//   logits[b,k] = scale * <x_b, t_k> * rx_b * rt_k,   r = 1 / |.| or 0 for a zero vector
//
// Shared texts are a matrix product: a block computes a tile of images and classes and reads its
// rows once. Its operands are the rows as they are. Those whose products may leave the range of the
// type are multiplied by the power of two next to their r first, which loses no bits, and the rest
// of r, in [1, 2), multiplies the sum; float16 has sums in float, and needs neither.
//
// A text per image is used once, by one row of logits: reading it is all the time there is, so a
// warp reads rows, and computes their norms in the same pass.
#pragma once

#include <cmath>
#include <cstdint>
#include <type_traits>

#include "cuda/block/block.h"
#include "cuda/block/reciprocal_norm.h"
#include "cuda/block/row.h"
#include "cuda/block/stage.h"
#include "cuda/block/tile_io.h"
#include "cuda/block/warp_tile.h"

namespace vtclip::cuda {

// the power of two in (x / 2, x] of a positive normal x
VTCLIP_DEVICE float power_of_two(float x) { return scalbnf(1.0f, larger(ilogbf(x), -126)); }
VTCLIP_DEVICE double power_of_two(double x) { return scalbn(1.0, larger(ilogb(x), -1022)); }

// What a row is multiplied by before its products, 1 unless its norm is extreme.
template <class Acc>
VTCLIP_DEVICE Acc unit_of(Acc rnorm) {
  constexpr Acc kSafe = 1099511627776;  // 2^40
  const bool extreme = rnorm > kSafe || (rnorm > 0 && rnorm < 1 / kSafe);
  return extreme ? power_of_two(rnorm) : 1;
}

// image_rnorm and text_rnorm of shared texts: one warp per row, images first
template <class T>
struct CosineNorms {
  using Acc = AccOf<T>;
  static constexpr int kWarps = 4;
  using Tiles = BlockTiles<kWarps>;
  struct Args {
    Rows<const T> image, text;      // [B, D], [K, D]
    Acc *image_rnorm, *text_rnorm;  // [B], [K]: written
    int64_t B, K, D;

    VTCLIP_BOTH int64_t blocks() const { return ceil_div(B + K, kWarps); }
  };

  static VTCLIP_DEVICE void run(const Args& args, int64_t index, Tiles& tiles) {
    const int64_t first = index * kWarps;
    const int rows = static_cast<int>(lesser<int64_t>(kWarps, args.B + args.K - first));
    tiles.block.template each_row<kWarpSize>(rows, [&](const auto& lanes, int r) {
      const bool of_text = first + r >= args.B;
      const int64_t row = first + r - (of_text ? args.B : 0);
      const Acc rnorm = row_reciprocal_norm(lanes, of_text ? args.text : args.image, row, args.D);
      lanes.once([&] { (of_text ? args.text_rnorm : args.image_rnorm)[row] = rnorm; });
    });
  }
};

// Block = (tile of images, tile of shared classes), kSide x kSide. Four warps of 32 x 32 share a
// tile of 64, and the columns of a step over a tile of 32, for problems too small to fill a device
// with the large one.
template <class T, int kSideOf>
struct CosineForward {
  using Acc = AccOf<T>;
  static constexpr int kWarps = 4, kThreads = kWarps * kWarpSize, kSide = kSideOf;
  static constexpr int kAcross = kSide / 32;                    // warps along a side
  static constexpr int kSplits = kWarps / (kAcross * kAcross);  // warps that share columns
  static constexpr int kSlice = sizeof(T) == 8 ? 8 : 128 / static_cast<int>(sizeof(T));
  static constexpr int kStep = kSplits * kSlice;  // columns loaded at a time
  static constexpr int kLd = tile_stride<T>(kStep), kLdM = tile_stride<Acc>(kSide);
  static constexpr bool kScaled = !std::is_same_v<T, Half>;

  struct Args {
    Rows<const T> image, text;                  // [B, D], [K, D]
    const Acc *image_rnorm, *text_rnorm;        // [B], [K]
    T* logits;                                  // [B, K], contiguous: written
    int64_t B, K, D;
    Acc scale;

    VTCLIP_BOTH int64_t tiles() const { return ceil_div(K, kSide); }
    VTCLIP_BOTH int64_t blocks() const { return ceil_div(B, kSide) * tiles(); }
  };
  struct Tiles {
    Shared& shared;
    Block<kWarps> block{shared};
    T* image = shared.take<T>(kSide * kLd);   // [kSide, kLd]
    T* text = shared.take<T>(kSide * kLd);    // [kSide, kLd]
    Acc* m = shared.take<Acc>(kSide * kLdM);  // [kSide, kLdM]
    Acc* unit = shared.take<Acc>(2 * kSide);  // [2, kSide]: of images, then of texts
    Acc* rest = shared.take<Acc>(2 * kSide);  // the same
  };

  static VTCLIP_DEVICE void run(const Args& args, int64_t index, Tiles& tiles) {
    const Block<kWarps>& block = tiles.block;
    const int64_t b0 = index / args.tiles() * kSide, k0 = index % args.tiles() * kSide;
    const int64_t images = args.B - b0, classes = args.K - k0;
    PerThread<Held, kThreads> all;
    PerWarp<WarpTile<T, 32, 32>, kWarps> sums;
    const auto fetch = [&](int64_t column) {
      block.loose().each(static_cast<int>(kThreads), [&](int i) {
        all[i].image.fetch(i, args.image.from(b0, column), images, args.D - column);
        all[i].text.fetch(i, args.text.from(k0, column), classes, args.D - column);
      });
    };
    fetch(0);
    block.loose().each(2 * kSide, [&](int i) {
      const bool of_text = i >= kSide;
      const int64_t row = i % kSide;
      Acc rnorm = 0;
      if (row < (of_text ? classes : images)) {
        rnorm = of_text ? args.text_rnorm[k0 + row] : args.image_rnorm[b0 + row];
      }
      const Acc unit = kScaled ? unit_of(rnorm) : 1;
      tiles.unit[i] = unit;
      tiles.rest[i] = rnorm / unit;
    });
    block.each_warp([&](const Warp& warp) { sums[warp].fill(0); });
    for (int64_t column = 0; column < args.D; column += kStep) {
      block.each(static_cast<int>(kThreads), [&](int i) {
        put_scaled(i, all[i].image, tiles.image, tiles.unit);
        put_scaled(i, all[i].text, tiles.text, tiles.unit + kSide);
      });
      if (column + kStep < args.D) fetch(column + kStep);
      block.each_warp([&](const Warp& warp) {
        const int slice = split(warp) * kSlice;
        sums[warp].template add_product<false, true>(tiles.image + row0(warp) * kLd + slice, kLd,
                                                     tiles.text + column0(warp) * kLd + slice, kLd,
                                                     kSlice);
      });
    }
    VTCLIP_ROLLED
    for (int turn = 0; turn < kSplits; ++turn) {
      block.each_warp([&](const Warp& warp) {
        if (split(warp) != turn) return;
        sums[warp].each([&](const Spot& at, Acc& element) {
          const int r = row0(warp) + at.row, c = column0(warp) + at.column;
          Acc& m = tiles.m[r * kLdM + c];
          const Acc total = turn == 0 ? element : m + element;
          const Acc factor = args.scale * (tiles.rest[r] * tiles.rest[kSide + c]);
          m = turn == kSplits - 1 ? total * factor : total;
        });
      });
    }
    store_tile<kSide, kSide>(block, Rows<T>{args.logits + b0 * args.K + k0, args.K, 1}, images,
                             classes, tiles.m, kLdM);
  }

 private:
  using Rectangle = Stage<T, kSide, kStep, kThreads>;
  struct Held {
    Rectangle image, text;
  };

  static VTCLIP_DEVICE int split(const Warp& warp) { return warp.index / (kAcross * kAcross); }
  static VTCLIP_DEVICE int row0(const Warp& warp) {
    return warp.index / kAcross % kAcross * 32;
  }
  static VTCLIP_DEVICE int column0(const Warp& warp) { return warp.index % kAcross * 32; }

  static VTCLIP_DEVICE void put_scaled(int thread, const Rectangle& held, T* to, const Acc* unit) {
    held.each(thread, [&](const Place& at, typename Rectangle::Packed packed) {
      if constexpr (kScaled) scale(packed, unit[at.row]);
      put(to + at.row * kLd + at.column, packed);
    });
  }
  static VTCLIP_DEVICE void scale(typename Rectangle::Packed& packed, Acc factor) {
    if (factor == 1) return;
    VTCLIP_UNROLL
    for (int e = 0; e < Rectangle::kSize; ++e) {
      packed.element[e] = static_cast<T>(static_cast<Acc>(packed.element[e]) * factor);
    }
  }
};

// Block = (image, tile of its own classes), four to a warp.
template <class T>
struct CosinePairedForward {
  using Acc = AccOf<T>;
  static constexpr int kWarps = 4, kAtOnce = 4, kClasses = kWarps * kAtOnce;
  static constexpr int kSums = 2 * kAtOnce + 1;
  struct Args {
    Rows<const T> image;            // [B, D]
    Vectors<const T> text;          // [B, K, D]
    T* logits;                      // [B, K], contiguous: written
    Acc *image_rnorm, *text_rnorm;  // [B], [B, K], contiguous: written
    int64_t B, K, D;
    Acc scale;

    // one of an image without classes: it writes image_rnorm
    VTCLIP_BOTH int64_t tiles() const { return larger<int64_t>(1, ceil_div(K, kClasses)); }
    VTCLIP_BOTH int64_t blocks() const { return B * tiles(); }
  };
  struct Tiles {
    Shared& shared;
    Block<kWarps> block{shared};
    Acc* slots = shared.take<Acc>(kWarps * kSums * kWarpSize);  // [kWarps, kSums, 32]
  };

  static VTCLIP_DEVICE void run(const Args& args, int64_t index, Tiles& tiles) {
    const int64_t b = index / args.tiles(), k0 = index % args.tiles() * kClasses;
    tiles.block.each_warp([&](const Warp& warp) {
      const int64_t first = k0 + warp.index * kAtOnce;
      if (first >= args.K && first > 0) return;
      rows(args, warp, b, first, tiles.slots + warp.index * kSums * kWarpSize);
    });
  }

 private:
  // logits and norms of classes first .. first + kAtOnce - 1
  static VTCLIP_DEVICE void rows(const Args& args, const Warp& warp, int64_t b, int64_t first,
                                 Acc* slots) {
    constexpr int kColumns = kGroup<T>;
    const int count = static_cast<int>(lesser<int64_t>(kAtOnce, args.K - first));
    const Rows<const T> texts = args.text.rows(b).from(first);
    const Row<const T> image(args.image, b, args.D);
    Acc totals[kSums];  // <x, t>, <t, t> of each class; <x, x>
    row_sums<kSums>(
        warp, slots, ceil_div(args.D, kColumns), [&](int64_t group, Acc (&part)[kSums]) {
          Acc x[kColumns], t[kAtOnce][kColumns];
          image.load(group * kColumns, x);
          VTCLIP_UNROLL
          for (int r = 0; r < kAtOnce; ++r) {
            if (r < count) Row<const T>(texts, r, args.D).load(group * kColumns, t[r]);
          }
          VTCLIP_UNROLL
          for (int e = 0; e < kColumns; ++e) part[kSums - 1] += x[e] * x[e];
          VTCLIP_UNROLL
          for (int r = 0; r < kAtOnce; ++r) {
            if (r >= count) continue;
            VTCLIP_UNROLL
            for (int e = 0; e < kColumns; ++e) {
              part[2 * r] += x[e] * t[r][e];
              part[2 * r + 1] += t[r][e] * t[r][e];
            }
          }
        }, totals);
    const bool plain = kSquaresFit<T> || square_in_range(totals[kSums - 1]);
    const Acc rx = rnorm_of_square<T>(totals[kSums - 1], [&] {
      return reciprocal_norm(warp, vector_of(args.image, b), args.D);
    });
    int again = 0;  // bit r: class r leaves the range of squares
    VTCLIP_UNROLL
    for (int r = 0; r < kAtOnce; ++r) {
      if (r >= count) continue;
      const Acc square = totals[2 * r + 1];
      if (!plain || (!kSquaresFit<T> && !square_in_range(square))) {
        again |= 1 << r;
        continue;
      }
      const Acc rt = rnorm_of_square<T>(square, [] { return Acc{0}; });
      warp.once([&] { write(args, b, first + r, totals[2 * r] * (rx * rt), rt); });
    }
    VTCLIP_ROLLED
    for (int r = 0; r < count; ++r) {
      if ((again >> r & 1) == 0) continue;
      const Strided<const T> x = vector_of(args.image, b), t = vector_of(texts, r);
      const Acc rt = reciprocal_norm(warp, t, args.D);
      const Acc cosine = warp.sum(args.D, [&](int64_t i) {
        return (static_cast<Acc>(x[i]) * rx) * (static_cast<Acc>(t[i]) * rt);
      });
      warp.once([&] { write(args, b, first + r, cosine, rt); });
    }
    if (first == 0) warp.once([&] { args.image_rnorm[b] = rx; });
  }

  static VTCLIP_DEVICE void write(const Args& args, int64_t b, int64_t k, Acc cosine, Acc rt) {
    args.logits[b * args.K + k] = static_cast<T>(args.scale * cosine);
    args.text_rnorm[b * args.K + k] = rt;
  }
};

}  // namespace vtclip::cuda
