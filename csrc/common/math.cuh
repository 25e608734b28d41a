// Small arithmetic for host and device.
#pragma once

#include <cstdint>

namespace lctx {

constexpr __host__ __device__ int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Division of non-negative 32-bit integers by a divisor known at launch: one multiplication.
struct FastDivisor {
  int divisor = 1;
  uint32_t multiplier = 0, shift = 0;  // quotient = (mulhi(n, multiplier) + n) >> shift

  FastDivisor() = default;
  explicit FastDivisor(int d) : divisor(d) {
    while ((int64_t{1} << shift) < d) ++shift;
    multiplier =
        static_cast<uint32_t>(((uint64_t{1} << 32) * ((uint64_t{1} << shift) - d)) / d + 1);
  }
#if defined(__CUDACC__)
  __device__ __forceinline__ int divide(int n) const {
    return static_cast<int>((__umulhi(n, multiplier) + static_cast<uint32_t>(n)) >> shift);
  }
  __device__ __forceinline__ int modulo(int n) const { return n - divide(n) * divisor; }
#endif
};

constexpr __host__ __device__ int next_power_of_two(int64_t x) {
  int power = 1;
  while (power < x) power *= 2;
  return power;
}

// Sum over `lanes` neighbouring threads (a power of two up to 32, aligned in the warp); every one
// of them gets it.
template <class C>
__device__ __forceinline__ C sum_over_lanes(C x, int lanes) {
  const unsigned thread = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
  const unsigned group = (lanes == 32 ? ~0u : (1u << lanes) - 1) << (thread % 32 & -lanes);
  for (int step = lanes / 2; step > 0; step /= 2) x += __shfl_xor_sync(group, x, step);
  return x;
}

}  // namespace lctx
