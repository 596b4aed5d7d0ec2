// SPDX-License-Identifier: Apache-2.0
// unit_products_fwd and unit_products_bwd for CUDA tensors.
#include <cmath>
#include <tuple>

#include "common/register.h"
#include "cuda/block/rows_launch.cuh"
#include "unit_products_block.h"

namespace vtclip::cuda {
namespace {

struct Sizes {
  int64_t B, K, D;

  bool empty() const { return (B + K) * D == 0; }
};

Sizes check_inputs(const char* op, const Tensor& image, const Tensor& text) {
  check_rank(op, "image", image, 2);
  check_rank(op, "text", text, 2);
  const Sizes n{image.size(0), text.size(0), image.size(1)};
  check_same(op, "text", text, image, image.scalar_type(), {n.K, n.D});
  return n;
}

template <class T>
AccOf<T> root_of(double scale) { return static_cast<AccOf<T>>(std::sqrt(scale)); }

std::tuple<Tensor, Tensor, Tensor> unit_products_fwd(const Tensor& image, const Tensor& text,
                                                     double scale) {
  const char* op = "unit_products_fwd";
  const Sizes n = check_inputs(op, image, text);
  const torch::stable::accelerator::DeviceGuard guard(image.get_device_index());
  Tensor v = new_empty(image, {n.B, n.D});
  Tensor t = new_empty(text, {n.K, n.D});
  Tensor products = new_empty(image, {n.B, n.K, n.D});
  if (n.empty()) return {v, t, products};
  with_dtype(op, "image", image, [&]<class T>(T) {
    typename UnitForward<T>::Args args{
        rows_of<T>(image), rows_of<T>(text), data_of<T>(v), data_of<T>(t), data_of<T>(products),
        root_of<T>(scale), n.B,              n.K,           n.D,           0};
    args.images = std::min<int64_t>(UnitForward<T>::kImages, images_per_block(n.B, args.tiles()));
    launch<UnitForward<T>>(op, args.blocks(), image, args);
  });
  return {v, t, products};
}

// The P slices of one side, summed first where they are many. At least one: UnitRows writes it.
template <class Acc>
struct Slices {
  Tensor all, sum;
  int64_t P;

  Slices(const Tensor& like, int64_t P, int64_t N, int64_t D)
      : all(new_acc(like, {std::max<int64_t>(1, P), N, D})),
        sum(new_acc(like, {P > kUnitSlices ? N : 0, D})),
        P(P) {}
  bool many() const { return P > kUnitSlices; }
  typename SumColumns<Acc>::Job job() {
    return {data_of<Acc>(all), data_of<Acc>(sum), P, many() ? sum.size(0) * sum.size(1) : 0};
  }
  template <class T>
  typename UnitRows<T>::Side side(const Tensor& rows, const Tensor& grad, Tensor& out) {
    return {rows_of<T>(rows), rows_of<T>(grad), data_of<Acc>(many() ? sum : all),
            data_of<T>(out),  many() ? 1 : P,   rows.size(0)};
  }
};

std::tuple<Tensor, Tensor> unit_products_bwd(const Tensor& grad_image, const Tensor& grad_text,
                                             const Tensor& grad_products, const Tensor& image,
                                             const Tensor& text, double scale) {
  const char* op = "unit_products_bwd";
  const Sizes n = check_inputs(op, image, text);
  check_same(op, "grad_image", grad_image, image, image.scalar_type(), {n.B, n.D});
  check_same(op, "grad_text", grad_text, image, image.scalar_type(), {n.K, n.D});
  check_same(op, "grad_products", grad_products, image, image.scalar_type(), {n.B, n.K, n.D});
  const torch::stable::accelerator::DeviceGuard guard(image.get_device_index());
  Tensor d_image = new_empty(image, {n.B, n.D});
  Tensor d_text = new_empty(text, {n.K, n.D});
  if (n.empty()) return {d_image, d_text};
  with_dtype(op, "image", image, [&]<class T>(T) {
    using Acc = AccOf<T>;
    using Gradient = UnitGradient<T>;
    Walk<T> walk = walk_of<Gradient, T>(n.B, n.K, n.D);
    walk.images = std::min<int64_t>(Gradient::kImages, walk.images);
    Slices<Acc> of_image(image, n.K == 0 ? 0 : walk.tiles(), n.B, n.D);
    Slices<Acc> of_text(image, n.B == 0 ? 0 : walk.chunks(), n.K, n.D);
    if (n.B * n.K > 0) {
      launch<UnitGradient<T>>(op, walk.blocks(Block<Gradient::kWarps>::kThreads), image,
                              {rows_of<T>(image), rows_of<T>(text), images_of<T>(grad_products),
                               data_of<Acc>(of_image.all), data_of<Acc>(of_text.all), walk});
      sum_columns<Acc>(op, image, {{of_image.job(), of_text.job()}});
    }
    const typename UnitRows<T>::Args args{
        of_image.template side<T>(image, grad_image, d_image),
        of_text.template side<T>(text, grad_text, d_text), root_of<T>(scale), n.D};
    launch<UnitRows<T>>(op, args.blocks(), image, args);
  });
  return {d_image, d_text};
}

}  // namespace
}  // namespace vtclip::cuda

VTCLIP_REGISTER(CUDA, cuda, unit_products)
