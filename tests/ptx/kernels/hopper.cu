// SPDX-License-Identifier: Apache-2.0
// wgmma, mbarriers, bulk and tensor copies of sm_90a; one warpgroup.
#include <cuda_fp16.h>
#include <cstdint>

#define SHARED(P) ((unsigned)__cvta_generic_to_shared(P))
#define FENCE asm volatile("fence.proxy.async;" ::: "memory")
#define BARRIER(P, N) asm volatile("mbarrier.init.shared.b64 [%0], " #N ";" ::"r"(SHARED(P)))

__device__ uint64_t descriptor(const void* p, int leading, int stride, uint64_t swizzle) {
  return SHARED(p) >> 4 | (uint64_t)(leading >> 4) << 16 | (uint64_t)(stride >> 4) << 32 |
         swizzle << 62;
}

__device__ void wait(uint64_t* barrier, int parity) {
  asm volatile(
      "{\n.reg .pred done;\nagain:\nmbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again;\n}" ::"r"(SHARED(barrier)), "r"(parity) : "memory");
}

extern "C" {

// c [64, 8] = a [64, 16] b [8, 16]^T in cores of 8 rows of 16 bytes; a from registers in _rs
#define WGMMA "wgmma.mma_async.sync.aligned.m64n8k16.f32.f16.f16 {%0,%1,%2,%3}, "
#define OUT "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
#define GROUP(NAME, FENCED, PRODUCT, WAIT)                                                        \
  __global__ void NAME(const __half* a, const __half* b, float* c) {                              \
    __shared__ __align__(128) __half sa[64 * 16], sb[8 * 16];                                     \
    int t = threadIdx.x, w = t / 32, g = t % 32 / 4, k = t % 4 * 2;                               \
    for (int i = t; i < 1024; i += 128)                                                           \
      sa[i / 128 * 128 + i % 16 / 8 * 64 + i / 16 % 8 * 8 + i % 8] = a[i];                        \
    if (t < 128) sb[t % 16 / 8 * 64 + t / 16 * 8 + t % 8] = b[t];                                 \
    FENCED;                                                                                       \
    __syncthreads();                                                                              \
    float d[4] = {0, 0, 0, 0};                                                                    \
    uint64_t da = descriptor(sa, 128, 256, 0), db = descriptor(sb, 128, 256, 0);                  \
    auto at = [&](int r, int q) { return *(const unsigned*)(a + (w * 16 + r + g) * 16 + q + k); }; \
    unsigned r[4] = {at(0, 0), at(8, 0), at(0, 8), at(8, 8)};                                     \
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");                                       \
    PRODUCT;                                                                                      \
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");                                \
    WAIT;                                                                                         \
    for (int i = 0; i < 4; ++i) c[(w * 16 + g + i / 2 * 8) * 8 + k + i % 2] = d[i];               \
  }
#define BY_DESCRIPTOR asm volatile(WGMMA "%4, %5, 0, 1, 1, 0, 0;" : OUT : "l"(da), "l"(db))
#define BY_REGISTERS                                                                              \
  asm volatile(WGMMA "{%4,%5,%6,%7}, %8, 0, 1, 1, 0;" : OUT                                       \
               : "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3]), "l"(db))
#define WAITED asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory")
GROUP(group, FENCE, BY_DESCRIPTOR, WAITED)
GROUP(group_rs, FENCE, BY_REGISTERS, WAITED)
GROUP(group_no_fence, , BY_DESCRIPTOR, WAITED)
GROUP(group_no_wait, FENCE, BY_DESCRIPTOR, )
GROUP(group_overwritten, FENCE, BY_DESCRIPTOR, __syncthreads(); sa[t] = a[0]; WAITED)


// 1024 bytes by one bulk copy; WAIT for all threads, EXPECT bytes
#define BULK(NAME, EXPECT, WAIT)                                                                  \
  __global__ void NAME(const float* x, float* y) {                                                \
    __shared__ __align__(128) float s[256];                                                       \
    __shared__ uint64_t bar;                                                                      \
    int t = threadIdx.x;                                                                          \
    if (t == 0) {                                                                                 \
      BARRIER(&bar, 1);                                                                           \
      FENCE;                                                                                      \
    }                                                                                             \
    __syncthreads();                                                                              \
    if (t == 0) {                                                                                 \
      asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(SHARED(&bar)),       \
                   "r"(EXPECT));                                                                  \
      asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes "           \
                   "[%0], [%1], 1024, [%2];" ::"r"(SHARED(s)), "l"(x), "r"(SHARED(&bar)));        \
    }                                                                                             \
    WAIT;                                                                                         \
    y[t] = s[t] + s[128 + t];                                                                     \
  }
BULK(bulk, 1024, wait(&bar, 0))
BULK(bulk_no_wait, 1024, __syncthreads())
BULK(bulk_too_few_bytes, 1040, wait(&bar, 0))

// two buffers filled by thread 0 and emptied by all; _unordered does not wait until one is empty
#define PIPELINE(NAME, EMPTY)                                                                     \
  __global__ void NAME(const float* x, float* y, int steps) {                                     \
    __shared__ __align__(128) float s[2][128];                                                    \
    __shared__ uint64_t full[2], empty[2];                                                        \
    int t = threadIdx.x;                                                                          \
    if (t == 0) {                                                                                 \
      for (int i = 0; i < 2; ++i) {                                                               \
        BARRIER(full + i, 1);                                                                     \
        BARRIER(empty + i, 128);                                                                  \
      }                                                                                           \
      FENCE;                                                                                      \
    }                                                                                             \
    __syncthreads();                                                                              \
    float sum = 0;                                                                                \
    for (int k = 0; k < steps; ++k) {                                                             \
      int i = k % 2;                                                                              \
      if (t == 0) {                                                                               \
        if (k >= 2) EMPTY;                                                                        \
        asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], 512;" ::"r"(                  \
            SHARED(full + i)));                                                                   \
        asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes "         \
                     "[%0], [%1], 512, [%2];" ::"r"(SHARED(s[i])), "l"(x + k * 128),              \
                     "r"(SHARED(full + i)));                                                      \
      }                                                                                           \
      wait(full + i, k / 2 & 1);                                                                  \
      sum += s[i][127 - t];                                                                       \
      asm volatile("mbarrier.arrive.shared.b64 _, [%0];" ::"r"(SHARED(empty + i)) : "memory");    \
    }                                                                                             \
    y[t] = sum;                                                                                   \
  }
PIPELINE(pipeline, wait(empty + i, (k / 2 - 1) & 1))
PIPELINE(pipeline_unordered, )

struct alignas(64) Map { char bytes[128]; };
// a tile of halves [16, 64] at (x0, y0) in and, to another tensor, out again; FENCED in between
#define TILE(NAME, FENCED)                                                                        \
  __global__ void NAME(const __grid_constant__ Map in, const __grid_constant__ Map out, int x0,   \
                       int y0, __half* raw) {                                                     \
    __shared__ __align__(1024) __half s[16 * 64];                                                 \
    __shared__ uint64_t bar;                                                                      \
    int t = threadIdx.x;                                                                          \
    if (t == 0) {                                                                                 \
      BARRIER(&bar, 1);                                                                           \
      FENCE;                                                                                      \
      asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], 2048;" ::"r"(SHARED(&bar)));    \
      asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes " \
                   "[%0], [%1, {%2, %3}], [%4];" ::"r"(SHARED(s)), "l"(&in), "r"(x0), "r"(y0),    \
                   "r"(SHARED(&bar)));                                                            \
    }                                                                                             \
    __syncthreads();                                                                              \
    wait(&bar, 0);                                                                                \
    for (int i = t; i < 1024; i += 128) {                                                         \
      raw[i] = s[i];                                                                              \
      s[i] = s[i] + __float2half(1);                                                              \
    }                                                                                             \
    FENCED;                                                                                       \
    __syncthreads();                                                                              \
    if (t == 0) {                                                                                 \
      asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%1, %2}], [%3];"  \
                   ::"l"(&out), "r"(0), "r"(0), "r"(SHARED(s)));                                  \
      asm volatile("cp.async.bulk.commit_group;");                                                \
      asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");                                   \
    }                                                                                             \
  }
TILE(tile, FENCE)
TILE(tile_no_fence, )
}
