// SPDX-License-Identifier: Apache-2.0
// The body of cross_attn's forward.
//
//   S = scale q k^T over the kept columns, P = exp(S - lse), out = P v, lse = log sum exp S
//
// A block keeps a tile of queries, of one head, and streams images past it (one image where the
// query differs from image to image). The softmax runs online, in powers of two, in registers: a
// row lies in four lanes of one warp.
#pragma once

#include "cuda/block/attn_block.h"

namespace vtclip::cuda {

template <class T>
struct CrossAttnArgs {
  AttnShape shape;
  Heads<const T> query, key, value;
  Heads<T> out;       // [B, H, K, d]: written
  AccOf<T>* lse;      // [B, H, K], contiguous: written
  AccOf<T> scale;
  int64_t images;     // of one block
};

template <class T, int kD>
struct CrossAttnForward : AttnTile<T, kD> {
  using Base = AttnTile<T, kD>;
  using Acc = AccOf<T>;
  using Args = CrossAttnArgs<T>;
  using Base::kC, Base::kChunks, Base::kLd, Base::kLdStep, Base::kOut, Base::kOutChunks;
  using Base::kRows, Base::kStep, Base::kWarps;
  using Step = typename Base::Step;

  struct Tiles {
    Shared& shared;
    Block<kWarps> block{shared};
    T* q = shared.take<T>(kRows * kLd);          // [kRows, kLd]
    T* k = shared.take<T>(kStep * kLd);          // [kStep, kLd]
    T* v = shared.take<T>(kStep * kLd);          // [kStep, kLd]
    T* p = shared.take<T>(kRows * kLdStep);      // [kRows, kLdStep]
    bool* keep = shared.take<bool>(2 * kStep);   // [2, kStep]: of this step and the next
  };

  static VTCLIP_BOTH int64_t blocks(const Args& args) { return Base::query_blocks(args); }

  static VTCLIP_DEVICE void run(const Args& args, int64_t index, Tiles& tiles) {
    const AttnShape& n = args.shape;
    const AttnPlace at = Base::place(n, index, n.K);
    const int64_t first = at.image * args.images, last = lesser(n.B, first + args.images);
    VTCLIP_ASSUME(first < last);
    Step step{first, 0, 0};
    if (kChunks == 1 && n.L > 0) {
      Base::keep_step(tiles.block, n, tiles.keep, step, last);
      tiles.block.sync();
      load_query(args, tiles, first, at, 0);  // of several images: they share it
      load_key(args, tiles, step, at, 0);
    }
    PerWarp<State, kWarps> states;
    for (int64_t b = first; b < last; ++b) {
      tiles.block.loose().each_warp([&](const Warp& warp) {
        State& own = states[warp];
        Base::clear(own.out);
        own.top.fill(-infinity<Acc>());
        own.total.fill(0);
      });
      for (int64_t start = 0; start < n.L; start += kStep) {
        if constexpr (kChunks == 1) {
          step = add(args, tiles, states, step, last, at);
        } else {
          add_chunks(args, tiles, states, {b, start, 0}, at);
        }
      }
      tiles.block.loose().each_warp([&](const Warp& warp) {
        finish(args, states[warp], tiles, b, at, warp);
      });
    }
  }

 private:
  // What a warp keeps while the keys of an image pass.
  struct State {
    WarpTile<T, 16, kStep> s;
    WarpTile<T, 16, kC> out[kOutChunks];
    RowValues<Acc, 16> top, total;
  };

  static VTCLIP_DEVICE void load_query(const Args& args, Tiles& tiles, int64_t b,
                                       const AttnPlace& at, int c) {
    Base::load_rows(tiles.block, tiles.q, args.query.at(b, at.head), args.shape.K, args.shape.d,
                    at.tile, c);
  }
  static VTCLIP_DEVICE void load_key(const Args& args, Tiles& tiles, const Step& step,
                                     const AttnPlace& at, int c) {
    Base::load_kept(tiles.block, tiles.k, args.key.at(step.b, at.head).from(step.start), c * kC,
                    args.shape.d, step.keep(tiles.keep));
  }
  static VTCLIP_DEVICE void load_value(const Args& args, Tiles& tiles, const Step& step,
                                       const AttnPlace& at, int c) {
    Base::load_kept(tiles.block, tiles.v, args.value.at(step.b, at.head).from(step.start),
                    at.part * kOut + c * kC, args.shape.d, step.keep(tiles.keep));
  }

  // A step of a head in one chunk. Its keys are on their way when it begins; its values come while
  // the scores are computed, the next step's keys, of this image or the next, while values are
  // added.
  static VTCLIP_DEVICE Step add(const Args& args, Tiles& tiles, PerWarp<State, kWarps>& states,
                                const Step& step, int64_t last, const AttnPlace& at) {
    const AttnShape& n = args.shape;
    const Block<kWarps>& block = tiles.block;
    const Step next = step.next(n.L);
    block.arrive();  // keys are there, values and the other slot are free
    load_value(args, tiles, step, at, 0);
    Base::keep_step(block, n, tiles.keep, next, last);
    block.loose().each_warp([&](const Warp& warp) {
      State& own = states[warp];
      own.s.fill(0);
      own.s.template add_product<false, true>(tiles.q + 16 * warp.index * kLd, kLd, tiles.k, kLd,
                                              summed<kC, Base::kChunks>(n.d, 0));
      soften(own, step.keep(tiles.keep), args.scale * static_cast<Acc>(kLog2E), step.start == 0);
    });
    block.arrive();  // values are there, keys are free
    if (next.b < last) load_key(args, tiles, next, at, 0);
    block.loose().each_warp([&](const Warp& warp) {
      State& own = states[warp];
      own.out[0].add_product(own.s, tiles.p + 16 * warp.index * kLdStep, kLdStep, tiles.v, kLd);
    });
    return next;
  }

  // A step of a head in several chunks, one after the other.
  static VTCLIP_DEVICE void add_chunks(const Args& args, Tiles& tiles,
                                       PerWarp<State, kWarps>& states, const Step& step,
                                       const AttnPlace& at) {
    const AttnShape& n = args.shape;
    const Block<kWarps>& block = tiles.block;
    Base::keep_step(block, n, tiles.keep, step, n.B);
    block.sync();
    VTCLIP_UNROLL
    for (int c = 0; c < kChunks; ++c) {
      load_query(args, tiles, step.b, at, c);
      if (c == 0) load_value(args, tiles, step, at, 0);
      load_key(args, tiles, step, at, c);
      block.arrive();
      block.each_warp([&](const Warp& warp) {
        State& own = states[warp];
        if (c == 0) own.s.fill(0);
        own.s.template add_product<false, true>(tiles.q + 16 * warp.index * kLd, kLd, tiles.k, kLd,
                                                summed<kC, Base::kChunks>(n.d, c));
        if (c < kChunks - 1) return;
        soften(own, step.keep(tiles.keep), args.scale * static_cast<Acc>(kLog2E), step.start == 0);
        T* p = tiles.p + 16 * warp.index * kLdStep;
        own.s.store(p, kLdStep);
        own.out[0].template add_product<false, false>(p, kLdStep, tiles.v, kLd, kStep);
      });
    }
    VTCLIP_UNROLL
    for (int c = 1; c < kOutChunks; ++c) {
      load_value(args, tiles, step, at, c);
      block.arrive();
      block.each_warp([&](const Warp& warp) {
        states[warp].out[c].template add_product<false, false>(
            tiles.p + 16 * warp.index * kLdStep, kLdStep, tiles.v, kLd, kStep);
      });
    }
  }

  // s becomes exp2 of the scores over a new maximum; what was summed before shrinks to it
  static VTCLIP_DEVICE void soften(State& own, const bool* keep, Acc scale_log2, bool first) {
    own.s.each([&](const Spot& spot, Acc& s) {
      s = keep[spot.column] ? s * scale_log2 : -infinity<Acc>();
    });
    RowValues<Acc, 16> top, sum, shrink;
    own.s.max_rows(top);
    top.each([&](const Spot& spot, Acc& row) {
      row = larger(own.top[spot], row);
      // no column yet: exp2(-inf) = 0, not NaN
      const Acc shift = row == -infinity<Acc>() ? 0 : row;
      shrink[spot] = exp2_of(own.top[spot] - shift);
      own.top[spot] = row;
      row = shift;
    });
    own.s.each([&](const Spot& spot, Acc& s) { s = exp2_of(s - top[spot]); });
    own.s.sum_rows(sum);
    own.total.each([&](const Spot& spot, Acc& total) {
      total = total * shrink[spot] + sum[spot];
    });
    if (first) return;
    VTCLIP_UNROLL
    for (int c = 0; c < kOutChunks; ++c) {
      own.out[c].each([&](const Spot& spot, Acc& element) { element *= shrink[spot]; });
    }
  }

  static VTCLIP_DEVICE void finish(const Args& args, State& own, const Tiles& tiles, int64_t b,
                                   const AttnPlace& at, const Warp& warp) {
    const AttnShape& n = args.shape;
    const int64_t row0 = at.tile * kRows + 16 * warp.index;
    Acc* lse = args.lse + (b * n.H + at.head) * n.K;
    own.total.once([&](const Spot& spot, Acc total) {
      const int64_t row = row0 + spot.row;
      if (row >= n.K || at.part != 0) return;
      const Acc top = own.top[spot] == -infinity<Acc>() ? 0 : own.top[spot];
      lse[row] = total == 0 ? -infinity<Acc>()
                            : (top + log2_of(total)) * static_cast<Acc>(kLn2);
    });
    own.total.each([](const Spot&, Acc& total) { total = total == 0 ? 0 : 1 / total; });
    VTCLIP_UNROLL
    for (int c = 0; c < kOutChunks; ++c) {
      own.out[c].each([&](const Spot& spot, Acc& element) { element *= own.total[spot]; });
      put<kC, kStep>(warp, own.out[c], tiles.p + 16 * warp.index * kLdStep,
                     args.out.at(b, at.head), row0, n.K, at.part * kOut + c * kC, n.d, Acc(1));
    }
  }
};

}  // namespace vtclip::cuda
