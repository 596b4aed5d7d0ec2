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

// Columns of chunk c that products have to sum over.
template <int kC>
VTCLIP_DEVICE int summed(int64_t d, int c) {
  const int64_t left = ceil_div(d - c * kC, 16) * 16;
  return static_cast<int>(lesser<int64_t>(kC, left < 0 ? 0 : left));
}

// Sizes and mask of a problem.
struct AttnShape {
  int64_t B, H, K, L, d;
  const bool* mask;  // [B|1, L], may be null
  int64_t mask_image, mask_column;

  VTCLIP_DEVICE bool keeps(int64_t b, int64_t l) const {
    return l < L && (mask == nullptr || mask[b * mask_image + l * mask_column]);
  }
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

// How many parts of kOut columns an output of width d is made in.
VTCLIP_BOTH constexpr int64_t attn_parts(int64_t d, int kOut) {
  return larger<int64_t>(1, ceil_div(d, kOut));
}

// Rows `row0`.. of a warp's result, times `factor`, to a strided matrix of rows x columns; its
// first column is `column0` there.
template <class T, class Tile>
VTCLIP_DEVICE void put(Tile& tile, const Rows<T>& to, int64_t row0, int64_t rows, int64_t column0,
                       int64_t columns, typename Tile::Acc factor) {
  tile.each([&](const Spot& at, typename Tile::Acc& element) {
    const int64_t r = row0 + at.row, c = column0 + at.column;
    if (r < rows && c < columns) to.at(r, c) = static_cast<T>(element * factor);
  });
}

template <class T, int kDOf>
struct AttnTile {
  static constexpr int kD = kDOf;
  static constexpr int kWarps = 4;
  static constexpr int kRows = 16 * kWarps;
  static constexpr int kC = sizeof(T) == 2 ? lesser(kD, 128) : sizeof(T) == 4 ? 64 : 32;
  static constexpr int kStep = sizeof(T) == 2 ? (kD == 64 ? 64 : 32) : sizeof(T) == 4 ? 32 : 16;
  static constexpr int kChunks = kD / kC;
  // columns of the output that one block makes: what its registers hold. Of a wider head every
  // block makes the scores again.
  static constexpr int kOut = lesser(kD, sizeof(T) == 8 ? 64 : 128);
  static constexpr int kOutChunks = kOut / kC;
  static constexpr int kLd = padded<T>(kC);
  static constexpr int kLdStep = padded<T>(kStep);

  // Blocks that make an output of so many rows, of images or chunks of them.
  static VTCLIP_BOTH int64_t output_blocks(const AttnShape& n, int64_t images, int64_t rows) {
    return images * n.H * attn_parts(n.d, kOut) * ceil_div(rows, kRows);
  }

  // Chunk c of a tile of the rows of one head, as many as there are.
  static VTCLIP_DEVICE void load_rows(const Block<kWarps>& block, T* to, const Rows<const T>& from,
                                      int64_t rows, int64_t d, int64_t tile, int c) {
    const int64_t left = rows - tile * kRows;
    load_tile<kRows, kC>(block.loose(), to, kLd, from.from(tile * kRows, c * kC), d - c * kC,
                         [&](int r) { return r < left; });
  }
  // A step of rows, from a column on: those that `keep` [kStep] says.
  template <class Team>
  static VTCLIP_DEVICE void load_kept(const Team& team, T* to, const Rows<const T>& from,
                                      int64_t column, int64_t d, const bool* keep) {
    load_tile<kStep, kC>(team, to, kLd, from.from(0, column), d - column,
                         [&](int r) { return keep[r]; });
  }

  // A warp's rows of d_query, or of the partial sum of a chunk of images.
  template <class Args, class Tile>
  static VTCLIP_DEVICE void put_query(const Args& args, Tile (&d_query)[kOutChunks],
                                      const AttnPlace& at, const Warp& warp) {
    const AttnShape& n = args.shape;
    const int64_t row0 = at.tile * kRows + 16 * warp.index;
    VTCLIP_UNROLL
    for (int c = 0; c < kOutChunks; ++c) {
      const int64_t column0 = at.part * kOut + c * kC;
      if (args.partial.base != nullptr) {
        put(d_query[c], args.partial.at(at.image, at.head), row0, n.K, column0, n.d, args.scale);
      } else {
        put(d_query[c], args.d_query.at(at.image, at.head), row0, n.K, column0, n.d, args.scale);
      }
    }
  }
};

}  // namespace vtclip::cuda
