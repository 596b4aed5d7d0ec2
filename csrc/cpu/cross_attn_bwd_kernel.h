// SPDX-License-Identifier: Apache-2.0
// Backward attention of one instruction set. Included by cross_attn_kernel.h.
//
// P = softmax(S)
// dP = dO V^T
// Delta = sum_l P dP
// dS = P (dP - Delta + d_lse)
// dV = P^T dO, dK = scale dS^T Q, dQ = scale dS K
//
// The softmax of one query block is recomputed from the scores, all keys at once, and not from
// exp(S - lse): at |S| = 1e4 a float32 lse is known to 1e-3 only. Delta comes from the same P, so
// it cancels exactly where the softmax saturates, and the output need not be read again. d_lse is
// added after that: beside a Delta of 1e10 nothing of it would be left.

// dO of one query block in both layouts.
template <class T>
static void pack_grad_block(const AttnBackward& p, int64_t b, int64_t h, int64_t first,
                            int64_t queries, T* rows, T* columns) {
  const AttnShape& s = p.shape;
  const int64_t ldd = leading_dim<T>(s.d), ldq = leading_dim<T>(s.query_block);
  pack_block<T>(s, rows, ldd, p.grad_out, b, h, first, queries, 1);
  pack_columns(s, columns, ldq, rows, ldd, queries);
}

// d_lse of one query block, 0 where there is none.
template <class T>
static void pack_grad_lse(const AttnBackward& p, int64_t b, int64_t h, int64_t first,
                          int64_t queries, T* grad_lse) {
  for (int64_t q = 0; q < round_up(queries, kLanes<T>); ++q) grad_lse[q] = 0;
  if (p.grad_lse.data == nullptr) return;
  const char* row = p.grad_lse.at(b, h) + first * p.grad_lse.column;
  for (int64_t q = 0; q < queries; ++q) {
    __builtin_memcpy(grad_lse + q, row + q * p.grad_lse.column, sizeof(T));
  }
}

// weights: exp(S - max) -> P; grads: dP -> dS. N vectors of queries at column `at`.
template <class T, int N>
VTCLIP_INLINE void grad_columns(T* weights, T* grads, int64_t ld, int64_t n, int64_t at,
                                const T* total, const T* grad_lse) {
  Vec<T> norm[N], delta[N], lse[N];
#pragma GCC unroll 4
  for (int j = 0; j < N; ++j) {
    norm[j] = T{1} / load(total + at + j * kLanes<T>);
    delta[j] = Vec<T>{};
  }
  for (int64_t l = 0; l < n; ++l) {
    T* weight = weights + l * ld + at;
    const T* grad = grads + l * ld + at;
#pragma GCC unroll 4
    for (int j = 0; j < N; ++j) {
      const Vec<T> w = load(weight + j * kLanes<T>) * norm[j];
      store(weight + j * kLanes<T>, w);
      delta[j] = fma(w, load(grad + j * kLanes<T>), delta[j]);
    }
  }
#pragma GCC unroll 4
  for (int j = 0; j < N; ++j) lse[j] = load(grad_lse + at + j * kLanes<T>);
  for (int64_t l = 0; l < n; ++l) {
    const T* weight = weights + l * ld + at;
    T* grad = grads + l * ld + at;
#pragma GCC unroll 4
    for (int j = 0; j < N; ++j) {
      const Vec<T> d = (load(grad + j * kLanes<T>) - delta[j]) + lse[j];
      store(grad + j * kLanes<T>, load(weight + j * kLanes<T>) * d);
    }
  }
}

template <class T>
static void grad_block(T* weights, T* grads, int64_t ld, int64_t n, int64_t queries, const T* total,
                       const T* grad_lse) {
  const int64_t columns = round_up(queries, kLanes<T>);
  int64_t at = 0;
  for (; at + 4 * kLanes<T> <= columns; at += 4 * kLanes<T>) {
    grad_columns<T, 4>(weights, grads, ld, n, at, total, grad_lse);
  }
  for (; at < columns; at += kLanes<T>) {
    grad_columns<T, 1>(weights, grads, ld, n, at, total, grad_lse);
  }
}

// A unit is (head, chunk of images); with a shared query its dQ is summed over the chunk.
template <class T>
static void backward_units(const AttnBackward& p, int64_t begin, int64_t end) {
  const AttnShape& s = p.shape;
  const int64_t blocks = s.num_blocks();
  const int64_t width = round_up(s.d, kLanes<T>);
  const int64_t ldd = leading_dim<T>(s.d);
  const int64_t ldq = leading_dim<T>(s.query_block);
  const int64_t block_size = s.d * ldq;
  const Scratch<int64_t> index(s.L + 1);
  const Scratch<T> keys(s.L * ldd), values(s.L * ldd), d_keys(s.L * ldd), d_values(s.L * ldd);
  const Scratch<T> weights(s.L * ldq), grads(s.L * ldq), state_memory(3 * ldq), grad_lse(ldq);
  const Scratch<T> out_rows(s.query_block * ldd), out_columns(block_size);
  const Scratch<T> own_columns(s.query_shared ? 0 : block_size);
  QuerySide<T> query{p};
  const SoftmaxState<T> state{state_memory, state_memory + ldq, state_memory + 2 * ldq};

  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t h = unit / p.num_chunks, chunk = unit % p.num_chunks;
    const int64_t last = min_of(s.B, (chunk + 1) * p.chunk_images);
    query.start_task(h, chunk);
    for (int64_t b = chunk * p.chunk_images; b < last; ++b) {
      const int64_t n = visible_keys(s, b, index);
      pack_rows<T>(s, keys, ldd, p.key, b, h, index, n, 1);
      pack_rows<T>(s, values, ldd, p.value, b, h, index, n, 1);
      for (int64_t block = 0; block < blocks; ++block) {
        const int64_t first = block * s.query_block;
        const int64_t queries = min_of(s.query_block, s.K - first);
        if (n == 0) {
          if (!s.query_shared) {
            __builtin_memset(query.own_sum, 0, static_cast<size_t>(queries * ldd) * sizeof(T));
            store_rows<T>(s, p.d_query, b, h, first, queries, query.own_sum, ldd, 1);
          }
          continue;
        }
        const T* query_columns = own_columns;
        if (s.query_shared) {
          query_columns = static_cast<const T*>(p.query_pack) + (h * blocks + block) * block_size;
        } else {
          pack_query<T>(s, own_columns, p.query, b, h, block, query.own_rows);
        }
        query.start_block(b, h, first, queries);
        pack_grad_block<T>(p, b, h, first, queries, out_rows, out_columns);
        pack_grad_lse<T>(p, b, h, first, queries, grad_lse);
        score_tile<T>(s, weights, ldq, keys, n, query_columns, queries);
        softmax_tile<T>(weights, ldq, n, queries, true, state);
        score_tile<T>(s, grads, ldq, values, n, out_columns, queries);
        grad_block<T>(weights, grads, ldq, n, queries, state.total, grad_lse);
        gemm(Gemm<T>{n, width, queries, weights, ldq, false, out_rows, ldd, d_values, ldd,
                     block != 0});
        gemm(Gemm<T>{n, width, queries, grads, ldq, false, query.rows, query.ld_rows, d_keys, ldd,
                     block != 0});
        for (int64_t l = 0; l < n; l += s.key_tile) {
          gemm(Gemm<T>{queries, width, min_of(s.key_tile, n - l), grads + l * ldq, ldq, true,
                       keys + l * ldd, ldd, query.d_query, query.ld_d_query,
                       s.query_shared || l != 0});
        }
        query.finish_block(b, h, first, queries);
      }
      store_key_rows<T>(s, p.d_key, b, h, index, n, d_keys, ldd);
      store_key_rows<T>(s, p.d_value, b, h, index, n, d_values, ldd);
    }
  }
}
