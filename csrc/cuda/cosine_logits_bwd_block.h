// SPDX-License-Identifier: Apache-2.0
// The bodies of cosine_logits' backward. With unit rows x, t:
//
//   d_image_b = scale rx_b (u_b - <u_b, x_b> x_b),  u_b = sum_k d_logits[b,k] t_k
//   d_text_k  = scale rt_k (u_k - <u_k, t_k> t_k),  u_k = sum_b d_logits[b,k] x_b
//
// CosineGather forms the sums u of both sides, of fixed ranges of what is summed over, and
// CosineProject adds the ranges in order. The unit rows of a half type do not fit into it: a row
// is the sum of two of its type, the second what the first leaves, and so are the products. Where
// u is nearly along x, little of it is left, and the errors of one part would be large compared
// with that.
//
// A text per image has one term, u = d_logits[b,k] x_b: CosinePairedGradient reads it and writes
// its gradient, with u_b of a tile of classes on the way.
#pragma once

#include <cstdint>

#include "cuda/block/block.h"
#include "cuda/block/reciprocal_norm.h"
#include "cuda/block/row.h"
#include "cuda/block/stage.h"
#include "cuda/block/tile_io.h"
#include "cuda/block/warp_tile.h"

namespace vtclip::cuda {

constexpr int kGatherTile = 64;

// partial[p, n] = sum of g[n, j] unit y[j] over the j of range p
template <class T>
struct Gather {
  using Acc = AccOf<T>;
  static constexpr int kStep = 128 / static_cast<int>(sizeof(T));

  Rows<const T> g;   // [N, J], or as it is stored, [J, N]
  Rows<const T> y;   // [J, D]
  const Acc* rnorm;  // [J]
  Acc* partial;      // [ranges, N, D], contiguous: written
  int64_t N, J, D;
  int64_t range;     // rows of y in one

  VTCLIP_BOTH int64_t ranges() const { return ceil_div(J, range); }
  VTCLIP_BOTH int64_t row_tiles() const { return ceil_div(N, kGatherTile); }
  VTCLIP_BOTH int64_t column_tiles() const { return ceil_div(D, kGatherTile); }
  VTCLIP_BOTH int64_t blocks() const { return ranges() * row_tiles() * column_tiles(); }

  // Enough blocks to fill a large device twice, of 128 rows or more; a function of the shape only.
  VTCLIP_BOTH static int64_t range_of(int64_t N, int64_t J, int64_t D) {
    const int64_t tiles = ceil_div(N, kGatherTile) * ceil_div(D, kGatherTile);
    const int64_t wanted = ceil_div(256, larger<int64_t>(1, tiles));
    return ceil_div(larger<int64_t>(128, ceil_div(J, wanted)), kStep) * kStep;
  }
};

// Block = (side, range, tile of rows, tile of columns), 64 x 64: four warps of 32 x 32.
template <class T>
struct CosineGather {
  using Acc = AccOf<T>;
  using Side = Gather<T>;
  static constexpr int kWarps = 4, kThreads = kWarps * kWarpSize, kTile = kGatherTile;
  static constexpr int kStep = Side::kStep;
  static constexpr int kLd = tile_stride<T>(kTile), kLdStep = tile_stride<T>(kStep);
  static constexpr bool kTwo = sizeof(T) == 2;

  struct Args {
    Side image, text;  // g is [N, J] = d_logits of the one, [J, N] = d_logits of the other

    VTCLIP_BOTH int64_t blocks() const { return image.blocks() + text.blocks(); }
  };
  struct Tiles {
    Shared& shared;
    Block<kWarps> block{shared};
    T* g = shared.take<T>(larger(kTile * kLdStep, kStep * kLd));  // [kTile, kLdStep], [kStep, kLd]
    T* one = shared.take<T>(kStep * kLd);             // [kStep, kLd]: unit rows
    T* two = shared.take<T>(kTwo ? kStep * kLd : 0);  // what `one` leaves of them, for half types
    Acc* rnorm = shared.take<Acc>(kStep);             // [kStep]
  };

  static VTCLIP_DEVICE void run(const Args& args, int64_t index, Tiles& tiles) {
    const int64_t blocks = args.image.blocks();
    if (index < blocks) {
      sum<false>(args.image, index, tiles);
    } else {
      sum<true>(args.text, index - blocks, tiles);
    }
  }

 private:
  template <bool kTransposed>
  struct Held {
    Stage<T, kTransposed ? kStep : kTile, kTransposed ? kTile : kStep, kThreads> g;
    Stage<T, kStep, kTile, kThreads> y;
    Acc rnorm;  // of row `thread` of y
  };

  template <bool kTransposed>
  static VTCLIP_DEVICE void sum(const Side& side, int64_t index, Tiles& tiles) {
    const Block<kWarps>& block = tiles.block;
    const int64_t column = index % side.column_tiles() * kTile;
    const int64_t row = index / side.column_tiles() % side.row_tiles() * kTile;
    const int64_t range = index / (side.column_tiles() * side.row_tiles());
    const int64_t first = range * side.range, end = lesser(side.J, first + side.range);
    const int64_t rows = side.N - row, columns = side.D - column;
    PerThread<Held<kTransposed>, kThreads> all;
    PerWarp<WarpTile<T, 32, 32>, kWarps> sums;
    const auto fetch = [&](int64_t j) {
      block.loose().each(static_cast<int>(kThreads), [&](int i) {
        if constexpr (kTransposed) {
          all[i].g.fetch(i, side.g.from(j, row), end - j, rows);
        } else {
          all[i].g.fetch(i, side.g.from(row, j), rows, end - j);
        }
        all[i].y.fetch(i, side.y.from(j, column), end - j, columns);
        all[i].rnorm = i < kStep && i < end - j ? side.rnorm[j + i] : 0;
      });
    };
    const auto put_rnorms = [&] {
      block.each(static_cast<int>(kThreads), [&](int i) {
        if (i < kStep) tiles.rnorm[i] = all[i].rnorm;
      });
    };
    fetch(first);
    block.each_warp([&](const Warp& warp) { sums[warp].fill(0); });
    put_rnorms();
    for (int64_t j = first; j < end; j += kStep) {
      block.each(static_cast<int>(kThreads), [&](int i) {
        all[i].g.each(i, [&](const Place& at, const Vector<T>& g) {
          put(tiles.g + at.row * (kTransposed ? kLd : kLdStep) + at.column, g);
        });
        all[i].y.each(i, [&](const Place& at, const Vector<T>& y) {
          put_units(tiles, at.row * kLd + at.column, y, tiles.rnorm[at.row]);
        });
      });
      if (j + kStep < end) fetch(j + kStep);
      block.each_warp([&](const Warp& warp) {
        constexpr int kLdG = kTransposed ? kLd : kLdStep;
        const int row0 = warp.index / 2 * 32, column0 = warp.index % 2 * 32;
        const T* g = tiles.g + (kTransposed ? row0 : row0 * kLdG);
        auto& own = sums[warp];
        own.template add_product<kTransposed, false>(g, kLdG, tiles.one + column0, kLd, kStep);
        if constexpr (kTwo) {
          own.template add_product<kTransposed, false>(g, kLdG, tiles.two + column0, kLd, kStep);
        }
      });
      if (j + kStep < end) put_rnorms();
    }
    block.each_warp([&](const Warp& warp) {
      Acc* to = side.partial + (range * side.N + row) * side.D + column;
      sums[warp].each([&](const Spot& at, Acc& element) {
        const int r = warp.index / 2 * 32 + at.row, c = warp.index % 2 * 32 + at.column;
        if (r < rows && c < columns) to[r * side.D + c] = element;
      });
    });
  }

  static VTCLIP_DEVICE void put_units(Tiles& tiles, int at, const Vector<T>& y, Acc rnorm) {
    Vector<T> one, two;
    VTCLIP_UNROLL
    for (int e = 0; e < Vector<T>::kSize; ++e) {
      const Acc unit = static_cast<Acc>(y.element[e]) * rnorm;
      one.element[e] = static_cast<T>(unit);
      if constexpr (kTwo) two.element[e] = static_cast<T>(unit - static_cast<Acc>(one.element[e]));
    }
    put(tiles.one + at, one);
    if constexpr (kTwo) put(tiles.two + at, two);
  }
};

// Block = one row of either side, whose sum is that of P partials.
template <class T>
struct CosineProject {
  using Acc = AccOf<T>;
  static constexpr int kWarps = 4, kColumns = kGroup<Acc>;
  using Tiles = BlockTiles<kWarps>;
  struct Side {
    Rows<const T> x;   // [N, D]
    const Acc* rnorm;  // [N]
    Acc* partial;      // [P, N, D], contiguous; of several, the first becomes the sum
    T* d_x;            // [N, D], contiguous: written
    int64_t P, N;
  };
  struct Args {
    Side image, text;  // N = 0 where there is nothing to do
    int64_t D;
    Acc scale;

    VTCLIP_BOTH int64_t blocks() const { return image.N + text.N; }
  };

  static VTCLIP_DEVICE void run(const Args& args, int64_t index, Tiles& tiles) {
    const bool of_text = index >= args.image.N;
    const Side side = of_text ? args.text : args.image;
    const int64_t n = index - (of_text ? args.image.N : 0), D = args.D;
    const Acc rnorm = side.rnorm[n];
    const Row<const T> row(side.x, n, D);
    const Row<Acc> sum(side.partial + n * D, 1, D);
    const auto load_unit = [&](int64_t group, Acc (&x)[kColumns]) {
      row.load(group * kColumns, x);
      VTCLIP_UNROLL
      for (int e = 0; e < kColumns; ++e) x[e] *= rnorm;
    };
    const Acc along = tiles.block.sum(ceil_div(D, kColumns), [&](int64_t group) {
      Acc u[kColumns], x[kColumns], total = 0;
      sum.load(group * kColumns, u);
      for (int64_t p = 1; p < side.P; ++p) {
        Acc part[kColumns];
        Row<const Acc>(side.partial + (p * side.N + n) * D, 1, D).load(group * kColumns, part);
        VTCLIP_UNROLL
        for (int e = 0; e < kColumns; ++e) u[e] += part[e];
      }
      if (side.P > 1) sum.store(group * kColumns, u);
      load_unit(group, x);
      VTCLIP_UNROLL
      for (int e = 0; e < kColumns; ++e) total += u[e] * x[e];
      return total;
    });
    const Acc step = args.scale * rnorm;
    tiles.block.each(ceil_div(D, kColumns), [&](int64_t group) {
      Acc u[kColumns], x[kColumns];
      sum.load(group * kColumns, u);
      load_unit(group, x);
      VTCLIP_UNROLL
      for (int e = 0; e < kColumns; ++e) u[e] = step * (u[e] - along * x[e]);
      Row<T>(side.d_x + n * D, 1, D).store(group * kColumns, u);
    });
  }
};

// Block = (image, tile of its own classes), eight to a warp: first their cosines, then, of a chunk
// of columns at a time, d_text and u.
template <class T>
struct CosinePairedGradient {
  using Acc = AccOf<T>;
  static constexpr int kWarps = 4, kOwn = 8, kAtOnce = 2, kClasses = kWarps * kOwn;
  static constexpr int kColumns = kGroup<T>, kChunk = kWarpSize * kColumns;
  struct Args {
    Rows<const T> image, d_logits;        // [B, D], [B, K]
    Vectors<const T> text;                // [B, K, D]
    const Acc *image_rnorm, *text_rnorm;  // [B], [B, K]
    Acc* partial;                         // [tiles, B, D], contiguous, of u: written
    T* d_text;                            // [B, K, D], contiguous: written
    int64_t B, K, D;
    Acc scale;

    VTCLIP_BOTH int64_t tiles() const { return ceil_div(K, kClasses); }
    VTCLIP_BOTH int64_t blocks() const { return B * tiles(); }
  };
  struct Tiles {
    Shared& shared;
    Block<kWarps> block{shared};
    Acc* slots = shared.take<Acc>(kWarps * kAtOnce * kWarpSize);  // [kWarps, kAtOnce, 32]
    Acc* cosine = shared.take<Acc>(kClasses);                     // [kClasses]
    Acc* rnorm = shared.take<Acc>(kClasses);                      // [kClasses]
    Acc* grad = shared.take<Acc>(kClasses);                       // [kClasses]: of d_logits
    Acc* sums = shared.take<Acc>(kWarps * kChunk);                // [kWarps, kChunk]
  };

  static VTCLIP_DEVICE void run(const Args& args, int64_t index, Tiles& tiles) {
    const Block<kWarps>& block = tiles.block;
    const int64_t tile = index % args.tiles(), b = index / args.tiles(), k0 = tile * kClasses;
    const int classes = static_cast<int>(lesser<int64_t>(kClasses, args.K - k0));
    const Rows<const T> texts = args.text.rows(b).from(k0);
    const Row<const T> image(args.image, b, args.D);
    const Acc rx = args.image_rnorm[b];
    block.each(static_cast<int>(kClasses), [&](int r) {
      const bool exists = r < classes;
      tiles.rnorm[r] = exists ? args.text_rnorm[b * args.K + k0 + r] : 0;
      tiles.grad[r] = exists ? static_cast<Acc>(args.d_logits.at(b, k0 + r)) : 0;
    });
    block.each_warp([&](const Warp& warp) {
      VTCLIP_ROLLED
      for (int first = warp.index * kOwn; first < (warp.index + 1) * kOwn; first += kAtOnce) {
        cosines(args, tiles, warp, image, texts, rx, first, classes - first);
      }
    });
    for (int64_t column = 0; column < args.D; column += kChunk) {
      block.each_warp([&](const Warp& warp) {
        Acc* sums = tiles.sums + warp.index * kChunk;
        T* d_text = args.d_text + (b * args.K + k0) * args.D;
        warp.each(static_cast<int>(kWarpSize), [&](int lane) {
          const int64_t at = column + lane * kColumns;
          Acc x[kColumns], u[kColumns] = {};
          image.load(at, x);
          VTCLIP_UNROLL
          for (int e = 0; e < kColumns; ++e) x[e] *= rx;
          VTCLIP_ROLLED
          for (int first = warp.index * kOwn; first < (warp.index + 1) * kOwn; first += kAtOnce) {
            gradients(args, tiles, texts, d_text, x, u, at, first, classes - first);
          }
          VTCLIP_UNROLL
          for (int e = 0; e < kColumns; ++e) sums[lane * kColumns + e] = u[e];
        });
      });
      block.each(static_cast<int>(lesser<int64_t>(kChunk, args.D - column)), [&](int c) {
        Acc total = 0;
        VTCLIP_UNROLL
        for (int warp = 0; warp < kWarps; ++warp) total += tiles.sums[warp * kChunk + c];
        args.partial[(tile * args.B + b) * args.D + column + c] = total;
      });
    }
  }

 private:
  // of classes first .. first + kAtOnce - 1 of the tile, as far as `count` goes
  static VTCLIP_DEVICE void cosines(const Args& args, Tiles& tiles, const Warp& warp,
                                    const Row<const T>& image, const Rows<const T>& texts, Acc rx,
                                    int first, int count) {
    Acc totals[kAtOnce], *slots = tiles.slots + warp.index * kAtOnce * kWarpSize;
    row_sums<kAtOnce>(
        warp, slots, ceil_div(args.D, kColumns), [&](int64_t group, Acc (&part)[kAtOnce]) {
          Acc x[kColumns], t[kAtOnce][kColumns];
          image.load(group * kColumns, x);
          VTCLIP_UNROLL
          for (int r = 0; r < kAtOnce; ++r) {
            if (r < count) Row<const T>(texts, first + r, args.D).load(group * kColumns, t[r]);
          }
          VTCLIP_UNROLL
          for (int r = 0; r < kAtOnce; ++r) {
            if (r >= count) continue;
            VTCLIP_UNROLL
            for (int e = 0; e < kColumns; ++e) {
              part[r] += (x[e] * rx) * (t[r][e] * tiles.rnorm[first + r]);
            }
          }
        }, totals);
    VTCLIP_UNROLL
    for (int r = 0; r < kAtOnce; ++r) {
      warp.once([&] { tiles.cosine[first + r] = totals[r]; });
    }
  }

  // of the same classes, a group of columns from `at`; u gets what they add to it
  static VTCLIP_DEVICE void gradients(const Args& args, const Tiles& tiles,
                                      const Rows<const T>& texts, T* d_text,
                                      const Acc (&x)[kColumns], Acc (&u)[kColumns], int64_t at,
                                      int first, int count) {
    Acc t[kAtOnce][kColumns];
    VTCLIP_UNROLL
    for (int r = 0; r < kAtOnce; ++r) {
      if (r < count) Row<const T>(texts, first + r, args.D).load(at, t[r]);
    }
    VTCLIP_UNROLL
    for (int r = 0; r < kAtOnce; ++r) {
      if (r >= count) continue;
      const Acc rnorm = tiles.rnorm[first + r], grad = tiles.grad[first + r];
      const Acc step = args.scale * grad * rnorm, cosine = tiles.cosine[first + r];
      VTCLIP_UNROLL
      for (int e = 0; e < kColumns; ++e) {
        const Acc unit = t[r][e] * rnorm;
        u[e] += grad * unit;
        t[r][e] = step * (x[e] - cosine * unit);
      }
      Row<T>(d_text + (first + r) * args.D, 1, args.D).store(at, t[r]);
    }
  }
};

}  // namespace vtclip::cuda
