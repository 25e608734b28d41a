// Vectors, exp and row conversion for one instruction set.
//
// This header is compiled once per instruction set, each time in its own namespace (LCTX_ISA =
// base, avx2, avx512), so it must not pull in inline functions of the standard library: the linker
// could keep the AVX-512 copy for everyone. Vectors are GCC/Clang vector extensions; only the
// 16-bit conversions use intrinsics.
#pragma once

#include <cstdint>

#include "../params.h"
#if defined(__AVX2__)
#include <immintrin.h>
#endif

#define LCTX_INLINE inline __attribute__((always_inline))

namespace lctx::cpu::LCTX_ISA {

#if defined(__AVX512F__)
constexpr int kVecBytes = 64;
constexpr int kMicroRows = 6, kMicroVecs = 4;  // 24 of 32 registers accumulate
#elif defined(__AVX2__)
constexpr int kVecBytes = 32;
constexpr int kMicroRows = 6, kMicroVecs = 2;  // 12 of 16
#else
constexpr int kVecBytes = 16;
constexpr int kMicroRows = 4, kMicroVecs = 2;
#endif

template <class C>
struct VecTraits;
template <>
struct VecTraits<float> {
  using Int = int32_t;
  typedef float Vec __attribute__((vector_size(kVecBytes)));
  typedef int32_t IVec __attribute__((vector_size(kVecBytes)));
};
template <>
struct VecTraits<double> {
  using Int = int64_t;
  typedef double Vec __attribute__((vector_size(kVecBytes)));
  typedef int64_t IVec __attribute__((vector_size(kVecBytes)));
};
template <class C>
using Vec = typename VecTraits<C>::Vec;
template <class C>
using IVec = typename VecTraits<C>::IVec;
template <class C>
constexpr int kLanes = kVecBytes / static_cast<int>(sizeof(C));

template <class T>
constexpr T min_of(T a, T b) {
  return a < b ? a : b;
}
template <class T>
constexpr T max_of(T a, T b) {
  return a > b ? a : b;
}
constexpr int64_t round_up(int64_t x, int64_t to) { return (x + to - 1) / to * to; }

// All scratch is aligned to, and padded to a multiple of, one vector.
template <class C>
LCTX_INLINE Vec<C> load(const C* p) {
  return *reinterpret_cast<const Vec<C>*>(p);
}
template <class C>
LCTX_INLINE void store(C* p, Vec<C> x) {
  *reinterpret_cast<Vec<C>*>(p) = x;
}
template <class C>
LCTX_INLINE Vec<C> splat(C x) {
  return x - Vec<C>{};  // x - 0 is exact, and keeps -0
}
template <class C>
LCTX_INLINE Vec<C> vmax(Vec<C> a, Vec<C> b) {
  return a > b ? a : b;
}

constexpr double kLog2e = 1.4426950408889634074;
template <class C>
constexpr C kNegInf = -__builtin_inf();

// e^x = 2^n e^f with n = round(x log2 e), f = x - n ln 2 in two steps (Cody and Waite), so that the
// relative error stays below one rounding however large |x| is. Results below the smallest normal
// number are 0; NaN stays NaN. e^f = 1 + f p(f), p the Chebyshev interpolant of (e^f - 1) / f:
// relative error 5.0e-9 (float), 1.0e-19 (double).
LCTX_INLINE Vec<float> expv(Vec<float> x) {
  const Vec<float> low = splat(-88.0f);
  x = x < low ? low : x;
  // Adding 1.5 * 2^23 rounds to an integer, which then stands in the low bits of the mantissa.
  const Vec<float> shifted = x * static_cast<float>(kLog2e) + 12582912.0f;
  const Vec<float> n = shifted - 12582912.0f;
  const Vec<float> f = (x - n * 0.693359375f) - n * -2.12194440e-4f;
  const IVec<float> exponent = ((IVec<float>)shifted - (0x4B400000 - 127)) << 23;
  Vec<float> p = f * 0.0013933685863f + 0.0083691843823f;
  p = p * f + 0.041666464602f;
  p = p * f + 0.16666504937f;
  p = p * f + 0.50000000135f;
  p = p * f + 1.0000000108f;
  p = p * f + 1.0f;
  return p * (Vec<float>)exponent;
}

LCTX_INLINE Vec<double> expv(Vec<double> x) {
  const Vec<double> low = splat(-709.1);
  x = x < low ? low : x;
  const Vec<double> shifted = x * kLog2e + 6755399441055744.0;  // 1.5 * 2^52
  const Vec<double> n = shifted - 6755399441055744.0;
  const Vec<double> f = (x - n * 0x1.62e42fee00000p-1) - n * 1.9082149292705877000e-10;
  const IVec<double> exponent = ((IVec<double>)shifted - (0x4338000000000000 - 1023)) << 52;
  constexpr double kCoeffs[] = {
      2.5110095611886237174e-8,   2.7557263189476207401e-7, 2.7557240761739259262e-6,
      0.000024801587336526003723, 0.0001984126989019370597, 0.0013888888888879042534,
      0.0083333333333195455608,   0.041666666666666676814,  0.16666666666666680877,
      0.49999999999999999998,     0.99999999999999999976,   1.0};
  Vec<double> p = splat(2.0918170876658782641e-9);
#pragma GCC unroll 12
  for (int i = 0; i < 12; ++i) p = p * f + kCoeffs[i];
  return p * (Vec<double>)exponent;
}

// ---- 16-bit storage ----

LCTX_INLINE float bf16_to_float(uint16_t x) {
  return __builtin_bit_cast(float, static_cast<uint32_t>(x) << 16);
}

LCTX_INLINE uint16_t float_to_bf16(float x) {
  const uint32_t bits = __builtin_bit_cast(uint32_t, x);
  if ((bits & 0x7fffffffu) > 0x7f800000u)
    return static_cast<uint16_t>((bits >> 16) | 0x40);  // quiet NaN
  return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >>
                               16);  // nearest, ties to even
}

LCTX_INLINE float half_to_float(uint16_t x) {
#if defined(__F16C__)
  return _cvtsh_ss(x);
#else
  // Shift exponent and mantissa into place, then let a multiplication by 2^112 rescale (denormals
  // included).
  const uint32_t magnitude = static_cast<uint32_t>(x & 0x7fffu) << 13;
  float value = __builtin_bit_cast(float, magnitude) * 0x1p112f;
  if (value >= 0x1p16f) value = __builtin_bit_cast(float, magnitude | 0x7f800000u);  // inf and NaN
  return __builtin_bit_cast(
      float, __builtin_bit_cast(uint32_t, value) | static_cast<uint32_t>(x & 0x8000u) << 16);
#endif
}

LCTX_INLINE uint16_t float_to_half(float x) {
#if defined(__F16C__)
  return static_cast<uint16_t>(_cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT));
#else
  const uint32_t bits = __builtin_bit_cast(uint32_t, x);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00u);   // NaN
  if (magnitude >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);  // rounds to infinity
  if (magnitude < 0x38800000u) {  // denormal: adding 1/2 aligns the mantissa and rounds it
    const float shifted = __builtin_bit_cast(float, magnitude) + 0.5f;
    return static_cast<uint16_t>(sign | (__builtin_bit_cast(uint32_t, shifted) - 0x3f000000u));
  }
  const uint32_t rounded = magnitude + 0xfffu + ((magnitude >> 13) & 1);
  return static_cast<uint16_t>(sign | ((rounded - 0x38000000u) >> 13));
#endif
}

// Reads n stored values into C, times `factor`, and zero-fills up to `padded`.
template <class C>
void load_row(DType dtype, const void* src, int64_t n, int64_t padded, C factor, C* dst) {
  switch (dtype) {
    case DType::kFloat32:
      for (int64_t i = 0; i < n; ++i)
        dst[i] = static_cast<C>(static_cast<const float*>(src)[i]) * factor;
      break;
    case DType::kFloat64:
      for (int64_t i = 0; i < n; ++i)
        dst[i] = static_cast<C>(static_cast<const double*>(src)[i]) * factor;
      break;
    case DType::kBFloat16:
      for (int64_t i = 0; i < n; ++i)
        dst[i] = static_cast<C>(bf16_to_float(static_cast<const uint16_t*>(src)[i])) * factor;
      break;
    case DType::kFloat16:
      for (int64_t i = 0; i < n; ++i)
        dst[i] = static_cast<C>(half_to_float(static_cast<const uint16_t*>(src)[i])) * factor;
      break;
  }
  for (int64_t i = n; i < padded; ++i) dst[i] = C(0);
}

template <class C>
LCTX_INLINE C load_one(DType dtype, const void* src, int64_t i) {
  switch (dtype) {
    case DType::kFloat32:
      return static_cast<C>(static_cast<const float*>(src)[i]);
    case DType::kFloat64:
      return static_cast<C>(static_cast<const double*>(src)[i]);
    case DType::kBFloat16:
      return static_cast<C>(bf16_to_float(static_cast<const uint16_t*>(src)[i]));
    case DType::kFloat16:
      return static_cast<C>(half_to_float(static_cast<const uint16_t*>(src)[i]));
  }
  return C(0);
}

// Dot product of two stored rows, in eight running sums.
template <class C>
C row_dot(DType dtype, const void* a, const void* b, int64_t n) {
  C sums[8] = {};
  for (int64_t i = 0; i < n; ++i)
    sums[i & 7] += load_one<C>(dtype, a, i) * load_one<C>(dtype, b, i);
  return ((sums[0] + sums[1]) + (sums[2] + sums[3])) + ((sums[4] + sums[5]) + (sums[6] + sums[7]));
}

// Writes n values times `factor` in the storage type.
template <class C>
void store_row(DType dtype, const C* src, int64_t n, C factor, void* dst) {
  switch (dtype) {
    case DType::kFloat32:
      for (int64_t i = 0; i < n; ++i)
        static_cast<float*>(dst)[i] = static_cast<float>(src[i] * factor);
      break;
    case DType::kFloat64:
      for (int64_t i = 0; i < n; ++i)
        static_cast<double*>(dst)[i] = static_cast<double>(src[i] * factor);
      break;
    case DType::kBFloat16:
      for (int64_t i = 0; i < n; ++i)
        static_cast<uint16_t*>(dst)[i] = float_to_bf16(static_cast<float>(src[i] * factor));
      break;
    case DType::kFloat16:
      for (int64_t i = 0; i < n; ++i)
        static_cast<uint16_t*>(dst)[i] = float_to_half(static_cast<float>(src[i] * factor));
      break;
  }
}

}  // namespace lctx::cpu::LCTX_ISA
