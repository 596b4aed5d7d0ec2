// SPDX-License-Identifier: Apache-2.0
// Work on a query shared by all images: done once per call, not once per image.
#include "simd.h"
#include "exp2.h"
#include "rows.h"
#include "attn_panels.h"

// One block of a query shared by all images; unit = head * num_blocks + block.
template <class T>
static void pack_shared_query(const AttnShape& s, const HeadsView& query, T* pack, int64_t begin,
                              int64_t end) {
  const int64_t blocks = s.num_blocks();
  const int64_t block_size = s.D * leading_dim<T>(s.query_block);
  const Scratch<T> rows(s.query_block * leading_dim<T>(s.D));
  for (int64_t unit = begin; unit < end; ++unit) {
    pack_query<T>(s, pack + unit * block_size, query, 0, unit / blocks, unit % blocks, rows);
  }
}

// Rows (head * K + k) of the shared query, scaled, as the right operand of dK.
template <class T>
static void pack_rows_of_query(const AttnShape& s, const HeadsView& query, T* rows, int64_t begin,
                               int64_t end) {
  const int64_t width = round_up(s.D, kLanes<T>);
  for (int64_t unit = begin; unit < end; ++unit) {
    const char* row = query.at(0, unit / s.K) + unit % s.K * query.row;
    load_row(rows + unit * width, s.D, width, row, query.column, s.dtype, static_cast<T>(s.scale));
  }
}

// d_query rows (head * K + k) = scale * sum of the chunks in ascending order.
template <class T>
static void sum_chunks(const AttnShape& s, const HeadsView& d_query, const T* partial,
                       int64_t num_chunks, int64_t begin, int64_t end) {
  const int64_t width = round_up(s.D, kLanes<T>);
  const Scratch<T> total(width);
  for (int64_t unit = begin; unit < end; ++unit) {
    for (int64_t c = 0; c < width; c += kLanes<T>) {
      Vec<T> sum = load(partial + unit * width + c);
      for (int64_t chunk = 1; chunk < num_chunks; ++chunk) {
        sum += load(partial + (chunk * s.H * s.K + unit) * width + c);
      }
      store(total + c, sum);
    }
    char* row = d_query.at(0, unit / s.K) + unit % s.K * d_query.row;
    store_row<T>(row, s.D, s.dtype, total, static_cast<T>(s.scale));
  }
}

void pack_query_units(const AttnShape& s, const HeadsView& query, void* pack, int64_t begin,
                      int64_t end) {
  if (s.dtype == Dtype::kFloat64) {
    pack_shared_query<double>(s, query, static_cast<double*>(pack), begin, end);
  } else {
    pack_shared_query<float>(s, query, static_cast<float*>(pack), begin, end);
  }
}

void pack_query_row_units(const AttnShape& s, const HeadsView& query, void* rows, int64_t begin,
                          int64_t end) {
  if (s.dtype == Dtype::kFloat64) {
    pack_rows_of_query<double>(s, query, static_cast<double*>(rows), begin, end);
  } else {
    pack_rows_of_query<float>(s, query, static_cast<float*>(rows), begin, end);
  }
}

void sum_chunk_units(const AttnShape& s, const HeadsView& d_query, const void* partial,
                     int64_t num_chunks, int64_t begin, int64_t end) {
  if (s.dtype == Dtype::kFloat64) {
    sum_chunks(s, d_query, static_cast<const double*>(partial), num_chunks, begin, end);
  } else {
    sum_chunks(s, d_query, static_cast<const float*>(partial), num_chunks, begin, end);
  }
}
