// Math: from the scores of 64 queries and the 64 keys of a warpgroup to P, and with dP to dS;
//       names as in landmark_grads.cuh. P = G t; G d = sum of P dP, dS = P (dP - d), and of the
//       landmark W = G d - G delta.
// Tile map: 64 / kWidth groups of columns, as in landmark_scores.cuh.
// Pipeline: nothing of a row but its sums crosses threads, so that all four of a row do its
//       arithmetic: a shuffle waits while products read shared memory.
// Memory: none.
// Limits: as landmark_fused.cuh.
#pragma once

#include "landmark_grads.cuh"

namespace lctx::cuda {

template <class T, int kWidth>
struct LandmarkWeights {
  static constexpr int kGroups = 64 / kWidth, kGroupRegisters = kWidth / 2;
  static constexpr float kLeastSum = 1e-20f, kMostSum = 1e30f, kLeastG = 1e-30f;

  // What is known of the groups before dP.
  struct Groups {
    uint32_t earlier;     // bit 2 g + row: the row sees group g by its landmark
    float A[kGroups][2];  // score of the landmark
    float l[kGroups][2];  // sum of exponentials, at first this thread's share
    float G[kGroups][2];
  };
  static __device__ __forceinline__ void sum_over_row(float (&x)[2]) {
#pragma unroll
    for (int step = 1; step < 4; step *= 2) {
#pragma unroll
      for (int row = 0; row < 2; ++row) x[row] += __shfl_xor_sync(~0u, x[row], step);
    }
  }

  // S of group g relative to `base`.
  static __device__ __forceinline__ void scale(float scale_log2, int g, const float (&base)[2],
                                               float (&s)[32]) {
#pragma unroll
    for (int j = 0; j < kGroupRegisters; ++j) {
      float& x = s[g * kGroupRegisters + j];
      x = x * scale_log2 - base[j / 2 % 2];
    }
  }
  // Registers kBegin .. kEnd -> exponentials, whose sums are begun or continued.
  template <int kBegin, int kEnd>
  static __device__ __forceinline__ void exponentials(float (&s)[32], Groups& groups) {
#pragma unroll
    for (int j = kBegin; j < kEnd; ++j) {
      float& l = groups.l[j / kGroupRegisters][j / 2 % 2];
      s[j] = ptx::exp2_approx(s[j]);
      l = j % kGroupRegisters / 4 == 0 && j % 2 == 0 ? s[j] : l + s[j];
    }
  }
  // 0, known only when all exponentials are there.
  static __device__ __forceinline__ uint32_t zero_behind(const Groups& groups) {
    uint32_t all = ~0u;
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
      all &= __float_as_uint(groups.l[g][0]) & __float_as_uint(groups.l[g][1]);
    }
    return all == ~0u ? 1 : 0;  // that is no sum
  }
  static __device__ __forceinline__ bool is_earlier(const float (&lse2)[2], const Groups& groups,
                                                    int g, int row) {
    return (groups.earlier >> (2 * g + row) & 1) != 0 && lse2[row] < INFINITY;
  }
  static __device__ __forceinline__ bool out_of_range(const float (&lse2)[2],
                                                      const Groups& groups) {
    bool out = false;
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
#pragma unroll
      for (int row = 0; row < 2; ++row) {
        const float l = groups.l[g][row];
        out |= is_earlier(lse2, groups, g, row) && !(l > kLeastSum && l < kMostSum);
      }
    }
    return __any_sync(~0u, out);
  }
  // Exponentials -> P.
  static __device__ __forceinline__ void weigh_groups(const float (&lse2)[2], float (&s)[32],
                                                      Groups& groups) {
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
      float factors[2];
#pragma unroll
      for (int row = 0; row < 2; ++row) {
        const bool earlier = is_earlier(lse2, groups, g, row);
        groups.G[g][row] = ptx::exp2_anywhere(groups.A[g][row] - lse2[row]);
        factors[row] = earlier ? __fdividef(groups.G[g][row], groups.l[g][row]) : 1.f;
      }
#pragma unroll
      for (int j = 0; j < kGroupRegisters; ++j) {
        s[g * kGroupRegisters + j] *= factors[j / 2 % 2];
      }
    }
  }
  // P and dP -> dS, packed.
  static __device__ __forceinline__ void differentiate(const float (&lse2)[2],
                                                       const float (&delta)[2],
                                                       const float (&weights)[32], float (&dp)[32],
                                                       const Groups& groups, uint32_t (&ds)[4][4]) {
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
      float sums[2][2] = {};
#pragma unroll
      for (int j = 0; j < kGroupRegisters; ++j) {
        const int at = g * kGroupRegisters + j;
        sums[j / 2 % 2][j % 2] += weights[at] * dp[at];
      }
      float sum[2] = {sums[0][0] + sums[0][1], sums[1][0] + sums[1][1]};  // G d
      sum_over_row(sum);
      float d[2], w[2];
#pragma unroll
      for (int row = 0; row < 2; ++row) {
        const bool earlier = is_earlier(lse2, groups, g, row);
        const float G = groups.G[g][row];
        // Weights below are nothing, whatever d.
        const float past = G > kLeastG ? __fdividef(sum[row], G) : 0.f;
        d[row] = earlier ? past : delta[row];
        w[row] = earlier ? sum[row] - G * delta[row] : 0.f;
      }
#pragma unroll
      for (int j = 0; j < kGroupRegisters; ++j) {
        const int at = g * kGroupRegisters + j;
        dp[at] = weights[at] * (dp[at] - d[j / 2 % 2]);
      }
#pragma unroll
      for (int row = 0; row < 2; ++row) {
        float& x = dp[(g + 1) * kGroupRegisters - 3 + 2 * row];
        x = threadIdx.x % 4 == 3 ? w[row] : x;
      }
    }
    accumulator_to_a<T, 64>(dp, ds);
  }
};

}  // namespace lctx::cuda
