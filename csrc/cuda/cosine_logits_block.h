// SPDX-License-Identifier: Apache-2.0
// The bodies of the cosine_logits kernels: one block per vector or per (image, text) pair.
//
//   logits[b,k] = scale * <x_b, t_k> * rx_b * rt_k,   r = 1 / |.| or 0 for a zero vector
//   d_x = rx * (g - xhat <xhat, g>),  g = scale * sum_k d_logits[b,k] that_k,  hat = r * vector
#pragma once

#include <cstdint>

#include "block.h"
#include "tile_io.h"

namespace vtclip::cuda {

// A strided vector: element i is base[i * stride].
template <class T>
struct Strided {
  T* base;
  int64_t stride;
  VTCLIP_DEVICE T& operator[](int64_t i) const { return base[i * stride]; }
};

// A [G, N, D] view: vector (g, n) starts at base + g * group + n * row, strides in elements.
template <class T>
struct Vectors {
  T* base;
  int64_t group, row, column;
  VTCLIP_DEVICE Strided<T> at(int64_t g, int64_t n) const {
    return {base + g * group + n * row, column};
  }
};

template <int kWarpsOfBody>
struct ReductionTiles {
  Block<kWarpsOfBody> block;
  VTCLIP_BOTH explicit ReductionTiles(Shared& shared) : block(shared) {}
};

constexpr int kCosineWarps = 4;

// rnorm[row] of vectors [G, N, D], row = g * N + n: 1 / |vector|, with the vector divided by its
// largest entry before squaring; 0 for a zero vector
template <class T>
struct ReciprocalNorm {
  using Acc = AccOf<T>;
  static constexpr int kWarps = kCosineWarps;
  using Tiles = ReductionTiles<kWarps>;
  struct Args {
    Vectors<const T> vectors;
    int64_t N, D;
    Acc* rnorm;  // [G, N]: written
  };

  static VTCLIP_DEVICE void run(const Args& args, int64_t row, Tiles& tiles) {
    const Strided<const T> x = args.vectors.at(row / args.N, row % args.N);
    tiles.block.once([&, r = of(x, args.D, tiles.block)] { args.rnorm[row] = r; });
  }

 private:
  static VTCLIP_DEVICE Acc of(const Strided<const T>& x, int64_t D, const Block<kWarps>& block) {
    const Acc largest = block.max(D, [&](int64_t i) {
      const Acc entry = static_cast<Acc>(x[i]);
      return entry < 0 ? -entry : entry;
    });
    const Acc nans = block.sum(D, [&](int64_t i) {
      const Acc entry = static_cast<Acc>(x[i]);
      return static_cast<Acc>(entry != entry);
    });
    if (nans != 0) return static_cast<Acc>(NAN);
    if (!(largest > 0)) return 0;
    const Acc square = block.sum(D, [&](int64_t i) {
      const Acc part = static_cast<Acc>(x[i]) / largest;
      return part * part;
    });
    return 1 / (largest * sqrt_of(square));
  }
};

// What both directions read. The text is [G, K, D] with its norms in groups of text_group rows (0:
// one group for all images).
template <class T>
struct CosineArgs {
  Vectors<const T> image, text;  // [1, B, D], [1|B, K, D]
  const AccOf<T>* image_rnorm;   // [B]
  const AccOf<T>* text_rnorm;    // [K] or [B, K]
  int64_t text_group, K, D;
  AccOf<T> scale;

  VTCLIP_DEVICE AccOf<T> rnorm_of_text(int64_t b, int64_t k) const {
    return text_rnorm[b * text_group + k];
  }
};

template <class T>
struct CosineForward {
  using Acc = AccOf<T>;
  static constexpr int kWarps = kCosineWarps;
  using Tiles = ReductionTiles<kWarps>;
  struct Args : CosineArgs<T> {
    T* logits;  // [B, K]: written
  };

  static VTCLIP_DEVICE void run(const Args& args, int64_t index, Tiles& tiles) {
    const int64_t b = index / args.K, k = index % args.K;
    const Strided<const T> x = args.image.at(0, b), t = args.text.at(b, k);
    const Acc rx = args.image_rnorm[b], rt = args.rnorm_of_text(b, k);
    // multiplied so that neither huge nor tiny vectors overflow on the way
    const Acc cosine = tiles.block.sum(args.D, [&](int64_t i) {
      return (static_cast<Acc>(x[i]) * rx) * (static_cast<Acc>(t[i]) * rt);
    });
    tiles.block.once([&] { args.logits[index] = static_cast<T>(args.scale * cosine); });
  }
};

template <class T>
struct CosineBackwardArgs : CosineArgs<T> {
  Rows<const T> d_logits;  // [B, K]
  int64_t count;           // images of one text row
  AccOf<T>* gradient;      // [rows, D], scratch
  T* out;                  // [rows, D]: written
};

// d_x of vector x against `count` vectors other(j) (element i: other(j, i)) with weights weight(j)
template <class T, class Block, class Other, class Weight>
VTCLIP_DEVICE void cosine_backward(const Block& block, const Strided<const T>& x, AccOf<T> rx,
                                   int64_t count, int64_t D, Other other, Weight weight,
                                   AccOf<T>* gradient, T* d_x) {
  using Acc = AccOf<T>;
  block.each(D, [&](int64_t i) {
    Acc sum = 0;
    for (int64_t j = 0; j < count; ++j) sum += weight(j) * other(j, i);
    gradient[i] = sum;
  });
  const Acc along = block.sum(
      D, [&](int64_t i) { return static_cast<Acc>(x[i]) * rx * gradient[i]; });
  block.each(D, [&](int64_t i) {
    d_x[i] = static_cast<T>(rx * (gradient[i] - static_cast<Acc>(x[i]) * rx * along));
  });
}

// one block per image b: d_image[b] from all texts
template <class T>
struct CosineImageGradient {
  using Acc = AccOf<T>;
  static constexpr int kWarps = kCosineWarps;
  using Tiles = ReductionTiles<kWarps>;
  using Args = CosineBackwardArgs<T>;

  static VTCLIP_DEVICE void run(const Args& args, int64_t b, Tiles& tiles) {
    const auto other = [&](int64_t k, int64_t i) {
      return static_cast<Acc>(args.text.at(b, k)[i]) * args.rnorm_of_text(b, k);
    };
    const auto weight = [&](int64_t k) {
      return args.scale * static_cast<Acc>(args.d_logits.at(b, k));
    };
    cosine_backward<T>(tiles.block, args.image.at(0, b), args.image_rnorm[b], args.K, args.D, other,
                       weight, args.gradient + b * args.D, args.out + b * args.D);
  }
};

// one block per text row (g, k): its images are [g * count, (g + 1) * count)
template <class T>
struct CosineTextGradient {
  using Acc = AccOf<T>;
  static constexpr int kWarps = kCosineWarps;
  using Tiles = ReductionTiles<kWarps>;
  using Args = CosineBackwardArgs<T>;

  static VTCLIP_DEVICE void run(const Args& args, int64_t row, Tiles& tiles) {
    const int64_t g = row / args.K, k = row % args.K, first = g * args.count;
    const auto other = [&](int64_t j, int64_t i) {
      return static_cast<Acc>(args.image.at(0, first + j)[i]) * args.image_rnorm[first + j];
    };
    const auto weight = [&](int64_t j) {
      return args.scale * static_cast<Acc>(args.d_logits.at(first + j, k));
    };
    cosine_backward<T>(tiles.block, args.text.at(g, k), args.text_rnorm[row], args.count, args.D,
                       other, weight, args.gradient + row * args.D, args.out + row * args.D);
  }
};

}  // namespace vtclip::cuda
