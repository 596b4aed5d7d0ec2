// SPDX-License-Identifier: Apache-2.0
// cosine_logits, both directions: image, text, d_logits; scale; rows of a range of the sums of the
// backward, 0 for the launcher's.
#include "cuda/cosine_logits_block.h"
#include "cuda/cosine_logits_bwd_block.h"
#include "host.h"

namespace {

using namespace vtclip::cuda;

template <class T>
struct Problem {
  using Acc = AccOf<T>;

  const host::Tensor &image, &text;
  Rows<const T> x, g;
  Acc scale;
  int64_t range;
  bool paired;
  int64_t B, D, K;
  host::Tensor logits, rx, rt, d_image, d_text;

  explicit Problem(const host::Input& in)
      : image(in.tensors.at(0)),
        text(in.tensors.at(1)),
        x(host::rows_of<const T>(image)),
        g(host::rows_of<const T>(in.tensors.at(2))),
        scale(static_cast<Acc>(in.numbers.at(0))),
        range(in.ints.at(0)),
        paired(text.sizes.size() == 3),
        B(image.size(0)),
        D(image.size(1)),
        K(text.size(paired)),
        logits(host::Tensor::empty<T>({B, K})),
        rx(host::Tensor::empty<Acc>({B})),
        rt(host::Tensor::empty<Acc>(paired ? std::vector<int64_t>{B, K} : std::vector<int64_t>{K})),
        d_image(host::Tensor::empty<T>({B, D})),
        d_text(host::Tensor::empty<T>(text.sizes)) {}

  Acc* image_rnorm() { return rx.data<Acc>(); }
  Acc* text_rnorm() { return rt.data<Acc>(); }
  Vectors<const T> texts() const {
    return {text.data<T>(), text.stride(0), text.stride(1), text.stride(2)};
  }
};

template <class T>
void paired(Problem<T>& p) {
  using Acc = AccOf<T>;
  const typename CosinePairedForward<T>::Args forward{
      p.x, p.texts(), p.logits.template data<T>(), p.image_rnorm(), p.text_rnorm(), p.B, p.K, p.D,
      p.scale};
  host::launch<CosinePairedForward<T>>(forward.blocks(), forward);
  p.logits.write();
  p.rx.write();
  p.rt.write();
  if (p.B * p.K * p.D == 0) return;  // the launcher zeroes the gradients
  typename CosinePairedGradient<T>::Args args{p.x, p.g, p.texts(), p.image_rnorm(), p.text_rnorm(),
                                              nullptr, p.d_text.template data<T>(), p.B, p.K, p.D,
                                              p.scale};
  const auto partial = host::Tensor::empty<Acc>({args.tiles(), p.B, p.D});
  args.partial = partial.template data<Acc>();
  host::launch<CosinePairedGradient<T>>(args.blocks(), args);
  const typename CosineProject<T>::Args project{
      {p.x, p.image_rnorm(), args.partial, p.d_image.template data<T>(), args.tiles(), p.B},
      {p.x, nullptr, nullptr, nullptr, 0, 0},
      p.D,
      p.scale};
  host::launch<CosineProject<T>>(project.blocks(), project);
  p.d_image.write();
  p.d_text.write();
}

template <class T, int kSide>
void forward(Problem<T>& p) {
  const typename CosineForward<T, kSide>::Args args{
      p.x, host::rows_of<const T>(p.text), p.image_rnorm(), p.text_rnorm(),
      p.logits.template data<T>(), p.B, p.K, p.D, p.scale};
  host::launch<CosineForward<T, kSide>>(args.blocks(), args);
  p.logits.write();
}

template <class T>
void shared(Problem<T>& p) {
  using Acc = AccOf<T>;
  const Rows<const T> y = host::rows_of<const T>(p.text);
  const typename CosineNorms<T>::Args norms{p.x, y, p.image_rnorm(), p.text_rnorm(), p.B, p.K, p.D};
  host::launch<CosineNorms<T>>(norms.blocks(), norms);
  forward<T, 64>(p);
  p.rx.write();
  p.rt.write();
  if (p.B * p.K * p.D != 0) {
    const auto range = [&](int64_t N, int64_t J) {
      return p.range == 0 ? Gather<T>::range_of(N, J, p.D) : p.range;
    };
    typename CosineGather<T>::Args args{
        {p.g, y, p.text_rnorm(), nullptr, p.B, p.K, p.D, range(p.B, p.K)},
        {p.g, p.x, p.image_rnorm(), nullptr, p.K, p.B, p.D, range(p.K, p.B)}};
    const auto for_image = host::Tensor::empty<Acc>({args.image.ranges(), p.B, p.D});
    const auto for_text = host::Tensor::empty<Acc>({args.text.ranges(), p.K, p.D});
    args.image.partial = for_image.template data<Acc>();
    args.text.partial = for_text.template data<Acc>();
    host::launch<CosineGather<T>>(args.blocks(), args);
    const typename CosineProject<T>::Args project{
        {p.x, p.image_rnorm(), args.image.partial, p.d_image.template data<T>(),
         args.image.ranges(), p.B},
        {y, p.text_rnorm(), args.text.partial, p.d_text.template data<T>(), args.text.ranges(),
         p.K},
        p.D,
        p.scale};
    host::launch<CosineProject<T>>(project.blocks(), project);
    p.d_image.write();
    p.d_text.write();
  }
  forward<T, 32>(p);
}

template <class T>
void run(const host::Input& in) {
  Problem<T> problem(in);
  problem.paired ? paired(problem) : shared(problem);
}

}  // namespace

int main() { return host::program([](auto t, auto& in) { run<decltype(t)>(in); }); }
