// SPDX-License-Identifier: Apache-2.0
// Forward attention of one instruction set: units of (head, image, query block), heads outermost so
// that a shared query block stays in cache over the images.
#include "cpu/common/simd.h"
#include "cpu/common/exp2.h"
#include "cpu/common/rows.h"
#include "cpu/common/attn_panels.h"

// S^T = K Q^T, softmax down the columns, O = P V over tiles of keys with a running maximum.
template <class T>
static void forward_units(const AttnForward& p, int64_t begin, int64_t end) {
  const AttnShape& s = p.shape;
  const int64_t blocks = s.num_blocks();
  const int64_t width = round_up(s.d, kLanes<T>);
  const int64_t ldd = leading_dim<T>(s.d);
  const int64_t ldq = leading_dim<T>(s.query_block);
  const int64_t block_size = s.d * ldq;
  const Scratch<int64_t> index(s.L + 1);
  const Scratch<T> keys(s.L * ldd), values(s.L * ldd), acc(s.query_block * ldd);
  const Scratch<T> scores(s.key_tile * ldq), state_memory(3 * ldq);
  const Scratch<T> own_pack(p.query_pack == nullptr ? block_size : 0);
  const Scratch<T> own_rows(p.query_pack == nullptr ? s.query_block * ldd : 0);
  const SoftmaxState<T> state{state_memory, state_memory + ldq, state_memory + 2 * ldq};
  const int64_t item = item_bytes(s.dtype);

  int64_t packed = -1, n = 0;
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t pair = unit / blocks, block = unit % blocks;
    const int64_t h = pair / s.B, b = pair % s.B;
    if (pair != packed) {
      n = visible_keys(s, b, index);
      pack_rows<T>(s, keys, ldd, p.key, b, h, index, n, 1);
      pack_rows<T>(s, values, ldd, p.value, b, h, index, n, 1);
      packed = pair;
    }
    const int64_t first = block * s.query_block;
    const int64_t queries = min_of(s.query_block, s.K - first);
    char* out = p.out.at(b, h) + first * p.out.row;
    T* lse = static_cast<T*>(p.lse) + (b * s.H + h) * s.K + first;
    if (n == 0) {
      for (int64_t q = 0; q < queries; ++q) {
        zero_bytes(out + q * p.out.row, s.d * item);
        lse[q] = -static_cast<T>(__builtin_inf());
      }
      continue;
    }
    const T* query = own_pack;
    if (p.query_pack != nullptr) {
      query = static_cast<const T*>(p.query_pack) + (h * blocks + block) * block_size;
    } else {
      pack_query<T>(s, own_pack, p.query, b, h, block, own_rows);
    }
    for (int64_t l = 0; l < n; l += s.key_tile) {
      const int64_t tile = min_of(s.key_tile, n - l);
      score_tile<T>(s, scores, ldq, keys + l * ldd, tile, query, queries);
      softmax_tile<T>(scores, ldq, tile, queries, l == 0, state);
      if (l != 0) rescale_rows<T>(acc, ldd, width, queries, state);
      gemm(Gemm<T>{queries, width, tile, scores, ldq, true, values + l * ldd, ldd, acc, ldd,
                   l != 0});
    }
    for (int64_t q = 0; q < queries; ++q) {
      store_row<T>(out + q * p.out.row, s.d, s.dtype, acc + q * ldd, T{1} / state.total[q]);
      lse[q] = log_sum(state.top[q], state.total[q]);
    }
  }
}

#include "cross_attn_bwd_kernel.h"

VTCLIP_BY_DTYPE(cross_attn_fwd_units, forward_units, AttnForward, shape.dtype)
VTCLIP_BY_DTYPE(cross_attn_bwd_units, backward_units, AttnBackward, shape.dtype)
