// SPDX-License-Identifier: Apache-2.0
// The bodies of cross_attn_weights.
//
//   P = softmax(scale q k^T) over the kept columns
//   delta = rowsum(P * dP) / rowsum(P), dS = P * (dP - delta)
//   d_query = scale dS k, d_key = scale dS^T q
//
// The stored P was rounded: its rows sum to 1 within the precision of T only, and without the
// division dS of a weight near 1 would be that rounding.
//
// A weight of 0 marks a masked column in the backward: what its key and its gradient hold is not
// used.
#pragma once

#include "cuda/block/attn_block.h"

namespace vtclip::cuda {

template <class T>
struct AttnWeightsArgs {
  AttnShape shape;
  Heads<const T> query, key;
  T* weights;  // [B, H, K, L], contiguous: written
  AccOf<T> scale;
};

template <class T, int kD>
struct AttnWeightsForward : AttnTile<T, kD> {
  using Base = AttnTile<T, kD>;
  using Acc = AccOf<T>;
  using Args = AttnWeightsArgs<T>;
  using Base::kC, Base::kChunks, Base::kLd, Base::kLdStep, Base::kRows, Base::kStep;
  using Base::kWarps;

  struct Tiles {
    Shared& shared;
    Block<kWarps> block{shared};
    T* q = shared.take<T>(kRows * kLd);      // [kRows, kLd]
    T* k = shared.take<T>(kStep * kLd);      // [kStep, kLd]
    T* p = shared.take<T>(kRows * kLdStep);  // [kRows, kLdStep]: weights on their way out
    bool* keep = shared.take<bool>(kStep);   // [kStep]
  };

  static VTCLIP_BOTH int64_t blocks(const Args& args) {
    return args.shape.B * args.shape.H * ceil_div(args.shape.K, kRows);
  }

  static VTCLIP_DEVICE void run(const Args& args, int64_t index, Tiles& tiles) {
    const AttnShape& n = args.shape;
    const Block<kWarps>& block = tiles.block;
    const AttnPlace at = attn_place(index, n.H, 1, ceil_div(n.K, kRows));
    PerWarp<State, kWarps> states;
    block.each_warp([&](const Warp& warp) {
      states[warp].top.fill(-infinity<Acc>());
      states[warp].total.fill(0);
    });
    if (kChunks == 1 && n.L > 0) load_query(args, tiles, at, 0);
    for (int64_t start = 0; start < n.L; start += kStep) {
      scores(args, tiles, states, at, start, [&](const Warp& warp) { soften(states[warp]); });
    }
    block.each_warp([&](const Warp& warp) {
      State& own = states[warp];
      own.total.each([&](const Spot& spot, Acc& total) {
        if (own.top[spot] == -infinity<Acc>()) own.top[spot] = 0;
        if (total == 0) total = 1;
      });
    });
    // scores that did not fit are recomputed: cheaper than keeping a row of them for any L
    if (n.L <= kStep) {
      block.each_warp([&](const Warp& warp) { write(args, states[warp], tiles, at, warp, 0); });
      return;
    }
    for (int64_t start = 0; start < n.L; start += kStep) {
      scores(args, tiles, states, at, start, [&](const Warp& warp) {
        write(args, states[warp], tiles, at, warp, start);
      });
    }
  }

 private:
  struct State {
    WarpTile<T, 16, kStep> s;
    RowValues<Acc, 16> top, total;
  };

  static VTCLIP_DEVICE void load_query(const Args& args, Tiles& tiles, const AttnPlace& at, int c) {
    Base::load_rows(tiles.block, tiles.q, args.query.at(at.image, at.head), args.shape.K,
                    args.shape.d, at.tile, c);
  }

  // scores of the columns from `start` on, in powers of two, -inf where masked; then after(warp)
  template <class After>
  static VTCLIP_DEVICE void scores(const Args& args, Tiles& tiles, PerWarp<State, kWarps>& states,
                                   const AttnPlace& at, int64_t start, After after) {
    const AttnShape& n = args.shape;
    const Block<kWarps>& block = tiles.block;
    const Acc scale_log2 = args.scale * static_cast<Acc>(kLog2E);
    block.each(kStep, [&](int l) { tiles.keep[l] = n.keeps(at.image, start + l); });
    VTCLIP_UNROLL
    for (int c = 0; c < kChunks; ++c) {
      if (kChunks > 1) load_query(args, tiles, at, c);
      Base::load_kept(block, tiles.k, args.key.at(at.image, at.head).from(start), c * kC, n.d,
                      tiles.keep);
      block.arrive();
      block.each_warp([&](const Warp& warp) {
        State& own = states[warp];
        if (c == 0) own.s.fill(0);
        own.s.template add_product<false, true>(tiles.q + 16 * warp.index * kLd, kLd, tiles.k, kLd,
                                                summed<kC, Base::kChunks>(n.d, c));
        if (c < kChunks - 1) return;
        own.s.each([&](const Spot& spot, Acc& s) {
          s = tiles.keep[spot.column] ? s * scale_log2 : -infinity<Acc>();
        });
        after(warp);
      });
    }
  }

  static VTCLIP_DEVICE void soften(State& own) {
    RowValues<Acc, 16> top;
    own.s.max_rows(top);
    top.each([&](const Spot& spot, Acc& row) {
      row = larger(own.top[spot], row);
      const Acc shift = row == -infinity<Acc>() ? 0 : row;
      own.total[spot] *= exp2_of(own.top[spot] - shift);
      own.top[spot] = row;
      row = shift;
    });
    WarpTile<T, 16, kStep> p;
    p.with(own.s, [&](const Spot& spot, Acc& element, Acc s) { element = exp2_of(s - top[spot]); });
    RowValues<Acc, 16> sum;
    p.sum_rows(sum);
    own.total.each([&](const Spot& spot, Acc& total) { total += sum[spot]; });
  }

  static VTCLIP_DEVICE void write(const Args& args, State& own, const Tiles& tiles,
                                  const AttnPlace& at, const Warp& warp, int64_t start) {
    const AttnShape& n = args.shape;
    own.s.each([&](const Spot& spot, Acc& s) {
      s = s == -infinity<Acc>() ? 0 : exp2_of(s - own.top[spot]) / own.total[spot];
    });
    const Rows<T> weights{args.weights + (at.image * n.H + at.head) * n.K * n.L, n.L, 1};
    put<kStep, kStep>(warp, own.s, tiles.p + 16 * warp.index * kLdStep, weights,
                      at.tile * kRows + 16 * warp.index, n.K, start, n.L, Acc(1));
  }
};

template <class T>
struct AttnWeightsBackwardArgs : AttnGradientArgs<T> {
  Heads<const T> d_weights, weights;  // [B, H, K, L]
};

// P * dP, where a weight of 0 leaves nothing
template <class T>
VTCLIP_DEVICE AccOf<T> weighted(T weight, T d_weight, AccOf<T> delta) {
  using Acc = AccOf<T>;
  const Acc p = static_cast<Acc>(weight);
  return p * ((p != 0 ? static_cast<Acc>(d_weight) : 0) - delta);
}

template <class T, int kD>
struct AttnWeightsQueryGradient : AttnTile<T, kD> {
  using Base = AttnTile<T, kD>;
  using Acc = AccOf<T>;
  using Args = AttnWeightsBackwardArgs<T>;
  using Base::kC, Base::kLd, Base::kLdStep, Base::kOutChunks, Base::kRows, Base::kStep;
  using Base::kWarps;

  struct Tiles {
    Shared& shared;
    Block<kWarps> block{shared};
    T* k = shared.take<T>(kStep * kLd);        // [kStep, kLd]
    T* d_s = shared.take<T>(kRows * kLdStep);  // [kRows, kLdStep]
    Acc* delta = shared.take<Acc>(kRows);      // [kRows]
    bool* used = shared.take<bool>(kStep);     // [kStep]: some weight of the column counts
  };

  static VTCLIP_BOTH int64_t blocks(const Args& args) { return Base::query_blocks(args); }

  static VTCLIP_DEVICE void run(const Args& args, int64_t index, Tiles& tiles) {
    const auto add = [&](PerWarp<State, kWarps>& states, const AttnPlace& at, int64_t b) {
      deltas(args, tiles, b, at);
      for (int64_t start = 0; start < args.shape.L; start += kStep) {
        step(args, tiles, states, b, at, start);
      }
    };
    Base::template query_gradient<State>(args, index, tiles.block, tiles.d_s, add);
  }

 private:
  struct State {
    WarpTile<T, 16, kC> d_q[kOutChunks];
  };

  static VTCLIP_DEVICE void deltas(const Args& args, Tiles& tiles, int64_t b,
                                   const AttnPlace& at) {
    const AttnShape& n = args.shape;
    tiles.block.template each_row<8>(kRows, [&](const auto& lanes, int r) {
      const int64_t row = at.tile * kRows + r;
      Acc delta = 0;
      if (row < n.K) {
        const Rows<const T> d_p = args.d_weights.at(b, at.head), p = args.weights.at(b, at.head);
        delta = lanes.sum(n.L, [&](int64_t l) {
          return weighted<T>(p.at(row, l), d_p.at(row, l), 0);
        });
        const Acc total = lanes.sum(n.L, [&](int64_t l) { return static_cast<Acc>(p.at(row, l)); });
        delta = total == 0 ? 0 : delta / total;
      }
      lanes.once([&] {
        tiles.delta[r] = delta;
        if (row < n.K && at.part == 0) args.delta[(b * n.H + at.head) * n.K + row] = delta;
      });
    });
  }

  static VTCLIP_DEVICE void step(const Args& args, Tiles& tiles, PerWarp<State, kWarps>& states,
                                 int64_t b, const AttnPlace& at, int64_t start) {
    const AttnShape& n = args.shape;
    const Block<kWarps>& block = tiles.block;
    const Rows<const T> d_p = args.d_weights.at(b, at.head), p = args.weights.at(b, at.head);
    block.each(kRows * kStep, [&](int i) {
      const int r = i / kStep, l = i % kStep;
      const int64_t row = at.tile * kRows + r, column = start + l;
      Acc d_s = 0;
      if (row < n.K && column < n.L) {
        d_s = weighted<T>(p.at(row, column), d_p.at(row, column), tiles.delta[r]);
      }
      tiles.d_s[r * kLdStep + l] = static_cast<T>(d_s);
    });
    block.template each_row<4>(kStep, [&](const auto& lanes, int l) {
      const Acc some = lanes.sum(kRows, [&](int r) {
        return static_cast<Acc>(static_cast<Acc>(tiles.d_s[r * kLdStep + l]) != 0);
      });
      lanes.once([&] { tiles.used[l] = some != 0; });
    });
    Base::add_keys(tiles, states, args.key.at(b, at.head).from(start), at, n.d, tiles.used);
  }
};

template <class T, int kD>
struct AttnWeightsKeyGradient : AttnTile<T, kD> {
  using Base = AttnTile<T, kD>;
  using Acc = AccOf<T>;
  using Args = AttnWeightsBackwardArgs<T>;
  using Base::kC, Base::kLd, Base::kOut, Base::kOutChunks, Base::kRows, Base::kStep, Base::kWarps;
  static constexpr int kLdRows = tile_stride<T>(kRows);

  struct Tiles {
    Shared& shared;
    Block<kWarps> block{shared};
    T* q = shared.take<T>(kStep * kLd);        // [kStep, kLd]
    // [kStep, kLdRows]: rows are queries, columns keys; then [kRows, kLdStep]: d_key on its way out
    T* d_s = shared.take<T>(larger(kStep * kLdRows, kRows * Base::kLdStep));
    bool* used = shared.take<bool>(kRows);     // [kRows]: some weight of the key counts
  };

  static VTCLIP_BOTH int64_t blocks(const Args& args) {
    return Base::output_blocks(args.shape, args.shape.B, args.shape.L);
  }

  static VTCLIP_DEVICE void run(const Args& args, int64_t index, Tiles& tiles) {
    const AttnShape& n = args.shape;
    const Block<kWarps>& block = tiles.block;
    const AttnPlace at = Base::place(n, index, n.L);
    PerWarp<State, kWarps> states;
    block.each_warp([&](const Warp& warp) { Base::clear(states[warp].d_k); });
    block.each(kRows, [&](int l) { tiles.used[l] = false; });
    for (int64_t start = 0; start < n.K; start += kStep) step(args, tiles, states, at, start);
    block.each_warp([&](const Warp& warp) {
      VTCLIP_UNROLL
      for (int c = 0; c < kOutChunks; ++c) {
        auto& d_k = states[warp].d_k[c];
        Base::keep_rows(d_k, warp, tiles.used);
        Base::template put_key<kStep>(n, args.d_key, d_k,
                                      tiles.d_s + 16 * warp.index * Base::kLdStep, at, warp, c,
                                      args.scale);
      }
    });
  }

 private:
  struct State {
    WarpTile<T, 16, kC> d_k[kOutChunks];
  };

  static VTCLIP_DEVICE void step(const Args& args, Tiles& tiles, PerWarp<State, kWarps>& states,
                                 const AttnPlace& at, int64_t start) {
    const AttnShape& n = args.shape;
    const Block<kWarps>& block = tiles.block;
    const Rows<const T> d_p = args.d_weights.at(at.image, at.head);
    const Rows<const T> p = args.weights.at(at.image, at.head);
    const Acc* delta = args.delta + (at.image * n.H + at.head) * n.K;
    block.each(kStep * kRows, [&](int i) {
      const int r = i / kRows, l = i % kRows;
      const int64_t row = start + r, column = at.tile * kRows + l;
      Acc d_s = 0;
      if (row < n.K && column < n.L) {
        d_s = weighted<T>(p.at(row, column), d_p.at(row, column), delta[row]);
      }
      tiles.d_s[r * kLdRows + l] = static_cast<T>(d_s);
    });
    block.template each_row<2>(kRows, [&](const auto& lanes, int l) {
      const Acc some = lanes.sum(kStep, [&](int r) {
        return static_cast<Acc>(static_cast<Acc>(tiles.d_s[r * kLdRows + l]) != 0);
      });
      lanes.once([&] { tiles.used[l] = tiles.used[l] || some != 0; });
    });
    const int64_t rows = n.K - start;
    VTCLIP_UNROLL
    for (int c = 0; c < kOutChunks; ++c) {
      const int64_t column = at.part * kOut + c * kC;
      copy_tile<kStep, kC>(block.loose(), tiles.q, kLd,
                           args.query.at(at.image, at.head).from(start, column), n.d - column,
                           [&](int r) { return r < rows; });
      block.arrive();
      block.each_warp([&](const Warp& warp) {
        states[warp].d_k[c].template add_product<true, false>(
            tiles.d_s + 16 * warp.index, kLdRows, tiles.q, kLd, kStep);
      });
    }
  }
};

}  // namespace vtclip::cuda
