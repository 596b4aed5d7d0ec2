// SPDX-License-Identifier: Apache-2.0
// rational_attn_fwd and rational_attn_bwd for CUDA tensors.
#include <optional>
#include <tuple>
#include <vector>

#include "common/register.h"
#include "cuda/block/launch.cuh"
#include "cuda/block/sum_partials.h"
#include "rational_attn_bwd_block.h"
#include "rational_attn_fwd_block.h"

namespace vtclip::cuda {
namespace {

using Query = std::optional<Tensor>;

// All five inputs; an absent query holds no tensor.
struct Inputs {
  const Query* query[kQueryKinds];
  const Tensor* key;
  const Tensor* value;
  double scale;

  int64_t size(int axis) const { return key->size(axis); }
  bool has(int kind) const { return query[kind]->has_value(); }
  int64_t maps() const { return has(kText) + has(kPair); }
};

void check_inputs(const char* op, const Inputs& in) {
  check_rank(op, "key", *in.key, 4);
  const ScalarType type = in.key->scalar_type();
  const int64_t B = in.size(0), H = in.size(1), K = in.size(2), d = in.size(3);
  if (d > kMaxHeadWidth) {
    fail(op, "key must have a head width of at most ", kMaxHeadWidth, ", got ", d);
  }
  check_same(op, "value", *in.value, *in.key, type, {B, H, K, d});
  const char* names[] = {"image_query", "text_query", "pair_query"};
  for (int kind = 0; kind < kQueryKinds; ++kind) {
    if (!in.has(kind)) continue;
    const Tensor& query = **in.query[kind];
    check_same(op, names[kind], query, *in.key, type);
    if (kind == kText) {
      check_shape_or_shared(op, names[kind], query, {B, H, K, d});
    } else {
      check_shape(op, names[kind], query, {B, H, kind == kImage ? 1 : K, d});
    }
  }
  if (in.maps() + in.has(kImage) == 0) {
    fail(op, "one of image_query, text_query, pair_query must be a tensor, got none");
  }
}

template <class T>
void set_inputs(RationalInputs<T>& args, const Inputs& in) {
  args.B = in.size(0);
  args.H = in.size(1);
  args.K = in.size(2);
  args.d = in.size(3);
  for (int kind = 0; kind < kQueryKinds; ++kind) {
    args.has[kind] = in.has(kind);
    if (in.has(kind)) args.query[kind] = heads_of<T>(std::as_const(**in.query[kind]));
  }
  args.key = heads_of<T>(*in.key);
  args.value = heads_of<T>(*in.value);
  args.scale = static_cast<AccOf<T>>(in.scale);
  args.share = 1 / static_cast<AccOf<T>>(in.maps() + in.has(kImage));
}

// parts [maps, B, H, K, d], the heads inner in memory
Tensor new_parts(const Inputs& in, int64_t maps) {
  const std::vector<int64_t> sizes{maps, in.size(0), in.size(2), in.size(1), in.size(3)};
  return torch::stable::transpose(new_empty(*in.key, sizes), 2, 3);
}

// the parts of the maps there are, in their order
template <class T, class Data>
void set_parts(Heads<T>* views, const Inputs& in, const Tensor& parts, Data* data) {
  int64_t slot = 0;
  for (int kind = kText; kind <= kPair; ++kind) {
    if (!in.has(kind)) continue;
    views[kind] = {data + slot++ * parts.stride(0), parts.stride(1), parts.stride(2),
                   parts.stride(3), parts.stride(4)};
  }
}

template <class T>
void forward(const char* op, const Inputs& in, RationalForwardArgs<T>& args, Tensor& parts,
             Tensor& row_stats) {
  const Tensor& like = *in.key;
  if (parts.size(0) > 0) set_parts(args.parts, in, parts, data_of<T>(parts));
  with_columns<T>(args.d, [&]<int kC>(std::integral_constant<int, kC>) {
    using One = RationalOne<T, kC>;
    if (args.K <= kRationalRows || in.maps() == 0) {
      return launch<One>(op, One::blocks(args), like, args);
    }
    const int64_t size = args.B * args.H * args.K;
    AccOf<T>* next = data_of<AccOf<T>>(row_stats);
    for (int kind = kText; kind <= kPair; ++kind) {
      if (!in.has(kind)) continue;
      args.row_base[kind] = next;
      args.row_total[kind] = next + size;
      next += 2 * size;
    }
    using Rows = RationalRows<T, kC>;
    using Combine = RationalCombine<T>;
    launch<Rows>(op, Rows::blocks(args), like, args);
    launch<Combine>(op, Combine::blocks(args), like, args);
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor> rational_attn_fwd(const Query& image, const Query& text,
                                                             const Query& pair, const Tensor& key,
                                                             const Tensor& value, double scale,
                                                             bool keep_parts) {
  const char* op = "rational_attn_fwd";
  const Inputs in{{&image, &text, &pair}, &key, &value, scale};
  check_inputs(op, in);
  const torch::stable::accelerator::DeviceGuard guard(key.get_device_index());
  const int64_t B = in.size(0), H = in.size(1), K = in.size(2), d = in.size(3);
  const ScalarType acc = acc_type(key.scalar_type());
  Tensor out = new_heads(key, B, H, K, d);
  Tensor parts = new_parts(in, keep_parts ? in.maps() : 0);
  Tensor image_out = new_empty(key, {in.has(kImage) ? B : 0, H, d}, acc);
  Tensor stats = new_empty(key, {3, 2, B, H}, acc);
  if (B * H * K == 0) {
    torch::stable::zero_(image_out);
    torch::stable::zero_(stats);
    return {out, parts, image_out, stats};
  }
  const bool several = in.maps() > 0 && K > kRationalRows;
  Tensor rows = several && !keep_parts ? new_parts(in, in.maps()) : parts;
  Tensor row_stats = new_empty(key, {several ? in.maps() : 0, 2, B, H, K}, acc);
  with_dtype(op, "key", key, [&]<class T>(T) {
    RationalForwardArgs<T> args{};
    set_inputs(args, in);
    args.out = heads_of<T>(out);
    args.keep_parts = keep_parts;
    args.image_out = data_of<AccOf<T>>(image_out);
    args.stats = data_of<AccOf<T>>(stats);
    forward(op, in, args, rows, row_stats);
  });
  return {out, parts, image_out, stats};
}

void check_saved(const char* op, const Inputs& in, const Tensor& grad_out, const Tensor& parts,
                 const Tensor& image_out, const Tensor& stats) {
  const ScalarType type = in.key->scalar_type(), acc = acc_type(type);
  const int64_t B = in.size(0), H = in.size(1), K = in.size(2), d = in.size(3);
  check_same(op, "grad_out", grad_out, *in.key, type, {B, H, K, d});
  check_same(op, "parts", parts, *in.key, type, {in.maps(), B, H, K, d});
  check_same(op, "image_out", image_out, *in.key, acc, {in.has(kImage) ? B : 0, H, d});
  check_same(op, "stats", stats, *in.key, acc, {3, 2, B, H});
}

// tensor `index` of those side by side in [B, K, count, H, d], seen as [B, H, K, d]
template <class T>
Heads<T> packed_heads(Tensor& packed, int64_t index) {
  return {data_of<T>(packed) + index * packed.stride(2), packed.stride(0), packed.stride(3),
          packed.stride(1), packed.stride(4)};
}

template <class T>
void backward(const char* op, const Tensor& like, RationalBackwardArgs<T>& args, Tensor& d_text) {
  using Acc = AccOf<T>;
  const int64_t pairs = args.B * args.H;
  const int64_t of_image = args.has[kImage] ? pairs * args.K : 0;
  const int64_t size = kQueryKinds * pairs + pairs * args.d + 2 * of_image;
  Tensor scratch = new_empty(like, {size}, acc_type(like.scalar_type()));
  args.c = data_of<Acc>(scratch);
  args.r = args.c + kQueryKinds * pairs;
  args.p = args.r + pairs * args.d;
  args.ds = args.p + of_image;
  launch<RationalSums<T>>(op, RationalSums<T>::blocks(args), like, args);
  with_columns<T>(args.d, [&]<int kC>(std::integral_constant<int, kC>) {
    using Keys = RationalKeys<T, kC>;
    using Queries = RationalQueries<T, kC>;
    launch<Keys>(op, Keys::blocks(args), like, args);
    const bool shared = args.has[kText] && d_text.size(0) == 1;
    args.images = shared ? images_per_block(args.B, Queries::blocks_of_image(args)) : 1;
    const int64_t chunks = ceil_div(args.B, args.images);
    Tensor partial = new_empty(like, {shared && chunks > 1 ? chunks : 0, args.K, args.H, args.d},
                               acc_type(like.scalar_type()));
    if (partial.size(0) > 0) args.text_partial = data_of<Acc>(partial);
    launch<Queries>(op, Queries::blocks(args), like, args);
    if (partial.size(0) == 0) return;
    const typename SumPartials<T>::Args sum{args.text_partial, data_of<T>(d_text), chunks,
                                            args.K * args.H * args.d};
    launch<SumPartials<T>>(op, SumPartials<T>::blocks(sum), like, sum);
  });
}

std::tuple<Tensor, Tensor, Tensor> rational_attn_bwd(
    const Tensor& grad_out, const Query& image, const Query& text, const Query& pair,
    const Tensor& key, const Tensor& value, const Tensor& parts, const Tensor& image_out,
    const Tensor& stats, double scale) {
  const char* op = "rational_attn_bwd";
  const Inputs in{{&image, &text, &pair}, &key, &value, scale};
  check_inputs(op, in);
  check_saved(op, in, grad_out, parts, image_out, stats);
  const torch::stable::accelerator::DeviceGuard guard(key.get_device_index());
  const int64_t B = in.size(0), H = in.size(1), K = in.size(2), d = in.size(3);
  const auto grad = [&](int kind) {
    if (!in.has(kind)) return new_empty(key, {0});
    return new_heads(key, (*in.query[kind])->size(0), H, kind == kImage ? 1 : K, d);
  };
  Tensor d_image = grad(kImage), d_text = grad(kText);
  Tensor d_pairs = new_empty(key, {B, K, in.has(kPair) ? 3 : 2, H, d});
  if (B * H * K * d == 0) {
    zero_all({&d_image, &d_text});
    return {d_image, d_text, d_pairs};
  }
  with_dtype(op, "key", key, [&]<class T>(T) {
    using Acc = AccOf<T>;
    RationalBackwardArgs<T> args{};
    set_inputs(args, in);
    args.d_out = heads_of<T>(grad_out);
    set_parts(args.parts, in, parts, data_of<T>(parts));
    args.image_out = {data_of<Acc>(image_out), image_out.stride(0), image_out.stride(1), 0,
                      image_out.stride(2)};
    args.stats = heads_of<Acc>(stats);
    int64_t next = 0;
    if (in.has(kImage)) args.d_query[kImage] = heads_of<T>(d_image);
    if (in.has(kText)) args.d_query[kText] = heads_of<T>(d_text);
    if (in.has(kPair)) args.d_query[kPair] = packed_heads<T>(d_pairs, next++);
    args.d_key = packed_heads<T>(d_pairs, next++);
    args.d_value = packed_heads<T>(d_pairs, next);
    backward(op, key, args, d_text);
  });
  return {d_image, d_text, d_pairs};
}

}  // namespace
}  // namespace vtclip::cuda

VTCLIP_REGISTER(CUDA, cuda, rational_attn)
