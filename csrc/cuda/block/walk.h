// SPDX-License-Identifier: Apache-2.0
// Gradients of what images [B, D] and texts [K, D] contribute to rows (b, k): a thread keeps the
// sums of a few classes and one group of columns in shared memory and walks over the images.
#pragma once

#include "block.h"
#include "row.h"

namespace vtclip::cuda {

// Threads are units (class tile, column group) of an image chunk; blocks are full of units.
template <class T>
struct Walk {
  using Acc = AccOf<T>;
  // at most 32 sums of d_text per thread; in registers they would ask for a copy of the code for
  // each class
  static constexpr int kColumns = kGroup<T>, kClasses = kColumns > 4 ? 4 : 8;
  static constexpr int kSums = kColumns * kClasses;

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
  // they are not null. `sums` is shared memory [kSums, kThreads]. kPacked: D is a multiple of
  // kColumns.
  template <bool kPacked = false, class Block, class Start>
  VTCLIP_DEVICE void run(const Block& block, Acc* sums, int64_t index, Acc* d_image,
                         int64_t image_slice, Acc* d_text, Start start) const {
    const int64_t per_chunk = blocks_per_chunk(Block::kThreads);
    const int64_t chunk = index / per_chunk, first_unit = index % per_chunk * Block::kThreads;
    const int64_t first = chunk * images, end = lesser(B, first + images);
    block.each_thread([&](int i) {
      const int64_t unit = first_unit + i;
      if (unit >= units()) return;
      const int64_t tile = unit / groups(), column = unit % groups() * kColumns;
      const int64_t k0 = tile * kClasses;
      const int classes = static_cast<int>(lesser<int64_t>(kClasses, K - k0));
      auto row = start(chunk * tiles() + tile);
      Texts<Block::kThreads> texts{sums, i};
      texts.clear();
      VTCLIP_ROLLED
      for (int64_t b = first; b < end; ++b) {
        Acc image[kColumns] = {};
        row.image(b, column);
        VTCLIP_ROLLED
        for (int r = 0; r < classes; ++r) {
          Acc to_image[kColumns], to_text[kColumns];
          row.contribute(b, k0 + r, column, to_image, to_text);
          VTCLIP_UNROLL
          for (int e = 0; e < kColumns; ++e) image[e] += to_image[e];
          texts.add(r, to_text);
        }
        if (d_image != nullptr) {
          store_sums<kPacked>(d_image + tile * image_slice + b * D, column, image);
        }
      }
      Acc total[kColumns] = {};
      VTCLIP_ROLLED
      for (int r = 0; r < classes; ++r) {
        Acc text[kColumns];
        texts.get(r, text);
        if (d_text != nullptr) {
          store_sums<kPacked>(d_text + (chunk * K + k0 + r) * D, column, text);
        }
        VTCLIP_UNROLL
        for (int e = 0; e < kColumns; ++e) total[e] += text[e];
      }
      row.finish(column, total);
    });
  }

  // columns `column`.. of a row of sums, [D], of an allocation of torch's
  template <bool kPacked>
  VTCLIP_DEVICE void store_sums(Acc* row, int64_t column, const Acc (&sums)[kColumns]) const {
    const Row<Acc> to(row, 1, D);
    if constexpr (kPacked) to.template store<true>(column, sums);
    else to.store(column, sums);
  }

 private:
  // The sums of thread `thread`: 16 bytes of them beside those of its neighbours.
  template <int kThreads>
  struct Texts {
    using Packed = Vector<Acc>;
    static constexpr int kVectors = kColumns / Packed::kSize;
    Acc* sums;
    int thread;

    VTCLIP_DEVICE Packed& at(int r, int vector) const {
      return reinterpret_cast<Packed*>(sums)[(r * kVectors + vector) * kThreads + thread];
    }
    VTCLIP_DEVICE void clear() const {
      for (int i = 0; i < kClasses * kVectors; ++i) at(0, i) = zeros<Acc>();
    }
    VTCLIP_DEVICE void add(int r, const Acc (&text)[kColumns]) const {
      VTCLIP_UNROLL
      for (int v = 0; v < kVectors; ++v) {
        Packed sum = at(r, v);
        VTCLIP_UNROLL
        for (int e = 0; e < Packed::kSize; ++e) sum.element[e] += text[v * Packed::kSize + e];
        at(r, v) = sum;
      }
    }
    VTCLIP_DEVICE void get(int r, Acc (&text)[kColumns]) const {
      VTCLIP_UNROLL
      for (int v = 0; v < kVectors; ++v) {
        const Packed sum = at(r, v);
        VTCLIP_UNROLL
        for (int e = 0; e < Packed::kSize; ++e) text[v * Packed::kSize + e] = sum.element[e];
      }
    }
  };
};

// The shared memory of a body that is nothing but a walk.
template <class T, int kWarps>
struct WalkTiles {
  Shared& shared;
  Block<kWarps> block{shared};
  // [kSums, kThreads]
  AccOf<T>* sums = shared.take<AccOf<T>>(Walk<T>::kSums * Block<kWarps>::kThreads);
};

}  // namespace vtclip::cuda
