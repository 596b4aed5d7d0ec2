// SPDX-License-Identifier: Apache-2.0
// unit_products_fwd and unit_products_bwd for CPU tensors.
#include <torch/csrc/stable/library.h>

#include <cmath>
#include <tuple>

#include "cpu/common/parallel.h"
#include "unit_products_args.h"

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
  Tensor image_row = wide ? v : new_acc(image, {s.B, s.D});
  Tensor text_row = wide ? t : new_acc(image, {s.K, s.D});
  p.image_row = image_row.data_ptr();
  p.text_row = text_row.data_ptr();
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
  Tensor units = new_acc(image, {s.B + s.K, width}), rnorms = new_acc(image, {s.B + s.K});
  Tensor image_partial = new_acc(image, {c.text_chunks, s.B, width});
  Tensor text_partial = new_acc(image, {c.image_chunks, s.K, width});
  const int64_t item = item_bytes(dtype_of(units.scalar_type()));
  p.image_unit = units.data_ptr();
  p.text_unit = static_cast<char*>(p.image_unit) + s.B * width * item;
  p.image_rnorm = rnorms.data_ptr();
  p.text_rnorm = static_cast<char*>(p.image_rnorm) + s.B * item;
  p.image_partial = image_partial.data_ptr();
  p.text_partial = text_partial.data_ptr();
  run(VTCLIP_PICK(unit_products_bwd_rows), p, s.B + s.K, 4 * s.D);
  run(VTCLIP_PICK(unit_products_bwd_units), p, c.units(), 8 * c.image_chunk * c.text_chunk * s.D);
  run(VTCLIP_PICK(unit_products_finish), p, s.B + s.K,
      4 * (c.image_chunks + c.text_chunks + 4) * s.D);
  return {d_image, d_text};
}

}  // namespace
}  // namespace vtclip::cpu

STABLE_TORCH_LIBRARY_IMPL(vtclip, CPU, m) {
  m.impl("unit_products_fwd", TORCH_BOX(&vtclip::cpu::unit_products_fwd));
  m.impl("unit_products_bwd", TORCH_BOX(&vtclip::cpu::unit_products_bwd));
}
