// SPDX-License-Identifier: Apache-2.0
// Run-time choice of the instruction set. VTCLIP_CPU_CAPABILITY=scalar|avx2|avx512 lowers it; it is
// read once per process and never raises it above what the processor has. AVX512-BF16 is AVX-512
// with products of bfloat16 pairs, which one operator has a kernel of its own for.
#pragma once

#include <algorithm>
#include <cstdlib>
#include <cstring>

namespace vtclip::cpu {

#if defined(VTCLIP_PORTABLE)  // the portable kernels alone, which compile in a third of the time
#define VTCLIP_X86 0
#elif defined(__x86_64__) && defined(__GNUC__)
#define VTCLIP_X86 1
#else
#define VTCLIP_X86 0
#endif

#if VTCLIP_X86 && (defined(__clang__) ? __clang_major__ >= 11 : __GNUC__ >= 11)
#define VTCLIP_X86_BF16 1  // the compiler knows AVX512-BF16 by the name that is asked for below
#else
#define VTCLIP_X86_BF16 0
#endif

enum class Capability { kScalar, kAvx2, kAvx512, kAvx512Bf16 };

inline Capability detect_capability() {
  Capability best = Capability::kScalar;
#if VTCLIP_X86
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
      __builtin_cpu_supports("f16c")) {
    best = Capability::kAvx2;
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
      best = Capability::kAvx512;
#if VTCLIP_X86_BF16
      if (__builtin_cpu_supports("avx512bf16")) best = Capability::kAvx512Bf16;
#endif
    }
  }
#endif
  const char* wish = std::getenv("VTCLIP_CPU_CAPABILITY");
  if (wish == nullptr) return best;
  if (std::strcmp(wish, "scalar") == 0) return Capability::kScalar;
  if (std::strcmp(wish, "avx2") == 0) return std::min(best, Capability::kAvx2);
  if (std::strcmp(wish, "avx512") == 0) return std::min(best, Capability::kAvx512);
  return best;
}

inline Capability capability() {
  static const Capability chosen = detect_capability();
  return chosen;
}

inline const char* capability_name() {
  switch (capability()) {
    case Capability::kAvx512Bf16:
      return "avx512_bf16";
    case Capability::kAvx512:
      return "avx512";
    case Capability::kAvx2:
      return "avx2";
    default:
      return "scalar";
  }
}

// Picks one of the three builds of the same kernel.
#if VTCLIP_X86
#define VTCLIP_PICK(function)                                                           \
  (::vtclip::cpu::capability() >= ::vtclip::cpu::Capability::kAvx512 ? avx512::function \
   : ::vtclip::cpu::capability() == ::vtclip::cpu::Capability::kAvx2 ? avx2::function   \
                                                                     : scalar::function)
#else
#define VTCLIP_PICK(function) (scalar::function)
#endif

}  // namespace vtclip::cpu
