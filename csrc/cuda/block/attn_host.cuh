// SPDX-License-Identifier: Apache-2.0
// The host's side of the attention kernels: checked sizes, head widths, partial sums.
#pragma once

#include <optional>

#include "attn_block.h"
#include "launch.cuh"
#include "sum_partials.h"

namespace vtclip::cuda {

// query [B|1, H, K, d], key [B, H, L, d], mask [B|1, L]
inline AttnShape attn_shape(const char* op, const Tensor& query, const Tensor& key,
                            const std::optional<Tensor>& mask) {
  check_rank(op, "query", query, 4);
  check_rank(op, "key", key, 4);
  check_same(op, "key", key, query, query.scalar_type());
  AttnShape n{key.size(0), key.size(1), query.size(2), key.size(2), key.size(3), nullptr, 0, 0};
  check_shape_or_shared(op, "query", query, {n.B, n.H, n.K, n.d});
  if (n.d > kMaxHeadWidth) {
    fail(op, "query must have a head width of at most ", kMaxHeadWidth, ", got ", n.d);
  }
  if (mask.has_value()) {
    check_same(op, "key_mask", *mask, query, ScalarType::Bool);
    check_shape_or_shared(op, "key_mask", *mask, {n.B, n.L});
    n.mask = data_of<bool>(*mask);
    n.mask_batch = mask->size(0) == 1 ? 0 : mask->stride(0);
    n.mask_column = mask->stride(1);
  }
  return n;
}

// [B, H, K] as heads of width 1
template <class Acc>
Heads<const Acc> statistics_of(const Tensor& tensor) {
  return {data_of<Acc>(tensor), tensor.stride(0), tensor.stride(1), tensor.stride(2), 0};
}

template <int kD>
struct Width {
  static constexpr int value = kD;
};

// run(T{}, Width<kD>{}) with the element type of `like` and a kD that holds d
template <class Run>
void with_dtype_and_width(const char* op, const Tensor& like, int64_t d, Run run) {
  with_dtype(op, "query", like, [&](auto t) {
    if (d <= 64) return run(t, Width<64>{});
    return d <= 128 ? run(t, Width<128>{}) : run(t, Width<256>{});
  });
}

// Where a query shared by all images is summed: one slice for each chunk of images. Undefined
// where one chunk, or one image per block, writes d_query itself.
struct QueryPartials {
  int64_t images = 1, chunks = 1;
  std::optional<Tensor> slices;  // [chunks, K, H, d]

  QueryPartials(const Tensor& query, const AttnShape& n) {
    if (query.size(0) != 1 || n.B == 1) return;
    images = images_per_block(n.B, n.H * ceil_div(n.K, 64));
    chunks = ceil_div(n.B, images);
    if (chunks == 1) return;
    slices = new_empty(query, {chunks, n.K, n.H, n.d}, acc_type(query.scalar_type()));
  }

  template <class Acc>
  Heads<Acc> heads() {
    if (!slices.has_value()) return {};
    const Tensor& s = *slices;
    return {data_of<Acc>(*slices), s.stride(0), s.stride(2), s.stride(1), s.stride(3)};
  }
  // d_query, memory [1, K, H, d], from its slices
  template <class T>
  void add(const char* op, Tensor& d_query) {
    if (!slices.has_value()) return;
    const typename SumPartials<T>::Args args{data_of<AccOf<T>>(*slices), data_of<T>(d_query),
                                             chunks, d_query.numel()};
    launch<SumPartials<T>>(op, SumPartials<T>::blocks(args), d_query, args);
  }
};

// The arguments both gradients share; delta is their workspace.
template <class T>
AttnGradientArgs<T> gradient_args(const AttnShape& n, const Tensor& query, const Tensor& key,
                                  Tensor& delta, Tensor& d_query, QueryPartials& partials,
                                  Tensor& d_key, double scale) {
  using Acc = AccOf<T>;
  return {n, heads_of<T>(query), heads_of<T>(key), data_of<Acc>(delta), heads_of<T>(d_query),
          partials.heads<Acc>(), heads_of<T>(d_key), static_cast<Acc>(scale), partials.images};
}

}  // namespace vtclip::cuda
