// SPDX-License-Identifier: Apache-2.0
// Unit rows and their products of one instruction set.
//
//   v[b] = root u_b,  t[k] = root u_k,  products[b,k] = v[b] t[k]        u = x / |x|
//   g_v[b] = grad_image[b] + root sum_k grad_products[b,k] u_k           g_t[k] likewise, over b
//   d_image[b] = root / |x_b| (g_v - u_b <g_v, u_b>)                     d_text[k] likewise
#include "cpu/common/simd.h"
#include "cpu/common/rows.h"
#include "cpu/common/unit_rows.h"

// Round to nearest even, as float_to_bfloat16.
VTCLIP_INLINE void store_bfloat16(char* p, VecF x) {
  typedef uint16_t Halves __attribute__((vector_size(VTCLIP_VECTOR_BYTES / 2)));
  const VecU32 bits = (VecU32)x, nan = (VecU32)(x != x);
  const VecU32 rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
  const Halves halves = __builtin_convertvector((rounded & ~nan) | (nan & 0x7FC0u), Halves);
  __builtin_memcpy(p, &halves, sizeof halves);
}

// Destination row = a[0..n) * b[0..n), stored densely. In float 32 bytes at a time also where
// vectors have 64: in memory that is new to the process wider stores took a tenth longer.
template <class T>
inline void store_product(char* dst, int64_t n, Dtype dtype, const T* a, const T* b) {
  int64_t i = 0;
  if constexpr (sizeof(T) == 4) {
#if VTCLIP_LEVEL >= 2
    if (dtype == Dtype::kFloat32) {
      for (; i + 8 <= n; i += 8) {
        const __m256 product = _mm256_loadu_ps(a + i) * _mm256_loadu_ps(b + i);
        __builtin_memcpy(dst + i * 4, &product, 32);
      }
    } else if (dtype == Dtype::kFloat16) {
      for (; i + 8 <= n; i += 8) {
        const __m256 product = _mm256_loadu_ps(a + i) * _mm256_loadu_ps(b + i);
        const __m128i halves = _mm256_cvtps_ph(product, _MM_FROUND_TO_NEAREST_INT);
        __builtin_memcpy(dst + i * 2, &halves, 16);
      }
    }
#endif
    if (dtype == Dtype::kBFloat16) {
      for (; i + kLanes<T> <= n; i += kLanes<T>) {
        store_bfloat16(dst + i * 2, load(a + i) * load(b + i));
      }
    }
  }
  if (is_native<T>(dtype)) {
    T* row = reinterpret_cast<T*>(dst);
    for (; i + kLanes<T> <= n; i += kLanes<T>) store(row + i, load(a + i) * load(b + i));
  }
  for (; i < n; ++i) store_one<T>(dst + i * item_bytes(dtype), dtype, a[i] * b[i]);
}

// Of N rows grad[j] of one image: image_sum += sum_j grad[j] text[j], text_sum[j] += grad[j] image.
// Rows of text are `ldt` apart, those of text_sum `lds`.
template <class T, int N>
VTCLIP_INLINE void product_rows_grad(const T* const* grad, const T* image, const T* text,
                                     int64_t ldt, int64_t n, T* image_sum, T* text_sum,
                                     int64_t lds) {
  int64_t i = 0;
  for (; i + kLanes<T> <= n; i += kLanes<T>) {
    const Vec<T> v = load(image + i);
    Vec<T> sum = load(image_sum + i);
#pragma GCC unroll 4
    for (int j = 0; j < N; ++j) {
      const Vec<T> g = load(grad[j] + i);
      sum = fma(g, load(text + j * ldt + i), sum);
      store(text_sum + j * lds + i, fma(g, v, load(text_sum + j * lds + i)));
    }
    store(image_sum + i, sum);
  }
  for (; i < n; ++i) {
    for (int j = 0; j < N; ++j) {
      image_sum[i] += grad[j][i] * text[j * ldt + i];
      text_sum[j * lds + i] += grad[j][i] * image[i];
    }
  }
}

// Rows of images (r < B) and texts (r - B < K), rounded into the outputs.
template <class T>
static void unit_forward_rows(const UnitProductsForward& p, int64_t begin, int64_t end) {
  const UnitProducts& s = p.sizes;
  const Scratch<T> scratch(s.D);
  const T root = static_cast<T>(s.root);
  for (int64_t r = begin; r < end; ++r) {
    const bool of_image = r < s.B;
    const int64_t i = of_image ? r : r - s.B;
    const RowsView& source = of_image ? s.image : s.text;
    T* row = static_cast<T*>(of_image ? p.image_row : p.text_row) + i * s.D;
    const T* x = view_row<T>(scratch, s.D, source.at(0, i), source.column, s.dtype);
    unit_row(row, x, s.D, s.D);
    scale_row(row, row, s.D, root);
    if (!is_native<T>(s.dtype)) {
      const RowsView& out = of_image ? p.image_out : p.text_out;
      store_row<T>(out.at(0, i), s.D, s.dtype, row, 1);
    }
  }
}

// Units are (image, block of texts).
template <class T>
static void unit_forward_products(const UnitProductsForward& p, int64_t begin, int64_t end) {
  const UnitProducts& s = p.sizes;
  const int64_t row_bytes = s.D * item_bytes(s.dtype);
  const int64_t blocks = ceil_div(s.K, kUnitBlock);
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t b = unit / blocks, k0 = unit % blocks * kUnitBlock;
    const T* v = static_cast<const T*>(p.image_row) + b * s.D;
    for (int64_t k = k0; k < min_of(s.K, k0 + kUnitBlock); ++k) {
      const T* t = static_cast<const T*>(p.text_row) + k * s.D;
      store_product<T>(p.products + (b * s.K + k) * row_bytes, s.D, s.dtype, v, t);
    }
  }
}

// Rows of images (r < B) and texts (r - B < K) divided by their length.
template <class T>
static void unit_backward_rows(const UnitProductsBackward& p, int64_t begin, int64_t end) {
  const UnitProducts& s = p.sizes;
  unit_matrix<T>(s.image, s.D, s.dtype, p.image_unit, p.image_rnorm, begin, min_of(end, s.B));
  unit_matrix<T>(s.text, s.D, s.dtype, p.text_unit, p.text_rnorm, max_of(begin - s.B, 0),
                 end - s.B);
}

template <class T>
static void unit_backward_products(const UnitProductsBackward& p, int64_t begin, int64_t end) {
  const UnitProducts& s = p.sizes;
  const RowChunks& c = p.chunks;
  constexpr int kRows = 4;
  const int64_t width = round_up(s.D, kLanes<T>);
  const size_t row_bytes = static_cast<size_t>(width) * sizeof(T);
  const Scratch<T> copies(kRows * width), image_sum(width), text_sums(kUnitBlock * width);
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t ic = unit / c.text_chunks, tc = unit % c.text_chunks;
    const int64_t b0 = ic * c.image_chunk, b1 = min_of(s.B, b0 + c.image_chunk);
    const int64_t k1 = min_of(s.K, (tc + 1) * c.text_chunk);
    T* to_image = static_cast<T*>(p.image_partial) + tc * s.B * width;
    T* to_text = static_cast<T*>(p.text_partial) + ic * s.K * width;
    __builtin_memset(to_image + b0 * width, 0, static_cast<size_t>(b1 - b0) * row_bytes);
    for (int64_t k0 = tc * c.text_chunk; k0 < k1; k0 += kUnitBlock) {
      const int64_t count = min_of(kUnitBlock, k1 - k0);
      const T* texts = static_cast<const T*>(p.text_unit) + k0 * width;
      __builtin_memset(to_text + k0 * width, 0, static_cast<size_t>(count) * row_bytes);
      for (int64_t b = b0; b < b1; ++b) {
        if ((b - b0) % kUnitBlock == 0) {
          __builtin_memset(text_sums, 0, static_cast<size_t>(count) * row_bytes);
        }
        __builtin_memset(image_sum, 0, row_bytes);
        const T* image = static_cast<const T*>(p.image_unit) + b * width;
        for (int64_t k = 0; k < count;) {
          const int rows = count - k < kRows ? 1 : kRows;
          const T* grad[kRows];
          for (int j = 0; j < rows; ++j) {
            grad[j] = view_row<T>(copies + j * width, s.D, p.grad_products.at(b, k0 + k + j),
                                  p.grad_products.column, s.dtype);
          }
          if (rows == kRows) {
            product_rows_grad<T, kRows>(grad, image, texts + k * width, width, s.D, image_sum,
                                        text_sums + k * width, width);
          } else {
            product_rows_grad<T, 1>(grad, image, texts + k * width, width, s.D, image_sum,
                                    text_sums + k * width, width);
          }
          k += rows;
        }
        add_row<T>(to_image + b * width, T{1}, image_sum, s.D);
        if ((b - b0) % kUnitBlock == kUnitBlock - 1 || b == b1 - 1) {
          for (int64_t k = 0; k < count; ++k) {
            add_row<T>(to_text + (k0 + k) * width, T{1}, text_sums + k * width, s.D);
          }
        }
      }
    }
  }
}

// Rows of d_image (r < B) and d_text (r - B < K).
template <class T>
static void unit_backward_finish(const UnitProductsBackward& p, int64_t begin, int64_t end) {
  const UnitProducts& s = p.sizes;
  const RowChunks& c = p.chunks;
  const int64_t width = round_up(s.D, kLanes<T>);
  const Scratch<T> total(s.D), sum(s.D);
  const T root = static_cast<T>(s.root);
  for (int64_t r = begin; r < end; ++r) {
    const bool of_image = r < s.B;
    const int64_t i = of_image ? r : r - s.B;
    const RowsView& grad = of_image ? p.grad_image : p.grad_text;
    const RowsView& out = of_image ? p.d_image : p.d_text;
    const T* unit = static_cast<const T*>(of_image ? p.image_unit : p.text_unit) + i * width;
    const T rnorm = static_cast<const T*>(of_image ? p.image_rnorm : p.text_rnorm)[i];
    load_row<T>(total, s.D, s.D, grad.at(0, i), grad.column, s.dtype, 1);
    const int64_t rows = of_image ? s.B : s.K, chunks = of_image ? c.text_chunks : c.image_chunks;
    if (chunks != 0) {
      const void* partial = of_image ? p.image_partial : p.text_partial;
      sum_rows<T>(sum, static_cast<const T*>(partial) + i * width, chunks, rows * width, s.D);
      add_row<T>(total, root, sum, s.D);
    }
    unit_row_grad<T>(total, unit, s.D, rnorm * root);
    store_row<T>(out.at(0, i), s.D, s.dtype, total, 1);
  }
}

VTCLIP_BY_DTYPE(unit_products_fwd_rows, unit_forward_rows, UnitProductsForward, sizes.dtype)
VTCLIP_BY_DTYPE(unit_products_fwd_units, unit_forward_products, UnitProductsForward, sizes.dtype)
VTCLIP_BY_DTYPE(unit_products_bwd_rows, unit_backward_rows, UnitProductsBackward, sizes.dtype)
VTCLIP_BY_DTYPE(unit_products_bwd_units, unit_backward_products, UnitProductsBackward, sizes.dtype)
VTCLIP_BY_DTYPE(unit_products_finish, unit_backward_finish, UnitProductsBackward, sizes.dtype)
