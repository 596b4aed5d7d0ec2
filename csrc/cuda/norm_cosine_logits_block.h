// SPDX-License-Identifier: Apache-2.0
// The bodies of the norm_cosine_logits kernels; y exists in registers only.
//
//   n = (hidden - mean) rstd,  y = text_k + residual (weight n + bias),  u = y / |y|
//   logits[b,k] = scale <x, u>,  x = image_b / |image_b|
//   d_y = step (x - cosine u),  step = scale d_logit / |y|;  d_text = sum_b d_y
//   d_weight = residual sum d_y n,  d_bias = residual sum d_y
//   d_hidden = rstd (g - mean(g) - n mean(g n)),  g = residual weight d_y
//   the gradient of x is sum_k scale d_logit u
#pragma once

#include "block.h"
#include "row.h"
#include "rational_logits_block.h"
#include "walk.h"

namespace vtclip::cuda {

template <class T>
struct NormArgs {
  Images<const T> hidden;     // [B, K, C]
  Rows<const T> text, image;  // [K, C], [B, C]
  Rows<const T> weight, bias;  // [1, C]
  const AccOf<T>* image_rnorm;  // [B]
  AccOf<T>* mean;               // [B, K], contiguous, as the next two
  AccOf<T>* rstd;
  AccOf<T>* row_rnorm;
  AccOf<T> residual, scale, eps;
  int64_t K, C;
};

// A group of columns of row (b, k).
template <class T>
struct NormGroup {
  using Acc = AccOf<T>;
  static constexpr int kColumns = kGroup<T>;

  Acc n[kColumns], y[kColumns], x[kColumns], weight[kColumns];

  // rstd (hidden - mean) + offset: a mean far from 0 is not exact in its own type, and
  // offset = -rstd mean(hidden - mean)
  VTCLIP_DEVICE NormGroup(const NormArgs<T>& args, int64_t b, int64_t k, int64_t column, Acc mean,
                          Acc rstd, Acc offset) {
    Acc bias[kColumns];
    Row<const T>(args.hidden.at(b), k, args.C).load(column, n);
    Row<const T>(args.text, k, args.C).load(column, y);
    Row<const T>(args.image, b, args.C).load(column, x);
    Row<const T>(args.weight, 0, args.C).load(column, weight);
    Row<const T>(args.bias, 0, args.C).load(column, bias);
    const Acc rx = args.image_rnorm[b];
    VTCLIP_UNROLL
    for (int e = 0; e < kColumns; ++e) {
      n[e] = column + e < args.C ? (n[e] - mean) * rstd + offset : 0;
      y[e] += args.residual * (weight[e] * n[e] + bias[e]);
      x[e] *= rx;
    }
  }
};

constexpr int kNormWarps = 4, kNormClasses = 8, kNormSums = 5;

template <class T>
struct NormTiles {
  Block<kNormWarps> block;
  AccOf<T>* slots;  // [kNormWarps, kNormSums, 32]
  VTCLIP_BOTH explicit NormTiles(Shared& shared)
      : block(shared), slots(shared.take<AccOf<T>>(kNormWarps * kNormSums * kWarpSize)) {}

  VTCLIP_DEVICE AccOf<T>* of_row(int r) const {
    return slots + r % kNormWarps * kNormSums * kWarpSize;
  }
};

// sum hidden - mean over the row, and its square
template <class T>
VTCLIP_DEVICE void norm_spread(const Lanes<kWarpSize>& lanes, AccOf<T>* slots,
                               const Row<const T>& hidden, int64_t C, AccOf<T> mean,
                               AccOf<T> (&totals)[2]) {
  using Acc = AccOf<T>;
  constexpr int kColumns = kGroup<T>;
  row_sums<2>(lanes, slots, ceil_div(C, kColumns), [&](int64_t group, Acc (&part)[2]) {
    Acc h[kColumns];
    hidden.load(group * kColumns, h);
    VTCLIP_UNROLL
    for (int e = 0; e < kColumns; ++e) {
      const Acc d = group * kColumns + e < C ? h[e] - mean : 0;
      part[0] += d;
      part[1] += d * d;
    }
  }, totals);
}

// one block per image and tile of classes, one warp per row
template <class T>
struct NormForward {
  using Acc = AccOf<T>;
  static constexpr int kWarps = kNormWarps, kColumns = kGroup<T>;
  using Tiles = NormTiles<T>;
  struct Args : NormArgs<T> {
    T* logits;  // [B, K], contiguous: written
    VTCLIP_BOTH int64_t tiles() const { return ceil_div(this->K, kNormClasses); }
  };

  static VTCLIP_DEVICE void run(const Args& args, int64_t index, Tiles& tiles) {
    const int64_t b = index / args.tiles(), k0 = index % args.tiles() * kNormClasses;
    const int classes = static_cast<int>(lesser<int64_t>(kNormClasses, args.K - k0));
    tiles.block.template each_row<kWarpSize>(classes, [&](const auto& lanes, int r) {
      row(args, b, k0 + r, lanes, tiles.of_row(r));
    });
  }

 private:
  static VTCLIP_DEVICE void row(const Args& args, int64_t b, int64_t k,
                                const Lanes<kWarpSize>& lanes, Acc* slots) {
    const int64_t groups = ceil_div(args.C, kColumns), at = b * args.K + k;
    const Acc width = static_cast<Acc>(args.C > 0 ? args.C : 1);
    const Row<const T> hidden(args.hidden.at(b), k, args.C);
    const Acc mean = lanes.sum(groups, [&](int64_t group) {
      Acc h[kColumns], sum = 0;
      hidden.load(group * kColumns, h);
      VTCLIP_UNROLL
      for (int e = 0; e < kColumns; ++e) sum += h[e];
      return sum;
    }) / width;
    Acc spread[2];
    norm_spread<T>(lanes, slots, hidden, args.C, mean, spread);
    const Acc shift = spread[0] / width, square = spread[1] / width;
    // where the square overflows, so may the correction
    const Acc variance = square < infinity<Acc>() ? square - shift * shift : square;
    const Acc rstd = 1 / sqrt_of(variance + args.eps), offset = -shift * rstd;
    const auto sums = [&](Acc divisor, Acc (&totals)[2]) {
      row_sums<2>(lanes, slots, groups, [&](int64_t group, Acc (&part)[2]) {
        const NormGroup<T> g(args, b, k, group * kColumns, mean, rstd, offset);
        VTCLIP_UNROLL
        for (int e = 0; e < kColumns; ++e) {
          const Acc y = g.y[e] / divisor;
          part[0] += y * y;
          part[1] += y * g.x[e];
        }
      }, totals);
    };
    Acc totals[2];
    sums(1, totals);
    Acc largest = 1;
    // squares that overflow or vanish are made again of the row divided by its largest entry
    if (totals[0] < tiny() || totals[0] > 1 / tiny()) {
      largest = lanes.max(groups, [&](int64_t group) {
        const NormGroup<T> g(args, b, k, group * kColumns, mean, rstd, offset);
        Acc top = 0;
        VTCLIP_UNROLL
        for (int e = 0; e < kColumns; ++e) top = larger(top, g.y[e] < 0 ? -g.y[e] : g.y[e]);
        return top;
      });
      if (largest == 0) largest = 1;  // a zero row
      sums(largest, totals);
    }
    const Acc rnorm = totals[0] == 0 ? 0 : 1 / sqrt_of(totals[0]);
    lanes.once([&] {
      args.logits[at] = static_cast<T>(args.scale * (totals[1] * rnorm));
      args.mean[at] = mean;
      args.rstd[at] = rstd;
      args.row_rnorm[at] = rnorm / largest;
    });
  }
  static VTCLIP_DEVICE constexpr Acc tiny() { return static_cast<Acc>(1e-25f); }
};

// What the second backward kernel needs of a row.
enum { kNormOffset, kNormCosine, kNormMeanG, kNormMeanGn, kNormScalars };

// Per row: cosine, mean(g) and mean(g n), the last two by their terms: with
// g = residual step weight (x - cosine u) they are sums of weight x, weight u, and these times n.
template <class T>
struct NormScalars {
  using Acc = AccOf<T>;
  static constexpr int kWarps = kNormWarps, kColumns = kGroup<T>;
  using Tiles = NormTiles<T>;
  struct Args : NormArgs<T> {
    Rows<const T> d_logits;  // [B, K]
    Acc* scalars;            // [B, K, kNormScalars]: written
    VTCLIP_BOTH int64_t tiles() const { return ceil_div(this->K, kNormClasses); }
  };

  static VTCLIP_DEVICE void run(const Args& args, int64_t index, Tiles& tiles) {
    const int64_t b = index / args.tiles(), k0 = index % args.tiles() * kNormClasses;
    const int classes = static_cast<int>(lesser<int64_t>(kNormClasses, args.K - k0));
    tiles.block.template each_row<kWarpSize>(classes, [&](const auto& lanes, int r) {
      row(args, b, k0 + r, lanes, tiles.of_row(r));
    });
  }

 private:
  static VTCLIP_DEVICE void row(const Args& args, int64_t b, int64_t k,
                                const Lanes<kWarpSize>& lanes, Acc* slots) {
    const int64_t at = b * args.K + k;
    const Acc width = static_cast<Acc>(args.C);
    const Acc mean = args.mean[at], rstd = args.rstd[at], rnorm = args.row_rnorm[at];
    const Row<const T> hidden(args.hidden.at(b), k, args.C);
    Acc spread[2];
    norm_spread<T>(lanes, slots, hidden, args.C, mean, spread);
    const Acc offset = -(spread[0] / width) * rstd;
    Acc sums[kNormSums];
    row_sums<kNormSums>(
        lanes, slots, ceil_div(args.C, kColumns), [&](int64_t group, Acc (&part)[kNormSums]) {
          const NormGroup<T> g(args, b, k, group * kColumns, mean, rstd, offset);
          VTCLIP_UNROLL
          for (int e = 0; e < kColumns; ++e) {
            const Acc u = g.y[e] * rnorm, wx = g.weight[e] * g.x[e], wu = g.weight[e] * u;
            part[0] += g.x[e] * u;
            part[1] += wx;
            part[2] += wu;
            part[3] += wx * g.n[e];
            part[4] += wu * g.n[e];
          }
        }, sums);
    const Acc step = args.scale * static_cast<Acc>(args.d_logits.at(b, k)) * rnorm;
    const Acc factor = args.residual * step / width;
    lanes.once([&] {
      Acc* to = args.scalars + at * kNormScalars;
      to[kNormOffset] = offset;
      to[kNormCosine] = sums[0];
      to[kNormMeanG] = factor * (sums[1] - sums[0] * sums[2]);
      to[kNormMeanGn] = factor * (sums[3] - sums[0] * sums[4]);
    });
  }
};

template <class T>
struct NormGradient {
  using Acc = AccOf<T>;
  static constexpr int kWarps = 4, kColumns = kGroup<T>;
  struct Args : NormArgs<T> {
    Rows<const T> d_logits;  // [B, K]
    const Acc* scalars;      // [B, K, kNormScalars]
    T* d_hidden;             // [B, K, C], contiguous: written
    Acc* d_unit;             // [tiles, B, C], contiguous: written
    Acc* d_text;             // [chunks, K, C], contiguous: written
    Acc* d_weight;           // [chunks * tiles, C], contiguous: written
    Acc* d_bias;             // [chunks * tiles, C], contiguous: written
    Walk<T> walk;
  };
  struct Tiles {
    Block<kWarps> block;
    VTCLIP_BOTH explicit Tiles(Shared& shared) : block(shared) {}
  };

  struct Unit {
    const Args& args;
    int64_t slot;
    Acc d_weight[kColumns];

    VTCLIP_DEVICE void image(int64_t, int64_t) {}
    VTCLIP_DEVICE void contribute(int64_t b, int64_t k, int64_t column, Acc (&to_image)[kColumns],
                                  Acc (&to_text)[kColumns]) {
      const int64_t at = b * args.K + k;
      const Acc* scalars = args.scalars + at * kNormScalars;
      const Acc rstd = args.rstd[at], rnorm = args.row_rnorm[at], cosine = scalars[kNormCosine];
      const NormGroup<T> g(args, b, k, column, args.mean[at], rstd, scalars[kNormOffset]);
      const Acc delta = args.scale * static_cast<Acc>(args.d_logits.at(b, k));
      Acc d_hidden[kColumns];
      VTCLIP_UNROLL
      for (int e = 0; e < kColumns; ++e) {
        const Acc u = g.y[e] * rnorm, d_y = delta * rnorm * (g.x[e] - cosine * u);
        to_image[e] = delta * u;
        to_text[e] = d_y;
        d_weight[e] += d_y * g.n[e];
        const Acc d_n = args.residual * g.weight[e] * d_y;
        d_hidden[e] = rstd * (d_n - scalars[kNormMeanG] - g.n[e] * scalars[kNormMeanGn]);
      }
      Row<T>(args.d_hidden + at * args.C, 1, args.C).store(column, d_hidden);
    }
    VTCLIP_DEVICE void finish(int64_t column, const Acc (&d_text)[kColumns]) {
      Acc d_bias[kColumns];
      VTCLIP_UNROLL
      for (int e = 0; e < kColumns; ++e) {
        d_bias[e] = args.residual * d_text[e];
        d_weight[e] *= args.residual;
      }
      Row<Acc>(args.d_bias + slot * args.C, 1, args.C).store(column, d_bias);
      Row<Acc>(args.d_weight + slot * args.C, 1, args.C).store(column, d_weight);
    }
  };

  static VTCLIP_DEVICE void run(const Args& args, int64_t index, Tiles& tiles) {
    args.walk.run(tiles.block, index, args.d_unit, args.walk.B * args.C, args.d_text,
                  [&](int64_t slot) { return Unit{args, slot, {}}; });
  }
};

// one block per image: d_image = |image|^-1 (g - x <x, g>), g = the sum of d_unit over tiles
template <class T>
struct NormImageGradient {
  using Acc = AccOf<T>;
  static constexpr int kWarps = 8;
  struct Args {
    Rows<const T> image;     // [B, C]
    const Acc* image_rnorm;  // [B]
    Acc* d_unit;             // [tiles, B, C], contiguous; the first slice becomes the sum
    T* d_image;              // [B, C], contiguous: written
    int64_t tiles, B, C;
  };
  struct Tiles {
    Block<kWarps> block;
    VTCLIP_BOTH explicit Tiles(Shared& shared) : block(shared) {}
  };

  static VTCLIP_DEVICE void run(const Args& args, int64_t b, Tiles& tiles) {
    const Acc rx = args.image_rnorm[b];
    Acc* g = args.d_unit + b * args.C;
    const auto x = [&](int64_t c) { return static_cast<Acc>(args.image.at(b, c)) * rx; };
    tiles.block.each(args.C, [&](int64_t c) {
      Acc total = 0;
      for (int64_t tile = 0; tile < args.tiles; ++tile) total += g[tile * args.B * args.C + c];
      g[c] = total;
    });
    const Acc along = tiles.block.sum(args.C, [&](int64_t c) { return x(c) * g[c]; });
    tiles.block.each(args.C, [&](int64_t c) {
      args.d_image[b * args.C + c] = static_cast<T>(rx * (g[c] - x(c) * along));
    });
  }
};

}  // namespace vtclip::cuda
