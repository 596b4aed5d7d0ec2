// SPDX-License-Identifier: Apache-2.0
// Rows between tensor memory (any dtype, any stride, any alignment) and packed panels of T.
// Included once per instruction set, after simd.h. Strides are in bytes.

VTCLIP_INLINE float half_to_float(const char* p) {
  uint16_t bits;
  __builtin_memcpy(&bits, p, 2);
#if VTCLIP_LEVEL >= 2
  return _cvtsh_ss(bits);
#else
  return static_cast<float>(torch::headeronly::Half(bits, torch::headeronly::Half::from_bits()));
#endif
}

VTCLIP_INLINE void float_to_half(char* p, float x) {
#if VTCLIP_LEVEL >= 2
  const uint16_t bits = _cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT);
#else
  const uint16_t bits = torch::headeronly::Half(x).x;
#endif
  __builtin_memcpy(p, &bits, 2);
}

VTCLIP_INLINE float bfloat16_to_float(const char* p) {
  uint16_t half;
  __builtin_memcpy(&half, p, 2);
  const uint32_t bits = static_cast<uint32_t>(half) << 16;
  float x;
  __builtin_memcpy(&x, &bits, 4);
  return x;
}

// Round to nearest even; NaN becomes the quiet NaN.
VTCLIP_INLINE void float_to_bfloat16(char* p, float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, 4);
  const uint32_t rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
  const uint16_t half = x != x ? uint16_t{0x7FC0} : static_cast<uint16_t>(rounded);
  __builtin_memcpy(p, &half, 2);
}

template <class T>
VTCLIP_INLINE T load_one(const char* p, Dtype dtype) {
  switch (dtype) {
    case Dtype::kFloat64: {
      double x;
      __builtin_memcpy(&x, p, 8);
      return static_cast<T>(x);
    }
    case Dtype::kFloat16:
      return static_cast<T>(half_to_float(p));
    case Dtype::kBFloat16:
      return static_cast<T>(bfloat16_to_float(p));
    default: {
      float x;
      __builtin_memcpy(&x, p, 4);
      return static_cast<T>(x);
    }
  }
}

template <class T>
VTCLIP_INLINE void store_one(char* p, Dtype dtype, T x) {
  switch (dtype) {
    case Dtype::kFloat64: {
      const double wide = static_cast<double>(x);
      __builtin_memcpy(p, &wide, 8);
      return;
    }
    case Dtype::kFloat16:
      return float_to_half(p, static_cast<float>(x));
    case Dtype::kBFloat16:
      return float_to_bfloat16(p, static_cast<float>(x));
    default: {
      const float narrow = static_cast<float>(x);
      __builtin_memcpy(p, &narrow, 4);
      return;
    }
  }
}

template <class T>
VTCLIP_INLINE constexpr bool is_native(Dtype dtype) {
  return dtype == (sizeof(T) == 8 ? Dtype::kFloat64 : Dtype::kFloat32);
}

// Of a tensor, which has no memory where an axis is 0: memset takes no null even for no bytes.
VTCLIP_INLINE void zero_bytes(char* p, int64_t bytes) {
  if (bytes != 0) __builtin_memset(p, 0, static_cast<size_t>(bytes));
}

// dst[0..n) = scale * src row; dst[n..width) = 0.
template <class T>
inline void load_row(T* dst, int64_t n, int64_t width, const char* src, int64_t stride, Dtype dtype,
                     T scale) {
  int64_t i = 0;
  if (is_native<T>(dtype) && stride == static_cast<int64_t>(sizeof(T))) {
    const T* row = reinterpret_cast<const T*>(src);
    const Vec<T> factor = splat(scale);
    for (; i + kLanes<T> <= n; i += kLanes<T>) store(dst + i, load(row + i) * factor);
    for (; i < n; ++i) dst[i] = load_one<T>(src + i * stride, dtype) * scale;
  } else if (dtype == Dtype::kBFloat16 && stride == 2) {
    for (; i < n; ++i) dst[i] = static_cast<T>(bfloat16_to_float(src + i * 2)) * scale;
  } else if (dtype == Dtype::kFloat16 && stride == 2) {
#if VTCLIP_LEVEL >= 2
    if (sizeof(T) == 4) {
      for (; i + 8 <= n; i += 8) {
        __m128i halves;
        __builtin_memcpy(&halves, src + i * 2, 16);
        const __m256 wide = _mm256_cvtph_ps(halves) * _mm256_set1_ps(static_cast<float>(scale));
        __builtin_memcpy(dst + i, &wide, 32);
      }
    }
#endif
    for (; i < n; ++i) dst[i] = static_cast<T>(half_to_float(src + i * 2)) * scale;
  } else {
    for (; i < n; ++i) dst[i] = load_one<T>(src + i * stride, dtype) * scale;
  }
  for (; i < width; ++i) dst[i] = 0;
}

// The row itself where it already is a plain row of T, else a converted copy in `scratch`.
template <class T>
inline const T* view_row(T* scratch, int64_t n, const char* src, int64_t stride, Dtype dtype) {
  const bool aligned = reinterpret_cast<uintptr_t>(src) % sizeof(T) == 0;
  if (is_native<T>(dtype) && aligned && (stride == static_cast<int64_t>(sizeof(T)) || n <= 1)) {
    return reinterpret_cast<const T*>(src);
  }
  load_row<T>(scratch, n, n, src, stride, dtype, T{1});
  return scratch;
}

// Destination row = scale * src[0..n), stored densely.
template <class T>
inline void store_row(char* dst, int64_t n, Dtype dtype, const T* src, T scale) {
  int64_t i = 0;
  if (is_native<T>(dtype)) {
    T* row = reinterpret_cast<T*>(dst);
    const Vec<T> factor = splat(scale);
    for (; i + kLanes<T> <= n; i += kLanes<T>) store(row + i, load(src + i) * factor);
    for (; i < n; ++i) row[i] = src[i] * scale;
  } else if (dtype == Dtype::kBFloat16) {
    for (; i < n; ++i) float_to_bfloat16(dst + i * 2, static_cast<float>(src[i] * scale));
  } else if (dtype == Dtype::kFloat16) {
#if VTCLIP_LEVEL >= 2
    if (sizeof(T) == 4) {
      for (; i + 8 <= n; i += 8) {
        __m256 wide;
        __builtin_memcpy(&wide, src + i, 32);
        wide = wide * _mm256_set1_ps(static_cast<float>(scale));
        const __m128i halves = _mm256_cvtps_ph(wide, _MM_FROUND_TO_NEAREST_INT);
        __builtin_memcpy(dst + i * 2, &halves, 16);
      }
    }
#endif
    for (; i < n; ++i) float_to_half(dst + i * 2, static_cast<float>(src[i] * scale));
  } else {
    const int64_t bytes = item_bytes(dtype);
    for (; i < n; ++i) store_one<T>(dst + i * bytes, dtype, src[i] * scale);
  }
}

#if VTCLIP_LEVEL >= 2
// 8 x 8 floats through registers.
VTCLIP_INLINE void transpose_8x8(float* dst, int64_t ldd, const float* src, int64_t lds) {
  __m256 r[8], s[8];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) r[i] = _mm256_loadu_ps(src + i * lds);
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    s[2 * i] = _mm256_unpacklo_ps(r[2 * i], r[2 * i + 1]);
    s[2 * i + 1] = _mm256_unpackhi_ps(r[2 * i], r[2 * i + 1]);
  }
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) {
    r[4 * i + 0] = _mm256_shuffle_ps(s[4 * i], s[4 * i + 2], 0x44);
    r[4 * i + 1] = _mm256_shuffle_ps(s[4 * i], s[4 * i + 2], 0xEE);
    r[4 * i + 2] = _mm256_shuffle_ps(s[4 * i + 1], s[4 * i + 3], 0x44);
    r[4 * i + 3] = _mm256_shuffle_ps(s[4 * i + 1], s[4 * i + 3], 0xEE);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    _mm256_storeu_ps(dst + i * ldd, _mm256_permute2f128_ps(r[i], r[i + 4], 0x20));
    _mm256_storeu_ps(dst + (i + 4) * ldd, _mm256_permute2f128_ps(r[i], r[i + 4], 0x31));
  }
}
#endif

// dst[c][r] = src[r][c] for r < rows, c < cols.
template <class T>
inline void transpose(T* dst, int64_t ldd, const T* src, int64_t lds, int64_t rows, int64_t cols) {
  int64_t r = 0;
#if VTCLIP_LEVEL >= 2
  if constexpr (sizeof(T) == 4) {
    for (; r + 8 <= rows; r += 8) {
      int64_t c = 0;
      for (; c + 8 <= cols; c += 8) transpose_8x8(dst + c * ldd + r, ldd, src + r * lds + c, lds);
      for (; c < cols; ++c) {
        for (int64_t i = r; i < r + 8; ++i) dst[c * ldd + i] = src[i * lds + c];
      }
    }
  }
#endif
  for (; r < rows; ++r) {
    for (int64_t c = 0; c < cols; ++c) dst[c * ldd + r] = src[r * lds + c];
  }
}

// Sum of a[i] * b[i]; four running sums, then the tail.
template <class T>
inline T dot_rows(const T* a, const T* b, int64_t n) {
  Vec<T> sums[4] = {};
  int64_t i = 0;
  for (; i + 4 * kLanes<T> <= n; i += 4 * kLanes<T>) {
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      sums[j] = fma(load(a + i + j * kLanes<T>), load(b + i + j * kLanes<T>), sums[j]);
    }
  }
  for (; i + kLanes<T> <= n; i += kLanes<T>) sums[0] = fma(load(a + i), load(b + i), sums[0]);
  T total = sum_lanes<T>((sums[0] + sums[1]) + (sums[2] + sums[3]));
  for (; i < n; ++i) total += a[i] * b[i];
  return total;
}
