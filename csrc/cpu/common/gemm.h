// SPDX-License-Identifier: Apache-2.0
// Small matrix products on packed panels; one build per instruction set (gemm.cpp).
#pragma once

#include <cstdint>

namespace vtclip::cpu {

// C[m, n] (+)= scale * sum_k A[m, k] B[k, n].
// A is read one element at a time: element (i, j) at a[i * lda + j], or a[j * lda + i] if
// transposed. B and C rows are read and written in whole vectors: n is a multiple of the vector
// length and ldb, ldc are at least n.
template <class T>
struct Gemm {
  int64_t m, n, k;
  const T* a;
  int64_t lda;
  bool a_transposed;
  const T* b;
  int64_t ldb;
  T* c;
  int64_t ldc;
  bool accumulate;
  T scale = T{1};
};

#define VTCLIP_DECLARE_GEMM(capability) \
  namespace capability {                \
  void gemm(const Gemm<float>& g);      \
  void gemm(const Gemm<double>& g);     \
  }
VTCLIP_DECLARE_GEMM(scalar)
VTCLIP_DECLARE_GEMM(avx2)
VTCLIP_DECLARE_GEMM(avx512)
#undef VTCLIP_DECLARE_GEMM

}  // namespace vtclip::cpu
