// SPDX-License-Identifier: Apache-2.0
// The bodies of cross_attn's backward.
//
//   P = exp(S - lse), dP = d_out v^T, delta = rowsum(d_out * out) - d_lse
//   dS = P * (dP - delta), d_query = scale dS k, d_key = scale dS^T q, d_value = P^T d_out
//
// CrossAttnQueryGradient keeps a tile of queries and streams images, where they share the queries,
// and keys past it; it leaves delta behind. CrossAttnKeyGradient keeps a tile of keys of one image
// and streams queries.
#pragma once

#include "cuda/block/attn_block.h"

namespace vtclip::cuda {

template <class T>
struct CrossAttnBackwardArgs : AttnGradientArgs<T> {
  Heads<const T> d_out, value, out;
  Heads<const AccOf<T>> d_lse;  // [B, H, K, 1], or null
  Heads<const AccOf<T>> lse;    // [B, H, K, 1]
  Heads<T> d_value;             // [B, H, L, d]: written
};

// log sum exp in powers of two; of a row without columns any finite number does
template <class Acc>
VTCLIP_DEVICE Acc lse_in_powers(Acc lse) {
  return lse == -infinity<Acc>() ? 0 : lse * static_cast<Acc>(kLog2E);
}

template <class T, int kD>
struct CrossAttnQueryGradient : AttnTile<T, kD> {
  using Base = AttnTile<T, kD>;
  using Acc = AccOf<T>;
  using Args = CrossAttnBackwardArgs<T>;
  using Base::kC, Base::kChunks, Base::kLd, Base::kLdStep, Base::kOut, Base::kOutChunks;
  using Base::kRows, Base::kStep, Base::kWarps;
  using Step = typename Base::Step;

  struct Tiles {
    Shared& shared;
    Block<kWarps> block{shared};
    T* q = shared.take<T>(kRows * kLd);        // [kRows, kLd]
    T* d_o = shared.take<T>(kRows * kLd);      // [kRows, kLd]
    T* k = shared.take<T>(kStep * kLd);        // [kStep, kLd]
    T* v = shared.take<T>(kStep * kLd);        // [kStep, kLd]
    T* d_s = shared.take<T>(kRows * kLdStep);  // [kRows, kLdStep]
    Acc* lse = shared.take<Acc>(kRows);        // [kRows], in powers of two
    Acc* delta = shared.take<Acc>(kRows);      // [kRows]
    bool* keep = shared.take<bool>(2 * kStep);  // [2, kStep]: of this step and the next
  };

  static VTCLIP_BOTH int64_t blocks(const Args& args) { return Base::query_blocks(args); }

  static VTCLIP_DEVICE void run(const Args& args, int64_t index, Tiles& tiles) {
    const AttnShape& n = args.shape;
    const AttnPlace place = Base::place(n, index, n.K);
    Step step{place.image * args.images, 0, 0};
    const int64_t last = lesser(n.B, step.b + args.images);
    if (kChunks == 1 && n.L > 0 && step.b < last) {
      Base::keep_step(tiles.block, n, tiles.keep, step, last);
      tiles.block.sync();
      load_rows(args, tiles.q, args.query, tiles, step.b, place, 0);  // images share it
      load_values(args, tiles, step, place);
    }
    const auto add = [&](PerWarp<State, kWarps>& states, const AttnPlace& at, int64_t b) {
      if (kChunks > 1) {
        row_statistics(args, tiles, b, at);
        tiles.block.sync();
      }
      for (int64_t start = 0; start < n.L; start += kStep) {
        if constexpr (kChunks == 1) {
          step = add_step(args, tiles, states, step, last, at);
        } else {
          add_chunks(args, tiles, states, {b, start, 0}, at);
        }
      }
    };
    Base::template query_gradient<State>(args, index, tiles.block, tiles.d_s, add);
  }

 private:
  struct State {
    WarpTile<T, 16, kStep> s, d_p;
    WarpTile<T, 16, kC> d_q[kOutChunks];
  };

  static VTCLIP_DEVICE void load_rows(const Args& args, T* to, const Heads<const T>& from,
                                      Tiles& tiles, int64_t b, const AttnPlace& at, int c) {
    Base::load_rows(tiles.block, to, from.at(b, at.head), args.shape.K, args.shape.d, at.tile, c);
  }
  // of a head in one chunk: the values of a step and, of an image's first, the rows of d_out
  static VTCLIP_DEVICE void load_values(const Args& args, Tiles& tiles, const Step& step,
                                        const AttnPlace& at) {
    if (step.start == 0) load_rows(args, tiles.d_o, args.d_out, tiles, step.b, at, 0);
    Base::load_kept(tiles.block, tiles.v, args.value.at(step.b, at.head).from(step.start), 0,
                    args.shape.d, step.keep(tiles.keep));
  }

  // What one of two lanes adds to <left, right>, two rows of n elements: every other 16 bytes of
  // them, as many loads at once as there are in a chunk.
  static VTCLIP_DEVICE Acc half_of_dot(const Rows<const T>& left, const Rows<const T>& right,
                                       int64_t n, int lane) {
    using Packed = Vector<T>;
    constexpr int kSize = Packed::kSize, kAtOnce = kChunks == 1 ? kC / (2 * kSize) : 4;
    Acc sum = 0;
    if (n % kSize != 0 || !vectors_fit(left) || !vectors_fit(right)) {
      VTCLIP_ROLLED
      for (int64_t c = lane; c < n; c += 2) {
        sum += static_cast<Acc>(left.at(0, c)) * static_cast<Acc>(right.at(0, c));
      }
      return sum;
    }
    VTCLIP_ROLLED
    for (int64_t first = lane * kSize; first < n; first += 2 * kSize * kAtOnce) {
      Packed a[kAtOnce], b[kAtOnce];
      VTCLIP_UNROLL
      for (int i = 0; i < kAtOnce; ++i) {
        const int64_t c = first + 2 * kSize * i;
        if (c >= n) a[i] = b[i] = zeros<T>();
        else a[i] = vector_at(left, c), b[i] = vector_at(right, c);
      }
      VTCLIP_UNROLL
      for (int i = 0; i < kAtOnce; ++i) {
        VTCLIP_UNROLL
        for (int e = 0; e < kSize; ++e) {
          sum += static_cast<Acc>(a[i].element[e]) * static_cast<Acc>(b[i].element[e]);
        }
      }
    }
    return sum;
  }

  // lse and delta of the block's rows, in shared memory; delta in global memory too. A head in one
  // chunk has its rows of d_out in place.
  static VTCLIP_DEVICE void row_statistics(const Args& args, Tiles& tiles, int64_t b,
                                           const AttnPlace& at) {
    const AttnShape& n = args.shape;
    tiles.block.loose().template each_row<2>(kRows, [&](const auto& lanes, int r) {
      const int64_t row = at.tile * kRows + r;
      Acc delta = 0, lse = 0;
      if (row < n.K) {
        const Rows<const T> out = args.out.at(b, at.head).from(row);
        const Rows<const T> d_o = kChunks == 1 ? Rows<const T>{tiles.d_o + r * kLd, 0, 1}
                                               : args.d_out.at(b, at.head).from(row);
        delta = lanes.sum(2, [&](int lane) { return half_of_dot(d_o, out, n.d, lane); });
        if (args.d_lse.base != nullptr) delta -= args.d_lse.at(b, at.head).at(row, 0);
        lse = lse_in_powers(args.lse.at(b, at.head).at(row, 0));
      }
      lanes.once([&] {
        tiles.lse[r] = lse;
        tiles.delta[r] = delta;
        if (row < n.K && at.part == 0) args.delta[(b * n.H + at.head) * n.K + row] = delta;
      });
    });
  }

  // A step of a head in one chunk. Its values are on their way when it begins; its keys come while
  // dP is computed, the next step's values, of this image or the next, during the rest.
  static VTCLIP_DEVICE Step add_step(const Args& args, Tiles& tiles,
                                     PerWarp<State, kWarps>& states, const Step& step, int64_t last,
                                     const AttnPlace& at) {
    const AttnShape& n = args.shape;
    const Block<kWarps>& block = tiles.block;
    const Step next = step.next(n.L);
    block.arrive();  // values, d_out are there; keys, statistics, the other slot are free
    Base::load_kept(block, tiles.k, args.key.at(step.b, at.head).from(step.start), 0, n.d,
                    step.keep(tiles.keep));
    Base::keep_step(block, n, tiles.keep, next, last);
    if (step.start == 0) row_statistics(args, tiles, step.b, at);
    block.loose().each_warp([&](const Warp& warp) {
      State& own = states[warp];
      own.d_p.fill(0);
      own.d_p.template add_product<false, true>(tiles.d_o + 16 * warp.index * kLd, kLd, tiles.v,
                                                kLd, summed<kC, Base::kChunks>(n.d, 0));
    });
    block.arrive();  // keys, statistics are there; values, d_out are free
    if (next.b < last) load_values(args, tiles, next, at);
    block.loose().each_warp([&](const Warp& warp) {
      State& own = states[warp];
      const int strip = 16 * warp.index;
      own.s.fill(0);
      own.s.template add_product<false, true>(tiles.q + strip * kLd, kLd, tiles.k, kLd,
                                              summed<kC, Base::kChunks>(n.d, 0));
      combine(own, tiles, step, strip, args.scale * static_cast<Acc>(kLog2E));
      own.d_q[0].add_product(own.s, tiles.d_s + strip * kLdStep, kLdStep, tiles.k, kLd);
    });
    return next;
  }

  // A step of a head in several chunks, one after the other.
  static VTCLIP_DEVICE void add_chunks(const Args& args, Tiles& tiles,
                                       PerWarp<State, kWarps>& states, const Step& step,
                                       const AttnPlace& at) {
    const AttnShape& n = args.shape;
    const Block<kWarps>& block = tiles.block;
    const Rows<const T> key = args.key.at(step.b, at.head).from(step.start);
    const Rows<const T> value = args.value.at(step.b, at.head).from(step.start);
    Base::keep_step(block, n, tiles.keep, step, n.B);
    block.sync();
    VTCLIP_UNROLL
    for (int c = 0; c < kChunks; ++c) {
      load_rows(args, tiles.q, args.query, tiles, step.b, at, c);
      load_rows(args, tiles.d_o, args.d_out, tiles, step.b, at, c);
      Base::load_kept(block, tiles.v, value, c * kC, n.d, tiles.keep);
      Base::load_kept(block, tiles.k, key, c * kC, n.d, tiles.keep);
      block.arrive();
      block.each_warp([&](const Warp& warp) {
        State& own = states[warp];
        const int strip = 16 * warp.index, k = summed<kC, Base::kChunks>(n.d, c);
        if (c == 0) own.s.fill(0);
        if (c == 0) own.d_p.fill(0);
        own.s.template add_product<false, true>(tiles.q + strip * kLd, kLd, tiles.k, kLd, k);
        own.d_p.template add_product<false, true>(tiles.d_o + strip * kLd, kLd, tiles.v, kLd, k);
        if (c < kChunks - 1) return;
        combine(own, tiles, step, strip, args.scale * static_cast<Acc>(kLog2E));
        own.s.store(tiles.d_s + strip * kLdStep, kLdStep);
      });
    }
    Base::add_keys(tiles, states, key, at, n.d, tiles.keep);
  }

  // s becomes dS without the scale
  static VTCLIP_DEVICE void combine(State& own, const Tiles& tiles, const Step& step, int strip,
                                    Acc scale_log2) {
    const bool* keep = step.keep(tiles.keep);
    own.s.with(own.d_p, [&](const Spot& spot, Acc& s, Acc d_p) {
      const Acc p = exp2_of(s * scale_log2 - tiles.lse[strip + spot.row]);
      // by selection, not by a factor 0: delta of an empty row may be anything
      s = keep[spot.column] ? p * (d_p - tiles.delta[strip + spot.row]) : 0;
    });
  }
};

template <class T, int kD>
struct CrossAttnKeyGradient : AttnTile<T, kD> {
  using Base = AttnTile<T, kD>;
  using Acc = AccOf<T>;
  using Args = CrossAttnBackwardArgs<T>;
  using Base::kC, Base::kChunks, Base::kLd, Base::kOut, Base::kOutChunks, Base::kRows, Base::kWarps;
  // two results: a step that leaves room for them
  static constexpr int kStep = lesser(Base::kStep, 32);
  static constexpr int kLdStep = tile_stride<T>(kStep);

  struct Tiles {
    Shared& shared;
    Block<kWarps> block{shared};
    T* k = shared.take<T>(kRows * kLd);      // [kRows, kLd]
    T* v = shared.take<T>(kRows * kLd);      // [kRows, kLd]
    T* q = shared.take<T>(kStep * kLd);      // [kStep, kLd]
    T* d_o = shared.take<T>(kStep * kLd);    // [kStep, kLd]
    T* p = shared.take<T>(kRows * kLdStep);  // [kRows, kLdStep], then dS
    Acc* lse = shared.take<Acc>(kStep);      // [kStep], in powers of two
    Acc* delta = shared.take<Acc>(kStep);    // [kStep]
    bool* keep = shared.take<bool>(kRows);   // [kRows]
  };

  static VTCLIP_BOTH int64_t blocks(const Args& args) {
    return Base::output_blocks(args.shape, args.shape.B, args.shape.L);
  }

  static VTCLIP_DEVICE void run(const Args& args, int64_t index, Tiles& tiles) {
    const AttnShape& n = args.shape;
    const Block<kWarps>& block = tiles.block;
    const AttnPlace at = attn_place(index, n.H, attn_parts(n.d, kOut), ceil_div(n.L, kRows));
    const int64_t row0 = at.tile * kRows;
    block.each(kRows, [&](int r) { tiles.keep[r] = n.keeps(at.image, row0 + r); });
    PerWarp<State, kWarps> states;
    block.loose().each_warp([&](const Warp& warp) {
      Base::clear(states[warp].d_k);
      Base::clear(states[warp].d_v);
    });
    if constexpr (kChunks == 1) {
      if (n.K > 0) {
        load_keys(args, tiles, at, 0);
        begin(args, tiles, at, 0);
      }
      for (int64_t start = 0; start < n.K; start += kStep) add(args, tiles, states, at, start);
    } else {
      for (int64_t start = 0; start < n.K; start += kStep) {
        add_chunks(args, tiles, states, at, start);
      }
    }
    block.loose().each_warp([&](const Warp& warp) {
      State& own = states[warp];
      T* strip = tiles.p + 16 * warp.index * kLdStep;
      VTCLIP_UNROLL
      for (int c = 0; c < kOutChunks; ++c) {
        Base::keep_rows(own.d_k[c], warp, tiles.keep);
        Base::keep_rows(own.d_v[c], warp, tiles.keep);
        Base::template put_key<kStep>(n, args.d_key, own.d_k[c], strip, at, warp, c, args.scale);
        Base::template put_key<kStep>(n, args.d_value, own.d_v[c], strip, at, warp, c, Acc(1));
      }
    });
  }

 private:
  struct State {
    WarpTile<T, 16, kStep> s, d_p;
    WarpTile<T, 16, kC> d_k[kOutChunks], d_v[kOutChunks];
  };

  static VTCLIP_DEVICE void load_keys(const Args& args, Tiles& tiles, const AttnPlace& at, int c) {
    const auto load = [&](T* to, const Heads<const T>& from) {
      copy_tile<kRows, kC>(tiles.block.loose(), to, kLd,
                           from.at(at.image, at.head).from(at.tile * kRows, c * kC),
                           args.shape.d - c * kC, [&](int r) { return tiles.keep[r]; });
    };
    load(tiles.k, args.key);
    load(tiles.v, args.value);
  }

  // a step of queries or of d_out
  static VTCLIP_DEVICE void load_queries(const Args& args, Tiles& tiles, T* to,
                                         const Heads<const T>& from, const AttnPlace& at,
                                         int64_t start, int64_t column) {
    const int64_t rows = args.shape.K - start;
    copy_tile<kStep, kC>(tiles.block.loose(), to, kLd,
                         from.at(at.image, at.head).from(start, column), args.shape.d - column,
                         [&](int r) { return r < rows; });
  }

  static VTCLIP_DEVICE void load_statistics(const Args& args, Tiles& tiles, const AttnPlace& at,
                                            int64_t start) {
    static_assert(kStep <= Block<kWarps>::kThreads);
    tiles.block.loose().each_thread([&](int r) {
      if (r >= kStep) return;
      const int64_t row = start + r;
      const bool exists = row < args.shape.K;
      tiles.lse[r] =
          exists ? lse_in_powers(args.lse.at(at.image, at.head).at(row, 0)) : static_cast<Acc>(0);
      tiles.delta[r] =
          exists ? args.delta[(at.image * args.shape.H + at.head) * args.shape.K + row] : 0;
    });
  }

  // what a step of a head in one chunk begins with: its queries and their statistics
  static VTCLIP_DEVICE void begin(const Args& args, Tiles& tiles, const AttnPlace& at,
                                  int64_t start) {
    load_queries(args, tiles, tiles.q, args.query, at, start, 0);
    load_statistics(args, tiles, at, start);
  }

  // A step of a head in one chunk. Its queries are on their way when it begins; its rows of d_out
  // come while S is computed, the next step's queries while d_v is.
  static VTCLIP_DEVICE void add(const Args& args, Tiles& tiles, PerWarp<State, kWarps>& states,
                                const AttnPlace& at, int64_t start) {
    const Block<kWarps>& block = tiles.block;
    const int k = summed<kC, Base::kChunks>(args.shape.d, 0);
    block.arrive();  // queries, statistics are there; d_out is free
    load_queries(args, tiles, tiles.d_o, args.d_out, at, start, 0);
    block.loose().each_warp([&](const Warp& warp) {
      State& own = states[warp];
      own.s.fill(0);
      own.s.template add_product<false, true>(tiles.k + 16 * warp.index * kLd, kLd, tiles.q, kLd,
                                              k);
    });
    block.arrive();  // d_out is there
    block.each_warp([&](const Warp& warp) {
      State& own = states[warp];
      const int strip = 16 * warp.index;
      own.d_p.fill(0);
      own.d_p.template add_product<false, true>(tiles.v + strip * kLd, kLd, tiles.d_o, kLd, k);
      combine(own, tiles, strip, args.scale * static_cast<Acc>(kLog2E));
      own.d_k[0].add_product(own.d_p, tiles.p + strip * kLdStep, kLdStep, tiles.q, kLd);
    });
    // queries and statistics are free
    if (start + kStep < args.shape.K) begin(args, tiles, at, start + kStep);
    block.loose().each_warp([&](const Warp& warp) {
      State& own = states[warp];
      own.d_v[0].add_product(own.s, tiles.p + 16 * warp.index * kLdStep, kLdStep, tiles.d_o, kLd);
    });
  }

  // A step of a head in several chunks, one after the other.
  static VTCLIP_DEVICE void add_chunks(const Args& args, Tiles& tiles,
                                       PerWarp<State, kWarps>& states, const AttnPlace& at,
                                       int64_t start) {
    const Block<kWarps>& block = tiles.block;
    load_statistics(args, tiles, at, start);
    VTCLIP_UNROLL
    for (int c = 0; c < kChunks; ++c) {
      load_keys(args, tiles, at, c);
      load_queries(args, tiles, tiles.q, args.query, at, start, c * kC);
      load_queries(args, tiles, tiles.d_o, args.d_out, at, start, c * kC);
      block.arrive();
      block.each_warp([&](const Warp& warp) {
        State& own = states[warp];
        const int strip = 16 * warp.index, k = summed<kC, Base::kChunks>(args.shape.d, c);
        if (c == 0) own.s.fill(0);
        if (c == 0) own.d_p.fill(0);
        own.s.template add_product<false, true>(tiles.k + strip * kLd, kLd, tiles.q, kLd, k);
        own.d_p.template add_product<false, true>(tiles.v + strip * kLd, kLd, tiles.d_o, kLd, k);
        if (c == kChunks - 1) combine(own, tiles, strip, args.scale * static_cast<Acc>(kLog2E));
      });
    }
    VTCLIP_UNROLL
    for (int c = 0; c < kOutChunks; ++c) {
      const int64_t column = at.part * kOut + c * kC;
      load_queries(args, tiles, tiles.q, args.query, at, start, column);
      load_queries(args, tiles, tiles.d_o, args.d_out, at, start, column);
      block.arrive();
      block.each_warp([&](const Warp& warp) {
        State& own = states[warp];
        T* p = tiles.p + 16 * warp.index * kLdStep;
        own.d_v[c].add_product(own.s, p, kLdStep, tiles.d_o, kLd);
        own.d_k[c].add_product(own.d_p, p, kLdStep, tiles.q, kLd);
      });
    }
  }

  // s becomes P, d_p becomes dS, both without the scale; rows are keys, columns queries
  static VTCLIP_DEVICE void combine(State& own, const Tiles& tiles, int strip, Acc scale_log2) {
    own.s.each([&](const Spot& spot, Acc& s) {
      const Acc p = exp2_of(s * scale_log2 - tiles.lse[spot.column]);
      s = tiles.keep[strip + spot.row] ? p : 0;
    });
    own.d_p.with(own.s, [&](const Spot& spot, Acc& d_p, Acc p) {
      d_p = p * (d_p - tiles.delta[spot.column]);
    });
  }
};

}  // namespace vtclip::cuda
