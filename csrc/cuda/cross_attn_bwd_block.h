// SPDX-License-Identifier: Apache-2.0
// The bodies of cross_attn's backward.
//
//   P = exp(S - lse), dP = d_out v^T, delta = rowsum(d_out * out) - d_lse
//   dS = P * (dP - delta), d_query = scale dS k, d_key = scale dS^T q, d_value = P^T d_out
//
// CrossAttnQueryGradient keeps a tile of queries and streams images and keys past it; it leaves
// delta behind. CrossAttnKeyGradient keeps a tile of keys of one image and streams queries.
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
    bool* keep = shared.take<bool>(kStep);     // [kStep]
  };

  static VTCLIP_BOTH int64_t blocks(const Args& args) { return Base::query_blocks(args); }

  static VTCLIP_DEVICE void run(const Args& args, int64_t index, Tiles& tiles) {
    const auto add = [&](PerWarp<State, kWarps>& states, const AttnPlace& at, int64_t b,
                         bool first) {
      if (kChunks == 1 && (args.query.batch != 0 || first)) {
        load_rows(args, tiles.q, args.query, tiles, b, at, 0);
      }
      if (kChunks == 1) load_rows(args, tiles.d_o, args.d_out, tiles, b, at, 0);
      row_statistics(args, tiles, b, at);
      for (int64_t start = 0; start < args.shape.L; start += kStep) {
        step(args, tiles, states, b, at, start);
      }
    };
    Base::template query_gradient<State>(args, index, tiles.block, add);
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

  // lse and delta of the block's rows, in shared memory; delta in global memory too
  static VTCLIP_DEVICE void row_statistics(const Args& args, Tiles& tiles, int64_t b,
                                           const AttnPlace& at) {
    const AttnShape& n = args.shape;
    tiles.block.template each_row<8>(kRows, [&](const auto& lanes, int r) {
      const int64_t row = at.tile * kRows + r;
      Acc delta = 0, lse = 0;
      if (row < n.K) {
        const Rows<const T> d_o = args.d_out.at(b, at.head), out = args.out.at(b, at.head);
        delta = lanes.sum(n.d, [&](int64_t c) {
          return static_cast<Acc>(d_o.at(row, c)) * static_cast<Acc>(out.at(row, c));
        });
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

  static VTCLIP_DEVICE void step(const Args& args, Tiles& tiles, PerWarp<State, kWarps>& states,
                                 int64_t b, const AttnPlace& at, int64_t start) {
    const AttnShape& n = args.shape;
    const Block<kWarps>& block = tiles.block;
    const Rows<const T> key = args.key.at(b, at.head).from(start);
    const Rows<const T> value = args.value.at(b, at.head).from(start);
    const Acc scale_log2 = args.scale * static_cast<Acc>(kLog2E);
    block.each(kStep, [&](int l) { tiles.keep[l] = n.keeps(b, start + l); });
    VTCLIP_UNROLL
    for (int c = 0; c < kChunks; ++c) {
      if (kChunks > 1) load_rows(args, tiles.q, args.query, tiles, b, at, c);
      if (kChunks > 1) load_rows(args, tiles.d_o, args.d_out, tiles, b, at, c);
      Base::load_kept(block.loose(), tiles.v, value, c * kC, n.d, tiles.keep);
      Base::load_kept(block, tiles.k, key, c * kC, n.d, tiles.keep);
      block.each_warp([&](const Warp& warp) {
        State& own = states[warp];
        const int strip = 16 * warp.index, k = summed<kC>(n.d, c);
        if (c == 0) own.s.fill(0);
        if (c == 0) own.d_p.fill(0);
        own.s.template add_product<false, true>(tiles.q + strip * kLd, kLd, tiles.k, kLd, k);
        own.d_p.template add_product<false, true>(tiles.d_o + strip * kLd, kLd, tiles.v, kLd, k);
        if (c < kChunks - 1) return;
        T* d_s = tiles.d_s + strip * kLdStep;
        combine(own, tiles, strip, scale_log2);
        own.s.store(d_s, kLdStep);
        if (kChunks > 1) return;
        own.d_q[0].template add_product<false, false>(d_s, kLdStep, tiles.k, kLd, kStep);
      });
    }
    if constexpr (kChunks > 1) Base::add_keys(tiles, states, key, at, n.d, tiles.keep);
  }

  // s becomes dS without the scale
  static VTCLIP_DEVICE void combine(State& own, const Tiles& tiles, int strip, Acc scale_log2) {
    own.s.with(own.d_p, [&](const Spot& spot, Acc& s, Acc d_p) {
      const Acc p = exp2_of(s * scale_log2 - tiles.lse[strip + spot.row]);
      // by selection, not by a factor 0: delta of an empty row may be anything
      s = tiles.keep[spot.column] ? p * (d_p - tiles.delta[strip + spot.row]) : 0;
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
    if (kChunks == 1) load_keys(args, tiles, at, 0);
    PerWarp<State, kWarps> states;
    block.each_warp([&](const Warp& warp) {
      VTCLIP_UNROLL
      for (int c = 0; c < kOutChunks; ++c) {
        states[warp].d_k[c].fill(0);
        states[warp].d_v[c].fill(0);
      }
    });
    for (int64_t start = 0; start < n.K; start += kStep) step(args, tiles, states, at, start);
    block.each_warp([&](const Warp& warp) {
      State& own = states[warp];
      VTCLIP_UNROLL
      for (int c = 0; c < kOutChunks; ++c) {
        Base::keep_rows(own.d_k[c], warp, tiles.keep);
        Base::keep_rows(own.d_v[c], warp, tiles.keep);
        Base::put_key(n, args.d_key, own.d_k[c], at, warp, c, args.scale);
        Base::put_key(n, args.d_value, own.d_v[c], at, warp, c, Acc(1));
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
      load_tile<kRows, kC>(tiles.block.loose(), to, kLd,
                           from.at(at.image, at.head).from(at.tile * kRows, c * kC),
                           args.shape.d - c * kC, [&](int r) { return tiles.keep[r]; });
    };
    load(tiles.k, args.key);
    load(tiles.v, args.value);
  }

  static VTCLIP_DEVICE void load_queries(const Args& args, Tiles& tiles, const AttnPlace& at,
                                         int64_t start, int64_t column) {
    const int64_t rows = args.shape.K - start;
    const auto load = [&](const auto& team, T* to, const Heads<const T>& from) {
      load_tile<kStep, kC>(team, to, kLd, from.at(at.image, at.head).from(start, column),
                           args.shape.d - column, [&](int r) { return r < rows; });
    };
    load(tiles.block.loose(), tiles.q, args.query);
    load(tiles.block, tiles.d_o, args.d_out);
  }

  static VTCLIP_DEVICE void step(const Args& args, Tiles& tiles, PerWarp<State, kWarps>& states,
                                 const AttnPlace& at, int64_t start) {
    const AttnShape& n = args.shape;
    const Block<kWarps>& block = tiles.block;
    block.loose().each(kStep, [&](int r) {
      const int64_t row = start + r;
      const bool exists = row < n.K;
      tiles.lse[r] =
          exists ? lse_in_powers(args.lse.at(at.image, at.head).at(row, 0)) : static_cast<Acc>(0);
      tiles.delta[r] = exists ? args.delta[(at.image * n.H + at.head) * n.K + row] : 0;
    });
    VTCLIP_UNROLL
    for (int c = 0; c < kChunks; ++c) {
      if (kChunks > 1) load_keys(args, tiles, at, c);
      load_queries(args, tiles, at, start, c * kC);
      block.each_warp([&](const Warp& warp) {
        State& own = states[warp];
        const int strip = 16 * warp.index, k = summed<kC>(n.d, c);
        if (c == 0) own.s.fill(0);
        if (c == 0) own.d_p.fill(0);
        own.s.template add_product<false, true>(tiles.k + strip * kLd, kLd, tiles.q, kLd, k);
        own.d_p.template add_product<false, true>(tiles.v + strip * kLd, kLd, tiles.d_o, kLd, k);
        if (c < kChunks - 1) return;
        combine(own, tiles, strip, args.scale * static_cast<Acc>(kLog2E));
        if (kChunks == 1) add_outer(own, tiles, warp, 0);
      });
    }
    if constexpr (kChunks > 1) {
      VTCLIP_UNROLL
      for (int c = 0; c < kOutChunks; ++c) {
        load_queries(args, tiles, at, start, at.part * kOut + c * kC);
        block.each_warp([&](const Warp& warp) { add_outer(states[warp], tiles, warp, c); });
      }
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

  // d_v[c] += P d_o, d_k[c] += dS q, of what lies in tiles.d_o and tiles.q
  static VTCLIP_DEVICE void add_outer(State& own, const Tiles& tiles, const Warp& warp, int c) {
    T* p = tiles.p + 16 * warp.index * kLdStep;
    own.s.store(p, kLdStep);
    own.d_v[c].template add_product<false, false>(p, kLdStep, tiles.d_o, kLd, kStep);
    warp.sync();
    own.d_p.store(p, kLdStep);
    own.d_k[c].template add_product<false, false>(p, kLdStep, tiles.q, kLd, kStep);
    warp.sync();
  }
};

}  // namespace vtclip::cuda
