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
};

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

}  // namespace vtclip::cuda
