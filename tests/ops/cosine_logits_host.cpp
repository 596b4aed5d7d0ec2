// SPDX-License-Identifier: Apache-2.0
// Runs the block-level code of the CUDA cosine_logits kernels on the host, one lane per block:
// reads B K D per_image scale, image, text and d_logits as doubles, prints all results.
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "cosine_logits_block.h"

namespace {

struct HostBlock {
  int64_t lane() const { return 0; }
  int64_t lanes() const { return 1; }
  template <typename Acc>
  Acc sum(Acc value) { return value; }
  template <typename Acc>
  Acc max(Acc value) { return value; }
};

template <typename T>
void print(const std::vector<T>& values) {
  for (const T value : values) std::printf("%.17g\n", static_cast<double>(value));
}

std::vector<float> read(int64_t count) {
  std::vector<float> values(count);
  for (float& value : values) {
    double number = 0;
    if (std::scanf("%lf", &number) != 1) std::abort();
    value = static_cast<float>(number);
  }
  return values;
}

}  // namespace

int main() {
  long B = 0, K = 0, D = 0, per_image = 0;
  double scale_in = 0;
  if (std::scanf("%ld %ld %ld %ld %lf", &B, &K, &D, &per_image, &scale_in) != 5) return 2;
  const float scale = static_cast<float>(scale_in);
  const int64_t rows = per_image ? B * K : K;
  const auto image = read(B * D), text = read(rows * D), d_logits = read(B * K);
  std::vector<float> rx(B), rt(rows), logits(B * K), d_image(B * D), d_text(rows * D), scratch(D);
  HostBlock block;
  using Row = vtclip::Row<const float>;
  auto image_row = [&](int64_t b) { return Row{image.data() + b * D, 1}; };
  auto text_row = [&](int64_t r) { return Row{text.data() + r * D, 1}; };
  auto row_of = [&](int64_t b, int64_t k) { return per_image ? b * K + k : k; };
  for (int64_t b = 0; b < B; ++b) rx[b] = vtclip::reciprocal_norm<float>(image_row(b), D, block);
  for (int64_t r = 0; r < rows; ++r) rt[r] = vtclip::reciprocal_norm<float>(text_row(r), D, block);
  for (int64_t b = 0; b < B; ++b) {
    for (int64_t k = 0; k < K; ++k) {
      const int64_t r = row_of(b, k);
      logits[b * K + k] =
          scale * vtclip::cosine<float>(image_row(b), text_row(r), rx[b], rt[r], D, block);
    }
  }
  for (int64_t b = 0; b < B; ++b) {
    vtclip::cosine_backward<float, float>(
        image_row(b), rx[b], K,
        [&](int64_t k, int64_t i) { return text_row(row_of(b, k))[i] * rt[row_of(b, k)]; },
        [&](int64_t k) { return scale * d_logits[b * K + k]; }, D,
        vtclip::Row<float>{scratch.data(), 1}, vtclip::Row<float>{d_image.data() + b * D, 1},
        block);
  }
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t first = per_image ? r / K : 0, count = per_image ? 1 : B, k = r % K;
    vtclip::cosine_backward<float, float>(
        text_row(r), rt[r], count,
        [&](int64_t j, int64_t i) { return image_row(first + j)[i] * rx[first + j]; },
        [&](int64_t j) { return scale * d_logits[(first + j) * K + k]; }, D,
        vtclip::Row<float>{scratch.data(), 1}, vtclip::Row<float>{d_text.data() + r * D, 1},
        block);
  }
  print(logits);
  print(d_image);
  print(d_text);
  return 0;
}
