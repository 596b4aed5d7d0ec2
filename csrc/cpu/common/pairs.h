// SPDX-License-Identifier: Apache-2.0
// Panels of bfloat16 pairs, for AVX512-BF16; included after simd.h, rows.h and gemm_tiles.h.
//
// A pair is 32 bits, the first number in the lower half, and lies in memory of floats: it is moved
// and never calculated with as one. Rows are paired along the summed axis, whose last pair holds a
// zero where its length is odd.

// C += A_first * B_first + A_second * B_second, summed in float32.
struct PairProduct {
  VTCLIP_INLINE static VecF spread(const float* a) {
    uint32_t bits;
    __builtin_memcpy(&bits, a, 4);
    const VecU32 wide = bits - VecU32{};
    VecF pairs;
    __builtin_memcpy(&pairs, &wide, sizeof pairs);
    return pairs;
  }
  VTCLIP_INLINE static VecF add(VecF a, VecF b, VecF c) {
    __m512bh left, right;
    __builtin_memcpy(&left, &a, sizeof left);
    __builtin_memcpy(&right, &b, sizeof right);
    return _mm512_dpbf16_ps(c, left, right);
  }
};

static void gemm_pairs(const Gemm<float>& g) { multiply<float, PairProduct>(g); }

// pairs[0 .. width) = numbers 2 i and 2 i + 1 of a row of n, zero behind them.
inline void load_pairs(float* pairs, int64_t n, int64_t width, const char* row, int64_t stride) {
  char* out = reinterpret_cast<char*>(pairs);
  if (stride == 2 && n != 0) {  // a row of no numbers may have no memory, and memcpy takes no null
    __builtin_memcpy(out, row, static_cast<size_t>(2 * n));
  } else {
    for (int64_t i = 0; i < n; ++i) __builtin_memcpy(out + 2 * i, row + i * stride, 2);
  }
  __builtin_memset(out + 2 * n, 0, static_cast<size_t>(4 * width - 2 * n));
}

typedef uint16_t WideBits __attribute__((vector_size(VTCLIP_VECTOR_BYTES)));
constexpr uint16_t kMagnitude = 0x7FFF, kLeastNormal = 0x0080, kInfinity = 0x7F80;
// 2^56: products of two numbers below it, and sums of 2^15 of them, are in range without the scale.
constexpr uint16_t kLarge = (127 + 56) << 7;

// Whether a number of these pairs is subnormal, which the processor's products take for zero, or
// has at least the magnitude of the bits `bound`.
inline bool outside(const float* pairs, int64_t width, uint16_t bound) {
  WideBits found{};
  for (int64_t i = 0; i < width; i += kLanes<float>) {
    WideBits x;
    __builtin_memcpy(&x, pairs + i, sizeof x);
    x &= kMagnitude;
    const auto subnormal = (x != 0) & (x < kLeastNormal);
    found |= static_cast<WideBits>(subnormal | (x >= bound));
  }
  VecU64 words;
  __builtin_memcpy(&words, &found, sizeof words);
  uint64_t any = 0;
  for (int64_t i = 0; i < kLanes<double>; ++i) any |= words[i];
  return any != 0;
}

typedef uint16_t Bits __attribute__((vector_size(VTCLIP_VECTOR_BYTES / 2)));  // of bfloat16

// The pairs (first[i], second[i]).
VTCLIP_INLINE VecF interleave(Bits first, Bits second) {
  const VecU32 low = __builtin_convertvector(first, VecU32);
  const VecU32 high = __builtin_convertvector(second, VecU32);
  const VecU32 both = low | high << 16;
  VecF pairs;
  __builtin_memcpy(&pairs, &both, sizeof pairs);
  return pairs;
}

VTCLIP_INLINE Bits rounded(VecF x) {
  const __m256bh narrow = _mm512_cvtneps_pbh(x);
  Bits bits;
  __builtin_memcpy(&bits, &narrow, sizeof bits);
  return bits;
}

// pairs[i][c] = rows 2 i and 2 i + 1 of n, rounded to bfloat16; columns in whole vectors.
inline void round_to_pairs(float* pairs, const float* rows, int64_t ld, int64_t n, int64_t columns) {
  for (int64_t i = 0; i < n; i += 2, pairs += ld) {
    const float* first = rows + i * ld;
    for (int64_t c = 0; c < columns; c += kLanes<float>) {
      const Bits second = i + 1 < n ? rounded(load(first + ld + c)) : Bits{};
      store(pairs + c, interleave(rounded(load(first + c)), second));
    }
  }
}
