// SPDX-License-Identifier: Apache-2.0
// What the programs of the attention bodies share.
#pragma once

#include "cuda/block/attn_block.h"
#include "host.h"
#include "cuda/block/sum_partials.h"

namespace host {

template <int kD>
struct Width {
  static constexpr int value = kD;
};

template <class Run>
void with_dtype_and_width(const Tensor& like, int64_t d, Run run) {
  with_dtype(like, [&](auto t) {
    if (d <= 64) return run(t, Width<64>{});
    return d <= 128 ? run(t, Width<128>{}) : run(t, Width<256>{});
  });
}

template <class T>
vtclip::cuda::Heads<const T> heads_of(const Tensor& t) {
  return {t.data<T>(), t.size(0) == 1 ? 0 : t.stride(0), t.stride(1), t.stride(2), t.stride(3)};
}

// memory [B, rows, H, d] as heads
template <class T>
vtclip::cuda::Heads<T> output_heads(const Tensor& t) {
  return {t.data<T>(), t.stride(0), t.stride(2), t.stride(1), t.stride(3)};
}

template <class T>
vtclip::cuda::Heads<const T> statistics_of(const Tensor& t) {
  return {t.data<T>(), t.stride(0), t.stride(1), t.stride(2), 0};
}

inline vtclip::cuda::AttnShape attn_shape(const Tensor& query, const Tensor& key,
                                          const Tensor& mask) {
  vtclip::cuda::AttnShape n{key.size(0), key.size(1), query.size(2), key.size(2),
                            key.size(3), nullptr,     0,             0};
  if (mask.given()) {
    n.mask = mask.data<bool>();
    n.mask_batch = mask.size(0) == 1 ? 0 : mask.stride(0);
    n.mask_column = mask.stride(1);
  }
  return n;
}

// The partial sums of a query shared by all images: a slice for each chunk of `images` images,
// where there is more than one.
template <class T>
struct QueryPartials {
  using Acc = vtclip::cuda::AccOf<T>;
  int64_t images, chunks;
  Tensor slices;

  QueryPartials(const Tensor& query, const vtclip::cuda::AttnShape& n, int64_t images_of_block)
      : images(query.size(0) == 1 ? images_of_block : 1),
        chunks(vtclip::ceil_div(n.B, images)) {
    if (query.size(0) == 1 && chunks != 1) slices = Tensor::empty<Acc>({chunks, n.K, n.H, n.d});
  }
  vtclip::cuda::Heads<Acc> heads() const {
    return slices.given() ? output_heads<Acc>(slices) : vtclip::cuda::Heads<Acc>{};
  }
  void add(const Tensor& d_query) const {
    if (!slices.given()) return;
    using Body = vtclip::cuda::SumPartials<T>;
    const typename Body::Args args{slices.template data<Acc>(), d_query.template data<T>(), chunks,
                                   d_query.numel()};
    launch<Body>(Body::blocks(args), args);
  }
};

}  // namespace host
