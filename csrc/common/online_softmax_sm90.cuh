// Online softmax on the accumulator fragments of a 64-row warpgroup: a thread holds two rows (8
// apart) and a quarter of their columns.
#pragma once

#include "ptx.cuh"

namespace lctx {

constexpr float kEmptyRowMax = -1e30f;  // finite: exp2 of a difference never sees inf - inf

// Maximum over the four threads that share a row.
__device__ __forceinline__ float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(~0u, x, 1));
  return fmaxf(x, __shfl_xor_sync(~0u, x, 2));
}
__device__ __forceinline__ float quad_sum(float x) {
  x += __shfl_xor_sync(~0u, x, 1);
  return x + __shfl_xor_sync(~0u, x, 2);
}

// Among the four threads of a row: x[j] of thread i becomes x[i] of thread j.
__device__ __forceinline__ void quad_transpose(uint32_t (&x)[4]) {
#pragma unroll
  for (int step = 1; step <= 2; step *= 2) {
    const bool upper = threadIdx.x & step;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      if (j & step) continue;
      const uint32_t got = __shfl_xor_sync(~0u, upper ? x[j] : x[j + step], step);
      x[j] = upper ? got : x[j];
      x[j + step] = upper ? x[j + step] : got;
    }
  }
}

// m: running maximum of the raw scores; l: this thread's share of the running sum.
struct RowState {
  float m[2] = {kEmptyRowMax, kEmptyRowMax};
  float l[2] = {0.f, 0.f};

  // Scores -> weights relative to the new maximum. Returns in alpha the factor on what was
  // accumulated before. Calls between(zero) when alpha and the weights of the first kFirst / 8 of
  // the columns are known; zero is 0, and known only when some of them are.
  template <int N, int kFirst, class Between>
  __device__ __forceinline__ void update(float (&s)[N / 2], float scale_log2, float (&alpha)[2],
                                         Between&& between) {
    float top[2] = {m[0], m[1]}, base[2], sum[2] = {0.f, 0.f};
#pragma unroll
    for (int j = 0; j < N / 8; ++j) {
#pragma unroll
      for (int row = 0; row < 2; ++row) {
        top[row] = fmaxf(top[row], fmaxf(s[4 * j + 2 * row], s[4 * j + 2 * row + 1]));
      }
    }
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      top[row] = quad_max(top[row]);
      alpha[row] = ptx::exp2_approx((m[row] - top[row]) * scale_log2);
      m[row] = top[row];
      base[row] = top[row] * scale_log2;
    }
#pragma unroll
    for (int j = 0; j < N / 8; ++j) {
      if (j == kFirst * N / 64) between(uint32_t{s[N / 16] > 1e30f});
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float& x = s[4 * j + i];
        x = ptx::exp2_approx(x * scale_log2 - base[i / 2]);
        sum[i / 2] += x;
      }
    }
#pragma unroll
    for (int row = 0; row < 2; ++row) l[row] = l[row] * alpha[row] + sum[row];
  }
  template <int N>
  __device__ __forceinline__ void update(float (&s)[N / 2], float scale_log2, float (&alpha)[2]) {
    update<N, 0>(s, scale_log2, alpha, [](uint32_t) {});
  }

  // 0, known only when all weights are: what uses it cannot be moved above the exponentials.
  __device__ __forceinline__ uint32_t settled() const { return l[0] < 0.f || l[1] < 0.f; }

  // Completes the sums: returns 1 / l (0 for a row without keys) and the natural log-sum-exp.
  __device__ __forceinline__ void finish(float scale_log2, float (&inverse)[2], float (&lse)[2]) {
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      const float sum = quad_sum(l[row]);
      const bool empty = sum == 0.f;
      inverse[row] = empty ? 0.f : 1.f / sum;
      lse[row] = empty ? -INFINITY : (m[row] * scale_log2 + log2f(sum)) * 0.69314718055994530942f;
    }
  }
};

}  // namespace lctx
