// SPDX-License-Identifier: Apache-2.0
// Compiles the file named by VTCLIP_KERNEL for AVX512-BF16 alone, inside vtclip::cpu::avx512_bf16:
// kernels that multiply pairs of bfloat16. To nothing where the compiler knows no such
// instructions. The rules are those of foreach_capability.h.

#include <torch/headeronly/util/Half.h>

#include "capability.h"
#include "common/ceil_div.h"
#include "common/dtype.h"
#include "gemm.h"
#include "scratch.h"

#if VTCLIP_X86_BF16
#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(                                                               \
    __attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16"))), \
    apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")
#endif
#define VTCLIP_LEVEL 512
#define VTCLIP_VECTOR_BYTES 64
namespace vtclip::cpu::avx512_bf16 {
#include VTCLIP_KERNEL
}  // namespace vtclip::cpu::avx512_bf16
#undef VTCLIP_LEVEL
#undef VTCLIP_VECTOR_BYTES
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#endif  // VTCLIP_X86_BF16
