// SPDX-License-Identifier: Apache-2.0
// The bodies of rational_attn's backward. With dA = d_out v^T, the same for all maps, and `share`
// taken out,
//
//   dS_x = A_x * (dA - c_x),  c_x = (1 / K) sum_i <d_out_i, (A_x v)_i>,  d_q = scale dS k
//   ds   = p * (v r - <r, o>),  r = sum_i d_out_i,  of the image's row p with o = p v
//   d_v  = (A_text + A_pair)^T d_out + p r^T
//   d_k  = scale (sum_x dS_x^T q_x + ds q_image^T)
//
// RationalSums forms c, r, p, ds and d_image, RationalKeys d_key and d_value in a loop over rows,
// RationalQueries d_text and d_pair in a loop over keys and, for a shared text, over images.
#pragma once

#include "rational_attn_block.h"

namespace vtclip::cuda {

template <class T>
struct RationalBackwardArgs : RationalInputs<T> {
  Heads<const T> d_out;                // [B, H, K, d]
  Heads<const T> parts[kQueryKinds];   // [B, H, K, d] of text and pair
  Heads<const AccOf<T>> image_out;     // [B, H, 1, d]
  Heads<const AccOf<T>> stats;         // [3, 2, B, H]
  AccOf<T>* c;                         // [3, B, H], written by RationalSums as the next three
  AccOf<T>* r;                         // [B, H, d]
  AccOf<T>* p;                         // [B, H, K] if there is an image's query
  AccOf<T>* ds;                        // [B, H, K]
  Heads<T> d_query[kQueryKinds];       // as `query`: written
  Heads<T> d_key, d_value;             // [B, H, K, d]: written
  int64_t images;                      // of one block of RationalQueries for the text
  AccOf<T>* text_partial;              // [chunks, K, H, d], contiguous: written in place of
                                       // d_query[kText] if it is not null
};

// A = factor * 2^(s scale_log2 - base) and c of one map.
template <class T>
struct RationalMade {
  using Acc = AccOf<T>;
  Acc scale_log2, base, factor, c;

  static VTCLIP_DEVICE RationalMade of(const RationalBackwardArgs<T>& args, int kind, int64_t b,
                                       int64_t h) {
    const Acc weight = kind == kImage ? 1 : static_cast<Acc>(args.K);
    return {args.scale_log2(), args.stats.at(kind, 0).at(b, h),
            weight / args.stats.at(kind, 1).at(b, h),
            kind == kImage ? 0 : args.c[(kind * args.B + b) * args.H + h]};
  }
  VTCLIP_DEVICE Acc operator()(Acc s) const { return power(s, scale_log2, base) * factor; }
};

// One block per (image, head).
template <class T>
struct RationalSums {
  using Acc = AccOf<T>;
  using Args = RationalBackwardArgs<T>;
  static constexpr int kWarps = 8;  // a thread for each column
  static constexpr int kGroups = 4;
  static_assert(kWarps * kWarpSize == kMaxHeadWidth);

  struct Tiles {
    Shared& shared;
    Block<kWarps> block{shared};
    // [kQueryKinds, kGroups, d]: of r, and of c for text and pair
    Acc* partial = shared.take<Acc>(kQueryKinds * kGroups * kMaxHeadWidth);
    Acc* r = shared.take<Acc>(kMaxHeadWidth);  // [d]
  };

  static VTCLIP_BOTH int64_t blocks(const Args& args) { return args.B * args.H; }

  static VTCLIP_DEVICE void run(const Args& args, int64_t index, Tiles& tiles) {
    const Block<kWarps>& block = tiles.block;
    const int64_t b = index / args.H, h = index % args.H;
    const int d = static_cast<int>(args.d), size = kGroups * d;
    const Rows<const T> d_out = args.d_out.at(b, h);
    block.each(size, [&](int i) {
      const int64_t first = i / d, column = i % d;
      Acc sum[kQueryKinds] = {};
      for (int64_t row = first; row < args.K; row += kGroups) {
        const Acc g = static_cast<Acc>(d_out.at(row, column));
        sum[0] += g;
        VTCLIP_UNROLL
        for (int kind = kText; kind <= kPair; ++kind) {
          if (!args.has[kind]) continue;
          sum[kind] += g * static_cast<Acc>(args.parts[kind].at(b, h).at(row, column));
        }
      }
      VTCLIP_UNROLL
      for (int kind = 0; kind < kQueryKinds; ++kind) tiles.partial[kind * size + i] = sum[kind];
    });
    for (int kind = kText; kind <= kPair; ++kind) {
      const Acc sum = block.sum(size, [&](int i) { return tiles.partial[kind * size + i]; });
      block.once([&] { args.c[kind * args.B * args.H + index] = sum / static_cast<Acc>(args.K); });
    }
    block.each_once(d, [&](int column) {
      const Acc sum = of_groups(tiles, d, column);
      tiles.r[column] = sum;
      args.r[index * d + column] = sum;
    });
    if (args.has[kImage]) image(args, tiles, index, b, h);
  }

 private:
  static VTCLIP_DEVICE Acc of_groups(const Tiles& tiles, int d, int column) {
    Acc sum = 0;
    for (int group = 0; group < kGroups; ++group) sum += tiles.partial[group * d + column];
    return sum;
  }

  static VTCLIP_DEVICE void image(const Args& args, Tiles& tiles, int64_t index, int64_t b,
                                  int64_t h) {
    const Block<kWarps>& block = tiles.block;
    const int d = static_cast<int>(args.d);
    const Rows<const T> query = args.query[kImage].at(b, h), key = args.key.at(b, h);
    const Rows<const T> value = args.value.at(b, h);
    const Rows<const Acc> o = args.image_out.at(b, h);
    const Acc along = block.sum(kMaxHeadWidth, [&](int i) {
      return i < d ? tiles.r[i] * o.at(0, i) : 0;
    });
    const auto made = RationalMade<T>::of(args, kImage, b, h);
    Acc* p = args.p + index * args.K;
    Acc* ds = args.ds + index * args.K;
    block.template each_row<kWarpSize>(args.K, [&](auto lanes, int64_t j) {
      const Acc s = lanes.sum(d, [&](int i) {
        return static_cast<Acc>(query.at(0, i)) * static_cast<Acc>(key.at(j, i));
      });
      const Acc d_a = lanes.sum(d, [&](int i) {
        return tiles.r[i] * static_cast<Acc>(value.at(j, i));
      });
      const Acc weight = made(s);
      lanes.once([&] {
        p[j] = weight;
        ds[j] = weight * (d_a - along);
      });
    });
    block.each(kGroups * d, [&](int i) {
      Acc sum = 0;
      for (int64_t j = i / d; j < args.K; j += kGroups) {
        sum += ds[j] * static_cast<Acc>(key.at(j, i % d));
      }
      tiles.partial[i] = sum;
    });
    const Rows<T> d_query = args.d_query[kImage].at(b, h);
    block.each_once(d, [&](int i) {
      d_query.at(0, i) = static_cast<T>(of_groups(tiles, d, i) * (args.scale * args.share));
    });
  }
};

// What a block of the next two keeps: two tiles of its own rows, and two that pass, each twice, so
// that the next one comes while one is multiplied.
template <class T, class Tile>
struct RationalBackwardTiles {
  Shared& shared;
  Block<Tile::kWarps> block{shared};
  T* own_a = shared.take<T>(Tile::kRows * Tile::kLd);   // [kRows, kLd]
  T* own_b = shared.take<T>(Tile::kRows * Tile::kLd);   // [kRows, kLd]
  T* steps_a = shared.take<T>(2 * Tile::kStep * Tile::kLd);  // [2, kStep, kLd]
  T* steps_b = shared.take<T>(2 * Tile::kStep * Tile::kLd);  // [2, kStep, kLd]
  T* p = shared.take<T>(Tile::kRows * Tile::kLdStep);        // [kRows, kLdStep]

  VTCLIP_DEVICE T* step_a(int slot) const { return steps_a + slot * Tile::kStep * Tile::kLd; }
  VTCLIP_DEVICE T* step_b(int slot) const { return steps_b + slot * Tile::kStep * Tile::kLd; }
};

// own step^T of a warp, one chunk, into `scores`
template <class Tile, class T, class Scores>
VTCLIP_DEVICE void rational_product(const Warp& warp, Scores& scores, const T* own, const T* step,
                                    int64_t d, int c) {
  if (c == 0) scores.fill(0);
  scores.template add_product<false, true>(own + 16 * warp.index * Tile::kLd, Tile::kLd, step,
                                           Tile::kLd, Tile::summed(d, c));
}

// The same over all of several chunks, one after the other, into a tile of each warp: pick(warp).
// `own` and `step` are shared tiles; of `step` chunk `part` stays.
template <class T, class Tile, class Pick>
VTCLIP_DEVICE void rational_scores(RationalBackwardTiles<T, Tile>& tiles, T* own, T* step,
                                   const Rows<const T>& own_rows, int64_t rows,
                                   const Rows<const T>& step_rows, int64_t steps, int64_t d,
                                   int chunks, int part, Pick pick) {
  const auto& block = tiles.block;
  VTCLIP_ROLLED
  for (int c = 0; c < chunks; ++c) {
    Tile::load_own(block, own, own_rows, rows, d, c);
    Tile::load_step(block, step, step_rows, steps, d, c);
    block.arrive();
    block.each_warp([&](const Warp& warp) {
      if (!Tile::idle(warp, rows)) rational_product<Tile>(warp, pick(warp), own, step, d, c);
    });
  }
  if (part == chunks - 1) return;
  Tile::load_step(block, step, step_rows, steps, d, part);
  block.arrive();
}

// One block per (image, head, chunk of columns, key tile).
template <class T, int kColumns>
struct RationalKeys : RationalTile<T, kColumns, rational_step<T>(kColumns, 2)> {
  using Tile = RationalTile<T, kColumns, rational_step<T>(kColumns, 2)>;
  using Acc = AccOf<T>;
  using Args = RationalBackwardArgs<T>;
  using Tiles = RationalBackwardTiles<T, Tile>;  // own: keys, values; step: queries, d_out
  using Tile::kC, Tile::kLd, Tile::kLdStep, Tile::kRows, Tile::kStep, Tile::kWarps;

  static VTCLIP_BOTH int64_t blocks(const Args& args) {
    return args.B * args.H * Tile::chunks(args) * ceil_div(args.K, kRows);
  }

  static VTCLIP_DEVICE void run(const Args& args, int64_t index, Tiles& tiles) {
    const int64_t tiles_of_map = ceil_div(args.K, kRows), row0 = index % tiles_of_map * kRows;
    index /= tiles_of_map;
    const int chunks = Tile::chunks(args), part = static_cast<int>(index % chunks);
    index /= chunks;
    const int64_t b = index / args.H, h = index % args.H, rows = args.K - row0;
    const Rows<const T> key = args.key.at(b, h).from(row0);
    const Rows<const T> value = args.value.at(b, h).from(row0);
    States states;
    tiles.block.each_warp([&](const Warp& warp) {
      states[warp].d_k.fill(0);
      states[warp].d_v.fill(0);
    });
    if (args.maps() > 0) {
      if (chunks == 1) {
        Tile::load_own(tiles.block, tiles.own_a, key, rows, args.d, 0);
        Tile::load_own(tiles.block, tiles.own_b, value, rows, args.d, 0);
        stream(args, tiles, states, b, h, rows);
      } else {
        for (int64_t start = 0; start < args.K; start += kStep) {
          add_chunks(args, tiles, states, b, h, part, key, value, rows, start);
        }
      }
    }
    finish(args, tiles, states, index, part, row0);
  }

 private:
  struct State {
    WarpTile<T, 16, kStep> s, d_a, a;
    WarpTile<T, 16, kC> d_k, d_v;
  };
  using States = PerWarp<State, kWarps>;

  // All steps of a head in one chunk. A turn is one map's queries of a step; the next turn's come
  // while it is multiplied, and in a step's last turn the next step's d_out.
  static VTCLIP_DEVICE void stream(const Args& args, Tiles& tiles, States& states, int64_t b,
                                   int64_t h, int64_t rows) {
    const Block<kWarps>& block = tiles.block;
    const int first = args.has[kText] ? kText : kPair, last = args.has[kPair] ? kPair : kText;
    const auto load = [&](int64_t start, int kind, int slot) {
      Tile::load_step(block, tiles.step_a(slot), args.query[kind].at(b, h).from(start),
                      args.K - start, args.d, 0);
      if (kind != first) return;
      Tile::load_step(block, tiles.step_b(static_cast<int>(start / kStep % 2)),
                      args.d_out.at(b, h).from(start), args.K - start, args.d, 0);
    };
    load(0, first, 0);
    int64_t start = 0;
    int slot = 0, kind = first;
    VTCLIP_ROLLED
    while (start < args.K) {
      const int64_t next_start = kind == last ? start + kStep : start;
      const int next_kind = kind == last ? first : last;
      block.arrive();  // this turn is there, the one before is read
      if (next_start < args.K) load(next_start, next_kind, 1 - slot);
      const T* d_out = tiles.step_b(static_cast<int>(start / kStep % 2));
      const T* query = tiles.step_a(slot);
      const RationalMade<T> made = RationalMade<T>::of(args, kind, b, h);
      block.loose().each_warp([&](const Warp& warp) {
        if (Tile::idle(warp, rows)) return;
        State& own = states[warp];
        if (kind == first) {
          rational_product<Tile>(warp, own.d_a, tiles.own_b, d_out, args.d, 0);
          own.a.fill(0);
        }
        rational_product<Tile>(warp, own.s, tiles.own_a, query, args.d, 0);
        add_key(own, tiles, warp, made, query, args.K - start);
        if (kind == last) add_value(own, tiles, warp, d_out);
      });
      start = next_start;
      kind = next_kind;
      slot = 1 - slot;
    }
  }

  // A step of a head in several chunks.
  static VTCLIP_DEVICE void add_chunks(const Args& args, Tiles& tiles, States& states, int64_t b,
                                       int64_t h, int part, const Rows<const T>& key,
                                       const Rows<const T>& value, int64_t rows, int64_t start) {
    const Block<kWarps>& block = tiles.block;
    const int64_t steps = args.K - start;
    const int chunks = Tile::chunks(args);
    rational_scores(tiles, tiles.own_b, tiles.step_b(0), value, rows,
                    args.d_out.at(b, h).from(start), steps, args.d, chunks, part,
                    [&](const Warp& warp) -> auto& { return states[warp].d_a; });
    block.loose().each_warp([&](const Warp& warp) { states[warp].a.fill(0); });
    VTCLIP_ROLLED
    for (int kind = kText; kind <= kPair; ++kind) {
      if (!args.has[kind]) continue;
      rational_scores(tiles, tiles.own_a, tiles.step_a(0), key, rows,
                      args.query[kind].at(b, h).from(start), steps, args.d, chunks, part,
                      [&](const Warp& warp) -> auto& { return states[warp].s; });
      const RationalMade<T> made = RationalMade<T>::of(args, kind, b, h);
      block.each_warp([&](const Warp& warp) {
        if (!Tile::idle(warp, rows)) {
          add_key(states[warp], tiles, warp, made, tiles.step_a(0), steps);
        }
      });
    }
    block.each_warp([&](const Warp& warp) {
      if (!Tile::idle(warp, rows)) add_value(states[warp], tiles, warp, tiles.step_b(0));
    });
  }

  static VTCLIP_DEVICE void add_key(State& own, Tiles& tiles, const Warp& warp,
                                    const RationalMade<T>& made, const T* query, int64_t steps) {
    own.s.each([&](const Spot& at, Acc& s) { s = at.column < steps ? made(s) : 0; });
    own.a.with(own.s, [](const Spot&, Acc& a, Acc one) { a += one; });
    own.s.with(own.d_a, [&](const Spot&, Acc& s, Acc d_a) { s *= d_a - made.c; });
    own.d_k.add_product(own.s, tiles.p + 16 * warp.index * kLdStep, kLdStep, query, kLd);
  }

  static VTCLIP_DEVICE void add_value(State& own, Tiles& tiles, const Warp& warp,
                                      const T* d_out) {
    own.d_v.add_product(own.a, tiles.p + 16 * warp.index * kLdStep, kLdStep, d_out, kLd);
  }

  static VTCLIP_DEVICE void finish(const Args& args, Tiles& tiles, States& states, int64_t index,
                                   int part, int64_t row0) {
    const int64_t b = index / args.H, h = index % args.H, column0 = int64_t{part} * kC;
    const Rows<const T> image = args.query[kImage].at(b, h);
    tiles.block.each_warp([&](const Warp& warp) {
      State& own = states[warp];
      const int64_t first = row0 + 16 * warp.index;
      const auto inside = [&](const Spot& at) {
        return args.has[kImage] && first + at.row < args.K && column0 + at.column < args.d;
      };
      own.d_k.each([&](const Spot& at, Acc& sum) {
        if (inside(at)) {
          const Acc weight = args.ds[index * args.K + first + at.row];
          sum += weight * static_cast<Acc>(image.at(0, column0 + at.column));
        }
        sum *= args.scale * args.share;
      });
      own.d_k.store(tiles.own_a + 16 * warp.index * kLd, kLd);
      own.d_v.each([&](const Spot& at, Acc& sum) {
        if (inside(at)) {
          const Acc weight = args.p[index * args.K + first + at.row];
          sum += weight * args.r[index * args.d + column0 + at.column];
        }
        sum *= args.share;
      });
      own.d_v.store(tiles.own_b + 16 * warp.index * kLd, kLd);
    });
    const int64_t rows = args.K - row0, columns = args.d - column0;
    store_tile<kRows, kC>(tiles.block, args.d_key.at(b, h).from(row0, column0), rows, columns,
                          tiles.own_a, kLd);
    store_tile<kRows, kC>(tiles.block, args.d_value.at(b, h).from(row0, column0), rows, columns,
                          tiles.own_b, kLd);
  }
};

// One block per (image or chunk of images, head, chunk of columns, row tile) of text and pair.
template <class T, int kColumns>
struct RationalQueries : RationalTile<T, kColumns, rational_step<T>(kColumns, 2)> {
  using Tile = RationalTile<T, kColumns, rational_step<T>(kColumns, 2)>;
  using Acc = AccOf<T>;
  using Args = RationalBackwardArgs<T>;
  using Tiles = RationalBackwardTiles<T, Tile>;  // own: queries, d_out; step: keys, values
  using Tile::kC, Tile::kLd, Tile::kLdStep, Tile::kRows, Tile::kStep, Tile::kWarps;

  static VTCLIP_BOTH int64_t blocks_of_image(const Args& args) {
    return args.H * Tile::chunks(args) * ceil_div(args.K, kRows);
  }
  static VTCLIP_BOTH int64_t text_blocks(const Args& args) {
    return args.has[kText] ? ceil_div(args.B, args.images) * blocks_of_image(args) : 0;
  }
  static VTCLIP_BOTH int64_t blocks(const Args& args) {
    return text_blocks(args) + (args.has[kPair] ? args.B * blocks_of_image(args) : 0);
  }

  static VTCLIP_DEVICE void run(const Args& args, int64_t index, Tiles& tiles) {
    const int64_t of_text = text_blocks(args);
    const bool text = index < of_text;
    if (!text) index -= of_text;
    const int64_t tiles_of_map = ceil_div(args.K, kRows), row0 = index % tiles_of_map * kRows;
    index /= tiles_of_map;
    const int chunks = Tile::chunks(args), part = static_cast<int>(index % chunks);
    index /= chunks;
    const int64_t h = index % args.H, group = index / args.H, images = text ? args.images : 1;
    const int64_t first = group * images, last = lesser(args.B, first + images);
    const int64_t rows = args.K - row0;
    const int kind = text ? kText : kPair;
    States states;
    tiles.block.each_warp([&](const Warp& warp) { states[warp].d_q.fill(0); });
    if (chunks == 1 && first < last) {
      // images share the text
      Tile::load_own(tiles.block, tiles.own_a, args.query[kind].at(first, h).from(row0), rows,
                     args.d, 0);
      load_steps(args, tiles, first, h, 0, 0);
    }
    int slot = 0;
    for (int64_t b = first; b < last; ++b) {
      const Rows<const T> d_out = args.d_out.at(b, h).from(row0);
      const auto made = RationalMade<T>::of(args, kind, b, h);
      if (chunks == 1) {
        if (b != first) tiles.block.sync();  // d_out of the image before is read
        Tile::load_own(tiles.block, tiles.own_b, d_out, rows, args.d, 0);
      }
      for (int64_t start = 0; start < args.K; start += kStep) {
        if (chunks == 1) {
          add(args, tiles, states, made, b, last, h, rows, start, slot);
          slot = 1 - slot;
        } else {
          add_chunks(args, tiles, states, made, b, h, part, args.query[kind].at(b, h).from(row0),
                     d_out, rows, start);
        }
      }
    }
    finish(args, tiles, states, group, h, part, kind, row0);
  }

 private:
  struct State {
    WarpTile<T, 16, kStep> s, d_a;
    WarpTile<T, 16, kC> d_q;
  };
  using States = PerWarp<State, kWarps>;

  // keys and values of a step of a head in one chunk
  static VTCLIP_DEVICE void load_steps(const Args& args, Tiles& tiles, int64_t b, int64_t h,
                                       int64_t start, int slot) {
    const int64_t steps = args.K - start;
    Tile::load_step(tiles.block, tiles.step_a(slot), args.key.at(b, h).from(start), steps, args.d,
                    0);
    Tile::load_step(tiles.block, tiles.step_b(slot), args.value.at(b, h).from(start), steps, args.d,
                    0);
  }

  // A step of a head in one chunk; the next one's keys and values, of this image or the next, come
  // meanwhile.
  static VTCLIP_DEVICE void add(const Args& args, Tiles& tiles, States& states,
                                const RationalMade<T>& made, int64_t b, int64_t last, int64_t h,
                                int64_t rows, int64_t start, int slot) {
    const Block<kWarps>& block = tiles.block;
    block.arrive();  // this step is there, the one before is read
    const bool goes_on = start + kStep < args.K;
    if (goes_on || b + 1 < last) {
      load_steps(args, tiles, goes_on ? b : b + 1, h, goes_on ? start + kStep : 0, 1 - slot);
    }
    block.loose().each_warp([&](const Warp& warp) {
      if (Tile::idle(warp, rows)) return;
      State& own = states[warp];
      rational_product<Tile>(warp, own.d_a, tiles.own_b, tiles.step_b(slot), args.d, 0);
      rational_product<Tile>(warp, own.s, tiles.own_a, tiles.step_a(slot), args.d, 0);
      add_query(own, tiles, warp, made, tiles.step_a(slot), args.K - start);
    });
  }

  // A step of a head in several chunks.
  static VTCLIP_DEVICE void add_chunks(const Args& args, Tiles& tiles, States& states,
                                       const RationalMade<T>& made, int64_t b, int64_t h, int part,
                                       const Rows<const T>& query, const Rows<const T>& d_out,
                                       int64_t rows, int64_t start) {
    const int64_t steps = args.K - start;
    const int chunks = Tile::chunks(args);
    rational_scores(tiles, tiles.own_b, tiles.step_b(0), d_out, rows,
                    args.value.at(b, h).from(start), steps, args.d, chunks, chunks - 1,
                    [&](const Warp& warp) -> auto& { return states[warp].d_a; });
    rational_scores(tiles, tiles.own_a, tiles.step_a(0), query, rows,
                    args.key.at(b, h).from(start), steps, args.d, chunks, part,
                    [&](const Warp& warp) -> auto& { return states[warp].s; });
    tiles.block.each_warp([&](const Warp& warp) {
      if (!Tile::idle(warp, rows)) {
        add_query(states[warp], tiles, warp, made, tiles.step_a(0), steps);
      }
    });
  }

  static VTCLIP_DEVICE void add_query(State& own, Tiles& tiles, const Warp& warp,
                                      const RationalMade<T>& made, const T* key, int64_t steps) {
    own.s.with(own.d_a, [&](const Spot& at, Acc& s, Acc d_a) {
      s = at.column < steps ? made(s) * (d_a - made.c) : 0;
    });
    own.d_q.add_product(own.s, tiles.p + 16 * warp.index * kLdStep, kLdStep, key, kLd);
  }

  static VTCLIP_DEVICE void finish(const Args& args, Tiles& tiles, States& states, int64_t group,
                                   int64_t h, int part, int kind, int64_t row0) {
    const bool partial = kind == kText && args.text_partial != nullptr;
    const Acc factor = args.scale * args.share;
    const int64_t rows = args.K - row0, column0 = int64_t{part} * kC, columns = args.d - column0;
    tiles.block.each_warp([&](const Warp& warp) {
      auto& d_q = states[warp].d_q;
      d_q.each([&](const Spot&, Acc& sum) { sum *= factor; });
      const int strip = 16 * warp.index;
      if (partial) {
        const int64_t row = (group * args.K + row0 + strip) * args.H + h;
        Acc* to = args.text_partial + row * args.d + column0;
        d_q.each([&](const Spot& at, Acc& sum) {
          if (strip + at.row < rows && at.column < columns) {
            to[at.row * args.H * args.d + at.column] = sum;
          }
        });
      } else {
        d_q.store(tiles.own_a + strip * kLd, kLd);
      }
    });
    if (partial) return;
    store_tile<kRows, kC>(tiles.block, args.d_query[kind].at(group, h).from(row0, column0), rows,
                          columns, tiles.own_a, kLd);
  }
};

}  // namespace vtclip::cuda
