// Accumulator fragments of a warpgroup in plain memory, row after row.
#pragma once

#include "../common/wgmma.cuh"

namespace lctx::tests {

// `at` is (64, pitch); a thread takes or gives what fragment_row and fragment_column say is its.
template <int N>
__device__ __forceinline__ void load_fragment(float (&d)[N / 2], const float* at, int pitch) {
  const int thread = threadIdx.x % 128;
  at += fragment_row(thread) * pitch + fragment_column(thread);
#pragma unroll
  for (int j = 0; j < N / 8; ++j) {
#pragma unroll
    for (int i = 0; i < 4; ++i) d[4 * j + i] = at[i / 2 * 8 * pitch + 8 * j + i % 2];
  }
}

template <int N>
__device__ __forceinline__ void store_fragment(const float (&d)[N / 2], float* at, int pitch) {
  const int thread = threadIdx.x % 128;
  at += fragment_row(thread) * pitch + fragment_column(thread);
#pragma unroll
  for (int j = 0; j < N / 8; ++j) {
#pragma unroll
    for (int i = 0; i < 4; ++i) at[i / 2 * 8 * pitch + 8 * j + i % 2] = d[4 * j + i];
  }
}

}  // namespace lctx::tests
