// SPDX-License-Identifier: Apache-2.0
// Packing and score tiles used by all attention kernels. Included once per instruction set, after
// simd.h, exp2.h and rows.h.
//
// Scores are kept transposed, S^T [keys, queries]: the keys are then the operand that is read one
// element at a time and needs no transposition, the (often shared) query is packed once, and the
// softmax over the keys runs down the columns with no sum across lanes.

// Indices of the visible keys of image b; returns how many there are.
inline int64_t visible_keys(const AttnShape& s, int64_t b, int64_t* index) {
  int64_t n = 0;
  for (int64_t l = 0; l < s.L; ++l) {
    index[n] = l;
    n += s.mask == nullptr || s.mask[b * s.mask_batch + l * s.mask_column] != 0;
  }
  return n;
}

// rows[i][0..D) = scale * view row index[i], zero up to a whole vector.
template <class T>
static void pack_rows(const AttnShape& s, T* rows, int64_t ld, const HeadsView& view, int64_t b,
                      int64_t h, const int64_t* index, int64_t n, T scale) {
  const int64_t width = round_up(s.d, kLanes<T>);
  const char* base = view.at(b, h);
  for (int64_t i = 0; i < n; ++i) {
    load_row(rows + i * ld, s.d, width, base + index[i] * view.row, view.column, s.dtype, scale);
  }
}

// Rows of one head lie H * d apart in [B, rows, H, d] memory, which no hardware prefetcher follows:
// row i + kRowsAhead is asked for while row i is read or written.
constexpr int64_t kRowsAhead = 8;

VTCLIP_INLINE void prefetch_row(const char* row, int64_t bytes) {
  for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch(row + at);
}

// As pack_rows for rows first .. first + n.
template <class T>
static void pack_block(const AttnShape& s, T* rows, int64_t ld, const HeadsView& view, int64_t b,
                       int64_t h, int64_t first, int64_t n, T scale) {
  const int64_t width = round_up(s.d, kLanes<T>);
  const char* base = view.at(b, h) + first * view.row;
  const int64_t bytes = s.d * item_bytes(s.dtype);
  for (int64_t i = 0; i < min_of(kRowsAhead, n); ++i) prefetch_row(base + i * view.row, bytes);
  for (int64_t i = 0; i < n; ++i) {
    if (i + kRowsAhead < n) prefetch_row(base + (i + kRowsAhead) * view.row, bytes);
    load_row(rows + i * ld, s.d, width, base + i * view.row, view.column, s.dtype, scale);
  }
}

// columns[j][i] = rows[i][j] for i < n, zero for n <= i < round_up(n).
template <class T>
static void pack_columns(const AttnShape& s, T* columns, int64_t ldc, const T* rows, int64_t ldr,
                         int64_t n) {
  transpose(columns, ldc, rows, ldr, n, s.d);
  const int64_t width = round_up(n, kLanes<T>);
  for (int64_t j = 0; j < s.d; ++j) {
    for (int64_t i = n; i < width; ++i) columns[j * ldc + i] = 0;
  }
}

constexpr double kLog2E = 1.4426950408889634074;

// exp(x - top). log2(e) is not in the scores: its rounding would grow with them, and whole numbers
// would not stay exact.
template <class T>
VTCLIP_INLINE Vec<T> exp_below(Vec<T> x, Vec<T> top) {
  return exp2((x - top) * splat(static_cast<T>(kLog2E)));
}

template <class T>
static void pack_query(const AttnShape& s, T* columns, const HeadsView& query, int64_t b, int64_t h,
                       int64_t block, T* rows) {
  const int64_t first = block * s.query_block;
  const int64_t n = min_of(s.query_block, s.K - first);
  const int64_t ld = leading_dim<T>(s.d);
  pack_block(s, rows, ld, query, b, h, first, n, static_cast<T>(s.scale));
  pack_columns(s, columns, leading_dim<T>(s.query_block), rows, ld, n);
}

// S^T[keys, queries] of n keys against one packed query block.
template <class T>
static void score_tile(const AttnShape& s, T* scores, int64_t ld, const T* keys, int64_t n,
                       const T* query_columns, int64_t queries) {
  gemm(Gemm<T>{n, round_up(queries, kLanes<T>), s.d, keys, leading_dim<T>(s.d), false,
               query_columns, leading_dim<T>(s.query_block), scores, ld, false});
}

// Softmax state of a query block.
template <class T>
struct SoftmaxState {
  T* top;      // running maximum of the scores
  T* total;    // sum of exp(score - top)
  T* rescale;  // what sums made before this tile must be multiplied by
};

// In place: score -> exp(score - max); updates the state. A maximum of -inf is replaced by 0, so
// that a column of -inf contributes 0 and not NaN while other tiles may still hold finite scores.
template <class T, int N>
VTCLIP_INLINE void softmax_columns(T* scores, int64_t ld, int64_t n, int64_t at, bool first,
                                   const SoftmaxState<T>& state) {
  const Vec<T> low = splat(static_cast<T>(-__builtin_inf()));
  Vec<T> top[N], old[N], total[N];
#pragma GCC unroll 4
  for (int j = 0; j < N; ++j) {
    old[j] = first ? low : load(state.top + at + j * kLanes<T>);
    top[j] = old[j];
    total[j] = Vec<T>{};
  }
  for (int64_t l = 0; l < n; ++l) {
#pragma GCC unroll 4
    for (int j = 0; j < N; ++j) top[j] = max(load(scores + l * ld + at + j * kLanes<T>), top[j]);
  }
#pragma GCC unroll 4
  for (int j = 0; j < N; ++j) {
    store(state.top + at + j * kLanes<T>, top[j]);
    top[j] = top[j] == low ? Vec<T>{} : top[j];
  }
  for (int64_t l = 0; l < n; ++l) {
    T* row = scores + l * ld + at;
#pragma GCC unroll 4
    for (int j = 0; j < N; ++j) {
      const Vec<T> p = exp_below<T>(load(row + j * kLanes<T>), top[j]);
      total[j] += p;
      store(row + j * kLanes<T>, p);
    }
  }
#pragma GCC unroll 4
  for (int j = 0; j < N; ++j) {
    T* sum = state.total + at + j * kLanes<T>;
    if (!first) {
      const Vec<T> factor = exp_below<T>(old[j], top[j]);
      store(state.rescale + at + j * kLanes<T>, factor);
      total[j] = fma(load(sum), factor, total[j]);
    }
    store(sum, total[j]);
  }
}

template <class T>
static void softmax_tile(T* scores, int64_t ld, int64_t n, int64_t queries, bool first,
                         const SoftmaxState<T>& state) {
  const int64_t columns = round_up(queries, kLanes<T>);
  int64_t at = 0;
  for (; at + 4 * kLanes<T> <= columns; at += 4 * kLanes<T>) {
    softmax_columns<T, 4>(scores, ld, n, at, first, state);
  }
  for (; at < columns; at += kLanes<T>) softmax_columns<T, 1>(scores, ld, n, at, first, state);
}

// Sums of values made before this tile, brought to its maximum.
template <class T>
static void rescale_rows(T* rows, int64_t ld, int64_t width, int64_t queries,
                         const SoftmaxState<T>& state) {
  for (int64_t q = 0; q < queries; ++q) {
    const Vec<T> factor = splat(state.rescale[q]);
    for (int64_t c = 0; c < width; c += kLanes<T>) {
      store(rows + q * ld + c, load(rows + q * ld + c) * factor);
    }
  }
}

// Log-sum-exp from the state. Where every score was -inf or NaN the maximum was
// taken as 0, and the sum, 0 or NaN, decides.
template <class T>
VTCLIP_INLINE T log_sum(T top, T total) {
  if (top == static_cast<T>(__builtin_inf())) return top;
  const double log_total = sizeof(T) == 4 ? static_cast<double>(__builtin_logf(total))
                                          : __builtin_log(static_cast<double>(total));
  const double shift = top == -static_cast<T>(__builtin_inf()) ? 0.0 : static_cast<double>(top);
  return static_cast<T>(shift + log_total);
}

// Packed rows of one block to tensor memory.
template <class T>
static void store_rows(const AttnShape& s, const HeadsView& view, int64_t b, int64_t h,
                       int64_t first, int64_t n, const T* rows, int64_t ld, T scale) {
  char* base = view.at(b, h) + first * view.row;
  const int64_t bytes = s.d * item_bytes(s.dtype);
  for (int64_t i = 0; i < n; ++i) {
    if (i + kRowsAhead < n) prefetch_row(base + (i + kRowsAhead) * view.row, bytes);
    store_row(base + i * view.row, s.d, s.dtype, rows + i * ld, scale);
  }
}

// The query's side of a backward task (head, chunk of images): its rows as the right operand of dK,
// and where its dQ is summed, over the chunk where all images share the query.
template <class T>
struct QuerySide {
  const AttnGradients& p;
  const AttnShape& s = p.shape;
  const int64_t width = round_up(s.d, kLanes<T>), ldd = leading_dim<T>(s.d);
  const int64_t own = s.query_shared ? 0 : s.query_block * ldd;
  const Scratch<T> own_rows{own}, own_sum{own};  // of a block where the query is not shared
  T* partial = nullptr;                          // [K, width] of this task where it is
  const T* rows = nullptr;                       // of this block, times scale
  T* d_query = nullptr;                          // of this block, without the scale
  const int64_t ld_rows = s.query_shared ? width : ldd, ld_d_query = ld_rows;

  void start_task(int64_t h, int64_t chunk) {
    if (!s.query_shared) return;
    partial = static_cast<T*>(p.d_query_partial) + (chunk * s.H + h) * s.K * width;
    __builtin_memset(partial, 0, static_cast<size_t>(s.K * width) * sizeof(T));
  }
  void start_block(int64_t b, int64_t h, int64_t first, int64_t queries) {
    if (s.query_shared) {
      rows = static_cast<const T*>(p.query_rows) + (h * s.K + first) * width;
      d_query = partial + first * width;
    } else {
      pack_block<T>(s, own_rows, ldd, p.query, b, h, first, queries, static_cast<T>(s.scale));
      rows = own_rows;
      d_query = own_sum;
    }
  }
  void finish_block(int64_t b, int64_t h, int64_t first, int64_t queries) {
    if (s.query_shared) return;
    store_rows<T>(s, p.d_query, b, h, first, queries, own_sum, ldd, static_cast<T>(s.scale));
  }
};

// Gradients of keys or values: rows of visible keys from `rows`, zero elsewhere.
template <class T>
static void store_key_rows(const AttnShape& s, const HeadsView& view, int64_t b, int64_t h,
                           const int64_t* index, int64_t n, const T* rows, int64_t ld) {
  char* base = view.at(b, h);
  const int64_t bytes = s.d * item_bytes(s.dtype);
  int64_t i = 0;
  for (int64_t l = 0; l < s.L; ++l) {
    char* row = base + l * view.row;
    if (i < n && index[i] == l) {
      store_row<T>(row, s.d, s.dtype, rows + i++ * ld, 1);
    } else {
      zero_bytes(row, bytes);
    }
  }
}
