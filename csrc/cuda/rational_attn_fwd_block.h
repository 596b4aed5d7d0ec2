// SPDX-License-Identifier: Apache-2.0
// The bodies of rational_attn's forward. Row i of A is omega_i times the softmax of row i, so a
// block streams the keys past 64 rows with a running softmax for each, and the rows are weighed
// when all of a map are known: by RationalOne where one block has them all, in one launch, else
// RationalRows leaves rows and weights behind for RationalCombine.
#pragma once

#include "rational_attn_block.h"

namespace vtclip::cuda {

template <class T>
struct RationalForwardArgs : RationalInputs<T> {
  Heads<T> out;                 // [B, H, K, d]: written
  bool keep_parts;              // parts are wanted
  Heads<T> parts[kQueryKinds];  // [B, H, K, d] of text and pair: written, RationalRows also if not
                                // wanted, by rows' own softmax; RationalCombine reads them
  AccOf<T>* image_out;          // [B, H, d], contiguous: written
  AccOf<T>* stats;              // [3, 2, B, H], contiguous: base and total, written
  AccOf<T>* row_base[kQueryKinds];   // [B, H, K] of text and pair, contiguous: written by
  AccOf<T>* row_total[kQueryKinds];  // RationalRows, read by RationalCombine

  VTCLIP_DEVICE void store_stats(int kind, int64_t index, AccOf<T> base, AccOf<T> total) const {
    AccOf<T>* to = stats + 2 * kind * this->B * this->H + index;
    to[0] = base;
    to[this->B * this->H] = total;
  }
};

// Rows with base and total of their own, taken together.
template <class Acc>
struct RationalMap {
  Acc base, total;

  VTCLIP_DEVICE Acc weight(Acc row_base, Acc row_total) const {
    return row_total * exp2_of(row_base - base);
  }
  template <class Block>
  static VTCLIP_DEVICE RationalMap of(const Block& block, int64_t rows, const Acc* row_base,
                                      const Acc* row_total) {
    RationalMap map;
    map.base = block.max(rows, [&](int64_t r) { return row_base[r]; });
    if (map.base == -infinity<Acc>()) map.base = 0;  // 2^-inf = 0, not NaN
    map.total = block.sum(rows, [&](int64_t r) { return map.weight(row_base[r], row_total[r]); });
    return map;
  }
  // the same of the rows of one tile: a thread has one at most
  template <class Block>
  static VTCLIP_DEVICE RationalMap of_tile(const Block& block, int64_t rows, const Acc* row_base,
                                           const Acc* row_total) {
    static_assert(kRationalRows <= Block::kThreads);
    RationalMap map;
    map.base = block.max(kRationalRows, [&](int r) {
      return r < rows ? row_base[r] : -infinity<Acc>();
    });
    if (map.base == -infinity<Acc>()) map.base = 0;
    map.total = block.sum(kRationalRows, [&](int r) {
      return r < rows ? map.weight(row_base[r], row_total[r]) : 0;
    });
    return map;
  }
};

// 64 rows of one query and all keys of their image and head.
template <class T, int kColumns, int kResults>
struct RationalStream : RationalTile<T, kColumns, rational_step<T>(kColumns, kResults)> {
  using Tile = RationalTile<T, kColumns, rational_step<T>(kColumns, kResults)>;
  using Acc = AccOf<T>;
  using Tile::kC, Tile::kLd, Tile::kLdStep, Tile::kRows, Tile::kStep, Tile::kWarps;

  struct Tiles {
    Shared& shared;
    Block<kWarps> block{shared};
    T* q = shared.take<T>(kRows * kLd);        // [kRows, kLd]
    T* k = shared.take<T>(kStep * kLd);        // [kStep, kLd]
    T* v = shared.take<T>(kStep * kLd);        // [kStep, kLd]
    T* p = shared.take<T>(kRows * kLdStep);    // [kRows, kLdStep]
    Acc* row_base = shared.take<Acc>(kRows);   // [kRows]
    Acc* row_total = shared.take<Acc>(kRows);  // [kRows]
    Acc* image = shared.take<Acc>(kC);         // [kC]
  };
  struct State {
    WarpTile<T, 16, kStep> s;
    WarpTile<T, 16, kC> out;
    RowValues<Acc, 16> base, total;
  };
  using States = PerWarp<State, kWarps>;

  // Rows row0.. of query `kind`, of which the first `rows` exist, and columns of chunk `part` of
  // the values. `loaded`: the only step of keys and values is there already. Values come while
  // scores are computed, of a head in one chunk the next keys while values are added.
  static VTCLIP_DEVICE void run(const RationalInputs<T>& n, Tiles& tiles, States& states, int64_t b,
                                int64_t h, int part, int kind, int64_t row0, int64_t rows,
                                bool loaded) {
    const Block<kWarps>& block = tiles.block;
    const int chunks = Tile::chunks(n);
    const Rows<const T> query = n.query[kind].at(b, h).from(row0);
    const auto load_keys = [&](int64_t start, int c) {
      if (loaded) return;
      Tile::load_step(block, tiles.k, n.key.at(b, h).from(start), n.K - start, n.d, c);
    };
    block.loose().each_warp([&](const Warp& warp) {
      State& own = states[warp];
      own.out.fill(0);
      own.base.fill(-infinity<Acc>());
      own.total.fill(0);
    });
    if (chunks == 1) {
      Tile::load_own(block, tiles.q, query, rows, n.d, 0);
      load_keys(0, 0);
    }
    VTCLIP_ASSUME(n.K > 0);
    for (int64_t start = 0; start < n.K; start += kStep) {
      const int64_t keys = n.K - start;
      VTCLIP_ROLLED
      for (int c = 0; c < chunks; ++c) {
        if (chunks > 1) {
          if (c > 0) block.sync();  // the chunk before is read
          Tile::load_own(block, tiles.q, query, rows, n.d, c);
          load_keys(start, c);
        }
        block.arrive();
        if (c == chunks - 1 && !loaded) {
          Tile::load_step(block, tiles.v, n.value.at(b, h).from(start), keys, n.d, part);
        }
        block.loose().each_warp([&](const Warp& warp) {
          if (Tile::idle(warp, rows)) return;
          State& own = states[warp];
          if (c == 0) own.s.fill(0);
          own.s.template add_product<false, true>(tiles.q + 16 * warp.index * kLd, kLd, tiles.k,
                                                  kLd, Tile::summed(n.d, c));
          if (c == chunks - 1) soften(own, n.scale_log2(), keys);
        });
      }
      block.arrive();
      if (chunks == 1 && start + kStep < n.K) load_keys(start + kStep, 0);
      block.loose().each_warp([&](const Warp& warp) {
        if (Tile::idle(warp, rows)) return;
        State& own = states[warp];
        own.out.add_product(own.s, tiles.p + 16 * warp.index * kLdStep, kLdStep, tiles.v, kLd);
      });
    }
    block.each_warp([&](const Warp& warp) {
      const State& own = states[warp];
      own.base.once([&](const Spot& at, Acc base) {
        tiles.row_base[16 * warp.index + at.row] = base;
      });
      own.total.once([&](const Spot& at, Acc total) {
        tiles.row_total[16 * warp.index + at.row] = total;
      });
    });
  }

  // what the image's row has left becomes image_out
  static VTCLIP_DEVICE void finish_image(const RationalForwardArgs<T>& args, Tiles& tiles,
                                         States& states, int64_t index, int part) {
    const auto map = RationalMap<Acc>::of(tiles.block, 1, tiles.row_base, tiles.row_total);
    tiles.block.once([&] {
      if (part == 0) args.store_stats(kImage, index, map.base, map.total);
    });
    const Acc factor = 1 / map.total;
    tiles.block.each_warp([&](const Warp& warp) {
      if (Tile::idle(warp, 1)) return;
      states[warp].out.each([&](const Spot& at, Acc& element) {
        if (at.row == 0) tiles.image[at.column] = element * factor;
      });
    });
    const int columns = static_cast<int>(lesser<int64_t>(kC, args.d - part * kC));
    tiles.block.each_once(columns, [&](int c) {
      args.image_out[index * args.d + part * kC + c] = tiles.image[c];
    });
  }

 private:
  // s becomes powers of two over a new maximum; what was summed before shrinks to it
  static VTCLIP_DEVICE void soften(State& own, Acc scale_log2, int64_t keys) {
    // of the scores as they are, so that the scale is multiplied in the exponent alone
    const Acc sign = scale_log2 < 0 ? -1 : 1;
    own.s.each([&](const Spot& at, Acc& s) { s = at.column < keys ? s * sign : -infinity<Acc>(); });
    RowValues<Acc, 16> shift, shrink, sum;
    own.s.max_rows(shift);
    shift.each([&](const Spot& at, Acc& row) {
      const Acc base = larger(own.base[at], row * (scale_log2 * sign));
      row = base == -infinity<Acc>() ? 0 : base;
      shrink[at] = exp2_of(own.base[at] - row);
      own.base[at] = base;
    });
    own.s.each([&](const Spot& at, Acc& s) {
      s = at.column < keys ? power(s, scale_log2 * sign, shift[at]) : 0;
    });
    own.s.sum_rows(sum);
    own.total.each([&](const Spot& at, Acc& total) { total = total * shrink[at] + sum[at]; });
    own.out.each([&](const Spot& at, Acc& element) { element *= shrink[at]; });
  }
};

// One block per (image, head, chunk of columns), for K <= kRows or the image's query alone.
template <class T, int kColumns>
struct RationalOne : RationalStream<T, kColumns, sizeof(T) == 4 ? 1 : 2> {
  using Stream = RationalStream<T, kColumns, sizeof(T) == 4 ? 1 : 2>;
  using Acc = AccOf<T>;
  using Args = RationalForwardArgs<T>;
  using Tiles = typename Stream::Tiles;
  using typename Stream::States;
  using Stream::kC, Stream::kLd, Stream::kRows, Stream::kStep, Stream::kWarps;

  static VTCLIP_BOTH int64_t blocks(const Args& args) {
    return args.B * args.H * Stream::chunks(args);
  }

  static VTCLIP_DEVICE void run(const Args& args, int64_t index, Tiles& tiles) {
    const Block<kWarps>& block = tiles.block;
    const int chunks = Stream::chunks(args), part = static_cast<int>(index % chunks);
    index /= chunks;
    const int64_t b = index / args.H, h = index % args.H;
    const bool one_step = chunks == 1 && args.K <= kStep;
    States states;
    Sums sums;
    block.each(kC, [&](int c) { tiles.image[c] = 0; });
    block.each_warp([&](const Warp& warp) { sums[warp].fill(0); });
    bool loaded = false;
    VTCLIP_ROLLED
    for (int kind = 0; kind < kQueryKinds; ++kind) {
      if (!args.has[kind]) {
        block.once([&] {
          if (part == 0) args.store_stats(kind, index, 0, 0);
        });
        continue;
      }
      const int64_t rows = kind == kImage ? 1 : args.K;
      Stream::run(args, tiles, states, b, h, part, kind, 0, rows, loaded);
      loaded = one_step;
      if (kind == kImage) {
        Stream::finish_image(args, tiles, states, index, part);
      } else {
        add_map(args, tiles, states, sums, index, part, kind);
      }
    }
    finish(args, tiles, sums, b, h, part);
  }

 private:
  using Sums = PerWarp<WarpTile<T, 16, kC>, kWarps>;

  // sums += A_kind v
  static VTCLIP_DEVICE void add_map(const Args& args, Tiles& tiles, States& states, Sums& sums,
                                    int64_t index, int part, int kind) {
    const auto map =
        RationalMap<Acc>::of_tile(tiles.block, args.K, tiles.row_base, tiles.row_total);
    const Acc factor = static_cast<Acc>(args.K) / map.total;
    tiles.block.once([&] {
      if (part == 0) args.store_stats(kind, index, map.base, map.total);
    });
    tiles.block.each_warp([&](const Warp& warp) {
      auto& own = states[warp];
      own.base.each([&](const Spot&, Acc& base) { base = exp2_of(base - map.base) * factor; });
      own.out.each([&](const Spot& at, Acc& element) { element *= own.base[at]; });
      sums[warp].with(own.out, [](const Spot&, Acc& sum, Acc one) { sum += one; });
      if (args.keep_parts) own.out.store(tiles.q + 16 * warp.index * kLd, kLd);
    });
    if (!args.keep_parts) return;
    const Rows<T> parts = args.parts[kind].at(index / args.H, index % args.H);
    store_tile<kRows, kC>(tiles.block, parts.from(0, int64_t{part} * kC), args.K,
                          args.d - part * kC, tiles.q, kLd);
  }

  static VTCLIP_DEVICE void finish(const Args& args, Tiles& tiles, Sums& sums, int64_t b, int64_t h,
                                   int part) {
    const Rows<T> out = args.out.at(b, h).from(0, int64_t{part} * kC);
    const int64_t columns = args.d - part * kC;
    if (args.maps() == 0) {
      tiles.block.each(args.K * kC, [&](int64_t i) {
        const int c = static_cast<int>(i % kC);
        if (c < columns) out.at(i / kC, c) = static_cast<T>(tiles.image[c]);
      });
      return;
    }
    tiles.block.each_warp([&](const Warp& warp) {
      auto& sum = sums[warp];
      sum.each([&](const Spot& at, Acc& element) {
        element = (element + tiles.image[at.column]) * args.share;
      });
      sum.store(tiles.q + 16 * warp.index * kLd, kLd);
    });
    store_tile<kRows, kC>(tiles.block, out, args.K, columns, tiles.q, kLd);
  }
};

// One block per (image, head, chunk of columns, row tile of a map or the image's row).
template <class T, int kColumns>
struct RationalRows : RationalStream<T, kColumns, 1> {
  using Stream = RationalStream<T, kColumns, 1>;
  using Acc = AccOf<T>;
  using Args = RationalForwardArgs<T>;
  using Tiles = typename Stream::Tiles;
  using typename Stream::States;
  using Stream::kC, Stream::kLd, Stream::kRows, Stream::kWarps;

  static VTCLIP_BOTH int64_t jobs(const Args& args) {
    return args.has[kImage] + args.maps() * ceil_div(args.K, kRows);
  }
  static VTCLIP_BOTH int64_t blocks(const Args& args) {
    return args.B * args.H * Stream::chunks(args) * jobs(args);
  }

  static VTCLIP_DEVICE void run(const Args& args, int64_t index, Tiles& tiles) {
    const int64_t tiles_of_map = ceil_div(args.K, kRows), all = jobs(args);
    const int64_t job = index % all - args.has[kImage];
    index /= all;
    const int chunks = Stream::chunks(args), part = static_cast<int>(index % chunks);
    index /= chunks;
    const int64_t b = index / args.H, h = index % args.H;
    const bool image = job < 0;
    const int kind = image ? kImage : args.has[kText] && job < tiles_of_map ? kText : kPair;
    const int64_t row0 = image ? 0 : job % tiles_of_map * kRows;
    States states;
    Stream::run(args, tiles, states, b, h, part, kind, row0, image ? 1 : args.K - row0, false);
    if (image) return Stream::finish_image(args, tiles, states, index, part);
    leave(args, tiles, states, index, part, kind, row0);
  }

 private:
  static VTCLIP_DEVICE void leave(const Args& args, Tiles& tiles, States& states, int64_t index,
                                  int part, int kind, int64_t row0) {
    const int rows = static_cast<int>(lesser<int64_t>(kRows, args.K - row0));
    tiles.block.each_once(part == 0 ? rows : 0, [&](int r) {
      args.row_base[kind][index * args.K + row0 + r] = tiles.row_base[r];
      args.row_total[kind][index * args.K + row0 + r] = tiles.row_total[r];
    });
    const Rows<T> parts = args.parts[kind].at(index / args.H, index % args.H);
    tiles.block.each_warp([&](const Warp& warp) {
      auto& own = states[warp];
      // of 16-bit types such rows, averages of values, neither overflow nor underflow
      own.total.each([](const Spot&, Acc& total) { total = total == 0 ? 0 : 1 / total; });
      own.out.each([&](const Spot& at, Acc& element) { element *= own.total[at]; });
      own.out.store(tiles.q + 16 * warp.index * kLd, kLd);
    });
    store_tile<kRows, kC>(tiles.block, parts.from(row0, int64_t{part} * kC), rows,
                          args.d - part * kC, tiles.q, kLd);
  }
};

// One block per (image, head, row tile): parts and out from rows and their weights.
template <class T>
struct RationalCombine {
  using Acc = AccOf<T>;
  using Args = RationalForwardArgs<T>;
  static constexpr int kWarps = 4;
  static constexpr int kRows = 64;

  struct Tiles {
    Shared& shared;
    Block<kWarps> block{shared};
    Acc* weight = shared.take<Acc>(kQueryKinds * kRows);  // [kQueryKinds, kRows]
  };

  static VTCLIP_BOTH int64_t blocks(const Args& args) {
    return args.B * args.H * ceil_div(args.K, kRows);
  }

  static VTCLIP_DEVICE void run(const Args& args, int64_t index, Tiles& tiles) {
    const Block<kWarps>& block = tiles.block;
    const int64_t tiles_of_map = ceil_div(args.K, kRows), tile = index % tiles_of_map;
    index /= tiles_of_map;
    const int64_t row0 = tile * kRows;
    const int rows = static_cast<int>(lesser<int64_t>(kRows, args.K - row0));
    for (int kind = 0; kind < kQueryKinds; ++kind) {
      if (!args.has[kind]) {
        block.once([&] {
          if (tile == 0) args.store_stats(kind, index, 0, 0);
        });
        continue;
      }
      if (kind == kImage) continue;  // RationalRows has written these
      const Acc* row_base = args.row_base[kind] + index * args.K;
      const Acc* row_total = args.row_total[kind] + index * args.K;
      const auto map = RationalMap<Acc>::of(block, args.K, row_base, row_total);
      const Acc factor = static_cast<Acc>(args.K) / map.total;
      block.once([&] {
        if (tile == 0) args.store_stats(kind, index, map.base, map.total);
      });
      block.each_once(rows, [&](int r) {
        tiles.weight[kind * kRows + r] =
            map.weight(row_base[row0 + r], row_total[row0 + r]) * factor;
      });
    }
    sum(args, tiles, index, row0, rows);
  }

 private:
  static VTCLIP_DEVICE void sum(const Args& args, Tiles& tiles, int64_t index, int64_t row0,
                                int rows) {
    const int64_t b = index / args.H, h = index % args.H;
    const int d = static_cast<int>(args.d);
    const Rows<T> out = args.out.at(b, h).from(row0);
    tiles.block.each(rows * d, [&](int i) {
      const int r = i / d, c = i % d;
      Acc total = args.has[kImage] ? args.image_out[index * args.d + c] : 0;
      VTCLIP_UNROLL
      for (int kind = kText; kind <= kPair; ++kind) {
        if (!args.has[kind]) continue;
        T& row = args.parts[kind].at(b, h).from(row0).at(r, c);
        const Acc part = static_cast<Acc>(row) * tiles.weight[kind * kRows + r];
        if (args.keep_parts) row = static_cast<T>(part);
        total += part;
      }
      out.at(r, c) = static_cast<T>(total * args.share);
    });
  }
};

}  // namespace vtclip::cuda
