// SPDX-License-Identifier: Apache-2.0
// The bodies of the rational_head kernels. A tile of m exists in shared memory only.
//
//   m = context weight^T + bias,  open = relu(1 + m),  logits[b,k] = scale sum_i open x_b t_k
//   penalty[b] = 0 | mean |E| | mean E^2 | max |E|,  E = open - 1 = max(-1, m)
//   d_m = g x t + the penalty's gradient where m > -1, else 0,  g = scale d_logits
//
// Rows are r = b K + k, so that few classes fill a tile too.
#pragma once

#include "cuda/block/block.h"
#include "rational_logits_block.h"
#include "cuda/block/row.h"
#include "cuda/block/warp_tile.h"

namespace vtclip::cuda {

enum { kNoPenalty = 0, kL1 = 1, kMse = 2, kLinf = 3 };

// side of a tile of m, and columns of context and weight loaded at a time
constexpr int kHeadTile = 64, kHeadInner = 64;

template <class T>
struct HeadArgs {
  Images<const T> context;     // [B, K, D]
  Rows<const T> weight;        // [D, D]
  const T* bias;               // [D]
  Rows<const T> image, text;   // [B, D], [K, D]
  int64_t bias_stride, B, K, D;
  AccOf<T> scale;
  int penalty;

  VTCLIP_BOTH int64_t rows() const { return B * K; }
  VTCLIP_BOTH int64_t row_tiles() const { return ceil_div(rows(), kHeadTile); }
  VTCLIP_BOTH int64_t column_tiles() const { return ceil_div(D, kHeadTile); }
};

// Four warps of 32 x 32 share a tile of m.
template <class T>
struct HeadTiles {
  using Acc = AccOf<T>;
  static constexpr int kWarps = 4;
  static constexpr int kLd = tile_stride<T>(kHeadInner), kLdM = tile_stride<Acc>(kHeadTile);

  Shared& shared;
  Block<kWarps> block{shared};
  T* a = shared.take<T>(kHeadTile * kLd);                 // [64, kLd]: context, then text
  T* b = shared.take<T>(kHeadTile * kLd);                 // [64, kLd]: weight, then images
  Acc* m = shared.take<Acc>(kHeadTile * kLdM);            // [64, kLdM]
  const T** contexts = shared.take<const T*>(kHeadTile);  // [64]: starts of rows or null
  const T** texts = shared.take<const T*>(kHeadTile);     // [64]
  const T** images = shared.take<const T*>(kHeadTile);    // [64]
  Acc* unit = shared.take<Acc>(3 * 2 * kHeadTile);        // [3, 128]
  int64_t* where = shared.take<int64_t>(2 * kHeadTile);   // [128]

  VTCLIP_DEVICE void find_rows(const HeadArgs<T>& args, int64_t first) {
    block.each(kHeadTile, [&](int r) {
      const int64_t row = first + r, at = row / args.K, k = row % args.K;
      const bool exists = row < args.rows();
      contexts[r] = exists ? &args.context.at(at).at(k, 0) : nullptr;
      texts[r] = exists ? &args.text.at(k, 0) : nullptr;
      images[r] = exists ? &args.image.at(at, 0) : nullptr;
    });
  }

  // to[r, c] = start(r)[first + c], 0 beyond column n and where start(r) is null; `packed` if rows
  // are dense and start at multiples of 16 bytes
  template <class Start>
  VTCLIP_DEVICE void gather(T* to, Start start, int64_t stride, bool packed, int64_t first,
                            int64_t n) {
    using Packed = Vector<T>;
    constexpr int kColumns = kGroup<T>, kGroups = kHeadInner / kColumns;
    if (packed && n % kColumns == 0) {
      block.each(kHeadTile * kGroups, [&](int i) {
        const int r = i / kGroups, c = i % kGroups * kColumns;
        const T* row = start(r);
        Packed values = zeros<T>();
        if (row != nullptr && first + c < n) {
          values = *reinterpret_cast<const Packed*>(row + first + c);
        }
        *reinterpret_cast<Packed*>(to + r * kLd + c) = values;
      });
      return;
    }
    block.each(kHeadTile * kHeadInner, [&](int i) {
      const int r = i / kHeadInner, c = i % kHeadInner;
      const T* row = start(r);
      const bool exists = row != nullptr && first + c < n;
      to[r * kLd + c] = exists ? row[(first + c) * stride] : static_cast<T>(0.0f);
    });
  }

  // m = context weight^T of columns first .. first + 63; then a holds text, b the images
  VTCLIP_DEVICE void product(const HeadArgs<T>& args, int64_t first) {
    const bool contexts_fit = vectors_fit(args.context.at(0)) &&
                              args.context.batch * static_cast<int64_t>(sizeof(T)) % 16 == 0;
    PerWarp<WarpTile<T, 32, 32>, kWarps> all;
    block.each_warp([&](const Warp& warp) { all[warp].fill(0); });
    VTCLIP_ASSUME(args.D > 0);
    for (int64_t inner = 0; inner < args.D; inner += kHeadInner) {
      gather(a, [&](int r) { return contexts[r]; }, args.context.column, contexts_fit, inner,
             args.D);
      gather(b, [&](int r) {
        return first + r < args.D ? &args.weight.at(first + r, 0) : nullptr;
      }, args.weight.column, vectors_fit(args.weight), inner, args.D);
      block.each_warp([&](const Warp& warp) {
        all[warp].template add_product<false, true>(a + warp.index / 2 * 32 * kLd, kLd,
                                                    b + warp.index % 2 * 32 * kLd, kLd, kHeadInner);
      });
    }
    block.each_warp([&](const Warp& warp) {
      all[warp].store(m + warp.index / 2 * 32 * kLdM + warp.index % 2 * 32, kLdM);
    });
    gather(a, [&](int r) { return texts[r]; }, args.text.column, vectors_fit(args.text), first,
           args.D);
    gather(b, [&](int r) { return images[r]; }, args.image.column, vectors_fit(args.image), first,
           args.D);
  }
};

// Whether an element comes before the best so far as torch.max counts: NaN above all, and of equal
// ones the first.
template <class Acc>
VTCLIP_DEVICE bool comes_first(Acc value, int64_t index, Acc best, int64_t at) {
  const bool nan = value != value, best_nan = best != best;
  if (nan || best_nan) return nan && (!best_nan || index < at);
  return value > best || (value == best && index < at);
}

// Block = (tile of columns, tile of rows). Two threads per row add up its elements.
template <class T>
struct HeadForward {
  using Acc = AccOf<T>;
  using Tiles = HeadTiles<T>;
  static constexpr int kWarps = Tiles::kWarps, kUnits = 2 * kHeadTile;
  struct Args : HeadArgs<T> {
    Acc* logits;    // [column tiles, B * K]: written
    Acc* size;      // [column tiles, B * K]: sum of |E| or E^2, or the largest |E|: written
    int64_t* peak;  // [column tiles, B * K], its column; written for the largest
  };

  static VTCLIP_DEVICE void run(const Args& args, int64_t index, Tiles& tiles) {
    const Block<kWarps>& block = tiles.block;
    const int64_t tile = index / args.row_tiles(), first = index % args.row_tiles() * kHeadTile;
    const int64_t column = tile * kHeadTile;
    Acc *dots = tiles.unit, *sizes = tiles.unit + kUnits;
    tiles.find_rows(args, first);
    tiles.product(args, column);
    block.each(kUnits, [&](int i) {
      const int r = i / 2;
      Acc dot = 0, size = args.penalty == kLinf ? -1 : 0;
      int64_t where = column;
      VTCLIP_ROLLED
      for (int c = i % 2; c < kHeadTile && column + c < args.D; c += 2) {
        const Acc bias = static_cast<Acc>(args.bias[(column + c) * args.bias_stride]);
        const Acc m = tiles.m[r * Tiles::kLdM + c] + bias;
        const Acc x = static_cast<Acc>(tiles.b[r * Tiles::kLd + c]);
        dot += opened(m) * (x * static_cast<Acc>(tiles.a[r * Tiles::kLd + c]));
        const Acc floor = m <= -1 ? -1 : m, off = floor < 0 ? -floor : floor;
        if (args.penalty == kL1) size += off;
        if (args.penalty == kMse) size += off * off;
        if (args.penalty == kLinf && comes_first(off, column + c, size, where)) {
          size = off;
          where = column + c;
        }
      }
      dots[i] = dot;
      sizes[i] = size;
      tiles.where[i] = where;
    });
    block.each(kHeadTile, [&](int r) {
      const int64_t row = first + r, at = tile * args.rows() + row;
      if (row >= args.rows()) return;
      const int one = 2 * r, two = one + 1;
      args.logits[at] = dots[one] + dots[two];
      if (args.penalty == kLinf) {
        const bool second = comes_first(sizes[two], tiles.where[two], sizes[one], tiles.where[one]);
        args.size[at] = sizes[second ? two : one];
        args.peak[at] = tiles.where[second ? two : one];
      } else {
        args.size[at] = sizes[one] + sizes[two];
      }
    });
  }
};

// one block per image, over what the column tiles left of its rows
template <class T>
struct HeadFinish {
  using Acc = AccOf<T>;
  static constexpr int kWarps = 4, kThreads = kWarps * kWarpSize;
  struct Args {
    const Acc* logits_part;    // [tiles, B * K], of column tiles
    const Acc* size_part;      // [tiles, B * K]
    const int64_t* peak_part;  // [tiles, B * K]
    T* logits;                 // [B, K]: written
    Acc* penalties;            // [B]: written
    int64_t* peak;             // [B], of the largest only: written
    int64_t tiles, B, K, D;
    Acc scale;
    int penalty;
  };
  struct Tiles {
    Shared& shared;
    Block<kWarps> block{shared};
    Acc* top = shared.take<Acc>(kThreads);            // [kThreads]
    int64_t* where = shared.take<int64_t>(kThreads);  // [kThreads]
  };

  static VTCLIP_DEVICE void run(const Args& args, int64_t b, Tiles& tiles) {
    const int64_t rows = args.B * args.K;
    const auto at = [&](int64_t i) { return i / args.K * rows + b * args.K + i % args.K; };
    tiles.block.each(args.K, [&](int64_t k) {
      Acc total = 0;
      for (int64_t s = 0; s < args.tiles; ++s) {
        total += args.logits_part[s * rows + b * args.K + k];
      }
      args.logits[b * args.K + k] = static_cast<T>(args.scale * total);
    });
    if (args.penalty != kLinf) {
      const double sum = tiles.block.sum(args.tiles * args.K, [&](int64_t i) {
        return static_cast<double>(args.size_part[at(i)]);
      });
      const double count = static_cast<double>(args.K) * static_cast<double>(args.D);
      tiles.block.once([&] { args.penalties[b] = static_cast<Acc>(sum / count); });
      return;
    }
    tiles.block.each(kThreads, [&](int thread) {
      Acc top = -1;
      int64_t where = 0;
      for (int64_t i = thread; i < args.tiles * args.K; i += kThreads) {
        const int64_t place = i % args.K * args.D + args.peak_part[at(i)];
        if (comes_first(args.size_part[at(i)], place, top, where)) {
          top = args.size_part[at(i)];
          where = place;
        }
      }
      tiles.top[thread] = top;
      tiles.where[thread] = where;
    });
    tiles.block.each(1, [&](int) {
      int best = 0;
      for (int i = 1; i < kThreads; ++i) {
        if (comes_first(tiles.top[i], tiles.where[i], tiles.top[best], tiles.where[best])) best = i;
      }
      args.penalties[b] = tiles.top[best];
      args.peak[b] = tiles.where[best];
    });
  }
};

// Block = (tile of rows, tile of columns): d_m, its column sums and, for the gradients of image and
// text, weighed = g open.
template <class T>
struct HeadGradient {
  using Acc = AccOf<T>;
  using Tiles = HeadTiles<T>;
  static constexpr int kWarps = Tiles::kWarps;
  struct Args : HeadArgs<T> {
    Rows<const T> d_logits;        // [B, K]
    Rows<const Acc> d_penalty;     // [B, 1]
    Rows<const int64_t> peak;      // [B, 1], read for the largest
    T* d_m;                        // [B * K, D], contiguous: written
    Acc* weighed;                  // [B * K, D], contiguous, or null: written
    Acc* d_bias;                   // [row tiles, D], contiguous: written
    Acc mean;                      // 1 / (K D)
  };

  static VTCLIP_DEVICE void run(const Args& args, int64_t index, Tiles& tiles) {
    const Block<kWarps>& block = tiles.block;
    const int64_t row_tile = index / args.column_tiles(), first = row_tile * kHeadTile;
    const int64_t column = index % args.column_tiles() * kHeadTile;
    Acc *steps = tiles.unit, *slopes = tiles.unit + kHeadTile;
    tiles.find_rows(args, first);
    block.each(kHeadTile, [&](int r) {
      const int64_t row = first + r, b = row / args.K, k = row % args.K;
      if (row >= args.rows()) return;
      steps[r] = args.scale * static_cast<Acc>(args.d_logits.at(b, k));
      slopes[r] = args.penalty == kNoPenalty ? 0 : args.d_penalty.at(b, 0);
      tiles.where[r] = args.penalty == kLinf ? args.peak.at(b, 0) - k * args.D : -1;
    });
    tiles.product(args, column);
    block.template each_row<1>(kHeadTile * kHeadTile, [&](const auto&, int i) {
      const int r = i / kHeadTile, c = i % kHeadTile;
      Acc& element = tiles.m[r * Tiles::kLdM + c];
      if (first + r >= args.rows() || column + c >= args.D) {
        element = 0;
        return;
      }
      const Acc m = element + static_cast<Acc>(args.bias[(column + c) * args.bias_stride]);
      const Acc x = static_cast<Acc>(tiles.b[r * Tiles::kLd + c]);
      Acc d_m = steps[r] * (x * static_cast<Acc>(tiles.a[r * Tiles::kLd + c]));
      const Acc sign = m > 0 ? 1 : m < 0 ? -1 : 0;
      if (args.penalty == kL1) d_m += slopes[r] * args.mean * sign;
      if (args.penalty == kMse) d_m += 2 * slopes[r] * args.mean * m;
      if (args.penalty == kLinf && tiles.where[r] == column + c) d_m += slopes[r] * sign;
      element = m <= -1 ? 0 : d_m;
      if (args.weighed != nullptr) {
        args.weighed[(first + r) * args.D + column + c] = steps[r] * opened(m);
      }
    });
    store_tile<kHeadTile, kHeadTile>(block, Rows<T>{args.d_m + first * args.D + column, args.D, 1},
                                     args.rows() - first, args.D - column, tiles.m, Tiles::kLdM);
    block.each(kHeadTile, [&](int c) {
      if (column + c >= args.D) return;
      Acc total = 0;
      for (int r = 0; r < kHeadTile; ++r) total += tiles.m[r * Tiles::kLdM + c];
      args.d_bias[row_tile * args.D + column + c] = total;
    });
  }
};

// d_image and d_text from weighed
template <class T>
struct HeadFeatures {
  using Acc = AccOf<T>;
  static constexpr int kWarps = 4, kColumns = kGroup<T>;
  struct Args {
    Rows<const T> image, text;  // [B, D], [K, D]
    const Acc* weighed;         // [B, K, D], contiguous
    Acc* d_image;               // [tiles, .., D], slices image_slice apart: written
    Acc* d_text;                // [chunks, K, D], contiguous: written
    int64_t image_slice;
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
      Acc weighed[kColumns], t[kColumns];
      Row<const Acc>(args.weighed + (b * args.walk.K + k) * D, 1, D).load(column, weighed);
      Row<const T>(args.text, k, D).load(column, t);
      VTCLIP_UNROLL
      for (int e = 0; e < kColumns; ++e) {
        to_image[e] = weighed[e] * t[e];
        to_text[e] = weighed[e] * x[e];
      }
    }
    VTCLIP_DEVICE void finish(int64_t, const Acc (&)[kColumns]) {}
  };

  static VTCLIP_DEVICE void run(const Args& args, int64_t index, Tiles& tiles) {
    args.walk.run(tiles.block, tiles.sums, index, args.d_image, args.image_slice, args.d_text,
                  [&](int64_t) { return Unit{args, {}}; });
  }
};

}  // namespace vtclip::cuda
