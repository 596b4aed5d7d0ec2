// SPDX-License-Identifier: Apache-2.0
// Attention weights of one instruction set.
#include "cpu/common/simd.h"
#include "cpu/common/exp2.h"
#include "cpu/common/rows.h"
#include "cpu/common/attn_panels.h"

// Units of (head, image, query block). The scores of a block are kept whole, [keys, queries].
template <class T>
static void weights_forward_units(const WeightsForward& p, int64_t begin, int64_t end) {
  const AttnShape& s = p.shape;
  const int64_t blocks = s.num_blocks();
  const int64_t ldd = leading_dim<T>(s.d), ldq = leading_dim<T>(s.query_block);
  const int64_t ldl = leading_dim<T>(s.L);
  const int64_t block_size = s.d * ldq;
  constexpr int64_t kRows = 16;  // queries turned into rows at a time
  const int64_t own = p.query_pack == nullptr ? 1 : 0;
  const Scratch<int64_t> index(s.L + 1);
  const Scratch<T> keys(s.L * ldd), scores(s.L * ldq), state_memory(3 * ldq);
  const Scratch<T> rows(kRows * ldl), spread(s.L);
  const Scratch<T> own_pack(own * block_size), own_rows(own * s.query_block * ldd);
  const SoftmaxState<T> state{state_memory, state_memory + ldq, state_memory + 2 * ldq};
  const int64_t row_bytes = s.L * item_bytes(s.dtype);

  int64_t packed = -1, n = 0;
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t pair = unit / blocks, block = unit % blocks;
    const int64_t h = pair / s.B, b = pair % s.B;
    if (pair != packed) {
      n = visible_keys(s, b, index);
      pack_rows<T>(s, keys, ldd, p.key, b, h, index, n, 1);
      packed = pair;
    }
    const int64_t first = block * s.query_block;
    const int64_t queries = min_of(s.query_block, s.K - first);
    char* out = p.weights + ((b * s.H + h) * s.K + first) * row_bytes;
    if (n == 0) {
      __builtin_memset(out, 0, static_cast<size_t>(queries * row_bytes));
      continue;
    }
    const T* query = own_pack;
    if (own == 0) {
      query = static_cast<const T*>(p.query_pack) + (h * blocks + block) * block_size;
    } else {
      pack_query<T>(s, own_pack, p.query, b, h, block, own_rows);
    }
    score_tile<T>(s, scores, ldq, keys, n, query, queries);
    softmax_tile<T>(scores, ldq, n, queries, true, state);
    for (int64_t q0 = 0; q0 < queries; q0 += kRows) {
      const int64_t group = min_of(kRows, queries - q0);
      transpose<T>(rows, ldl, scores + q0, ldq, n, group);
      for (int64_t i = 0; i < group; ++i) {
        const T* row = rows + i * ldl;
        if (n < s.L) {
          __builtin_memset(spread, 0, static_cast<size_t>(s.L) * sizeof(T));
          for (int64_t l = 0; l < n; ++l) spread[index[l]] = row[l];
          row = spread;
        }
        const T norm = T{1} / state.total[q0 + i];
        // A masked column stays 0 even where the row is NaN, so it must not be multiplied.
        if (n < s.L && norm != norm) {
          for (int64_t l = 0; l < n; ++l) spread[index[l]] = norm;
          store_row<T>(out + (q0 + i) * row_bytes, s.L, s.dtype, row, 1);
        } else {
          store_row<T>(out + (q0 + i) * row_bytes, s.L, s.dtype, row, norm);
        }
      }
    }
  }
}

// Columns with a weight other than 0 in some row of (b, h): all others are masked, or carry
// nothing.
static int64_t used_columns(const WeightsBackward& p, int64_t b, int64_t h, bool* used,
                            int64_t* index) {
  const AttnShape& s = p.shape;
  for (int64_t l = 0; l < s.L; ++l) used[l] = false;
  for (int64_t k = 0; k < s.K; ++k) {
    const char* row = p.weights.at(b, h) + k * p.weights.row;
    for (int64_t l = 0; l < s.L; ++l) {
      used[l] |= load_one<double>(row + l * p.weights.column, s.dtype) != 0;
    }
  }
  int64_t n = 0;
  for (int64_t l = 0; l < s.L; ++l) {
    index[n] = l;
    n += used[l];
  }
  return n;
}

// dS = W * (dW - sum_l W dW) of one row over its used columns; a weight of 0 gives exactly 0.
//
// The weights were rounded to the dtype of the tensors, so they sum to 1 within its precision only,
// and where one of them is nearly 1, dW - sum_l W dW would be that rounding and little else. So the
// mean is one of weights that sum to 1, of what dW is above its value at the largest weight.
template <class T>
static void weights_grad_row(const WeightsBackward& p, int64_t b, int64_t h, int64_t k,
                             const int64_t* index, int64_t n, T* weight, T* out) {
  const AttnShape& s = p.shape;
  const char* weights = p.weights.at(b, h) + k * p.weights.row;
  const char* grads = p.grad_weights.at(b, h) + k * p.grad_weights.row;
  T sum = 0, total = 0, largest = 0, pivot = 0;
  for (int64_t i = 0; i < n; ++i) {
    weight[i] = load_one<T>(weights + index[i] * p.weights.column, s.dtype);
    out[i] = load_one<T>(grads + index[i] * p.grad_weights.column, s.dtype);
    if (weight[i] > largest) {
      largest = weight[i];
      pivot = out[i];
    }
  }
  for (int64_t i = 0; i < n; ++i) {
    out[i] = weight[i] == 0 ? 0 : out[i] - pivot;
    sum += weight[i] * out[i];
    total += weight[i];
  }
  const T mean = total == 0 ? 0 : sum / total;
  for (int64_t i = 0; i < n; ++i) out[i] = weight[i] * (out[i] - mean);
}

// Units of (head, chunk of images):  dQ = scale dS K,  dK = scale dS^T Q.
template <class T>
static void weights_backward_units(const WeightsBackward& p, int64_t begin, int64_t end) {
  const AttnShape& s = p.shape;
  const int64_t blocks = s.num_blocks();
  const int64_t width = round_up(s.d, kLanes<T>);
  const int64_t ldd = leading_dim<T>(s.d), ldl = leading_dim<T>(s.L);
  const Scratch<int64_t> index(s.L + 1);
  const Scratch<bool> used(s.L);
  const Scratch<T> keys(s.L * ldd), d_keys(s.L * ldd), grads(s.query_block * ldl), weight(s.L);
  QuerySide<T> query{p};

  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t h = unit / p.num_chunks, chunk = unit % p.num_chunks;
    const int64_t last = min_of(s.B, (chunk + 1) * p.chunk_images);
    query.start_task(h, chunk);
    for (int64_t b = chunk * p.chunk_images; b < last; ++b) {
      const int64_t n = used_columns(p, b, h, used, index);
      pack_rows<T>(s, keys, ldd, p.key, b, h, index, n, 1);
      for (int64_t block = 0; block < blocks; ++block) {
        const int64_t first = block * s.query_block;
        const int64_t queries = min_of(s.query_block, s.K - first);
        query.start_block(b, h, first, queries);
        for (int64_t q = 0; q < queries; ++q) {
          weights_grad_row<T>(p, b, h, first + q, index, n, weight, grads + q * ldl);
        }
        gemm(Gemm<T>{queries, width, n, grads, ldl, false, keys, ldd, query.d_query,
                     query.ld_d_query, s.query_shared});
        gemm(Gemm<T>{n, width, queries, grads, ldl, true, query.rows, query.ld_rows, d_keys, ldd,
                     block != 0});
        query.finish_block(b, h, first, queries);
      }
      store_key_rows<T>(s, p.d_key, b, h, index, n, d_keys, ldd);
    }
  }
}

VTCLIP_BY_DTYPE(weights_fwd_units, weights_forward_units, WeightsForward, shape.dtype)
VTCLIP_BY_DTYPE(weights_bwd_units, weights_backward_units, WeightsBackward, shape.dtype)
