// Small arithmetic for host and device.
#pragma once

#include <cstdint>

namespace lctx {

constexpr __host__ __device__ int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

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
