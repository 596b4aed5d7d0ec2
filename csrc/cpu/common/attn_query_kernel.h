// SPDX-License-Identifier: Apache-2.0
// Work on a query shared by all images: done once per call, not once per image.
#include "simd.h"
#include "exp2.h"
#include "rows.h"
#include "attn_panels.h"

// Blocks of the query, packed; unit = head * num_blocks + block.
template <class T>
static void pack_query_blocks(const SharedQuery& p, int64_t begin, int64_t end) {
  const AttnShape& s = p.shape;
  const int64_t blocks = s.num_blocks();
  const int64_t block_size = s.d * leading_dim<T>(s.query_block);
  const Scratch<T> rows(s.query_block * leading_dim<T>(s.d));
  for (int64_t unit = begin; unit < end; ++unit) {
    T* pack = static_cast<T*>(p.rows) + unit * block_size;
    pack_query<T>(s, pack, p.query, 0, unit / blocks, unit % blocks, rows);
  }
}

// Rows (head * K + k), scaled, as the right operand of dK.
template <class T>
static void pack_query_rows(const SharedQuery& p, int64_t begin, int64_t end) {
  const AttnShape& s = p.shape;
  const int64_t width = round_up(s.d, kLanes<T>);
  for (int64_t unit = begin; unit < end; ++unit) {
    const char* row = p.query.at(0, unit / s.K) + unit % s.K * p.query.row;
    load_row(static_cast<T*>(p.rows) + unit * width, s.d, width, row, p.query.column, s.dtype,
             static_cast<T>(s.scale));
  }
}

// Rows (head * K + k) of d_query = scale * sum of the chunks in ascending order.
template <class T>
static void sum_chunks(const SharedQuery& p, int64_t begin, int64_t end) {
  const AttnShape& s = p.shape;
  const int64_t width = round_up(s.d, kLanes<T>);
  const T* partial = static_cast<const T*>(p.rows);
  const Scratch<T> total(width);
  for (int64_t unit = begin; unit < end; ++unit) {
    for (int64_t c = 0; c < width; c += kLanes<T>) {
      Vec<T> sum = load(partial + unit * width + c);
      for (int64_t chunk = 1; chunk < p.num_chunks; ++chunk) {
        sum += load(partial + (chunk * s.H * s.K + unit) * width + c);
      }
      store(total + c, sum);
    }
    char* row = p.query.at(0, unit / s.K) + unit % s.K * p.query.row;
    store_row<T>(row, s.d, s.dtype, total, static_cast<T>(s.scale));
  }
}

VTCLIP_BY_DTYPE(pack_query_units, pack_query_blocks, SharedQuery, shape.dtype)
VTCLIP_BY_DTYPE(pack_query_row_units, pack_query_rows, SharedQuery, shape.dtype)
VTCLIP_BY_DTYPE(sum_chunk_units, sum_chunks, SharedQuery, shape.dtype)
