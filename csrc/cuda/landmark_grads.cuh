// Math: the gradient of the scores in landmark attention over uniform blocks of a few keys, from
//       G = exp(A - L), A the landmark's score, L the row's log-sum-exp, and of an earlier block's
//       ordinary keys l = logsumexp s, t = exp(s - l), d = sum of t dP:
//         key of the own block      dS = P (dP - delta), P = exp(s - L)
//         key of an earlier block   dS = G t (dP - d);   its landmark  dS = W = G (d - delta)
// Tile map: as landmark_scores.cuh. The statistics of a group are made where its scores are.
// Pipeline: as attn_dq_sm90.cuh. What the gradients of the keys need of a group and a row is
//       written on the way: lam = l - A + L, d and W (own block: L, delta, 0), with which a key's
//       gradient is the dense one: P = exp(s - lam), dS = P (dP - d).
// Memory: 12 bytes a group and row written.
// Limits: as landmark_scores.cuh.
#pragma once

#include "attn_dq_scores.cuh"
#include "landmark_bwd.h"
#include "landmark_scores.cuh"

namespace lctx::cuda {

// kByLandmark: exponentials are taken relative to the landmark's score instead of the group's
// maximum, which is looked for only if they leave the range; needs registers for them.
template <class T, int kBlockN, int kWidth, bool kByLandmark>
struct LandmarkGrads : LandmarkScores<T, kBlockN, kWidth> {
  using Base = LandmarkScores<T, kBlockN, kWidth>;
  using Base::is_second_row;
  using Base::kGroupRegisters;
  using Base::kGroups;
  static constexpr bool kLeavesOut = false;
  static constexpr float kLeastSum = 1e-20f, kMostSum = 1e30f;

  struct Params : Base::Params, DqParams {
    LandmarkVectors vectors;
  };
  struct State : Base::State, DqRows {
    float *lam, *dsum, *w;  // the vectors at this thread's first row of group 0
  };

  template <class Kernel>
  static __device__ __forceinline__ void begin(const Kernel& kernel, int warpgroup,
                                               const Work& work, State& state) {
    state.load(kernel, warpgroup, work);
    const LandmarkVectors& vectors = kernel.p.vectors;
    const int thread = warpgroup_thread();
    const int row = work.row0 + warpgroup * 64 + fragment_row(thread) + thread % 2 * 8;
    const int64_t head = work.batch * int64_t{kernel.p.Hq} + work.head;
    const int64_t at = head * vectors.num_groups * vectors.pitch + row;
    state.lam = vectors.lam + at;
    state.dsum = vectors.dsum + at;
    state.w = vectors.w + at;
  }

  template <class Kernel>
  static __device__ __forceinline__ void enter(const Kernel&, int, State&) {}

  // Of the two values the one of this thread's row.
  static __device__ __forceinline__ float own(float first, float second) {
    return is_second_row() ? second : first;
  }
  // Both rows' sums, complete for this thread's row.
  static __device__ __forceinline__ float sum_own(const float (&x)[2]) {
    const float half = own(x[0], x[1]) + __shfl_xor_sync(~0u, own(x[1], x[0]), 1);
    return half + __shfl_xor_sync(~0u, half, 2);
  }

  // Exponentials of a group relative to `base`, and their sums.
  template <class P>
  static __device__ __forceinline__ void exponentials(const P& p, int g, const float (&base)[2],
                                                      const float (&s)[kBlockN / 2],
                                                      float (&e)[kGroupRegisters], float& l) {
    float sum[2] = {0.f, 0.f};
#pragma unroll
    for (int j = 0; j < kGroupRegisters; ++j) {
      const int row = j / 2 % 2;
      e[j] = ptx::exp2_approx(s[g * kGroupRegisters + j] * p.scale_log2 - base[row]);
      sum[row] += e[j];
    }
    l = sum_own(sum);
  }

  // dP -> dS.
  template <bool kMasked, class Kernel>
  static __device__ __forceinline__ void differentiate(const Kernel& kernel, int n,
                                                       float (&s)[kBlockN / 2],
                                                       float (&dp)[kBlockN / 2], State& state) {
    const auto& p = kernel.p;
    if (!kMasked && p.padding > 0) Base::mask_padding(p, s);
    float A[kGroups][2];
    Base::take_landmarks(p, s, A);
    const bool whole = !kMasked || n < p.whole_tiles;
    const int place = threadIdx.x % 4;
    const float lse2 = own(state.lse2[0], state.lse2[1]);
    const float delta = own(state.delta[0], state.delta[1]);
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
      const bool earlier = !kMasked || (state.earlier >> (2 * g + (is_second_row() ? 1 : 0)) & 1);
      float base[2], e[kGroupRegisters], l;
      if constexpr (kByLandmark && !kMasked) {
        base[0] = A[g][0];
        base[1] = A[g][1];
        exponentials(p, g, base, s, e, l);
        if (__any_sync(~0u, !(l > kLeastSum && l < kMostSum))) {
          Base::template find_base<kMasked>(p, g, s, base);
          exponentials(p, g, base, s, e, l);
        }
      } else {
        Base::template find_base<kMasked>(p, g, s, base);
#pragma unroll
        for (int row = 0; kMasked && row < 2; ++row) {
          if (!(state.earlier >> (2 * g + row) & 1)) base[row] = state.lse2[row];
        }
        exponentials(p, g, base, s, e, l);
      }
      float sum[2] = {0.f, 0.f};
#pragma unroll
      for (int j = 0; j < kGroupRegisters; ++j) {
        sum[j / 2 % 2] += e[j] * dp[g * kGroupRegisters + j];
      }
      // Of this thread's row alone.
      const float score = own(A[g][0], A[g][1]);
      const float G = ptx::exp2_anywhere(score - lse2), inverse = __fdividef(1.f, l);
      const float past = sum_own(sum) * inverse, d = earlier ? past : delta;
      const float w = earlier ? G * (d - delta) : 0.f;
      const float lam = own(base[0], base[1]) + __log2f(l) - score + lse2;
      const float factor = earlier ? G * inverse : 1.f;
      float factors[2], shifts[2], ws[2];
      Base::both_rows(factor, factors);
      Base::both_rows(factor * d, shifts);
      Base::both_rows(w, ws);
#pragma unroll
      for (int j = 0; j < kGroupRegisters; ++j) {
        float& x = dp[g * kGroupRegisters + j];
        x = e[j] * (x * factors[j / 2 % 2] - shifts[j / 2 % 2]);
      }
#pragma unroll
      for (int row = 0; row < 2; ++row) {
        float& x = dp[(g + 1) * kGroupRegisters - 3 + 2 * row];
        x = place == 3 ? ws[row] : x;
      }
      const int group = whole ? n * kGroups + g : p.whole_blocks + g;
      if (group < p.vectors.num_groups) {
        const int64_t at = int64_t{group} * p.vectors.pitch;
        if (place < 2) {
          state.lam[at] = earlier ? lam : lse2;
          state.w[at] = w;
        } else {
          state.dsum[at] = d;
        }
      }
    }
  }
};

}  // namespace lctx::cuda
