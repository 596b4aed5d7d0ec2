// SPDX-License-Identifier: Apache-2.0
// What the attention bodies share: tile sizes, the problem, and scores of a tile.
//
// A block has four warps and 64 rows, 16 to a warp, and streams `kStep` rows of the other kind past
// them. A head of width d is padded to kD and taken in chunks of kC columns: half types hold a head
// of up to 128 in whole. Sizes keep every body within the 64 KiB of sm_75.
#pragma once

#include <cstdint>

#include "block.h"
#include "tile_io.h"
#include "warp_tile.h"

namespace vtclip::cuda {

constexpr double kLog2E = 1.4426950408889634074;
constexpr double kLn2 = 0.6931471805599453094;

// Columns of chunk c that products have to sum over. A head in several chunks fills more than half
// of them, or a narrower tile would hold it.
template <int kC, int kChunks>
VTCLIP_DEVICE int summed(int64_t d, int c) {
  if (kKnownSizesFit && c < kChunks / 2) return kC;
  const int64_t left = ceil_div(d - c * kC, 16) * 16;
  return static_cast<int>(lesser<int64_t>(kC, left < 0 ? 0 : left));
}

// Sizes and mask of a problem.
struct AttnShape {
  int64_t B, H, K, L, d;
  const bool* mask;  // [B|1, L], may be null
  int64_t mask_batch, mask_column;

  VTCLIP_DEVICE bool keeps(int64_t b, int64_t l) const {
    return l < L && (mask == nullptr || mask[b * mask_batch + l * mask_column]);
  }
};

// Gradients of query and key; each op adds what it needs.
template <class T>
struct AttnGradientArgs {
  AttnShape shape;
  Heads<const T> query, key;
  AccOf<T>* delta;          // [B, H, K], contiguous: written by the query's body, read by the key's
  Heads<T> d_query;         // [B or image chunks, H, K, d]: written, unless there are
  Heads<AccOf<T>> partial;  // partial sums of image chunks, of the same shape
  Heads<T> d_key;           // [B, H, L, d]: written
  AccOf<T> scale;
  int64_t images;  // of one block of the query gradient
};

// Block `index` of a grid (image or image chunk, head, part of the output columns, tile of 64
// rows), the tile first: neighbours share what they stream.
struct AttnPlace {
  int64_t image, head, part, tile;
};

VTCLIP_DEVICE AttnPlace attn_place(int64_t index, int64_t H, int64_t parts, int64_t tiles) {
  return {index / (tiles * parts * H), index / (tiles * parts) % H, index / tiles % parts,
          index % tiles};
}

// How many parts of kOut columns an output of width d is computed in.
VTCLIP_BOTH constexpr int64_t attn_parts(int64_t d, int kOut) {
  return larger<int64_t>(1, ceil_div(d, kOut));
}

// Rows `row0`.. of a warp's result of kN columns, times `factor`, to a strided matrix of
// rows x columns; its first column is `column0` there. They pass through a strip of shared memory
// of the warp, [16, tile_stride<T>(kStrip)], so that 16 bytes are written at a time.
template <int kN, int kStrip, class T, class S, class Tile>
VTCLIP_DEVICE void put(const Warp& warp, Tile& tile, T* strip, const Rows<S>& to, int64_t row0,
                       int64_t rows, int64_t column0, int64_t columns,
                       typename Tile::Acc factor) {
  constexpr int kSizeT = static_cast<int>(sizeof(T)), kSizeS = static_cast<int>(sizeof(S));
  constexpr int kWide = lesser(kN, kStrip * kSizeT / kSizeS), kLd = tile_stride<S>(kWide);
  constexpr int kVector = Vector<S>::kSize, kGroups = kWide / kVector;
  constexpr int kApart = kWarpSize / kGroups;  // rows from one vector of a lane to its next
  static_assert(kN % kWide == 0 && kLd * sizeof(S) <= tile_stride<T>(kStrip) * sizeof(T));
  S* own = reinterpret_cast<S*>(strip);
  const Rows<S> out = to.from(row0, column0);
  const int rows_left = static_cast<int>(lesser<int64_t>(16, rows - row0));
  const int columns_left = static_cast<int>(lesser<int64_t>(kN, columns - column0));
  const bool fits = columns % kVector == 0 && vectors_fit(out);
  VTCLIP_UNROLL
  for (int first = 0; first < kN; first += kWide) {
    tile.template store<kWide>(own, kLd, first, factor);
    warp.each_thread([&](int lane) {
      if (fits) {
        const int row = lane / kGroups, column = lane % kGroups * kVector;
        if (first + column >= columns_left) return;
        VTCLIP_UNROLL
        for (int r = 0; r < 16; r += kApart) {
          if (row + r >= rows_left) return;
          *reinterpret_cast<Vector<S>*>(&out.at(row + r, first + column)) =
              *reinterpret_cast<const Vector<S>*>(own + (row + r) * kLd + column);
        }
        return;
      }
      VTCLIP_ROLLED
      for (int i = lane; i < 16 * kWide; i += kWarpSize) {
        const int r = i / kWide, c = i % kWide;
        if (r < rows_left && first + c < columns_left) out.at(r, first + c) = own[r * kLd + c];
      }
    });
  }
}

template <class T, int kDOf>
struct AttnTile {
  static constexpr int kD = kDOf;
  static constexpr int kWarps = 4;
  static constexpr int kRows = 16 * kWarps;
  static constexpr int kC = sizeof(T) == 2 ? lesser(kD, 128) : sizeof(T) == 4 ? 64 : 32;
  static constexpr int kStep = sizeof(T) == 2 ? (kD == 64 ? 64 : 32) : sizeof(T) == 4 ? 32 : 16;
  static constexpr int kChunks = kD / kC;
  // columns of the output that one block computes: what its registers hold. Of a wider head every
  // block recomputes the scores.
  static constexpr int kOut = lesser(kD, sizeof(T) == 8 ? 64 : 128);
  static constexpr int kOutChunks = kOut / kC;
  static constexpr int kLd = tile_stride<T>(kC);
  static constexpr int kLdStep = tile_stride<T>(kStep);

  // Blocks that compute an output of so many rows, of images or chunks of them.
  static VTCLIP_BOTH int64_t output_blocks(const AttnShape& n, int64_t images, int64_t rows) {
    return images * n.H * attn_parts(n.d, kOut) * ceil_div(rows, kRows);
  }
  template <class Args>
  static VTCLIP_BOTH int64_t query_blocks(const Args& args) {
    return output_blocks(args.shape, ceil_div(args.shape.B, args.images), args.shape.K);
  }
  static VTCLIP_DEVICE AttnPlace place(const AttnShape& n, int64_t index, int64_t rows) {
    return attn_place(index, n.H, attn_parts(n.d, kOut), ceil_div(rows, kRows));
  }

  // Keys `start`.. of image b; `slot` of keep [2, kStep] says which of them count.
  struct Step {
    int64_t b, start;
    int slot;

    // the step after this one, of this image or the next
    VTCLIP_DEVICE Step next(int64_t L) const {
      if (start + kStep < L) return {b, start + kStep, 1 - slot};
      return {b + 1, 0, 1 - slot};
    }
    VTCLIP_DEVICE const bool* keep(const bool* both) const { return both + slot * kStep; }
  };
  // Which keys of a step count, none from image `last` on; without a barrier.
  static VTCLIP_DEVICE void keep_step(const Block<kWarps>& block, const AttnShape& n, bool* keep,
                                      const Step& step, int64_t last) {
    static_assert(kStep <= Block<kWarps>::kThreads);
    block.loose().each_thread([&](int l) {
      if (l >= kStep) return;
      keep[step.slot * kStep + l] = step.b < last && n.keeps(step.b, step.start + l);
    });
  }

  // Loads are copies: they are there after block.arrive().
  //
  // Chunk c of a tile of the rows of one head, as many as there are.
  static VTCLIP_DEVICE void load_rows(const Block<kWarps>& block, T* to, const Rows<const T>& from,
                                      int64_t rows, int64_t d, int64_t tile, int c) {
    const int64_t left = rows - tile * kRows;
    copy_tile<kRows, kC>(block.loose(), to, kLd, from.from(tile * kRows, c * kC), d - c * kC,
                         [&](int r) { return r < left; });
  }
  // A step of rows, from a column on: those that `keep` [kStep] says.
  static VTCLIP_DEVICE void load_kept(const Block<kWarps>& block, T* to, const Rows<const T>& from,
                                      int64_t column, int64_t d, const bool* keep) {
    copy_tile<kStep, kC>(block.loose(), to, kLd, from.from(0, column), d - column,
                         [&](int r) { return keep[r]; });
  }

  template <class Tile>
  static VTCLIP_DEVICE void clear(Tile (&output)[kOutChunks]) {
    VTCLIP_UNROLL
    for (int c = 0; c < kOutChunks; ++c) output[c].fill(0);
  }

  // d_query of a block: add(states, at, b) adds what image b contributes to each warp's d_q.
  // `strip` is shared memory [kRows, kLdStep].
  template <class State, class Args, class Add>
  static VTCLIP_DEVICE void query_gradient(const Args& args, int64_t index,
                                           const Block<kWarps>& block, T* strip, Add add) {
    const AttnShape& n = args.shape;
    const AttnPlace at = place(n, index, n.K);
    const int64_t first = at.image * args.images, last = lesser(n.B, first + args.images);
    VTCLIP_ASSUME(first < last);
    PerWarp<State, kWarps> states;
    block.loose().each_warp([&](const Warp& warp) { clear(states[warp].d_q); });
    for (int64_t b = first; b < last; ++b) add(states, at, b);
    block.loose().each_warp([&](const Warp& warp) {
      put_query(args, states[warp].d_q, strip, at, warp);
    });
  }

  // d_q += dS k for a step of keys, of which `keep` [kStep] counts; dS lies in tiles.d_s.
  template <class Tiles, class States>
  static VTCLIP_DEVICE void add_keys(const Tiles& tiles, States& states, const Rows<const T>& key,
                                     const AttnPlace& at, int64_t d, const bool* keep) {
    VTCLIP_UNROLL
    for (int c = 0; c < kOutChunks; ++c) {
      load_kept(tiles.block, tiles.k, key, at.part * kOut + c * kC, d, keep);
      tiles.block.arrive();
      tiles.block.each_warp([&](const Warp& warp) {
        states[warp].d_q[c].template add_product<false, false>(
            tiles.d_s + 16 * warp.index * kLdStep, kLdStep, tiles.k, kLd, kStep);
      });
    }
  }

  // A warp's rows of d_query, or of the partial sum of a chunk of images.
  template <class Args, class Tile>
  static VTCLIP_DEVICE void put_query(const Args& args, Tile (&d_query)[kOutChunks], T* strips,
                                      const AttnPlace& at, const Warp& warp) {
    const AttnShape& n = args.shape;
    const int64_t row0 = at.tile * kRows + 16 * warp.index;
    T* strip = strips + 16 * warp.index * kLdStep;
    VTCLIP_UNROLL
    for (int c = 0; c < kOutChunks; ++c) {
      const int64_t column0 = at.part * kOut + c * kC;
      if (args.partial.base != nullptr) {
        put<kC, kStep>(warp, d_query[c], strip, args.partial.at(at.image, at.head), row0, n.K,
                       column0, n.d, args.scale);
      } else {
        put<kC, kStep>(warp, d_query[c], strip, args.d_query.at(at.image, at.head), row0, n.K,
                       column0, n.d, args.scale);
      }
    }
  }

  // A row of keys that `keep` [kRows] leaves out has gradient 0 even where a query or an incoming
  // gradient is NaN.
  template <class Tile>
  static VTCLIP_DEVICE void keep_rows(Tile& gradient, const Warp& warp, const bool* keep) {
    gradient.each([&](const Spot& spot, typename Tile::Acc& element) {
      element = keep[16 * warp.index + spot.row] ? element : 0;
    });
  }

  // Chunk c of a warp's rows of d_key or d_value; `strip` [16, tile_stride(kStrip)] is the warp's.
  template <int kStrip, class Tile>
  static VTCLIP_DEVICE void put_key(const AttnShape& n, const Heads<T>& to, Tile& gradient,
                                    T* strip, const AttnPlace& at, const Warp& warp, int c,
                                    typename Tile::Acc factor) {
    put<kC, kStrip>(warp, gradient, strip, to.at(at.image, at.head),
                    at.tile * kRows + 16 * warp.index, n.L, at.part * kOut + c * kC, n.d, factor);
  }
};

}  // namespace vtclip::cuda
