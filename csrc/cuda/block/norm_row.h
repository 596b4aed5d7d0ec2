// SPDX-License-Identifier: Apache-2.0
// A row h of [B, K, C] that is normalised, added to a text and compared with an image, both
// directions. Where h comes from is an Input; y exists in registers only.
//
//   n = (h - mean) rstd,  y = text_k + residual (weight n + bias),  u = y / |y|
//   logits[b,k] = scale <x, u>,  x = image_b / |image_b|
//   d_y = step (x - cosine u),  step = scale d_logit / |y|;  d_text = sum_b d_y
//   d_weight = residual sum d_y n,  d_bias = residual sum d_y
//   d_h = rstd step (g - mean(g) - n mean(g n)),  g = residual weight (x - cosine u)
//   the gradient of x is sum_k scale d_logit u
//
// An Input has load<kPacked>(b, k, column, mean, to): to = h - mean, 0 beyond the row; packed(),
// whether 16-byte vectors fit everywhere; and kBias, whether the sum of d_h over rows is a gradient
// too. Bodies are written for kPacked: rows in vectors, or all of them by elements.
#pragma once

#include <type_traits>

#include "block.h"
#include "row.h"
#include "tile_io.h"
#include "walk.h"

namespace vtclip::cuda {

// Of each row, [B, K], contiguous. A mean far from 0 is not exact in its own type: the rest of it,
// mean(h - mean), is the shift. mean_g and mean_gn are those of g and g n.
template <class Acc>
struct NormStats {
  Acc *mean, *shift, *rstd, *rnorm, *cosine, *mean_g, *mean_gn;
};

constexpr int kNormWarps = 4, kNormClasses = 8, kNormSums = 5;

template <class T, class Input>
struct NormArgs {
  Input input;
  Rows<const T> text, image;    // [K, C], [B, C]
  Rows<const T> weight, bias;   // [1, C]
  const AccOf<T>* image_rnorm;  // [B]
  NormStats<AccOf<T>> stats;
  AccOf<T> residual, scale, eps;
  int64_t K, C;

  VTCLIP_BOTH int64_t tiles() const { return ceil_div(K, kNormClasses); }
  VTCLIP_DEVICE bool packed() const {
    return C % kGroup<T> == 0 && vectors_fit(text) && vectors_fit(image) && vectors_fit(weight) &&
           vectors_fit(bias) && input.packed();
  }
};

// f(std::bool_constant<kPacked>{}) as the arguments allow
template <class Args, class F>
VTCLIP_DEVICE void with_packed(const Args& args, F f) {
  if (args.packed()) f(std::true_type{});
  else f(std::false_type{});
}

// mean, rstd and -shift rstd of a row
template <class Acc>
struct Norm {
  Acc mean, rstd, offset;
};

// A group of columns of an image and of what is the same for all rows.
template <class T, bool kPacked>
struct NormColumns {
  using Acc = AccOf<T>;
  Acc x[kGroup<T>], weight[kGroup<T>], bias[kGroup<T>];

  template <class Input>
  VTCLIP_DEVICE void load(const NormArgs<T, Input>& args, int64_t b, int64_t column) {
    Row<const T>(args.image, b, args.C).template load<kPacked>(column, x);
    Row<const T>(args.weight, 0, args.C).template load<kPacked>(column, weight);
    Row<const T>(args.bias, 0, args.C).template load<kPacked>(column, bias);
    const Acc rx = args.image_rnorm[b];
    VTCLIP_UNROLL
    for (Acc& element : x) element *= rx;
  }
};

// The same columns of row (b, k).
template <class T, bool kPacked>
struct NormGroup {
  using Acc = AccOf<T>;
  static constexpr int kColumns = kGroup<T>;
  Acc n[kColumns], y[kColumns];

  template <class Input>
  VTCLIP_DEVICE NormGroup(const NormArgs<T, Input>& args, int64_t b, int64_t k, int64_t column,
                          const Norm<Acc>& norm, const NormColumns<T, kPacked>& of) {
    args.input.template load<kPacked>(b, k, column, norm.mean, n);
    Row<const T>(args.text, k, args.C).template load<kPacked>(column, y);
    VTCLIP_UNROLL
    for (int e = 0; e < kColumns; ++e) {
      n[e] = kPacked || column + e < args.C ? n[e] * norm.rstd + norm.offset : 0;
      y[e] += args.residual * (of.weight[e] * n[e] + of.bias[e]);
    }
  }
};

template <class T>
struct NormTiles {
  Shared& shared;
  Block<kNormWarps> block{shared};
  // [kNormWarps, kNormSums, 32]
  AccOf<T>* slots = shared.take<AccOf<T>>(kNormWarps * kNormSums * kWarpSize);

  // f(lanes, b, k, slots) for the classes of block `index`: one warp per row
  template <class F>
  VTCLIP_DEVICE void each_row(int64_t index, int64_t K, F f) const {
    const int64_t tiles = ceil_div(K, kNormClasses);
    const int64_t b = index / tiles, k0 = index % tiles * kNormClasses;
    const int classes = static_cast<int>(lesser<int64_t>(kNormClasses, K - k0));
    block.template each_row<kWarpSize>(classes, [&](const auto& lanes, int r) {
      f(lanes, b, k0 + r, slots + r % kNormWarps * kNormSums * kWarpSize);
    });
  }
};

// sum h - mean over the row, and its square
template <bool kPacked, class T, class Input>
VTCLIP_DEVICE void norm_spread(const Lanes<kWarpSize>& lanes, AccOf<T>* slots,
                               const NormArgs<T, Input>& args, int64_t b, int64_t k, AccOf<T> mean,
                               AccOf<T> (&totals)[2]) {
  using Acc = AccOf<T>;
  constexpr int kColumns = kGroup<T>;
  row_sums<2>(lanes, slots, ceil_div(args.C, kColumns), [&](int64_t group, Acc (&part)[2]) {
    Acc d[kColumns];
    args.input.template load<kPacked>(b, k, group * kColumns, mean, d);
    VTCLIP_UNROLL
    for (int e = 0; e < kColumns; ++e) {
      part[0] += d[e];
      part[1] += d[e] * d[e];
    }
  }, totals);
}

template <class Acc>
struct NormRow {
  Acc mean, shift, rstd, rnorm, cosine;

  VTCLIP_DEVICE Norm<Acc> norm() const { return {mean, rstd, -shift * rstd}; }
};

// below this or above its inverse, squares overflow or vanish
template <class Acc>
VTCLIP_DEVICE constexpr Acc tiny_square() { return static_cast<Acc>(1e-25f); }

template <bool kPacked, class T, class Input>
VTCLIP_DEVICE NormRow<AccOf<T>> norm_row(const Lanes<kWarpSize>& lanes, AccOf<T>* slots,
                                         const NormArgs<T, Input>& args, int64_t b, int64_t k) {
  using Acc = AccOf<T>;
  constexpr int kColumns = kGroup<T>;
  const int64_t groups = ceil_div(args.C, kColumns);
  const Acc width = static_cast<Acc>(args.C > 0 ? args.C : 1);
  NormRow<Acc> found;
  found.mean = lanes.sum(groups, [&](int64_t group) {
    Acc h[kColumns], sum = 0;
    args.input.template load<kPacked>(b, k, group * kColumns, 0, h);
    VTCLIP_UNROLL
    for (int e = 0; e < kColumns; ++e) sum += h[e];
    return sum;
  }) / width;
  Acc spread[2];
  norm_spread<kPacked>(lanes, slots, args, b, k, found.mean, spread);
  found.shift = spread[0] / width;
  const Acc square = spread[1] / width;
  // where the square overflows, so may the correction
  const Acc variance = square < infinity<Acc>() ? square - found.shift * found.shift : square;
  found.rstd = 1 / sqrt_of(variance + args.eps);
  const Norm<Acc> norm = found.norm();
  const auto group_of = [&](int64_t group, NormColumns<T, kPacked>& of) {
    of.load(args, b, group * kColumns);
    return NormGroup<T, kPacked>(args, b, k, group * kColumns, norm, of);
  };
  Acc totals[2], factor = 1;
  VTCLIP_ROLLED
  for (bool again = false;; again = true) {
    row_sums<2>(lanes, slots, groups, [&](int64_t group, Acc (&part)[2]) {
      NormColumns<T, kPacked> of;
      const NormGroup<T, kPacked> g = group_of(group, of);
      VTCLIP_UNROLL
      for (int e = 0; e < kColumns; ++e) {
        const Acc y = g.y[e] * factor;
        part[0] += y * y;
        part[1] += y * of.x[e];
      }
    }, totals);
    if (again || (totals[0] >= tiny_square<Acc>() && totals[0] <= 1 / tiny_square<Acc>())) break;
    // once more, from the row over its largest entry
    const Acc largest = lanes.max(groups, [&](int64_t group) {
      NormColumns<T, kPacked> of;
      const NormGroup<T, kPacked> g = group_of(group, of);
      Acc top = 0;
      VTCLIP_UNROLL
      for (int e = 0; e < kColumns; ++e) top = larger(top, g.y[e] < 0 ? -g.y[e] : g.y[e]);
      return top;
    });
    if (largest == 0) break;  // a zero row
    factor = lesser(1 / largest, 1 / smallest_normal<Acc>());
  }
  const Acc rnorm = totals[0] == 0 ? 0 : 1 / sqrt_of(totals[0]);
  found.cosine = totals[1] * rnorm;
  found.rnorm = rnorm * factor;
  return found;
}

template <class Acc>
struct NormMeans {
  Acc cosine, mean_g, mean_gn;
};

// The means by their terms: sums of weight x, weight u, and these times n.
template <bool kPacked, class T, class Input>
VTCLIP_DEVICE NormMeans<AccOf<T>> norm_means(const Lanes<kWarpSize>& lanes, AccOf<T>* slots,
                                             const NormArgs<T, Input>& args, int64_t b, int64_t k,
                                             const Norm<AccOf<T>>& norm, AccOf<T> rnorm) {
  using Acc = AccOf<T>;
  constexpr int kColumns = kGroup<T>;
  Acc sums[kNormSums];
  row_sums<kNormSums>(
      lanes, slots, ceil_div(args.C, kColumns), [&](int64_t group, Acc (&part)[kNormSums]) {
        NormColumns<T, kPacked> of;
        of.load(args, b, group * kColumns);
        const NormGroup<T, kPacked> g(args, b, k, group * kColumns, norm, of);
        VTCLIP_UNROLL
        for (int e = 0; e < kColumns; ++e) {
          const Acc u = g.y[e] * rnorm, wx = of.weight[e] * of.x[e], wu = of.weight[e] * u;
          part[0] += of.x[e] * u;
          part[1] += wx;
          part[2] += wu;
          part[3] += wx * g.n[e];
          part[4] += wu * g.n[e];
        }
      }, sums);
  const Acc factor = args.residual / static_cast<Acc>(args.C);
  return {sums[0], factor * (sums[1] - sums[0] * sums[2]), factor * (sums[3] - sums[0] * sums[4])};
}

template <class T, class Input>
struct NormRowGradient {
  using Acc = AccOf<T>;
  static constexpr int kWarps = 4, kColumns = kGroup<T>;
  struct Args : NormArgs<T, Input> {
    Rows<const T> d_logits;  // [B, K]
    T* d_input;              // [B, K, C], contiguous: written
    Acc* d_unit;             // [tiles, .., C], slices image_slice apart, or null: written
    Acc* d_text;             // [chunks, K, C], contiguous, or null: written
    Acc* d_weight;           // [chunks * tiles, C], contiguous: written
    Acc* d_bias;             // [chunks * tiles, C], contiguous: written
    Acc* d_input_bias;       // [chunks * tiles, C], contiguous: written if Input::kBias
    int64_t image_slice;
    Walk<T> walk;

    VTCLIP_DEVICE bool packed() const {
      return NormArgs<T, Input>::packed() && vectors_fit(Rows<T>{d_input, C, 1});
    }
    using NormArgs<T, Input>::C;
  };
  using Tiles = WalkTiles<T, kWarps>;

  template <bool kPacked>
  struct Unit {
    const Args& args;
    int64_t slot;
    Acc d_weight[kColumns], d_input[Input::kBias ? kColumns : 1];
    NormColumns<T, kPacked> of;

    VTCLIP_DEVICE void image(int64_t b, int64_t column) { of.load(args, b, column); }
    VTCLIP_DEVICE void contribute(int64_t b, int64_t k, int64_t column, Acc (&to_image)[kColumns],
                                  Acc (&to_text)[kColumns]) {
      const int64_t at = b * args.K + k;
      const NormStats<Acc>& stats = args.stats;
      const Acc rstd = stats.rstd[at], rnorm = stats.rnorm[at], cosine = stats.cosine[at];
      const Norm<Acc> norm{stats.mean[at], rstd, -stats.shift[at] * rstd};
      const NormGroup<T, kPacked> g(args, b, k, column, norm, of);
      const Acc delta = args.scale * static_cast<Acc>(args.d_logits.at(b, k));
      const Acc step = delta * rnorm;
      const Acc mean_g = step * stats.mean_g[at], mean_gn = step * stats.mean_gn[at];
      Acc d_h[kColumns];
      VTCLIP_UNROLL
      for (int e = 0; e < kColumns; ++e) {
        const Acc u = g.y[e] * rnorm, d_y = step * (of.x[e] - cosine * u);
        to_image[e] = delta * u;
        to_text[e] = d_y;
        d_weight[e] += d_y * g.n[e];
        const Acc d_n = args.residual * of.weight[e] * d_y;
        d_h[e] = rstd * (d_n - mean_g - g.n[e] * mean_gn);
        if constexpr (Input::kBias) d_input[e] += d_h[e];
      }
      Row<T>(args.d_input + at * args.C, 1, args.C).template store<kPacked>(column, d_h);
    }
    VTCLIP_DEVICE void finish(int64_t column, const Acc (&d_text)[kColumns]) {
      Acc d_bias[kColumns];
      VTCLIP_UNROLL
      for (int e = 0; e < kColumns; ++e) {
        d_bias[e] = args.residual * d_text[e];
        d_weight[e] *= args.residual;
      }
      const int64_t at = slot * args.C;
      const Walk<T>& walk = args.walk;
      walk.template store_sums<kPacked>(args.d_bias + at, column, d_bias);
      walk.template store_sums<kPacked>(args.d_weight + at, column, d_weight);
      if constexpr (Input::kBias) {
        walk.template store_sums<kPacked>(args.d_input_bias + at, column, d_input);
      }
    }
  };

  static VTCLIP_DEVICE void run(const Args& args, int64_t index, Tiles& tiles) {
    with_packed(args, [&](auto packed) {
      args.walk.template run<packed.value>(
          tiles.block, tiles.sums, index, args.d_unit, args.image_slice, args.d_text,
          [&](int64_t slot) { return Unit<packed.value>{args, slot, {}, {}, {}}; });
    });
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
  using Tiles = BlockTiles<kWarps>;

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
