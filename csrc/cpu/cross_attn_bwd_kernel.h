// SPDX-License-Identifier: Apache-2.0
// Backward attention of one instruction set. Included by cross_attn_kernel.h.
//
//   P = exp2(S - lse)      dP = dO V^T      Delta = rowsum(dO * O) - d_lse      dS = P * (dP -
//   Delta) dV = P^T dO            dK = scale dS^T Q            dQ = scale dS K
// P and dS are recomputed tile by tile, kept transposed ([keys, queries]), and never stored whole.

// dO of one query block in both layouts, lse in base 2, and Delta.
template <class T>
static void pack_grad_block(const AttnBackward& p, int64_t b, int64_t h, int64_t first,
                            int64_t queries, T* rows, T* columns, T* lse, T* delta, T* buffer) {
  const AttnShape& s = p.shape;
  const int64_t ldd = leading_dim<T>(s.D), ldq = leading_dim<T>(s.query_block);
  pack_block<T>(s, rows, ldd, p.grad_out, b, h, first, queries, 1);
  pack_columns(s, columns, ldq, rows, ldd, queries);
  const char* lse_row = p.lse + b * p.lse_batch + h * p.lse_head + first * p.lse_row;
  const char* out_row = p.out.at(b, h) + first * p.out.row;
  const char* grad_lse = p.grad_lse;
  if (grad_lse != nullptr) {
    grad_lse += b * p.grad_lse_batch + h * p.grad_lse_head + first * p.grad_lse_row;
  }
  for (int64_t q = 0; q < queries; ++q) {
    T value;
    __builtin_memcpy(&value, lse_row + q * p.lse_row, sizeof(T));
    lse[q] = static_cast<T>(static_cast<double>(value) * kLog2E);
    const T* out = view_row<T>(buffer, s.D, out_row + q * p.out.row, p.out.column, s.dtype);
    delta[q] = dot_rows(rows + q * ldd, out, s.D);
    if (grad_lse != nullptr) {
      __builtin_memcpy(&value, grad_lse + q * p.grad_lse_row, sizeof(T));
      delta[q] -= value;
    }
  }
  for (int64_t q = queries; q < round_up(queries, kLanes<T>); ++q) lse[q] = delta[q] = 0;
}

// scores: S -> P; grads: dP -> dS.
template <class T>
static void grad_tile(T* scores, T* grads, int64_t ld, int64_t n, int64_t queries, const T* lse,
                      const T* delta) {
  const int64_t columns = round_up(queries, kLanes<T>);
  for (int64_t l = 0; l < n; ++l) {
    T* score = scores + l * ld;
    T* grad = grads + l * ld;
    for (int64_t q = 0; q < columns; q += kLanes<T>) {
      const Vec<T> weight = exp2(load(score + q) - load(lse + q));
      store(score + q, weight);
      store(grad + q, weight * (load(grad + q) - load(delta + q)));
    }
  }
}

// A unit is (head, chunk of images); with a shared query its dQ is summed over the chunk.
template <class T>
static void backward_units(const AttnBackward& p, int64_t begin, int64_t end) {
  const AttnShape& s = p.shape;
  const int64_t blocks = s.num_blocks();
  const int64_t width = round_up(s.D, kLanes<T>);
  const int64_t ldd = leading_dim<T>(s.D);
  const int64_t ldq = leading_dim<T>(s.query_block);
  const int64_t block_size = s.D * ldq;
  const int64_t own = s.query_shared ? 0 : 1;
  const Scratch<int64_t> index(s.L + 1);
  const Scratch<T> keys(s.L * ldd), values(s.L * ldd), d_keys(s.L * ldd), d_values(s.L * ldd);
  const Scratch<T> scores(s.key_tile * ldq), grads(s.key_tile * ldq);
  const Scratch<T> out_rows(s.query_block * ldd), out_columns(block_size);
  const Scratch<T> lse(ldq), delta(ldq), buffer(ldd);
  const Scratch<T> own_columns(own * block_size), own_rows(own * s.query_block * ldd);
  const Scratch<T> own_d_query(own * s.query_block * ldd);

  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t h = unit / p.num_chunks, chunk = unit % p.num_chunks;
    const int64_t last = min_of(s.B, (chunk + 1) * p.chunk_images);
    T* partial = nullptr;
    if (s.query_shared) {
      partial = static_cast<T*>(p.d_query_partial) + (chunk * s.H + h) * s.K * width;
      __builtin_memset(partial, 0, static_cast<size_t>(s.K * width) * sizeof(T));
    }
    for (int64_t b = chunk * p.chunk_images; b < last; ++b) {
      const int64_t n = visible_keys(s, b, index);
      pack_rows<T>(s, keys, ldd, p.key, b, h, index, n, 1);
      pack_rows<T>(s, values, ldd, p.value, b, h, index, n, 1);
      for (int64_t block = 0; block < blocks; ++block) {
        const int64_t first = block * s.query_block;
        const int64_t queries = min_of(s.query_block, s.K - first);
        if (n == 0) {
          if (!s.query_shared) {
            __builtin_memset(own_d_query, 0, static_cast<size_t>(queries * ldd) * sizeof(T));
            store_rows<T>(s, p.d_query, b, h, first, queries, own_d_query, ldd, 1);
          }
          continue;
        }
        const T* query_columns = own_columns;
        const T* query_rows = own_rows;
        int64_t ld_rows = ldd;
        if (s.query_shared) {
          query_columns = static_cast<const T*>(p.query_pack) + (h * blocks + block) * block_size;
          query_rows = static_cast<const T*>(p.query_rows) + (h * s.K + first) * width;
          ld_rows = width;
        } else {
          pack_query<T>(s, own_columns, p.query, b, h, block, own_rows);
          pack_block<T>(s, own_rows, ldd, p.query, b, h, first, queries, static_cast<T>(s.scale));
        }
        T* d_query = s.query_shared ? partial + first * width : own_d_query;
        const int64_t ld_d_query = s.query_shared ? width : ldd;
        pack_grad_block<T>(p, b, h, first, queries, out_rows, out_columns, lse, delta, buffer);
        for (int64_t l = 0; l < n; l += s.key_tile) {
          const int64_t tile = min_of(s.key_tile, n - l);
          score_tile<T>(s, scores, ldq, keys + l * ldd, tile, query_columns, queries);
          score_tile<T>(s, grads, ldq, values + l * ldd, tile, out_columns, queries);
          grad_tile<T>(scores, grads, ldq, tile, queries, lse, delta);
          gemm(Gemm<T>{tile, width, queries, scores, ldq, false, out_rows, ldd, d_values + l * ldd,
                       ldd, block != 0});
          gemm(Gemm<T>{tile, width, queries, grads, ldq, false, query_rows, ld_rows,
                       d_keys + l * ldd, ldd, block != 0});
          gemm(Gemm<T>{queries, width, tile, grads, ldq, true, keys + l * ldd, ldd, d_query,
                       ld_d_query, s.query_shared || l != 0});
        }
        if (!s.query_shared) {
          store_rows<T>(s, p.d_query, b, h, first, queries, own_d_query, ldd,
                        static_cast<T>(s.scale));
        }
      }
      store_key_rows<T>(s, p.d_key, b, h, index, n, d_keys, ldd);
      store_key_rows<T>(s, p.d_value, b, h, index, n, d_values, ldd);
    }
  }
}
