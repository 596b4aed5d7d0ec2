// SPDX-License-Identifier: Apache-2.0
// Forward of rational_attn for one instruction set.
//
// S = scale q k^T ;  A = K exp(S - max S) / sum exp(S - max S) ;  O = A v
//
// One pass over query blocks. A block has its own maximum, and its rows of O are weighed by
// exp(maximum of the block - maximum of the map) when the whole map is known.
#include "cpu/common/simd.h"
#include "cpu/common/exp2.h"
#include "cpu/common/rows.h"
#include "cpu/common/attn_panels.h"
#include "rational_attn_panels.h"

// Maximum and sum of one map, and what the rows of each block must be multiplied by.
template <class T>
struct MapStats {
  T top, total;
};

template <class T>
static MapStats<T> merge_blocks(const T* tops, const T* totals, int64_t blocks) {
  MapStats<T> map{kLowest<T>, 0};
  for (int64_t i = 0; i < blocks; ++i) map.top = tops[i] > map.top ? tops[i] : map.top;
  for (int64_t i = 0; i < blocks; ++i) {
    map.total += totals[i] * exp_below_one<T>(tops[i], map.top);
  }
  return map;
}

// Rows of exp(S - top) v of one query block; its top and total.
template <class T>
static void forward_block(const AttnShape& s, const T* queries, int64_t count, const T* columns,
                          const T* values, T* scores, T* acc, int64_t lda, T* top, T* total) {
  const int64_t width = round_up(s.d, kLanes<T>);
  const int64_t ldd = leading_dim<T>(s.d), ldk = leading_dim<T>(s.K);
  const int64_t ldt = leading_dim<T>(s.key_tile);
  T best = kLowest<T>, sum = 0;
  for (int64_t l = 0; l < s.K; l += s.key_tile) {
    const int64_t n = min_of(s.key_tile, s.K - l);
    score_rows<T>(s, scores, ldt, queries, count, columns, ldk, l, n);
    const T old = best;
    best = top_of_tile<T>(scores, ldt, count, n, old);
    // all of the tile is -inf or NaN: others may still be finite, so it counts 0 and not NaN
    const T shift = best == kLowest<T> ? 0 : best;
    const T fresh = exp_of_tile<T>(scores, ldt, count, n, shift);
    if (l != 0 && best > old) {
      const T factor = exp_below_one<T>(old, best);
      sum *= factor;
      for (int64_t q = 0; q < count; ++q) {
        for (int64_t c = 0; c < width; c += kLanes<T>) {
          store(acc + q * lda + c, load(acc + q * lda + c) * splat(factor));
        }
      }
    }
    sum += fresh;
    gemm(Gemm<T>{count, width, n, scores, ldt, false, values + l * ldd, ldd, acc, lda, l != 0});
  }
  *top = best;
  *total = sum;
}

// p = softmax_j(scale q . k_j) as unnormalised weights exp(S - top) in `weights` [K padded].
template <class T>
static MapStats<T> image_weights(const RationalInputs& in, int64_t b, int64_t h, const T* columns,
                                 T* query, T* weights) {
  const AttnShape& s = in.shape;
  const int64_t ldk = leading_dim<T>(s.K);
  pack_block<T>(s, query, leading_dim<T>(s.d), in.image, b, h, 0, 1, static_cast<T>(s.scale));
  score_rows<T>(s, weights, ldk, query, 1, columns, ldk, 0, s.K);
  MapStats<T> map{};
  map.top = top_of_tile<T>(weights, ldk, 1, s.K, kLowest<T>);
  map.total = exp_of_tile<T>(weights, ldk, 1, s.K, map.top);
  return map;
}

// out[0 .. D) = sum_j weights[j] rows[j], in tiles of keys.
template <class T>
static void weigh_rows(const AttnShape& s, const T* weights, const T* rows, T* out) {
  const int64_t ldd = leading_dim<T>(s.d), width = round_up(s.d, kLanes<T>);
  for (int64_t l = 0; l < s.K; l += s.key_tile) {
    gemm(Gemm<T>{1, width, min_of(s.key_tile, s.K - l), weights + l, s.K, false, rows + l * ldd,
                 ldd, out, width, l != 0});
  }
}

template <class T>
static void store_stats(const RationalForward& p, int kind, int64_t pair, MapStats<T> map) {
  const int64_t pairs = p.in.shape.B * p.in.shape.H;
  T* stats = static_cast<T*>(p.stats) + 2 * kind * pairs + pair;
  stats[0] = map.top;
  stats[pairs] = map.total;
}

template <class T>
static void image_forward(const RationalForward& p, int64_t pair, const T* columns, const T* values,
                          T* query, T* weights) {
  const AttnShape& s = p.in.shape;
  const MapStats<T> map = image_weights<T>(p.in, pair / s.H, pair % s.H, columns, query, weights);
  const int64_t width = round_up(s.d, kLanes<T>);
  const Scratch<T> sum(width);
  weigh_rows<T>(s, weights, values, sum);
  T* out = static_cast<T*>(p.image_out) + pair * s.d;
  for (int64_t c = 0; c < s.d; ++c) out[c] = sum[c] / map.total;
  store_stats(p, 0, pair, map);
}

// Blocks first .. last of one (image, head) to tensor memory; acc[kind] begins at block `first`.
template <class T>
static void finish_blocks(const RationalForward& p, int64_t pair, int64_t first, int64_t last,
                          const T* const* acc, int64_t lda, T* row) {
  const AttnShape& s = p.in.shape;
  const int64_t b = pair / s.H, h = pair % s.H, blocks = s.num_blocks();
  const int64_t width = round_up(s.d, kLanes<T>);
  const T* block_stats = static_cast<const T*>(p.block_stats) + pair * kMatrixKinds * 2 * blocks;
  MapStats<T> map[kMatrixKinds]{};
  for (int x = 0; x < kMatrixKinds; ++x) {
    const T* tops = block_stats + 2 * x * blocks;
    if (p.in.has[x]) map[x] = merge_blocks<T>(tops, tops + blocks, blocks);
    if (first == 0) store_stats(p, 1 + x, pair, map[x]);
  }
  const Scratch<T> shared(width);  // the image's row, the same for every class
  for (int64_t c = 0; c < width; ++c) shared[c] = 0;
  if (p.in.has_image) {
    const T* image = static_cast<const T*>(p.image_out) + pair * s.d;
    for (int64_t c = 0; c < s.d; ++c) shared[c] = image[c];
  }
  for (int64_t block = first; block < last; ++block) {
    T factor[kMatrixKinds]{};
    for (int x = 0; x < kMatrixKinds; ++x) {
      if (!p.in.has[x]) continue;
      const T weight = exp_below_one<T>(block_stats[2 * x * blocks + block], map[x].top);
      factor[x] = static_cast<T>(s.K) * weight / map[x].total;
    }
    const int64_t end = min_of(s.K, (block + 1) * s.query_block);
    const int64_t bytes = s.d * item_bytes(s.dtype);
    for (int64_t q = block * s.query_block; q < end; ++q) {
      const int64_t ahead = min_of(q + kRowsAhead, end - 1);
      prefetch_row(p.out.at(b, h) + ahead * p.out.row, bytes);
      const int64_t at = (q - first * s.query_block) * lda;
      for (int64_t c = 0; c < width; c += kLanes<T>) {
        Vec<T> sum = load(shared + c);
        for (int x = 0; x < kMatrixKinds; ++x) {
          if (p.in.has[x]) sum = fma(load(acc[x] + at + c), splat(factor[x]), sum);
        }
        store(row + c, sum / splat(static_cast<T>(p.in.num_kinds)));
      }
      store_row<T>(p.out.at(b, h) + q * p.out.row, s.d, s.dtype, row, 1);
      for (int x = 0; x < kMatrixKinds; ++x) {
        if (!p.keep_parts || !p.in.has[x]) continue;
        char* part = p.parts[x].at(b, h);
        prefetch_row(part + ahead * p.parts[x].row, bytes);
        store_row<T>(part + q * p.parts[x].row, s.d, s.dtype, acc[x] + at, factor[x]);
      }
    }
  }
}

template <class T>
static void rational_forward_units(const RationalForward& p, int64_t begin, int64_t end) {
  const AttnShape& s = p.in.shape;
  const int64_t blocks = s.num_blocks(), width = round_up(s.d, kLanes<T>);
  const int64_t ldd = leading_dim<T>(s.d), ldk = leading_dim<T>(s.K);
  const int64_t own = p.rows == nullptr ? s.K * width : 0;
  const Scratch<T> columns(s.d * ldk), values(s.K * ldd), queries(s.query_block * ldd);
  const Scratch<T> pack(64 * ldd), row(width), image_weight(p.in.has_image ? ldk : 0);
  const Scratch<T> scores(s.query_block * leading_dim<T>(s.key_tile));
  const Scratch<T> text_rows(p.in.has[0] ? own : 0), pair_rows(p.in.has[1] ? own : 0);

  int64_t packed = -1;
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t pair = unit / p.num_chunks, chunk = unit % p.num_chunks;
    const int64_t b = pair / s.H, h = pair % s.H;
    if (pair != packed) {
      pack_transposed<T>(s, columns, ldk, p.in.key, b, h, s.K, pack);
      pack_block<T>(s, values, ldd, p.in.value, b, h, 0, s.K, 1);
      packed = pair;
    }
    if (chunk == 0 && p.in.has_image) {
      image_forward<T>(p, pair, columns, values, queries, image_weight);
    }
    const int64_t first = chunk * p.chunk_blocks, last = min_of(blocks, first + p.chunk_blocks);
    const T* acc[kMatrixKinds] = {text_rows, pair_rows};
    for (int x = 0; x < kMatrixKinds; ++x) {
      if (!p.in.has[x]) continue;
      T* rows = x == 0 ? text_rows : pair_rows;
      if (p.rows != nullptr) {
        rows = static_cast<T*>(p.rows) + (pair * kMatrixKinds + x) * s.K * width;
      }
      T* tops = static_cast<T*>(p.block_stats) + (pair * kMatrixKinds + x) * 2 * blocks;
      for (int64_t block = first; block < last; ++block) {
        const int64_t q = block * s.query_block, count = min_of(s.query_block, s.K - q);
        pack_block<T>(s, queries, ldd, p.in.query[x], b, h, q, count, static_cast<T>(s.scale));
        forward_block<T>(s, queries, count, columns, values, scores, rows + q * width, width,
                         tops + block, tops + blocks + block);
      }
    }
    if (p.rows == nullptr) finish_blocks<T>(p, pair, 0, blocks, acc, width, row);
  }
}

// Units of (image, head, query block), where the first pass was split.
template <class T>
static void rational_finish_units(const RationalForward& p, int64_t begin, int64_t end) {
  const AttnShape& s = p.in.shape;
  const int64_t blocks = s.num_blocks(), width = round_up(s.d, kLanes<T>);
  const Scratch<T> row(width);
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t pair = unit / blocks, block = unit % blocks;
    const T* acc[kMatrixKinds];
    for (int x = 0; x < kMatrixKinds; ++x) {
      const int64_t at = (pair * kMatrixKinds + x) * s.K + block * s.query_block;
      acc[x] = static_cast<const T*>(p.rows) + at * width;
    }
    finish_blocks<T>(p, pair, block, block + 1, acc, width, row);
  }
}

#include "rational_attn_bwd_kernel.h"

VTCLIP_BY_DTYPE(rational_attn_fwd_units, rational_forward_units, RationalForward, in.shape.dtype)
VTCLIP_BY_DTYPE(rational_attn_finish_units, rational_finish_units, RationalForward, in.shape.dtype)
VTCLIP_BY_DTYPE(rational_attn_bwd_units, rational_backward_units, RationalBackward, in.shape.dtype)
VTCLIP_BY_DTYPE(rational_attn_mean_units, rational_mean_units, RationalBackward, in.shape.dtype)
VTCLIP_BY_DTYPE(rational_attn_sum_units, rational_sum_units, RationalBackward, in.shape.dtype)
