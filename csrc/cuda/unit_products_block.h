// SPDX-License-Identifier: Apache-2.0
// The bodies of the unit_products kernels. The products are written once, their gradient is read
// once; rows of images and texts, which lie in the caches, are normalised wherever they are used.
//
//   v[b] = root xhat_b,  t[k] = root xhat_k,  products[b,k] = v[b] t[k],  xhat = x / |x|
//   d_x = root / |x| (g - xhat <g, xhat>)
//   g of image b = d_v[b] + root sum_k d_products[b,k] xhat_k,  of a text likewise over b
#pragma once

#include "cuda/block/block.h"
#include "cuda/block/row.h"
#include "cuda/block/tile_io.h"
#include "cuda/block/walk.h"

namespace vtclip::cuda {

// xhat = x * shrink * rnorm. Neither factor leaves the normal numbers: shrink is 1 unless squares
// overflow or vanish. rnorm is 0 for a zero row, NaN for one with a NaN.
template <class Acc>
struct UnitNorm {
  Acc shrink, rnorm;

  // x = root xhat
  template <int N>
  VTCLIP_DEVICE void apply(Acc (&x)[N], Acc root) const {
    const Acc factor = rnorm * root;
    VTCLIP_UNROLL
    for (int e = 0; e < N; ++e) x[e] = x[e] * shrink * factor;
  }
};

// `team` is a block or the lanes of a row: whatever has sum(n, f) and max(n, f)
template <class Team, class T>
VTCLIP_DEVICE UnitNorm<AccOf<T>> unit_norm(const Team& team, const Row<const T>& row, int64_t D) {
  using Acc = AccOf<T>;
  constexpr int kColumns = kGroup<T>;
  constexpr Acc kTinySquare = static_cast<Acc>(1e-25);
  constexpr Acc kTiny = static_cast<Acc>(sizeof(Acc) == 4 ? 1e-37 : 1e-300);
  const int64_t groups = ceil_div(D, kColumns);
  const auto square = [&](Acc shrink) {
    return team.sum(groups, [&](int64_t group) {
      Acc x[kColumns], sum = 0;
      row.load(group * kColumns, x);
      VTCLIP_UNROLL
      for (int e = 0; e < kColumns; ++e) sum += (x[e] * shrink) * (x[e] * shrink);
      return sum;
    });
  };
  Acc shrink = 1, total = square(1);
  if constexpr (kSquaresFit<T>) {
    if (total == 0) return {1, 0};
  } else if (total < kTinySquare || total > 1 / kTinySquare) {
    const Acc largest = team.max(groups, [&](int64_t group) {
      Acc x[kColumns], top = 0;
      row.load(group * kColumns, x);
      VTCLIP_UNROLL
      for (int e = 0; e < kColumns; ++e) top = larger(top, x[e] < 0 ? -x[e] : x[e]);
      return top;
    });
    if (largest == 0) return {1, 0};
    shrink = 1 / lesser(1 / kTiny, larger(kTiny, largest));
    total = square(shrink);
  }
  return {shrink, 1 / sqrt_of(total)};
}

// Norms of some images and some texts, in shared memory.
template <class T, int kImages, int kTexts>
struct UnitNorms {
  using Acc = AccOf<T>;
  Shared& shared;
  Acc* shrink = shared.take<Acc>(kImages + kTexts);
  Acc* rnorm = shared.take<Acc>(kImages + kTexts);

  // of `images` rows from b0 and `texts` rows from k0: one warp per row
  template <class Block>
  VTCLIP_DEVICE void make(const Block& block, const Rows<const T>& image, int64_t b0, int images,
                          const Rows<const T>& text, int64_t k0, int texts, int64_t D) const {
    block.template each_row<kWarpSize>(images + texts, [&](const auto& lanes, int r) {
      const bool of_image = r < images;
      const Row<const T> row =
          of_image ? Row<const T>(image, b0 + r, D) : Row<const T>(text, k0 + r - images, D);
      const UnitNorm<Acc> norm = unit_norm(lanes, row, D);
      const int at = of_image ? r : kImages + r - images;
      lanes.once([&] {
        shrink[at] = norm.shrink;
        rnorm[at] = norm.rnorm;
      });
    });
  }
  VTCLIP_DEVICE UnitNorm<Acc> of_image(int64_t i) const { return {shrink[i], rnorm[i]}; }
  VTCLIP_DEVICE UnitNorm<Acc> of_text(int64_t i) const { return of_image(kImages + i); }
};

// One block per chunk of images and tile of classes, at least one of either; one warp per product.
template <class T>
struct UnitForward {
  using Acc = AccOf<T>;
  static constexpr int kWarps = 4, kClasses = 8, kImages = 16;
  struct Args {
    Rows<const T> image, text;  // [B, D], [K, D]
    T *v, *t, *products;        // [B, D], [K, D], [B, K, D], contiguous: written
    Acc root;
    int64_t B, K, D;
    int64_t images;  // per block, at most kImages

    VTCLIP_BOTH int64_t tiles() const { return K == 0 ? 1 : ceil_div(K, kClasses); }
    VTCLIP_BOTH int64_t chunks() const { return B == 0 ? 1 : ceil_div(B, images); }
    VTCLIP_BOTH int64_t blocks() const { return tiles() * chunks(); }
  };
  struct Tiles {
    Shared& shared;
    Block<kWarps> block{shared};
    UnitNorms<T, kImages, kClasses> norms{shared};
  };

  static VTCLIP_DEVICE void run(const Args& args, int64_t index, Tiles& tiles) {
    const Block<kWarps>& block = tiles.block;
    const int64_t b0 = index / args.tiles() * args.images, k0 = index % args.tiles() * kClasses;
    const int images = static_cast<int>(lesser(args.images, args.B - b0));
    const int classes = static_cast<int>(lesser<int64_t>(kClasses, args.K - k0));
    tiles.norms.make(block, args.image, b0, images, args.text, k0, classes, args.D);
    block.template each_row<kWarpSize>(images * classes, [&](const auto& lanes, int r) {
      const int i = r / classes, j = r % classes;
      const int64_t row = (b0 + i) * args.K + k0 + j;
      const Row<const T> image(args.image, b0 + i, args.D), text(args.text, k0 + j, args.D);
      const Row<T> to(args.products + row * args.D, 1, args.D);
      const UnitNorm<Acc> of_image = tiles.norms.of_image(i), of_text = tiles.norms.of_text(j);
      lanes.each(ceil_div(args.D, kGroup<T>), [&](int64_t group) {
        Acc x[kGroup<T>], t[kGroup<T>];
        image.load(group * kGroup<T>, x);
        text.load(group * kGroup<T>, t);
        of_image.apply(x, args.root);
        of_text.apply(t, args.root);
        VTCLIP_UNROLL
        for (int e = 0; e < kGroup<T>; ++e) x[e] *= t[e];
        to.store(group * kGroup<T>, x);
      });
    });
    if (k0 == 0) {
      copy(args, block, images, args.image, b0, args.v,
           [&](int i) { return tiles.norms.of_image(i); });
    }
    if (b0 == 0) {
      copy(args, block, classes, args.text, k0, args.t,
           [&](int j) { return tiles.norms.of_text(j); });
    }
  }

 private:
  // rows first .. first + count - 1, brought to their length
  template <class Norm>
  static VTCLIP_DEVICE void copy(const Args& args, const Block<kWarps>& block, int count,
                                 const Rows<const T>& rows, int64_t first, T* to, Norm norm_of) {
    block.template each_row<kWarpSize>(count, [&](const auto& lanes, int r) {
      const Row<const T> from(rows, first + r, args.D);
      const Row<T> out(to + (first + r) * args.D, 1, args.D);
      const UnitNorm<Acc> norm = norm_of(r);
      lanes.each(ceil_div(args.D, kGroup<T>), [&](int64_t group) {
        Acc x[kGroup<T>];
        from.load(group * kGroup<T>, x);
        norm.apply(x, args.root);
        out.store(group * kGroup<T>, x);
      });
    });
  }
};

// What the gradient of the products adds to those of images and texts, root taken out.
template <class T>
struct UnitGradient {
  using Acc = AccOf<T>;
  static constexpr int kWarps = 4, kColumns = kGroup<T>, kImages = 64;
  static constexpr int kTexts = kWarps * kWarpSize * Walk<T>::kClasses;
  struct Args {
    Rows<const T> image, text;   // [B, D], [K, D]
    Images<const T> d_products;  // [B, K, D]
    Acc* d_image;                // [tiles, B, D], contiguous: written
    Acc* d_text;                 // [chunks, K, D], contiguous: written
    Walk<T> walk;                // of at most kImages images
  };
  struct Tiles {
    Shared& shared;
    Block<kWarps> block{shared};
    UnitNorms<T, kImages, kTexts> norms{shared};
    Acc* sums = shared.take<Acc>(Walk<T>::kSums * Block<kWarps>::kThreads);  // [kSums, kThreads]
  };

  struct Unit {
    const Args& args;
    const UnitNorms<T, kImages, kTexts>& norms;
    int64_t b0, k0;
    Acc x[kColumns];

    VTCLIP_DEVICE void image(int64_t b, int64_t column) {
      Row<const T>(args.image, b, args.walk.D).load(column, x);
      norms.of_image(b - b0).apply(x, Acc{1});
    }
    VTCLIP_DEVICE void contribute(int64_t b, int64_t k, int64_t column, Acc (&to_image)[kColumns],
                                  Acc (&to_text)[kColumns]) {
      Acc g[kColumns], t[kColumns];
      Row<const T>(args.d_products.at(b), k, args.walk.D).load(column, g);
      Row<const T>(args.text, k, args.walk.D).load(column, t);
      norms.of_text(k - k0).apply(t, Acc{1});
      VTCLIP_UNROLL
      for (int e = 0; e < kColumns; ++e) {
        to_image[e] = g[e] * t[e];
        to_text[e] = g[e] * x[e];
      }
    }
    VTCLIP_DEVICE void finish(int64_t, const Acc (&)[kColumns]) {}
  };

  static VTCLIP_DEVICE void run(const Args& args, int64_t index, Tiles& tiles) {
    constexpr int kThreads = Block<kWarps>::kThreads;
    const Walk<T>& walk = args.walk;
    const int64_t per_chunk = walk.blocks_per_chunk(kThreads), groups = walk.groups();
    const int64_t first = index % per_chunk * kThreads;
    const int64_t last = lesser(walk.units(), first + kThreads) - 1;
    const int64_t k0 = first / groups * walk.kClasses;
    const int64_t k1 = lesser(walk.K, (last / groups + 1) * walk.kClasses);
    const int64_t b0 = index / per_chunk * walk.images, b1 = lesser(walk.B, b0 + walk.images);
    tiles.norms.make(tiles.block, args.image, b0, static_cast<int>(b1 - b0), args.text, k0,
                     static_cast<int>(k1 - k0), walk.D);
    walk.run(tiles.block, tiles.sums, index, args.d_image, walk.B * walk.D, args.d_text,
             [&](int64_t) { return Unit{args, tiles.norms, b0, k0, {}}; });
  }
};

// more slices than this are summed by SumColumns first
constexpr int64_t kUnitSlices = 32;

// One block per image and per text: the sum over slices, and the way back through the length.
template <class T>
struct UnitRows {
  using Acc = AccOf<T>;
  static constexpr int kWarps = 8;
  struct Side {
    Rows<const T> rows, grad;  // [N, D]: x; d_v or d_t
    Acc* partial;              // [max(1, P), N, D], contiguous; the first slice becomes g
    T* out;                    // [N, D], contiguous: written
    int64_t P, N;
  };
  struct Args {
    Side image, text;
    Acc root;
    int64_t D;

    VTCLIP_BOTH int64_t blocks() const { return image.N + text.N; }
  };
  using Tiles = BlockTiles<kWarps>;

  static VTCLIP_DEVICE void run(const Args& args, int64_t index, Tiles& tiles) {
    const bool of_image = index < args.image.N;
    const Side& side = of_image ? args.image : args.text;
    const int64_t i = of_image ? index : index - args.image.N, D = args.D, slice = side.N * D;
    const Block<kWarps>& block = tiles.block;
    const UnitNorm<Acc> norm = unit_norm(block, Row<const T>(side.rows, i, D), D);
    Acc* g = side.partial + i * D;
    const auto unit = [&](int64_t c) {
      Acc x[1] = {static_cast<Acc>(side.rows.at(i, c))};
      norm.apply(x, Acc{1});
      return x[0];
    };
    block.each(D, [&](int64_t c) {
      Acc total = 0;
      for (int64_t p = 0; p < side.P; ++p) total += g[p * slice + c];
      g[c] = static_cast<Acc>(side.grad.at(i, c)) + args.root * total;
    });
    const Acc along = block.sum(D, [&](int64_t c) { return unit(c) * g[c]; });
    const Acc factor = args.root * norm.rnorm;
    block.each(D, [&](int64_t c) {
      side.out[i * D + c] = static_cast<T>(factor * (g[c] - unit(c) * along) * norm.shrink);
    });
  }
};

}  // namespace vtclip::cuda
