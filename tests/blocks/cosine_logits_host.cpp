// SPDX-License-Identifier: Apache-2.0
// cosine_logits, both directions: image, text, d_logits; scale.
#include "cosine_logits_block.h"
#include "host.h"

namespace {

using namespace vtclip::cuda;

template <class T>
Vectors<const T> vectors_of(const host::Tensor& tensor) {
  const host::Tensor& t = tensor;
  if (t.sizes.size() == 2) return {t.data<T>(), 0, t.stride(0), t.stride(1)};
  return {t.data<T>(), t.stride(0), t.stride(1), t.stride(2)};
}

template <class T>
void run(const host::Input& in) {
  using Acc = AccOf<T>;
  const host::Tensor &image = in.tensors.at(0), &text = in.tensors.at(1);
  const bool per_image = text.sizes.size() == 3;
  const int64_t B = image.size(0), D = image.size(1), K = text.size(per_image);
  const int64_t rows = per_image ? B * K : K;
  const auto rx = host::Tensor::empty<Acc>({B}), rt = host::Tensor::empty<Acc>({rows});
  const auto logits = host::Tensor::empty<T>({B, K}), d_image = host::Tensor::empty<T>({B, D});
  const auto d_text = host::Tensor::empty<T>(text.sizes);
  const auto gradient = host::Tensor::empty<Acc>({B + rows, D});

  using Norm = ReciprocalNorm<T>;
  host::launch<Norm>(B, {vectors_of<T>(image), B, D, rx.template data<Acc>()});
  host::launch<Norm>(rows, {vectors_of<T>(text), K, D, rt.template data<Acc>()});
  const CosineArgs<T> common{vectors_of<T>(image), vectors_of<T>(text), rx.template data<Acc>(),
                             rt.template data<Acc>(), per_image ? K : 0, K, D,
                             static_cast<Acc>(in.numbers.at(0))};
  host::launch<CosineForward<T>>(B * K, {common, logits.template data<T>()});
  CosineBackwardArgs<T> args{common, host::rows_of<const T>(in.tensors.at(2)), per_image ? 1 : B,
                             gradient.template data<Acc>(), d_image.template data<T>()};
  host::launch<CosineImageGradient<T>>(B, args);
  args.gradient += B * D;
  args.out = d_text.template data<T>();
  host::launch<CosineTextGradient<T>>(rows, args);
  logits.write();
  d_image.write();
  d_text.write();
}

}  // namespace

int main() {
  const host::Input in;
  host::with_dtype(in.tensors.at(0), [&](auto t) { run<decltype(t)>(in); });
  return 0;
}
