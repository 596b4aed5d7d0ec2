// SPDX-License-Identifier: Apache-2.0
// Cosine logits of one instruction set. All products are of unit rows, so nothing overflows.
#include "cpu/common/simd.h"
#include "cpu/common/rows.h"
#include "cpu/common/unit_rows.h"

// Steps of the inner dimension per product: the panel stays in cache and partial sums stay short.
constexpr int64_t kInner = 128;

// image_unit[b] and image_rnorm[b] for b in [begin, end).
template <class T>
static void image_units(const Cosine& s, int64_t begin, int64_t end) {
  unit_matrix<T>(s.image, s.D, s.dtype, s.image_unit, s.image_rnorm, begin, end);
}

// C[m, n] = A B with the inner dimension in steps of kInner.
template <class T>
static void blocked_gemm(Gemm<T> g) {
  const int64_t k = g.k;
  const T* a = g.a;
  const T* b = g.b;
  for (int64_t p = 0; p == 0 || p < k; p += kInner) {
    g.k = min_of(kInner, k - p);
    g.a = a + (g.a_transposed ? p * g.lda : p);
    g.b = b + p * g.ldb;
    gemm(g);
    g.accumulate = true;
  }
}

// Shared texts. A unit is (block of images, block of texts): logits^T = T^ X^T, transposed on the
// way out, because the images are few and packed once per range.
template <class T>
static void shared_forward_units(const CosineForward& p, int64_t begin, int64_t end) {
  const Cosine& s = p.sizes;
  const int64_t width = round_up(s.D, kLanes<T>);
  const int64_t text_blocks = ceil_div(s.K, s.text_block);
  const int64_t ldb = leading_dim<T>(s.image_block), ldt = leading_dim<T>(s.D);
  const int64_t ldk = leading_dim<T>(s.text_block);
  const Scratch<T> columns(s.D * ldb), texts(s.text_block * ldt), buffer(s.D);
  const Scratch<T> products(s.text_block * ldb), rows(s.image_block * ldk);
  const int64_t item = item_bytes(s.dtype);
  int64_t packed = -1;
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t b0 = unit / text_blocks * s.image_block, k0 = unit % text_blocks * s.text_block;
    const int64_t images = min_of(s.image_block, s.B - b0);
    const int64_t count = min_of(s.text_block, s.K - k0);
    const int64_t vectors = round_up(images, kLanes<T>);
    if (b0 != packed) {
      const T* unit_rows = static_cast<const T*>(s.image_unit) + b0 * width;
      transpose<T>(columns, ldb, unit_rows, width, images, s.D);
      for (int64_t d = 0; d < s.D; ++d) {
        for (int64_t i = images; i < vectors; ++i) columns[d * ldb + i] = 0;
      }
      packed = b0;
    }
    for (int64_t i = 0; i < count; ++i) {
      const T* t = view_row<T>(buffer, s.D, s.text.at(0, k0 + i), s.text.column, s.dtype);
      const T rnorm = unit_row(texts + i * ldt, t, s.D, s.D);
      if (b0 == 0) static_cast<T*>(s.text_rnorm)[k0 + i] = rnorm;
    }
    blocked_gemm(
        Gemm<T>{count, vectors, s.D, texts, ldt, false, columns, ldb, products, ldb, false});
    transpose<T>(rows, ldk, products, ldb, count, images);
    for (int64_t i = 0; i < images; ++i) {
      store_row(p.logits + ((b0 + i) * s.K + k0) * item, count, s.dtype, rows + i * ldk,
                static_cast<T>(s.scale));
    }
  }
}

// One text set per image: one pass over row b * K + k.
template <class T>
static void own_forward_units(const CosineForward& p, int64_t begin, int64_t end) {
  const Cosine& s = p.sizes;
  const int64_t width = round_up(s.D, kLanes<T>);
  const Scratch<T> buffer(s.D), unit_text(s.D);
  const int64_t item = item_bytes(s.dtype);
  for (int64_t row = begin; row < end; ++row) {
    const int64_t b = row / s.K;
    const T* x = static_cast<const T*>(s.image_unit) + b * width;
    const T* t = view_row<T>(buffer, s.D, s.text.at(b, row % s.K), s.text.column, s.dtype);
    const T square = dot_rows(t, t, s.D);
    T rnorm, cosine;
    if (in_safe_range(square)) {
      rnorm = 1 / square_root(square);
      cosine = dot_rows(t, x, s.D) * rnorm;
    } else {
      rnorm = unit_row_scaled<T>(unit_text, t, s.D);
      cosine = dot_rows<T>(unit_text, x, s.D);
    }
    static_cast<T*>(s.text_rnorm)[row] = rnorm;
    store_one<T>(p.logits + row * item, s.dtype, static_cast<T>(s.scale) * cosine);
  }
}

// Rows of the unit images, the unit texts (shared only) and the scaled gradients; row r < B is
// image r, any other text r - B.
template <class T>
static void prepare_units(const CosineBackward& p, int64_t begin, int64_t end) {
  const Cosine& s = p.sizes;
  const int64_t width = round_up(s.D, kLanes<T>);
  const Scratch<T> buffer(s.D);
  for (int64_t r = begin; r < end; ++r) {
    if (r < s.B) {
      const T* x = view_row<T>(buffer, s.D, s.image.at(0, r), s.image.column, s.dtype);
      unit_row_known(static_cast<T*>(s.image_unit) + r * width, x, s.D, width,
                     element<T>(p.image_rnorm_in, 0, r));
      if (p.grads != nullptr) {
        load_row(static_cast<T*>(p.grads) + r * s.K, s.K, s.K, p.grad_logits.at(0, r),
                 p.grad_logits.column, s.dtype, static_cast<T>(s.scale));
      }
    } else {
      const int64_t k = r - s.B;
      const T* t = view_row<T>(buffer, s.D, s.text.at(0, k), s.text.column, s.dtype);
      unit_row_known(static_cast<T*>(p.text_unit) + k * width, t, s.D, width,
                     element<T>(p.text_rnorm_in, 0, k));
    }
  }
}

// Shared texts: unit = (block of images, 128 columns):  d_unit = G T^.
template <class T>
static void shared_image_units(const CosineBackward& p, int64_t begin, int64_t end) {
  const Cosine& s = p.sizes;
  const int64_t width = round_up(s.D, kLanes<T>);
  const int64_t slices = (width + 127) / 128;
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t b0 = unit / slices * s.image_block, c0 = unit % slices * 128;
    const int64_t images = min_of(s.image_block, s.B - b0);
    blocked_gemm(Gemm<T>{images, min_of(128, width - c0), s.K,
                         static_cast<const T*>(p.grads) + b0 * s.K, s.K, false,
                         static_cast<const T*>(p.text_unit) + c0, width,
                         static_cast<T*>(p.d_unit) + b0 * width + c0, width, false});
  }
}

// Shared texts: unit = block of texts:  d_text from G^T X^.
template <class T>
static void shared_text_units(const CosineBackward& p, int64_t begin, int64_t end) {
  const Cosine& s = p.sizes;
  const int64_t width = round_up(s.D, kLanes<T>);
  const int64_t ldd = leading_dim<T>(s.D);
  const Scratch<T> d_unit(s.text_block * ldd);
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t k0 = unit * s.text_block, count = min_of(s.text_block, s.K - k0);
    blocked_gemm(Gemm<T>{count, width, s.B, static_cast<const T*>(p.grads) + k0, s.K, true,
                         static_cast<const T*>(s.image_unit), width, d_unit, ldd, false});
    for (int64_t i = 0; i < count; ++i) {
      const int64_t k = k0 + i;
      unit_row_grad<T>(d_unit + i * ldd, static_cast<const T*>(p.text_unit) + k * width, s.D,
                       element<T>(p.text_rnorm_in, 0, k));
      store_row<T>(p.d_text.at(0, k), s.D, s.dtype, d_unit + i * ldd, 1);
    }
  }
}

// One text set per image; unit = (image, chunk of texts), with the chunk's part of d_unit.
template <class T>
static void own_backward_units(const CosineBackward& p, int64_t begin, int64_t end) {
  const Cosine& s = p.sizes;
  const int64_t width = round_up(s.D, kLanes<T>);
  const Scratch<T> buffer(s.D), unit_text(s.D), grad(s.D);
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t b = unit / p.num_chunks, chunk = unit % p.num_chunks;
    const T* x = static_cast<const T*>(s.image_unit) + b * width;
    T* d_unit = static_cast<T*>(p.d_unit) + (chunk * s.B + b) * width;
    __builtin_memset(d_unit, 0, static_cast<size_t>(width) * sizeof(T));
    const int64_t last = min_of(s.K, (chunk + 1) * s.text_block);
    for (int64_t k = chunk * s.text_block; k < last; ++k) {
      const T rnorm = element<T>(p.text_rnorm_in, b, k);
      const T delta = element<T>(p.grad_logits, b, k, s.dtype) * static_cast<T>(s.scale);
      const T* t = view_row<T>(buffer, s.D, s.text.at(b, k), s.text.column, s.dtype);
      unit_row_known<T>(unit_text, t, s.D, s.D, rnorm);
      add_row<T>(d_unit, delta, unit_text, s.D);
      scale_row<T>(grad, x, s.D, delta);
      unit_row_grad<T>(grad, unit_text, s.D, rnorm);
      store_row<T>(p.d_text.at(b, k), s.D, s.dtype, grad, 1);
    }
  }
}

// d_image rows from the gradient of the unit images.
template <class T>
static void finish_image_units(const CosineBackward& p, int64_t begin, int64_t end) {
  const Cosine& s = p.sizes;
  const int64_t width = round_up(s.D, kLanes<T>);
  const Scratch<T> grad(width);
  for (int64_t b = begin; b < end; ++b) {
    sum_rows<T>(grad, static_cast<const T*>(p.d_unit) + b * width, p.num_chunks, s.B * width, s.D);
    unit_row_grad<T>(grad, static_cast<const T*>(s.image_unit) + b * width, s.D,
                     element<T>(p.image_rnorm_in, 0, b));
    store_row<T>(p.d_image.at(0, b), s.D, s.dtype, grad, 1);
  }
}

VTCLIP_BY_DTYPE(cosine_images, image_units, Cosine, dtype)
VTCLIP_BY_DTYPE(cosine_shared_fwd, shared_forward_units, CosineForward, sizes.dtype)
VTCLIP_BY_DTYPE(cosine_own_fwd, own_forward_units, CosineForward, sizes.dtype)
VTCLIP_BY_DTYPE(cosine_prepare, prepare_units, CosineBackward, sizes.dtype)
VTCLIP_BY_DTYPE(cosine_shared_image, shared_image_units, CosineBackward, sizes.dtype)
VTCLIP_BY_DTYPE(cosine_shared_text, shared_text_units, CosineBackward, sizes.dtype)
VTCLIP_BY_DTYPE(cosine_own_bwd, own_backward_units, CosineBackward, sizes.dtype)
VTCLIP_BY_DTYPE(cosine_finish_image, finish_image_units, CosineBackward, sizes.dtype)
