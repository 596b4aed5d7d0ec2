// SPDX-License-Identifier: Apache-2.0
// ldmatrix, mma, stmatrix and cp.async; one warp for products, 128 threads for copies.
#include <cuda_fp16.h>

#define SHARED(P) ((unsigned)__cvta_generic_to_shared(P))

extern "C" {

// c [16, 8] = a [16, 16] b [16, 8], b by rows; A1, A2 swap registers of a, TRANS orders b
#define PRODUCT(NAME, A1, A2, TRANS)                                                              \
  __global__ void NAME(const __half* a, const __half* b, float* c) {                              \
    __shared__ __align__(16) __half sa[16 * 24], sb[16 * 8];                                      \
    int t = threadIdx.x;                                                                          \
    for (int i = t; i < 256; i += 32) sa[i / 16 * 24 + i % 16] = a[i];                            \
    for (int i = t; i < 128; i += 32) sb[i] = b[i];                                               \
    __syncwarp();                                                                                 \
    unsigned r[4], q[2];                                                                          \
    float d[4] = {0, 0, 0, 0};                                                                    \
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"                  \
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])                                 \
                 : "r"(SHARED(sa + t % 16 * 24 + t / 16 * 8)));                                   \
    asm volatile("ldmatrix.sync.aligned.m8n8.x2" TRANS ".shared.b16 {%0,%1}, [%2];"               \
                 : "=r"(q[0]), "=r"(q[1]) : "r"(SHARED(sb + t % 16 * 8)));                        \
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, "              \
                 "{%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"                                         \
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                 \
                 : "r"(r[0]), "r"(r[A1]), "r"(r[A2]), "r"(r[3]), "r"(q[0]), "r"(q[1]));           \
    for (int i = 0; i < 4; ++i) c[(t / 4 + i / 2 * 8) * 8 + t % 4 * 2 + i % 2] = d[i];            \
  }
PRODUCT(product, 1, 2, ".trans")
PRODUCT(product_swapped, 2, 1, ".trans")
PRODUCT(product_untransposed, 1, 2, "")

// c [16, 8] = a [16, 8] b [8, 8] in tf32, both by rows
__global__ void product_tf32(const float* a, const float* b, float* c) {
  int t = threadIdx.x, g = t / 4, k = t % 4;
  unsigned r[4], q[2];
  for (int i = 0; i < 4; ++i)
    asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(r[i]) : "f"(a[(g + i % 2 * 8) * 8 + k + i / 2 * 4]));
  for (int i = 0; i < 2; ++i)
    asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(q[i]) : "f"(b[(k + i * 4) * 8 + g]));
  float d[4] = {0, 0, 0, 0};
  asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, "
               "{%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3]), "r"(q[0]), "r"(q[1]));
  for (int i = 0; i < 4; ++i) c[(g + i / 2 * 8) * 8 + k * 2 + i % 2] = d[i];
}

// every thread copies 16 bytes and reads those of another
#define COPY(NAME, WAIT, BARRIER)                                                                 \
  __global__ void NAME(const float4* x, float4* y) {                                              \
    __shared__ float4 s[128];                                                                     \
    int t = threadIdx.x;                                                                          \
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(SHARED(s + t)), "l"(x + t));   \
    asm volatile("cp.async.commit_group;");                                                       \
    WAIT;                                                                                         \
    BARRIER;                                                                                      \
    y[t] = s[127 - t];                                                                            \
  }
#define WAIT(N) asm volatile("cp.async.wait_group " #N ";")
COPY(copy, WAIT(0), __syncthreads())
COPY(copy_no_wait, , __syncthreads())
COPY(copy_wait_one, WAIT(1), __syncthreads())
COPY(copy_no_barrier, WAIT(0), )

// the last 5 floats of a row of 4 n are filled with zeros
__global__ void copy_filled(const float* x, float* y, int n) {
  __shared__ float4 s[128];
  int t = threadIdx.x, have = min(max(n - 4 * t, 0), 4) * 4;
  asm volatile("cp.async.ca.shared.global [%0], [%1], 16, %2;" ::"r"(SHARED(s + t)),
               "l"(have ? x + 4 * t : x), "r"(have));
  asm volatile("cp.async.wait_all;");
  __syncthreads();
  float4 v = s[127 - t];
  y[4 * t] = v.x, y[4 * t + 1] = v.y, y[4 * t + 2] = v.z, y[4 * t + 3] = v.w;
}

// the tile of the next step is copied over one that other warps may still read
#define RING(NAME, BARRIER)                                                                       \
  __global__ void NAME(const float* x, float* y, int steps) {                                     \
    __shared__ float s[128];                                                                      \
    int t = threadIdx.x;                                                                          \
    float sum = 0;                                                                                \
    for (int k = 0; k < steps; ++k) {                                                             \
      s[t] = x[k * 128 + t];                                                                      \
      __syncthreads();                                                                            \
      sum += s[127 - t];                                                                          \
      BARRIER;                                                                                    \
    }                                                                                             \
    y[t] = sum;                                                                                   \
  }
RING(ring, __syncthreads())
RING(ring_no_barrier, )

// warps 0, 1 write and warps 2, 3 read, ordered by a named barrier; _late reads before it
#define PAIRED(NAME, BEFORE, AFTER)                                                               \
  __global__ void NAME(const float* x, float* y) {                                                \
    __shared__ float s[64];                                                                       \
    int t = threadIdx.x;                                                                          \
    if (t < 64) {                                                                                 \
      s[t] = x[t];                                                                                \
      asm volatile("bar.arrive 1, 128;" ::: "memory");                                            \
      asm volatile("bar.sync 3, 64;" ::: "memory");                                               \
    } else {                                                                                      \
      BEFORE;                                                                                     \
      asm volatile("bar.sync 1, 128;" ::: "memory");                                              \
      AFTER;                                                                                      \
    }                                                                                             \
  }
PAIRED(paired, , y[t] = s[127 - t])
PAIRED(paired_again, , y[t] = s[127 - t]; asm volatile("bar.sync 2, 64;" ::: "memory");
       y[t] = s[127 - t])
PAIRED(paired_late, y[t] = *(volatile float*)&s[127 - t], )
}
