// SPDX-License-Identifier: Apache-2.0
// unit_products_fwd and unit_products_bwd for CPU tensors.
#include <cmath>
#include <tuple>

#include "common/register.h"
#include "cpu/common/parallel.h"
#include "cpu/common/row_args.h"

namespace vtclip::cpu {

// Texts that stay in a second-level cache while images pass, and images per running sum of d_text.
constexpr int64_t kUnitBlock = 32;

struct UnitProducts {
  int64_t B, K, D;
  Dtype dtype;
  double root;  // sqrt(scale)
  RowsView image, text;
};

struct UnitProductsForward {
  UnitProducts sizes;
  RowsView image_out, text_out;
  char* products;              // [B, K, D] contiguous
  void *image_row, *text_row;  // [B, D], [K, D] acc: the outputs before rounding
};

struct UnitProductsBackward {
  UnitProducts sizes;
  RowsView grad_image, grad_text, grad_products, d_image, d_text;
  void *image_unit, *text_unit;    // [B, D padded], [K, D padded] acc: rows divided by length
  void *image_rnorm, *text_rnorm;  // [B], [K] acc
  RowChunks chunks;
  void* image_partial;  // [text_chunks, B, D padded] acc: sums of grad_products times text_unit
  void* text_partial;   // [image_chunks, K, D padded] acc
};

// Chunks of 16 texts or more, and where these are fewer than 32 of 16 images or more. A function of
// the shape, so the order of every sum is fixed.
inline RowChunks unit_chunks(int64_t B, int64_t K) {
  RowChunks c{};
  c.text_chunk = ceil_div(K, std::min<int64_t>(32, ceil_div(K, 16)));
  c.text_chunks = ceil_div(K, c.text_chunk);
  c.image_chunk = ceil_div(B, std::min(ceil_div(32, c.text_chunks), ceil_div(B, 16)));
  c.image_chunks = ceil_div(B, c.image_chunk);
  return c;
}

}  // namespace vtclip::cpu

#define VTCLIP_KERNEL "cpu/unit_products_kernel.h"
#include "cpu/common/foreach_capability.h"

namespace vtclip::cpu {
namespace {

UnitProducts product_sizes(const char* op, const Tensor& image, const Tensor& text, double scale) {
  const ScalarType type = check_float(op, "image", image);
  check_rank(op, "image", image, 2);
  check_rank(op, "text", text, 2);
  UnitProducts s{};
  s.B = image.size(0);
  s.K = text.size(0);
  s.D = image.size(1);
  s.text = checked_view(op, "text", text, type, {s.K, s.D});
  s.dtype = dtype_of(type);
  s.root = std::sqrt(scale);
  s.image = rows_view(image);
  return s;
}

std::tuple<Tensor, Tensor, Tensor> unit_products_fwd(Tensor image, Tensor text, double scale) {
  UnitProductsForward p{};
  p.sizes = product_sizes("unit_products_fwd", image, text, scale);
  const UnitProducts& s = p.sizes;
  Tensor v = new_empty(image, {s.B, s.D}), t = new_empty(image, {s.K, s.D});
  Tensor products = new_empty(image, {s.B, s.K, s.D});
  if ((s.B + s.K) * s.D == 0) return {v, t, products};
  p.image_out = rows_view(v);
  p.text_out = rows_view(t);
  p.products = static_cast<char*>(products.data_ptr());
  // outputs in the accumulation dtype are what the products are made of
  const bool wide = item_bytes(s.dtype) >= 4;
  Workspace workspace(image);
  p.image_row = wide ? v.data_ptr() : workspace.take({s.B, s.D});
  p.text_row = wide ? t.data_ptr() : workspace.take({s.K, s.D});
  run(VTCLIP_PICK(unit_products_fwd_rows), p, s.B + s.K, 4 * s.D);
  run(VTCLIP_PICK(unit_products_fwd_units), p, ceil_div(s.K, kUnitBlock) * s.B,
      4 * std::min(s.K, kUnitBlock) * s.D);
  return {v, t, products};
}

std::tuple<Tensor, Tensor> unit_products_bwd(Tensor grad_image, Tensor grad_text,
                                             Tensor grad_products, Tensor image, Tensor text,
                                             double scale) {
  const char* op = "unit_products_bwd";
  UnitProductsBackward p{};
  p.sizes = product_sizes(op, image, text, scale);
  const UnitProducts& s = p.sizes;
  const ScalarType type = image.scalar_type();
  p.grad_image = checked_view(op, "grad_image", grad_image, type, {s.B, s.D});
  p.grad_text = checked_view(op, "grad_text", grad_text, type, {s.K, s.D});
  p.grad_products = checked_view(op, "grad_products", grad_products, type, {s.B, s.K, s.D});
  Tensor d_image = new_empty(image, {s.B, s.D}), d_text = new_empty(text, {s.K, s.D});
  if ((s.B + s.K) * s.D == 0) return {d_image, d_text};
  p.d_image = rows_view(d_image);
  p.d_text = rows_view(d_text);
  if (s.B * s.K != 0) p.chunks = unit_chunks(s.B, s.K);
  const RowChunks& c = p.chunks;
  const int64_t width = row_width(s.D);
  Workspace workspace(image);
  p.image_unit = workspace.take({s.B, width});
  p.text_unit = workspace.take({s.K, width});
  p.image_rnorm = workspace.take({s.B});
  p.text_rnorm = workspace.take({s.K});
  p.image_partial = workspace.take({c.text_chunks, s.B, width});
  p.text_partial = workspace.take({c.image_chunks, s.K, width});
  run(VTCLIP_PICK(unit_products_bwd_rows), p, s.B + s.K, 4 * s.D);
  run(VTCLIP_PICK(unit_products_bwd_units), p, c.units(), 8 * c.image_chunk * c.text_chunk * s.D);
  run(VTCLIP_PICK(unit_products_finish), p, s.B + s.K,
      4 * (c.image_chunks + c.text_chunks + 4) * s.D);
  return {d_image, d_text};
}

}  // namespace
}  // namespace vtclip::cpu

VTCLIP_REGISTER(CPU, cpu, unit_products)
