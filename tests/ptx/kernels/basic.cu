// SPDX-License-Identifier: Apache-2.0
// Good kernels and the same with one fault, 128 threads a block unless said otherwise.
#include <cuda_fp16.h>
#include <cuda_bf16.h>

extern "C" {

// a block's sum by a tree; _bad leaves the barrier out
#define TREE(NAME, BARRIER)                                                  \
  __global__ void NAME(const float* x, float* y) {                           \
    __shared__ float s[128];                                                 \
    int t = threadIdx.x;                                                     \
    s[t] = x[blockIdx.x * 128 + t];                                          \
    __syncthreads();                                                         \
    for (int n = 64; n > 0; n /= 2) {                                        \
      if (t < n) s[t] += s[t + n];                                           \
      BARRIER;                                                               \
    }                                                                        \
    if (t == 0) y[blockIdx.x] = s[0];                                        \
  }
TREE(tree, __syncthreads())
TREE(tree_no_barrier, )

__global__ void barrier_in_branch(const float* x, float* y) {
  __shared__ float s[128];
  int t = threadIdx.x;
  s[t] = x[t];
  if (t < 80) __syncthreads();
  y[t] = s[t];
}

#define NEIGHBOUR(NAME, SYNC)                          \
  __global__ void NAME(const float* x, float* y) {     \
    __shared__ float s[128];                           \
    int t = threadIdx.x;                               \
    s[t] = x[t];                                       \
    SYNC;                                              \
    y[t] = s[t ^ 1];                                   \
  }
NEIGHBOUR(neighbour, __syncwarp())
NEIGHBOUR(neighbour_no_sync, )

// reads x[1..n], n = 127 is in bounds
__global__ void shifted(const float* x, float* y, int n) {
  int t = threadIdx.x;
  if (t < n) y[t] = x[t + 1];
}

__global__ void shared_shifted(const float* x, float* y) {
  extern __shared__ float dynamic[];
  int t = threadIdx.x;
  dynamic[t + 1] = x[t];
  __syncthreads();
  y[t] = dynamic[t + 1];
}

__global__ void shared_unwritten(const float* x, float* y) {
  __shared__ float s[256];
  int t = threadIdx.x;
  s[2 * t] = x[t];
  __syncthreads();
  y[t] = s[(t + 1) % 128];
}

__global__ void misaligned(const float* x, float* y) {
  int t = threadIdx.x;
  if (t < 8) {
    float4 v = *(const float4*)(x + 2 * t);
    y[t] = v.x + v.w;
  }
}

__global__ void block_number(float* y) { y[threadIdx.x] = blockIdx.x; }
__global__ void same_value(float* y) { y[threadIdx.x] = 7; }

__global__ void reads_other_block(float* y) {
  int t = threadIdx.x, b = blockIdx.x;
  y[b * 128 + t] = b;
  y[256 + b * 128 + t] = y[(1 - b) * 128 + t];
}

__global__ void through_global(const float* x, float* y, float* z) {
  int t = threadIdx.x;
  y[t] = x[t];
  __syncthreads();
  z[t] = y[127 - t];
}

__global__ void through_global_no_barrier(const float* x, float* y, float* z) {
  int t = threadIdx.x;
  y[t] = x[t];
  z[t] = y[127 - t];
}

__global__ void shuffle_sum(const float* x, float* y) {
  float v = x[threadIdx.x];
  for (int n = 16; n > 0; n /= 2) v += __shfl_xor_sync(0xffffffffu, v, n);
  y[threadIdx.x] = v;
}

__global__ void shuffle_in_branch(const float* x, float* y) {
  int t = threadIdx.x;
  float v = x[t];
  if (t % 32 < 20) v += __shfl_xor_sync(0xffffffffu, v, 1);
  y[t] = v;
}

__global__ void histogram(const int* x, int* counts, int* order) {
  int t = threadIdx.x;
  order[t] = atomicAdd(&counts[x[t]], 1);
}

__global__ void histogram_no_atomic(const int* x, int* counts) {
  int t = threadIdx.x;
  counts[x[t]] += 1;
}

__global__ void any_negative(const float* x, int* y) {
  int t = threadIdx.x;
  y[t] = __syncthreads_or(x[t] < 0) + 2 * __syncthreads_count(x[t] < 0);
}

// 100 threads: a warp that is not whole
__global__ void odd_block(const float* x, float* y) {
  __shared__ float s[100];
  int t = threadIdx.x;
  s[t] = x[t];
  __syncthreads();
  y[t] = s[99 - t];
}

// pairs of lanes write one word; the values are equal, or differ in the last bit
#define TWICE(NAME, VALUE)                             \
  __global__ void NAME(const float* x, float* y) {     \
    __shared__ float s[64];                            \
    int t = threadIdx.x;                               \
    s[t / 2] = VALUE;                                  \
    __syncthreads();                                   \
    y[t] = s[t / 2];                                   \
  }
TWICE(twice_equal, x[t / 2])
TWICE(twice_unequal, __int_as_float(__float_as_int(x[t / 2]) ^ (t & 1)))

// lanes of a warp read shared and global memory by one generic load
__global__ void either_space(const float* x, float* y) {
  __shared__ float s[128];
  int t = threadIdx.x;
  s[t] = 2 * x[t];
  __syncthreads();
  const float* p = t % 2 ? s : x;
  y[t] = p[t];
}

__global__ void local_array(const float* x, float* y, int k) {
  float a[8];
  for (int i = 0; i < 8; ++i) a[(i * k) % 8] = x[(threadIdx.x + i) % 128];
  y[threadIdx.x] = a[k & 7];
}

__constant__ float table[4] = {1, 2, 3, 4};
__global__ void constants(float* y) { y[threadIdx.x] = table[threadIdx.x % 4]; }

__global__ void arithmetic(const double* x, const float* f, double* y, float* g, int* n) {
  int t = threadIdx.x;
  y[t] = fma(x[t], x[t], -1.0) / (x[t] + 3) + sqrt(x[t] * x[t]) + exp(x[t]);
  g[t] = expf(f[t]) + logf(fabsf(f[t]) + 1) + rsqrtf(f[t] * f[t] + 1) + tanhf(f[t]);
  n[t] = (int)(f[t] * 100) % 7 + __popc(t) + __clz(t + 1) + __ffs(t) + __brev(t) % 5;
}

__global__ void half_pairs(const __half2* a, const __half2* b, __half2* c,
                           const __nv_bfloat162* d, __nv_bfloat162* e) {
  int t = threadIdx.x;
  c[t] = __hfma2(a[t], b[t], __hmax2(a[t], b[t]));
  e[t] = __hadd2(d[t], __hmul2(d[t], d[t]));
}
}
