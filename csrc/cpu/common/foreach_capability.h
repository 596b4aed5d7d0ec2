// SPDX-License-Identifier: Apache-2.0
// Compiles the file named by VTCLIP_KERNEL once per instruction set, each time inside
// vtclip::cpu::{scalar, avx2, avx512}, with the standard and shared headers that kernels need. No
// include guard: one inclusion per kernel file.
//
// Code compiled here must not instantiate standard templates: the linker keeps one copy of an
// instantiation for the whole process, and it could be the one with instructions this machine
// lacks.

#include <torch/headeronly/util/Half.h>

#include "capability.h"
#include "common/ceil_div.h"
#include "common/dtype.h"
#include "gemm.h"
#include "scratch.h"
#if VTCLIP_X86
#include <immintrin.h>
#endif

// name(args, begin, end) of one instruction set: function<double> where args.dtype_of_args is
// float64, else function<float>.
#define VTCLIP_BY_DTYPE(name, function, Args, dtype_of_args) \
  void name(const Args& args, int64_t begin, int64_t end) {  \
    if (args.dtype_of_args == ::vtclip::Dtype::kFloat64) {   \
      function<double>(args, begin, end);                    \
    } else {                                                 \
      function<float>(args, begin, end);                     \
    }                                                        \
  }

#define VTCLIP_LEVEL 0
#define VTCLIP_VECTOR_BYTES 16
namespace vtclip::cpu::scalar {
#include VTCLIP_KERNEL
}  // namespace vtclip::cpu::scalar
#undef VTCLIP_LEVEL
#undef VTCLIP_VECTOR_BYTES

#if VTCLIP_X86

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif
#define VTCLIP_LEVEL 2
#define VTCLIP_VECTOR_BYTES 32
namespace vtclip::cpu::avx2 {
#include VTCLIP_KERNEL
}  // namespace vtclip::cpu::avx2
#undef VTCLIP_LEVEL
#undef VTCLIP_VECTOR_BYTES
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#if defined(__clang__)
#pragma clang attribute push(                                                    \
    __attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl"))), \
    apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl")
#endif
#define VTCLIP_LEVEL 512
#define VTCLIP_VECTOR_BYTES 64
namespace vtclip::cpu::avx512 {
#include VTCLIP_KERNEL
}  // namespace vtclip::cpu::avx512
#undef VTCLIP_LEVEL
#undef VTCLIP_VECTOR_BYTES
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#endif  // VTCLIP_X86
