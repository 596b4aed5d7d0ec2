// SPDX-License-Identifier: Apache-2.0
// unit_products, both directions: image, text, d_v, d_t, d_products; images of a forward block and
// of a chunk, whether slices are summed before the rows; scale.
#include <cmath>

#include "rows_host.h"
#include "cuda/unit_products_block.h"

namespace {

using namespace vtclip::cuda;

// the slices of one side, as the launcher keeps them
template <class Acc>
struct Slices {
  host::Tensor all, sum;
  int64_t P;
  bool first;

  Slices(int64_t P, int64_t N, int64_t D, bool first)
      : all(host::Tensor::empty<Acc>({P == 0 ? 1 : P, N, D})),
        sum(host::Tensor::empty<Acc>({N, D})),
        P(P),
        first(first && P > 0) {}
  typename SumColumns<Acc>::Job job() const {
    return {all.template data<Acc>(), sum.template data<Acc>(), P, first ? sum.numel() : 0};
  }
  template <class T>
  typename UnitRows<T>::Side side(const host::Tensor& rows, const host::Tensor& grad,
                                  const host::Tensor& out) const {
    return {host::rows_of<const T>(rows),
            host::rows_of<const T>(grad),
            (first ? sum : all).template data<Acc>(),
            out.data<T>(),
            first ? 1 : P,
            rows.size(0)};
  }
};

template <class T>
void run(const host::Input& in) {
  using Acc = AccOf<T>;
  const host::Tensor &image = in.tensors.at(0), &text = in.tensors.at(1);
  const int64_t B = image.size(0), K = text.size(0), D = image.size(1);
  const auto rows = host::rows_of<const T>(image), texts = host::rows_of<const T>(text);
  const Acc root = static_cast<Acc>(std::sqrt(in.numbers.at(0)));
  const auto v = host::Tensor::empty<T>({B, D}), t = host::Tensor::empty<T>({K, D});
  const auto products = host::Tensor::empty<T>({B, K, D});
  typename UnitForward<T>::Args forward{};
  forward.image = rows;
  forward.text = texts;
  forward.v = v.template data<T>();
  forward.t = t.template data<T>();
  forward.products = products.template data<T>();
  forward.root = root;
  forward.B = B;
  forward.K = K;
  forward.D = D;
  forward.images = in.ints.at(0);
  host::launch<UnitForward<T>>(forward.blocks(), forward);

  using Gradient = UnitGradient<T>;
  const auto d_image = host::Tensor::empty<T>({B, D}), d_text = host::Tensor::empty<T>({K, D});
  const Walk<T> walk{B, K, D, in.ints.at(1)};
  const bool first = in.ints.at(2) != 0;
  const Slices<Acc> of_image(walk.tiles(), B, D, first), of_text(walk.chunks(), K, D, first);
  if (B * K > 0) {
    host::launch<Gradient>(walk.blocks(Block<Gradient::kWarps>::kThreads),
                           {rows, texts, host::images_of<T>(in.tensors.at(4)),
                            of_image.all.template data<Acc>(), of_text.all.template data<Acc>(),
                            walk});
    host::sum_columns<Acc>({{of_image.job(), of_text.job()}});
  }
  const typename UnitRows<T>::Args back{of_image.template side<T>(image, in.tensors.at(2), d_image),
                                        of_text.template side<T>(text, in.tensors.at(3), d_text),
                                        root, D};
  host::launch<UnitRows<T>>(back.blocks(), back);
  for (const host::Tensor* result : {&v, &t, &products, &d_image, &d_text}) result->write();
}

}  // namespace

int main() { return host::program([](auto t, auto& in) { run<decltype(t)>(in); }); }
