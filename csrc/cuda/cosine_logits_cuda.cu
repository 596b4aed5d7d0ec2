// SPDX-License-Identifier: Apache-2.0
// cosine_logits on CUDA without Triton: one block per vector or per (image, text) pair.
#include <tuple>


#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include "cosine_logits_block.h"
#include "launch.cuh"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using vtclip::Row;

constexpr int kNumThreads = 128;
constexpr int kNumWarps = kNumThreads / 32;

// The threads of a block, meeting in sum and max; reductions run in a fixed order.
template <typename Acc>
struct CudaBlock {
  Acc* shared;  // [kNumWarps]

  __device__ int64_t lane() const { return threadIdx.x; }
  __device__ int64_t lanes() const { return kNumThreads; }

  __device__ Acc sum(Acc value) {
    for (int offset = 16; offset > 0; offset /= 2) {
      value += __shfl_xor_sync(0xffffffffu, value, offset);
    }
    return meet(value, [](Acc a, Acc b) { return a + b; });
  }
  __device__ Acc max(Acc value) {
    for (int offset = 16; offset > 0; offset /= 2) {
      const Acc other = __shfl_xor_sync(0xffffffffu, value, offset);
      value = other > value ? other : value;
    }
    return meet(value, [](Acc a, Acc b) { return b > a ? b : a; });
  }

 private:
  template <typename Combine>
  __device__ Acc meet(Acc value, Combine combine) {
    __syncthreads();  // the shared slots may still be read by the previous reduction
    if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = value;
    __syncthreads();
    Acc total = shared[0];
    for (int warp = 1; warp < kNumWarps; ++warp) total = combine(total, shared[warp]);
    return total;
  }
};

// A [G, N, D] view: vector (g, n) starts at base + g * stride_g + n * stride_n, strides in elements.
template <typename T>
struct Vectors {
  T* base;
  int64_t stride_g, stride_n, stride_d;
  __device__ Row<T> row(int64_t g, int64_t n) const {
    return {base + g * stride_g + n * stride_n, stride_d};
  }
};

template <typename T, typename Acc>
__global__ void __launch_bounds__(kNumThreads)
    rnorm_kernel(Vectors<const T> vectors, int64_t N, int64_t D, Acc* rnorm) {
  __shared__ Acc shared[kNumWarps];
  CudaBlock<Acc> block{shared};
  const int64_t row = blockIdx.x;
  const Acc r = vtclip::reciprocal_norm<Acc>(vectors.row(row / N, row % N), D, block);
  if (threadIdx.x == 0) rnorm[row] = r;
}

template <typename T, typename Acc>
__global__ void __launch_bounds__(kNumThreads)
    logits_kernel(Vectors<const T> image, Vectors<const T> text, const Acc* image_rnorm,
                  const Acc* text_rnorm, int64_t text_rnorm_stride_b, int64_t K, int64_t D,
                  Acc scale, T* logits) {
  __shared__ Acc shared[kNumWarps];
  CudaBlock<Acc> block{shared};
  const int64_t b = blockIdx.x / K, k = blockIdx.x % K;
  const Acc cosine =
      vtclip::cosine<Acc>(image.row(0, b), text.row(b, k), image_rnorm[b],
                          text_rnorm[b * text_rnorm_stride_b + k], D, block);
  if (threadIdx.x == 0) logits[b * K + k] = static_cast<T>(scale * cosine);
}

// one block per image b: d_image[b] from all texts
template <typename T, typename Acc>
__global__ void __launch_bounds__(kNumThreads)
    d_image_kernel(Vectors<const T> image, Vectors<const T> text, Row<const T> d_logits_b,
                   int64_t stride_logits_b, const Acc* image_rnorm, const Acc* text_rnorm,
                   int64_t text_rnorm_stride_b, int64_t K, int64_t D, Acc scale, Acc* gradient,
                   T* d_image) {
  __shared__ Acc shared[kNumWarps];
  CudaBlock<Acc> block{shared};
  const int64_t b = blockIdx.x;
  const Row<const T> d_logits{d_logits_b.base + b * stride_logits_b, d_logits_b.stride};
  auto other = [&](int64_t k, int64_t i) {
    return static_cast<Acc>(text.row(b, k)[i]) * text_rnorm[b * text_rnorm_stride_b + k];
  };
  auto weight = [&](int64_t k) { return scale * static_cast<Acc>(d_logits[k]); };
  vtclip::cosine_backward<Acc, T>(image.row(0, b), image_rnorm[b], K, other, weight, D,
                                  Row<Acc>{gradient + b * D, 1}, Row<T>{d_image + b * D, 1},
                                  block);
}

// one block per text row (g, k): its images are [g * count, (g + 1) * count)
template <typename T, typename Acc>
__global__ void __launch_bounds__(kNumThreads)
    d_text_kernel(Vectors<const T> image, Vectors<const T> text, Row<const T> d_logits_b,
                  int64_t stride_logits_b, const Acc* image_rnorm, const Acc* text_rnorm,
                  int64_t count, int64_t K, int64_t D, Acc scale, Acc* gradient, T* d_text) {
  __shared__ Acc shared[kNumWarps];
  CudaBlock<Acc> block{shared};
  const int64_t row = blockIdx.x, g = row / K, k = row % K;
  auto other = [&](int64_t j, int64_t i) {
    const int64_t b = g * count + j;
    return static_cast<Acc>(image.row(0, b)[i]) * image_rnorm[b];
  };
  auto weight = [&](int64_t j) {
    const int64_t b = g * count + j;
    return scale * static_cast<Acc>(d_logits_b.base[b * stride_logits_b + k * d_logits_b.stride]);
  };
  vtclip::cosine_backward<Acc, T>(text.row(g, k), text_rnorm[row], count, other, weight, D,
                                  Row<Acc>{gradient + row * D, 1}, Row<T>{d_text + row * D, 1},
                                  block);
}

template <typename T>
Vectors<const T> vectors_of(const Tensor& tensor) {
  const bool per_image = tensor.dim() == 3;
  return {static_cast<const T*>(tensor.const_data_ptr()), per_image ? tensor.stride(0) : 0,
          tensor.stride(-2), tensor.stride(-1)};
}

dim3 rows(int64_t count) {
  STD_TORCH_CHECK(count <= vtclip::kMaxGridX, "cosine_logits: at most ", vtclip::kMaxGridX,
                  " rows in one call, got ", count);
  return dim3(static_cast<unsigned>(count));
}

template <typename T, typename Acc>
void forward(const Tensor& image, const Tensor& text, double scale, Tensor& logits,
             Tensor& image_rnorm, Tensor& text_rnorm) {
  const int64_t B = image.size(0), D = image.size(1), K = text.size(-2);
  const int64_t groups = text.dim() == 3 ? B : 1;
  const cudaStream_t stream = vtclip::current_stream(image);
  Acc* rx = static_cast<Acc*>(image_rnorm.mutable_data_ptr());
  Acc* rt = static_cast<Acc*>(text_rnorm.mutable_data_ptr());
  if (B > 0) {
    rnorm_kernel<T, Acc><<<rows(B), kNumThreads, 0, stream>>>(vectors_of<T>(image), B, D, rx);
    vtclip::check_launch("cosine_logits_fwd");
  }
  if (groups * K > 0) {
    rnorm_kernel<T, Acc>
        <<<rows(groups * K), kNumThreads, 0, stream>>>(vectors_of<T>(text), K, D, rt);
    vtclip::check_launch("cosine_logits_fwd");
  }
  if (B * K == 0) return;
  logits_kernel<T, Acc><<<rows(B * K), kNumThreads, 0, stream>>>(
      vectors_of<T>(image), vectors_of<T>(text), rx, rt, groups == 1 && text.dim() == 2 ? 0 : K, K,
      D, static_cast<Acc>(scale), static_cast<T*>(logits.mutable_data_ptr()));
  vtclip::check_launch("cosine_logits_fwd");
}

template <typename T, typename Acc>
void backward(const Tensor& d_logits, const Tensor& image, const Tensor& text,
              const Tensor& image_rnorm, const Tensor& text_rnorm, double scale, Tensor& d_image,
              Tensor& d_text, Tensor& gradient) {
  const int64_t B = image.size(0), D = image.size(1), K = text.size(-2);
  const bool shared_text = text.dim() == 2;
  const int64_t text_rows = shared_text ? K : B * K;
  const cudaStream_t stream = vtclip::current_stream(image);
  const Acc* rx = static_cast<const Acc*>(image_rnorm.const_data_ptr());
  const Acc* rt = static_cast<const Acc*>(text_rnorm.const_data_ptr());
  const Row<const T> row{static_cast<const T*>(d_logits.const_data_ptr()), d_logits.stride(1)};
  Acc* scratch = static_cast<Acc*>(gradient.mutable_data_ptr());
  if (B * D > 0) {
    d_image_kernel<T, Acc><<<rows(B), kNumThreads, 0, stream>>>(
        vectors_of<T>(image), vectors_of<T>(text), row, d_logits.stride(0), rx, rt,
        shared_text ? 0 : K, K, D, static_cast<Acc>(scale), scratch,
        static_cast<T*>(d_image.mutable_data_ptr()));
    vtclip::check_launch("cosine_logits_bwd");
  }
  if (text_rows * D > 0) {
    d_text_kernel<T, Acc><<<rows(text_rows), kNumThreads, 0, stream>>>(
        vectors_of<T>(image), vectors_of<T>(text), row, d_logits.stride(0), rx, rt,
        shared_text ? B : 1, K, D, static_cast<Acc>(scale), scratch + B * D,
        static_cast<T*>(d_text.mutable_data_ptr()));
    vtclip::check_launch("cosine_logits_bwd");
  }
}

ScalarType acc_type(ScalarType type) {
  return type == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// calls run.template operator()<T, Acc>() for the dtype of `like`
template <typename Run>
void switch_dtype(const Tensor& like, Run run) {
  switch (like.scalar_type()) {
    case ScalarType::Double: return run(double{}, double{});
    case ScalarType::Float: return run(float{}, float{});
    case ScalarType::Half: return run(torch::headeronly::Half{}, float{});
    case ScalarType::BFloat16: return run(torch::headeronly::BFloat16{}, float{});
    default: STD_TORCH_CHECK(false, "cosine_logits: wanted float16, bfloat16, float32 or float64");
  }
}

std::tuple<Tensor, Tensor, Tensor> cosine_logits_fwd_cuda(const Tensor& image, const Tensor& text,
                                                          double scale) {
  const torch::stable::accelerator::DeviceGuard guard(image.get_device_index());
  const int64_t B = image.size(0), K = text.size(-2);
  const ScalarType acc = acc_type(image.scalar_type());
  Tensor logits = torch::stable::new_empty(image, {B, K});
  Tensor image_rnorm = torch::stable::new_empty(image, {B}, acc);
  Tensor text_rnorm = text.dim() == 3 ? torch::stable::new_empty(text, {B, K}, acc)
                                      : torch::stable::new_empty(text, {K}, acc);
  switch_dtype(image, [&](auto t, auto a) {
    forward<decltype(t), decltype(a)>(image, text, scale, logits, image_rnorm, text_rnorm);
  });
  return {logits, image_rnorm, text_rnorm};
}

std::tuple<Tensor, Tensor> cosine_logits_bwd_cuda(const Tensor& grad_logits, const Tensor& image,
                                                  const Tensor& text, const Tensor& image_rnorm,
                                                  const Tensor& text_rnorm, double scale) {
  const torch::stable::accelerator::DeviceGuard guard(image.get_device_index());
  const int64_t B = image.size(0), D = image.size(1), K = text.size(-2);
  const int64_t text_rows = text.dim() == 3 ? B * K : K;
  const ScalarType acc = acc_type(image.scalar_type());
  Tensor d_image = torch::stable::new_empty(image, {B, D});
  Tensor d_text = text.dim() == 3 ? torch::stable::new_empty(text, {B, K, D})
                                  : torch::stable::new_empty(text, {K, D});
  Tensor gradient = torch::stable::new_empty(image, {B + text_rows, D}, acc);
  switch_dtype(image, [&](auto t, auto a) {
    backward<decltype(t), decltype(a)>(grad_logits, image, text, image_rnorm, text_rnorm, scale,
                                       d_image, d_text, gradient);
  });
  return {d_image, d_text};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(vtclip, CUDA, m) {
  m.impl("cosine_logits_fwd", TORCH_BOX(&cosine_logits_fwd_cuda));
  m.impl("cosine_logits_bwd", TORCH_BOX(&cosine_logits_bwd_cuda));
}
