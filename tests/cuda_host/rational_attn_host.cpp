// SPDX-License-Identifier: Apache-2.0
// rational_attn, both directions: image, text and pair query (each may be absent), key, value,
// d_out; scale; whether parts are kept, images of one block of the text's gradient.
#include <type_traits>

#include "host.h"
#include "cuda/rational_attn_bwd_block.h"
#include "cuda/rational_attn_fwd_block.h"
#include "cuda/block/sum_partials.h"

namespace {

using namespace vtclip::cuda;

template <class T>
Heads<const T> input(const host::Tensor& t) {
  if (!t.given()) return {};
  return {t.data<T>(), t.size(0) == 1 ? 0 : t.stride(0), t.stride(1), t.stride(2), t.stride(3)};
}

// a result of host::Tensor::empty({B, rows, H, d}), seen as [B, H, rows, d]
template <class T>
Heads<T> output(const host::Tensor& t) {
  return {t.data<std::remove_const_t<T>>(), t.stride(0), t.stride(2), t.stride(1), t.stride(3)};
}

// tensor `index` of those side by side in a [B, K, count, H, d], seen as [B, H, K, d]
template <class T>
Heads<T> packed(const host::Tensor& t, int64_t index) {
  return {t.data<T>() + index * t.stride(2), t.stride(0), t.stride(3), t.stride(1), t.stride(4)};
}

template <class T>
struct Problem {
  using Acc = AccOf<T>;
  RationalInputs<T> inputs{};
  host::Tensor out, parts[kQueryKinds], image_out, stats;

  explicit Problem(const host::Input& in) {
    const host::Tensor& key = in.tensors.at(3);
    inputs.B = key.size(0);
    inputs.H = key.size(1);
    inputs.K = key.size(2);
    inputs.d = key.size(3);
    int given = 0;
    for (int kind = 0; kind < kQueryKinds; ++kind) {
      const host::Tensor& query = in.tensors.at(static_cast<size_t>(kind));
      inputs.has[kind] = query.given();
      inputs.query[kind] = input<T>(query);
      given += query.given();
    }
    inputs.key = input<T>(key);
    inputs.value = input<T>(in.tensors.at(4));
    inputs.scale = static_cast<Acc>(in.numbers.at(0));
    inputs.share = 1 / static_cast<Acc>(given);
    out = rows(inputs.B);
    for (auto& part : parts) part = rows(inputs.B);
    image_out = host::Tensor::empty<Acc>({inputs.B, inputs.H, inputs.d});
    stats = host::Tensor::empty<Acc>({3, 2, inputs.B, inputs.H});
  }

  host::Tensor rows(int64_t B) const {
    return host::Tensor::empty<T>({B, inputs.K, inputs.H, inputs.d});
  }

  template <int kC>
  void forward(bool keep_parts) {
    RationalForwardArgs<T> args{};
    static_cast<RationalInputs<T>&>(args) = inputs;
    args.out = output<T>(out);
    args.keep_parts = keep_parts;
    args.image_out = image_out.template data<Acc>();
    args.stats = stats.template data<Acc>();
    host::Tensor row_stats[kQueryKinds];
    using One = RationalOne<T, kC>;
    const bool one = args.K <= One::kRows || args.maps() == 0;
    for (int kind = kText; kind <= kPair; ++kind) {
      if (!args.has[kind]) continue;
      if (keep_parts || !one) args.parts[kind] = output<T>(parts[kind]);
      if (one) continue;
      row_stats[kind] = host::Tensor::empty<Acc>({2, args.B, args.H, args.K});
      args.row_base[kind] = row_stats[kind].template data<Acc>();
      args.row_total[kind] = args.row_base[kind] + args.B * args.H * args.K;
    }
    if (one) return host::launch<One>(One::blocks(args), args);
    using Rows = RationalRows<T, kC>;
    host::launch<Rows>(Rows::blocks(args), args);
    host::launch<RationalCombine<T>>(RationalCombine<T>::blocks(args), args);
  }

  template <int kC>
  void backward(const host::Input& in) {
    const int64_t B = inputs.B, H = inputs.H, K = inputs.K, d = inputs.d;
    RationalBackwardArgs<T> args{};
    static_cast<RationalInputs<T>&>(args) = inputs;
    args.d_out = input<T>(in.tensors.at(5));
    for (int kind = kText; kind <= kPair; ++kind) {
      if (args.has[kind]) args.parts[kind] = output<const T>(parts[kind]);
    }
    args.image_out = {image_out.template data<Acc>(), H * d, d, 0, 1};
    args.stats = {stats.template data<Acc>(), 2 * B * H, B * H, H, 1};
    const auto c = host::Tensor::empty<Acc>({3, B, H}), r = host::Tensor::empty<Acc>({B, H, d});
    const auto p = host::Tensor::empty<Acc>({B, H, K}), ds = host::Tensor::empty<Acc>({B, H, K});
    args.c = c.template data<Acc>();
    args.r = r.template data<Acc>();
    args.p = args.has[kImage] ? p.template data<Acc>() : nullptr;
    args.ds = args.has[kImage] ? ds.template data<Acc>() : nullptr;

    const host::Tensor& text = in.tensors.at(kText);
    const int64_t texts = text.given() ? text.size(0) : 0;
    const host::Tensor d_image = host::Tensor::empty<T>({args.has[kImage] ? B : 0, 1, H, d});
    const host::Tensor d_text = rows(texts);
    const auto d_pairs = host::Tensor::empty<T>({B, K, args.has[kPair] ? 3 : 2, H, d});
    int64_t next = 0;
    if (args.has[kImage]) args.d_query[kImage] = output<T>(d_image);
    if (args.has[kText]) args.d_query[kText] = output<T>(d_text);
    if (args.has[kPair]) args.d_query[kPair] = packed<T>(d_pairs, next++);
    args.d_key = packed<T>(d_pairs, next++);
    args.d_value = packed<T>(d_pairs, next);
    host::launch<RationalSums<T>>(RationalSums<T>::blocks(args), args);
    using Keys = RationalKeys<T, kC>;
    using Queries = RationalQueries<T, kC>;
    host::launch<Keys>(Keys::blocks(args), args);
    args.images = texts == 1 ? in.ints.at(1) : 1;
    const int64_t chunks = vtclip::ceil_div(B, args.images);
    const auto partial = host::Tensor::empty<Acc>({chunks, K, H, d});
    const bool several = texts == 1 && chunks > 1;
    if (several) args.text_partial = partial.template data<Acc>();
    host::launch<Queries>(Queries::blocks(args), args);
    if (several) {
      const typename SumPartials<T>::Args sum{args.text_partial, d_text.template data<T>(), chunks,
                                              K * H * d};
      host::launch<SumPartials<T>>(SumPartials<T>::blocks(sum), sum);
    }
    for (const host::Tensor* grad : {&d_image, &d_text, &d_pairs}) grad->write();
  }
};

template <class T>
void run(const host::Input& in) {
  Problem<T> problem(in);
  const bool keep_parts = in.ints.at(0) != 0;
  with_columns<T>(problem.inputs.d, [&](auto columns) {
    constexpr int kC = decltype(columns)::value;
    problem.template forward<kC>(keep_parts);
    problem.out.write();
    problem.stats.write();
    if (keep_parts) problem.template backward<kC>(in);
  });
}

// bytes of shared memory of every body
template <class T, int kC>
void count(host::Tensor& sizes, int& next) {
  const auto add = [&](auto tiles) {
    Shared shared;
    typename decltype(tiles)::type counted(shared);
    sizes.data<int64_t>()[next++] = shared.bytes();
  };
  add(std::type_identity<typename RationalOne<T, kC>::Tiles>{});
  add(std::type_identity<typename RationalCombine<T>::Tiles>{});
  add(std::type_identity<typename RationalSums<T>::Tiles>{});
  add(std::type_identity<typename RationalKeys<T, kC>::Tiles>{});
}

}  // namespace

int main() {
  const host::Input in;
  if (in.tensors.empty()) {
    host::Tensor sizes = host::Tensor::empty<int64_t>({16});
    int next = 0;
    count<Half, 64>(sizes, next);
    count<Half, 128>(sizes, next);
    count<float, 64>(sizes, next);
    count<double, 32>(sizes, next);
    sizes.write();
    return 0;
  }
  host::with_dtype(in.tensors.at(3), [&](auto t) { run<decltype(t)>(in); });
  return 0;
}
