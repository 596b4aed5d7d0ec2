// SPDX-License-Identifier: Apache-2.0
// A weight [out, in] as panels of kPanel columns of its transpose, or of itself, for products with
// rows on the left, and its gradient. Included once per instruction set, after simd.h, rows.h and
// unit_rows.h.

// Steps of the inner dimension per product: a panel's part (32 KiB in float32) stays in the first
// cache and partial sums stay short.
constexpr int64_t kInner = 128;

// Panel `index` of weight^T: [in, kPanel], element (i, j) = weight[index * kPanel + j, i].
template <class T>
static void pack_transposed(T* pack, const RowsView& weight, int64_t out, int64_t in, Dtype dtype,
                            int64_t index) {
  const int64_t ldw = leading_dim<T>(in);
  const int64_t first = index * kPanel, count = min_of(kPanel, out - first);
  const Scratch<T> rows(kPanel * ldw);
  T* panel = pack + first * in;
  for (int64_t j = 0; j < count; ++j) {
    load_row<T>(rows + j * ldw, in, in, weight.at(0, first + j), weight.column, dtype, T{1});
  }
  transpose<T>(panel, kPanel, rows, ldw, count, in);
  for (int64_t i = 0; i < in && count < kPanel; ++i) {
    for (int64_t j = count; j < kPanel; ++j) panel[i * kPanel + j] = 0;
  }
}

// Panel `index` of weight: [out, kPanel], element (i, j) = weight[i, index * kPanel + j].
template <class T>
static void pack_plain(T* pack, const RowsView& weight, int64_t out, int64_t in, Dtype dtype,
                       int64_t index) {
  const int64_t first = index * kPanel, count = min_of(kPanel, in - first);
  T* panel = pack + first * out;
  for (int64_t i = 0; i < out; ++i) {
    load_row<T>(panel + i * kPanel, count, kPanel, weight.at(0, i) + first * weight.column,
                weight.column, dtype, T{1});
  }
}

// Units of packing: panels of weight^T, to `transposed`; after them, of weight, to `plain`.
template <class T>
static void pack_weight(const RowsView& weight, int64_t out, int64_t in, Dtype dtype,
                        void* transposed, void* plain, int64_t begin, int64_t end) {
  const int64_t panels = panels_of(out);
  for (int64_t u = begin; u < min_of(end, panels); ++u) {
    pack_transposed<T>(static_cast<T*>(transposed), weight, out, in, dtype, u);
  }
  for (int64_t u = max_of(begin, panels); u < end; ++u) {
    pack_plain<T>(static_cast<T*>(plain), weight, out, in, dtype, u - panels);
  }
}

// Blocks of kSumRows outputs of d_weight [out, in] and d_bias [out], over the rows of all units in
// one round: d_weight (+)= d_out^T input, d_bias (+)= sum d_out. Rows lie in panels, row_block to a
// unit.
template <class T, class Args>
static void weight_grad_blocks(const Args& p, const RowChunks& chunks, int64_t B, int64_t K,
                               const void* d_out, int64_t out, const void* input, int64_t in,
                               int64_t begin, int64_t end) {
  const int64_t ld_out = leading_dim<T>(out), ld_in = leading_dim<T>(in);
  const int64_t width = round_up(in, kLanes<T>);
  const Scratch<T> column_sum(kSumRows);
  for (int64_t block = begin; block < end; ++block) {
    const int64_t first = block * kSumRows, count = min_of(kSumRows, out - first);
    T* d_weight = static_cast<T*>(p.d_weight_sum) + first * width;
    T* d_bias = static_cast<T*>(p.d_bias_sum) + first;
    for (int64_t unit = 0; unit < chunks.units(); ++unit) {
      const int64_t rows = row_unit(chunks, B, K, unit).rows_of_round(p.round, p.row_block);
      if (rows == 0) continue;
      const bool more = p.round != 0 || unit != 0;
      const T* x = static_cast<const T*>(input) + unit * p.row_block * ld_in;
      const T* g = static_cast<const T*>(d_out) + unit * p.row_block * ld_out + first;
      gemm(Gemm<T>{count, width, rows, g, ld_out, true, x, ld_in, d_weight, width, more});
      sum_rows<T>(column_sum, g, rows, ld_out, count);
      for (int64_t i = 0; i < count; ++i) {
        d_bias[i] = more ? d_bias[i] + column_sum[i] : column_sum[i];
      }
    }
  }
}
