// SPDX-License-Identifier: Apache-2.0
// Register tiles of kTileM rows by kTileN vectors; included once per instruction set, after simd.h.
//
// AVX2: 6 x 2 vectors, 12 accumulators + 2 of B + 1 of A = 15 of 16 registers. AVX-512: 6 x 4,
// 24 + 4 + 1 of 32. Both keep more sums in flight than FMA latency x pipes (8 to 10).

constexpr int kTileM = 6;
constexpr int kTileN = VTCLIP_LEVEL == 512 ? 4 : 2;

// What a tile does with an element of A, a vector of B and a vector of C.
template <class T>
struct FusedMultiplyAdd {
  VTCLIP_INLINE static Vec<T> spread(const T* a) { return splat(*a); }
  VTCLIP_INLINE static Vec<T> add(Vec<T> a, Vec<T> b, Vec<T> c) { return fma(a, b, c); }
};

template <class T, class Product, int M, int N, bool kTransposed>
static void tile(const Gemm<T>& g, const T* a, const T* b, T* c) {
  Vec<T> acc[M][N];
#pragma GCC unroll 8
  for (int i = 0; i < M; ++i) {
#pragma GCC unroll 8
    for (int j = 0; j < N; ++j) {
      acc[i][j] = Vec<T>{};
    }
  }
  const int64_t k = g.k, lda = g.lda, ldb = g.ldb;
  for (int64_t p = 0; p < k; ++p) {
    Vec<T> row[N];
#pragma GCC unroll 8
    for (int j = 0; j < N; ++j) row[j] = load(b + j * kLanes<T>);
#pragma GCC unroll 8
    for (int i = 0; i < M; ++i) {
      const Vec<T> x = Product::spread(kTransposed ? a + i : a + i * lda);
#pragma GCC unroll 8
      for (int j = 0; j < N; ++j) acc[i][j] = Product::add(x, row[j], acc[i][j]);
    }
    a += kTransposed ? lda : 1;
    b += ldb;
  }
  if (g.scale != T{1}) {
    const Vec<T> scale = splat(g.scale);
#pragma GCC unroll 8
    for (int i = 0; i < M; ++i) {
#pragma GCC unroll 8
      for (int j = 0; j < N; ++j) acc[i][j] *= scale;
    }
  }
  // The old value is added last: sums formed in several calls are sums of partial sums, whose
  // rounding errors grow with the number of parts and not with the number of terms.
  if (g.accumulate) {
#pragma GCC unroll 8
    for (int i = 0; i < M; ++i) {
#pragma GCC unroll 8
      for (int j = 0; j < N; ++j) acc[i][j] += load(c + i * g.ldc + j * kLanes<T>);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < M; ++i) {
#pragma GCC unroll 8
    for (int j = 0; j < N; ++j) store(c + i * g.ldc + j * kLanes<T>, acc[i][j]);
  }
}

template <class T, class Product, int N, bool kTransposed>
static void tile_rows(const Gemm<T>& g, int64_t rows, const T* a, const T* b, T* c) {
  switch (rows) {
    case 1:
      return tile<T, Product, 1, N, kTransposed>(g, a, b, c);
    case 2:
      return tile<T, Product, 2, N, kTransposed>(g, a, b, c);
    case 3:
      return tile<T, Product, 3, N, kTransposed>(g, a, b, c);
    case 4:
      return tile<T, Product, 4, N, kTransposed>(g, a, b, c);
    case 5:
      return tile<T, Product, 5, N, kTransposed>(g, a, b, c);
    default:
      return tile<T, Product, kTileM, N, kTransposed>(g, a, b, c);
  }
}

// All rows of one panel of N vectors.
template <class T, class Product, int N, bool kTransposed>
static void panel(const Gemm<T>& g, const T* b, T* c) {
  for (int64_t i = 0; i < g.m; i += kTileM) {
    const T* a = g.a + (kTransposed ? i : i * g.lda);
    tile_rows<T, Product, N, kTransposed>(g, min_of(kTileM, g.m - i), a, b, c + i * g.ldc);
  }
}

template <class T, class Product, bool kTransposed>
static void panels(const Gemm<T>& g) {
  int64_t left = g.n / kLanes<T>;
  int64_t j = 0;
  for (; left >= kTileN; left -= kTileN, j += kTileN * kLanes<T>) {
    panel<T, Product, kTileN, kTransposed>(g, g.b + j, g.c + j);
  }
  if constexpr (kTileN > 2) {
    if (left == 3) return panel<T, Product, 3, kTransposed>(g, g.b + j, g.c + j);
    if (left == 2) return panel<T, Product, 2, kTransposed>(g, g.b + j, g.c + j);
  }
  if (left == 1) panel<T, Product, 1, kTransposed>(g, g.b + j, g.c + j);
}

template <class T, class Product>
static void multiply(const Gemm<T>& g) {
  if (g.a_transposed) {
    panels<T, Product, true>(g);
  } else {
    panels<T, Product, false>(g);
  }
}
