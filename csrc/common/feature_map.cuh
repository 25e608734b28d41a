// The feature map of the compressive memory, elu(x) + 1, on pairs of 16-bit elements.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "ptx_words.cuh"

namespace lctx {

template <class T>
__device__ __forceinline__ float2 unpack2(uint32_t x);
template <>
__device__ __forceinline__ float2 unpack2<__nv_bfloat16>(uint32_t x) {
  return {__uint_as_float(x << 16), __uint_as_float(x & 0xffff0000u)};
}
template <>
__device__ __forceinline__ float2 unpack2<__half>(uint32_t x) {
  __half2 h;
  memcpy(&h, &x, sizeof h);
  return __half22float2(h);
}

// A NaN stays one.
__device__ __forceinline__ float elu_plus_one(float x) {
  return x > 0.f ? x + 1.f : ptx::exp2_anywhere(x * 1.4426950408889634f);
}

// e.x = x.x + 1 where x.x > 0, and so for y. Both comparisons at once, on the pair that x comes
// from.
template <class T>
__device__ __forceinline__ void add_one_where_positive(uint32_t pair, const float2& x, float2& e);
template <>
__device__ __forceinline__ void add_one_where_positive<__nv_bfloat16>(uint32_t pair,
                                                                      const float2& x, float2& e) {
  asm(
      "{\n"
      ".reg .pred p, q;\n"
      "setp.gt.bf16x2 p|q, %4, %5;\n"
      "@p add.f32 %0, %2, 0f3f800000;\n"
      "@q add.f32 %1, %3, 0f3f800000;\n"
      "}\n"
      : "+f"(e.x), "+f"(e.y)
      : "f"(x.x), "f"(x.y), "r"(pair), "r"(0));
}
template <>
__device__ __forceinline__ void add_one_where_positive<__half>(uint32_t pair, const float2& x,
                                                               float2& e) {
  asm(
      "{\n"
      ".reg .pred p, q;\n"
      "setp.gt.f16x2 p|q, %4, %5;\n"
      "@p add.f32 %0, %2, 0f3f800000;\n"
      "@q add.f32 %1, %3, 0f3f800000;\n"
      "}\n"
      : "+f"(e.x), "+f"(e.y)
      : "f"(x.x), "f"(x.y), "r"(pair), "r"(0));
}

// A NaN stays one.
template <class T>
__device__ __forceinline__ float2 elu_plus_one2(uint32_t x) {
  constexpr float kLog2e = 1.4426950408889634f;
  const float2 in = unpack2<T>(x);
  float2 power{ptx::exp2_anywhere(in.x * kLog2e), ptx::exp2_anywhere(in.y * kLog2e)};
  add_one_where_positive<T>(x, in, power);
  return power;
}

// The same where it is written: above the wait for a product that runs under it.
template <class T>
__device__ __forceinline__ float2 elu_plus_one2_here(uint32_t x) {
  constexpr float kLog2e = 1.4426950408889634f;
  const float2 in = unpack2<T>(x);
  float2 power{ptx::exp2_approx(in.x * kLog2e), ptx::exp2_approx(in.y * kLog2e)};
  add_one_where_positive<T>(x, in, power);
  return power;
}

}  // namespace lctx
