// SPDX-License-Identifier: Apache-2.0
// A weight [out, in] as panels of kPanel columns of its transpose, or of itself, for products with
// rows on the left. Included once per instruction set, after simd.h and rows.h.

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
