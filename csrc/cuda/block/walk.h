// SPDX-License-Identifier: Apache-2.0
// Gradients of what images [B, D] and texts [K, D] contribute to rows (b, k): a thread keeps the
// sums of a few classes and one group of columns in registers and walks over the images.
#pragma once

#include "block.h"
#include "row.h"

namespace vtclip::cuda {

// Threads are units (class tile, column group) of an image chunk; blocks are full of units.
template <class T>
struct Walk {
  using Acc = AccOf<T>;
  // at most 32 sums of d_text per thread
  static constexpr int kColumns = kGroup<T>, kClasses = kColumns > 4 ? 4 : 8;

  int64_t B, K, D;
  int64_t images;  // per chunk

  VTCLIP_BOTH int64_t tiles() const { return ceil_div(K, kClasses); }
  VTCLIP_BOTH int64_t groups() const { return ceil_div(D, kColumns); }
  VTCLIP_BOTH int64_t units() const { return tiles() * groups(); }
  VTCLIP_BOTH int64_t chunks() const { return ceil_div(B, images); }
  VTCLIP_BOTH int64_t blocks_per_chunk(int threads) const { return ceil_div(units(), threads); }
  VTCLIP_BOTH int64_t blocks(int threads) const { return chunks() * blocks_per_chunk(threads); }

  // Every unit of block `index` makes row = start(slot), slot = its tile of all chunks'.
  // row.image(b, column) begins an image, row.contribute(b, k, column, to_image, to_text) says what
  // row (b, k) adds to both gradients, row.finish(column, d_text) ends with the sum over the tile.
  // d_image [tiles, B, D], slices `image_slice` apart, and d_text [chunks, K, D] are written where
  // they are not null.
  template <class Block, class Start>
  VTCLIP_DEVICE void run(const Block& block, int64_t index, Acc* d_image, int64_t image_slice,
                         Acc* d_text, Start start) const {
    const int64_t per_chunk = blocks_per_chunk(Block::kThreads);
    const int64_t chunk = index / per_chunk, first_unit = index % per_chunk * Block::kThreads;
    const int64_t first = chunk * images, end = lesser(B, first + images);
    block.each(static_cast<int>(Block::kThreads), [&](int i) {
      const int64_t unit = first_unit + i;
      if (unit >= units()) return;
      const int64_t tile = unit / groups(), column = unit % groups() * kColumns;
      const int64_t k0 = tile * kClasses;
      auto row = start(chunk * tiles() + tile);
      Acc texts[kClasses][kColumns] = {};
      for (int64_t b = first; b < end; ++b) {
        Acc image[kColumns] = {};
        row.image(b, column);
        VTCLIP_UNROLL
        for (int r = 0; r < kClasses; ++r) {
          if (k0 + r < K) {
            Acc to_image[kColumns], to_text[kColumns];
            row.contribute(b, k0 + r, column, to_image, to_text);
            VTCLIP_UNROLL
            for (int e = 0; e < kColumns; ++e) {
              image[e] += to_image[e];
              texts[r][e] += to_text[e];
            }
          }
        }
        if (d_image != nullptr) {
          Row<Acc>(d_image + tile * image_slice + b * D, 1, D).store(column, image);
        }
      }
      Acc total[kColumns] = {};
      VTCLIP_UNROLL
      for (int r = 0; r < kClasses; ++r) {
        if (d_text != nullptr && k0 + r < K) {
          Row<Acc>(d_text + (chunk * K + k0 + r) * D, 1, D).store(column, texts[r]);
        }
        VTCLIP_UNROLL
        for (int e = 0; e < kColumns; ++e) total[e] += texts[r][e];
      }
      row.finish(column, total);
    });
  }
};

}  // namespace vtclip::cuda
