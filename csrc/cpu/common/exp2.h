// SPDX-License-Identifier: Apache-2.0
// 2^x for vectors; included once per instruction set, after simd.h.
//
// x = n + f with n the nearest integer, so f is in [-1/2, 1/2] and exact; 2^f is a polynomial and
// n is added to the exponent bits. Adding `shift` puts n into the low mantissa bits of the sum.
// Results below the smallest normal number are 0; NaN stays NaN. Arguments above the exponent range
// give something large (callers pass x <= 0 up to rounding). AVX-512 rounds and scales in single
// instructions, with the same bits.

// Minimax for (2^f - 1) / f on [-1/2, 1/2], times f, plus 1: relative error 2e-9 before rounding.
VTCLIP_INLINE VecF exp2_fraction(VecF f) {
  VecF p = fma(splat(1.53533620e-4f), f, splat(1.33988739e-3f));
  p = fma(p, f, splat(9.61843692e-3f));
  p = fma(p, f, splat(5.55033237e-2f));
  p = fma(p, f, splat(2.40226477e-1f));
  p = fma(p, f, splat(6.93147182e-1f));
  return fma(p, f, splat(1.0f));
}

#if VTCLIP_LEVEL == 512
VTCLIP_INLINE VecF exp2(VecF x) {
  constexpr auto all = static_cast<__mmask16>(-1);
  const VecF n = _mm512_maskz_roundscale_ps(all, x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __mmask16 kept = _mm512_cmp_ps_mask(x, splat(-126.0f), _CMP_NLT_UQ);
  return _mm512_maskz_scalef_ps(kept, exp2_fraction(x - n), n);
}
#else
VTCLIP_INLINE VecF exp2(VecF x) {
  const VecF clamped = min(splat(127.0f), max(splat(-126.0f), x));
  const VecF shift = splat(12582912.0f);  // 1.5 * 2^23
  const VecF shifted = clamped + shift;
  const VecF p = exp2_fraction(clamped - (shifted - shift));
  const VecU32 bits = (VecU32)p + ((VecU32)shifted << 23);
  const VecU32 below = (VecU32)(x < splat(-126.0f));
  const VecU32 nan = (VecU32)(x != x);
  return (VecF)((bits & ~below & ~nan) | ((VecU32)x & nan));
}
#endif

VTCLIP_INLINE VecD exp2(VecD x) {
  const VecD clamped = min(splat(1023.0), max(splat(-1022.0), x));
  const VecD shift = splat(6755399441055744.0);  // 1.5 * 2^52
  const VecD shifted = clamped + shift;
  const VecD t = (clamped - (shifted - shift)) * splat(0.693147180559945309417);
  // Taylor series of e^t, |t| <= 0.347: the first term left out is below 4e-18.
  VecD p = splat(1.0 / 6227020800.0);
  p = fma(p, t, splat(1.0 / 479001600.0));
  p = fma(p, t, splat(1.0 / 39916800.0));
  p = fma(p, t, splat(1.0 / 3628800.0));
  p = fma(p, t, splat(1.0 / 362880.0));
  p = fma(p, t, splat(1.0 / 40320.0));
  p = fma(p, t, splat(1.0 / 5040.0));
  p = fma(p, t, splat(1.0 / 720.0));
  p = fma(p, t, splat(1.0 / 120.0));
  p = fma(p, t, splat(1.0 / 24.0));
  p = fma(p, t, splat(1.0 / 6.0));
  p = fma(p, t, splat(0.5));
  p = fma(p, t, splat(1.0));
  p = fma(p, t, splat(1.0));
  const VecU64 bits = (VecU64)p + ((VecU64)shifted << 52);
  const VecU64 below = (VecU64)(x < splat(-1022.0));
  const VecU64 nan = (VecU64)(x != x);
  return (VecD)((bits & ~below & ~nan) | ((VecU64)x & nan));
}
