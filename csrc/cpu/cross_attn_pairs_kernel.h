// SPDX-License-Identifier: Apache-2.0
// Forward attention of bfloat16 tensors by products of pairs. Scores are sums in float32 of exact
// products; probabilities are rounded to bfloat16 before they weigh the values, as on GPUs.
#include "common/simd.h"
#include "common/exp2.h"
#include "common/rows.h"
#include "common/gemm_tiles.h"
#include "common/pairs.h"
#include "common/attn_panels.h"

// Floats behind a packed query block; the first is not zero where a number of it is `outside`.
constexpr int64_t kMark = kLanes<float>;

// A query block as the right operand of the scores, pairs [ceil(d / 2), query_block], and its mark.
static void pack_query_pairs(const AttnShape& s, float* columns, const HeadsView& query, int64_t b,
                             int64_t h, int64_t block, float* rows) {
  const int64_t first = block * s.query_block, n = min_of(s.query_block, s.K - first);
  const int64_t pairs = ceil_div(s.d, 2), ldr = leading_dim<float>(pairs);
  const int64_t ldc = leading_dim<float>(s.query_block), width = round_up(n, kLanes<float>);
  const char* base = query.at(b, h) + first * query.row;
  for (int64_t i = 0; i < n; ++i) {
    if (i + kRowsAhead < n) prefetch_row(base + (i + kRowsAhead) * query.row, 2 * s.d);
    load_pairs(rows + i * ldr, s.d, ldr, base + i * query.row, query.column);
  }
  __builtin_memset(rows + n * ldr, 0, static_cast<size_t>((width - n) * ldr) * sizeof(float));
  transpose(columns, ldc, rows, ldr, width, pairs);
  columns[pairs * ldc] = outside(rows, n * ldr, kLarge) ? 1.0f : 0.0f;
}

// Visible keys as rows of pairs. Returns whether one of their numbers is `outside`.
static bool pack_key_pairs(const AttnShape& s, float* rows, const HeadsView& key, int64_t b,
                           int64_t h, const int64_t* index, int64_t n) {
  const int64_t pairs = ceil_div(s.d, 2), ld = leading_dim<float>(pairs);
  const char* base = key.at(b, h);
  for (int64_t i = 0; i < n; ++i) {
    load_pairs(rows + i * ld, s.d, ld, base + index[i] * key.row, key.column);
  }
  return outside(rows, n * ld, kLarge);
}

// Visible values, pairs[i][c] = (value[2 i][c], value[2 i + 1][c]); two rows of scratch. Returns whether
// one of their numbers is subnormal; none is too large for weights of at most 1.
static bool pack_value_pairs(const AttnShape& s, float* pairs, const HeadsView& value, int64_t b,
                             int64_t h, const int64_t* index, int64_t n, float* rows) {
  const int64_t ld = leading_dim<float>(s.d), half = ld / 2;
  const char* base = value.at(b, h);
  float* const start = pairs;
  for (int64_t i = 0; i < n; i += 2, pairs += ld) {
    load_pairs(rows, s.d, half, base + index[i] * value.row, value.column);
    const bool two = i + 1 < n;
    load_pairs(rows + half, two ? s.d : 0, half, base + index[two ? i + 1 : i] * value.row,
               value.column);
    for (int64_t c = 0; c < ld; c += kLanes<float>) {
      Bits first, second;
      __builtin_memcpy(&first, rows + c / 2, sizeof first);
      __builtin_memcpy(&second, rows + half + c / 2, sizeof second);
      store(pairs + c, interleave(first, second));
    }
  }
  return outside(start, pairs - start, kInfinity);
}

static void zero_block(const AttnForward& p, char* out, float* lse, int64_t queries) {
  for (int64_t q = 0; q < queries; ++q) {
    zero_bytes(out + q * p.out.row, 2 * p.shape.d);
    lse[q] = -__builtin_inff();
  }
}

// Blocks of a query that all images share; unit = head * num_blocks + block.
void cross_attn_pairs_query_units(const SharedQuery& p, int64_t begin, int64_t end) {
  const AttnShape& s = p.shape;
  const int64_t blocks = s.num_blocks(), pairs = ceil_div(s.d, 2);
  const int64_t block_size = pairs * leading_dim<float>(s.query_block) + kMark;
  const Scratch<float> rows(s.query_block * leading_dim<float>(pairs));
  for (int64_t unit = begin; unit < end; ++unit) {
    float* pack = static_cast<float*>(p.rows) + unit * block_size;
    pack_query_pairs(s, pack, p.query, 0, unit / blocks, unit % blocks, rows);
  }
}

// As forward_units of cross_attn_kernel.h, which computes units with numbers that are `outside`.
// Tiles of keys are even, so that no pair lies in two.
void cross_attn_pairs_fwd_units(const AttnForward& p, int64_t begin, int64_t end) {
  const AttnShape& s = p.shape;
  const int64_t blocks = s.num_blocks(), pairs = ceil_div(s.d, 2);
  const int64_t key_tile = round_up(s.key_tile, 2), width = round_up(s.d, kLanes<float>);
  const int64_t ldk = leading_dim<float>(pairs), ldd = leading_dim<float>(s.d);
  const int64_t ldq = leading_dim<float>(s.query_block);
  const int64_t block_size = pairs * ldq + kMark, own = p.query_pack == nullptr;
  const Scratch<int64_t> index(s.L + 1);
  const Scratch<float> keys(s.L * ldk), values(ceil_div(s.L, 2) * ldd), value_rows(ldd);
  const Scratch<float> scores(key_tile * ldq), weights(key_tile / 2 * ldq);
  const Scratch<float> acc(s.query_block * ldd), state_memory(3 * ldq);
  const Scratch<float> own_pack(own * block_size), own_rows(own * s.query_block * ldk);
  const SoftmaxState<float> state{state_memory, state_memory + ldq, state_memory + 2 * ldq};

  AttnForward exact = p;
  exact.query_pack = nullptr;
  int64_t packed = -1, n = 0;
  bool is_outside = false;
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t pair = unit / blocks, block = unit % blocks;
    const int64_t h = pair / s.B, b = pair % s.B;
    if (pair != packed) {
      n = visible_keys(s, b, index);
      is_outside = pack_key_pairs(s, keys, p.key, b, h, index, n);
      is_outside |= pack_value_pairs(s, values, p.value, b, h, index, n, value_rows);
      packed = pair;
    }
    const int64_t first = block * s.query_block, queries = min_of(s.query_block, s.K - first);
    char* out = p.out.at(b, h) + first * p.out.row;
    float* lse = static_cast<float*>(p.lse) + (b * s.H + h) * s.K + first;
    if (n == 0) {
      zero_block(p, out, lse, queries);
      continue;
    }
    if (own) pack_query_pairs(s, own_pack, p.query, b, h, block, own_rows);
    const float* query = own ? own_pack
                             : static_cast<const float*>(p.query_pack) +
                                   (h * blocks + block) * block_size;
    if (is_outside || query[pairs * ldq] != 0) {
      avx512::cross_attn_fwd_units(exact, unit, unit + 1);
      continue;
    }
    const int64_t columns = round_up(queries, kLanes<float>);
    for (int64_t l = 0; l < n; l += key_tile) {
      const int64_t tile = min_of(key_tile, n - l);
      gemm_pairs({tile, columns, pairs, keys + l * ldk, ldk, false, query, ldq, scores, ldq, false,
                  static_cast<float>(s.scale)});
      softmax_tile<float>(scores, ldq, tile, queries, l == 0, state);
      round_to_pairs(weights, scores, ldq, tile, columns);
      if (l != 0) rescale_rows<float>(acc, ldd, width, queries, state);
      gemm_pairs({queries, width, ceil_div(tile, 2), weights, ldq, true, values + l / 2 * ldd, ldd,
                  acc, ldd, l != 0});
    }
    for (int64_t q = 0; q < queries; ++q) {
      store_row<float>(out + q * p.out.row, s.d, s.dtype, acc + q * ldd, 1.0f / state.total[q]);
      lse[q] = log_sum(state.top[q], state.total[q]);
    }
  }
}
