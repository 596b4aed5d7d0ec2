// SPDX-License-Identifier: Apache-2.0
// Vectors of VTCLIP_VECTOR_BYTES. Included once per instruction set, so it has no guard.
// Arithmetic is the compiler's vector extension; only what it cannot express uses intrinsics.

typedef float VecF __attribute__((vector_size(VTCLIP_VECTOR_BYTES)));
typedef double VecD __attribute__((vector_size(VTCLIP_VECTOR_BYTES)));
typedef uint32_t VecU32 __attribute__((vector_size(VTCLIP_VECTOR_BYTES)));
typedef uint64_t VecU64 __attribute__((vector_size(VTCLIP_VECTOR_BYTES)));

template <class T>
struct VecTraits;
template <>
struct VecTraits<float> {
  using Vec = VecF;
};
template <>
struct VecTraits<double> {
  using Vec = VecD;
};
template <class T>
using Vec = typename VecTraits<T>::Vec;

template <class T>
constexpr int64_t kLanes = VTCLIP_VECTOR_BYTES / static_cast<int64_t>(sizeof(T));

#define VTCLIP_INLINE inline __attribute__((always_inline))

template <class T>
VTCLIP_INLINE Vec<T> load(const T* p) {
  Vec<T> v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}

template <class T>
VTCLIP_INLINE void store(T* p, Vec<T> v) {
  __builtin_memcpy(p, &v, sizeof v);
}

template <class T>
VTCLIP_INLINE Vec<T> splat(T x) {
  return x - Vec<T>{};
}

// max(a, b) is b where either is NaN. (AVX-512: the full-mask forms, because the plain ones read an
// undefined register in the headers of GCC 12, which then warns.)
#if VTCLIP_LEVEL == 512
VTCLIP_INLINE VecF fma(VecF a, VecF b, VecF c) { return _mm512_fmadd_ps(a, b, c); }
VTCLIP_INLINE VecD fma(VecD a, VecD b, VecD c) { return _mm512_fmadd_pd(a, b, c); }
VTCLIP_INLINE VecF max(VecF a, VecF b) {
  return _mm512_maskz_max_ps(static_cast<__mmask16>(-1), a, b);
}
VTCLIP_INLINE VecD max(VecD a, VecD b) {
  return _mm512_maskz_max_pd(static_cast<__mmask8>(-1), a, b);
}
VTCLIP_INLINE VecF min(VecF a, VecF b) {
  return _mm512_maskz_min_ps(static_cast<__mmask16>(-1), a, b);
}
VTCLIP_INLINE VecD min(VecD a, VecD b) {
  return _mm512_maskz_min_pd(static_cast<__mmask8>(-1), a, b);
}
#elif VTCLIP_LEVEL == 2
VTCLIP_INLINE VecF fma(VecF a, VecF b, VecF c) { return _mm256_fmadd_ps(a, b, c); }
VTCLIP_INLINE VecD fma(VecD a, VecD b, VecD c) { return _mm256_fmadd_pd(a, b, c); }
VTCLIP_INLINE VecF max(VecF a, VecF b) { return _mm256_max_ps(a, b); }
VTCLIP_INLINE VecD max(VecD a, VecD b) { return _mm256_max_pd(a, b); }
VTCLIP_INLINE VecF min(VecF a, VecF b) { return _mm256_min_ps(a, b); }
VTCLIP_INLINE VecD min(VecD a, VecD b) { return _mm256_min_pd(a, b); }
#else
template <class V>
VTCLIP_INLINE V fma(V a, V b, V c) {
  return a * b + c;
}
template <class V>
VTCLIP_INLINE V max(V a, V b) {
  return a > b ? a : b;
}
template <class V>
VTCLIP_INLINE V min(V a, V b) {
  return a < b ? a : b;
}
#endif

template <class T>
VTCLIP_INLINE T sum_lanes(Vec<T> v) {
  T total = 0;
  for (int64_t i = 0; i < kLanes<T>; ++i) total += v[i];
  return total;
}

template <class T>
VTCLIP_INLINE T max_lanes(Vec<T> v) {
  T best = v[0];
  for (int64_t i = 1; i < kLanes<T>; ++i) best = v[i] > best ? v[i] : best;
  return best;
}

VTCLIP_INLINE int64_t round_up(int64_t x, int64_t unit) { return (x + unit - 1) / unit * unit; }
VTCLIP_INLINE int64_t min_of(int64_t a, int64_t b) { return a < b ? a : b; }
VTCLIP_INLINE int64_t max_of(int64_t a, int64_t b) { return a > b ? a : b; }

// Leading dimension for at least n elements: an odd number of cache lines, so that a walk down a
// column does not fall into a few cache sets.
template <class T>
VTCLIP_INLINE int64_t leading_dim(int64_t n) {
  constexpr int64_t line = 64 / static_cast<int64_t>(sizeof(T));
  const int64_t lines = (n + line - 1) / line;
  return (lines | 1) * line;
}

// Scratch memory of one thread, aligned to a cache line.
template <class T>
class Scratch {
 public:
  explicit Scratch(int64_t count)
      : data_(static_cast<T*>(scratch_alloc(max_of(count, 1) * static_cast<int64_t>(sizeof(T))))) {}
  ~Scratch() { scratch_free(data_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  operator T*() const { return data_; }

 private:
  T* data_;
};
