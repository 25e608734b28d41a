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

template <class T, int kBlockN, int kWidth>
struct LandmarkGrads : LandmarkScores<T, kBlockN, kWidth> {
  using Base = LandmarkScores<T, kBlockN, kWidth>;
  using Base::kGroupRegisters;
  using Base::kGroups;

  struct Params : Base::Params, DqParams {
    LandmarkVectors vectors;
  };
  struct State : Base::State, DqRows {
    float* out;  // this thread's vector (lam, d or W), at its first row of group 0
    // Of the groups of a tile and the rows.
    float G[kGroups][2], factor[kGroups][2], lam[kGroups][2], inverse[kGroups][2];
  };
  static constexpr bool kLeavesOut = false;

  template <class Kernel>
  static __device__ __forceinline__ void begin(const Kernel& kernel, int warpgroup,
                                               const Work& work, State& state) {
    const auto& p = kernel.p;
    state.load(kernel, warpgroup, work);
    const int thread = warpgroup_thread();
    const int64_t row = work.row0 + warpgroup * 64 + fragment_row(thread);
    const int64_t head = work.batch * int64_t{p.Hq} + work.head;
    const int place = thread % 4;
    float* const vector = place == 0 ? p.vectors.lam : place == 1 ? p.vectors.dsum : p.vectors.w;
    state.out = vector + head * p.vectors.num_groups * p.vectors.pitch + row;
  }

  template <class Kernel>
  static __device__ __forceinline__ void enter(const Kernel&, int, State&) {}

  template <bool kMasked>
  static __device__ __forceinline__ bool is_earlier(int g, int row, const State& state) {
    return !kMasked || (state.earlier >> (2 * g + row) & 1);
  }

  // S -> exp(s - its maximum), own block: P.
  template <bool kMasked, class Kernel>
  static __device__ __forceinline__ uint32_t weigh(const Kernel& kernel, int,
                                                   float (&s)[kBlockN / 2], State& state) {
    const auto& p = kernel.p;
    if (!kMasked && p.padding > 0) Base::mask_padding(p, s);
    float A[kGroups][2];
    Base::take_landmarks(p, s, A);
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
      float base[2], l[2] = {0.f, 0.f};
      Base::template find_base<kMasked>(p, g, s, base);
#pragma unroll
      for (int row = 0; row < 2; ++row) {
        if (!is_earlier<kMasked>(g, row, state)) base[row] = state.lse2[row];
      }
#pragma unroll
      for (int j = 0; j < kGroupRegisters; ++j) {
        const int at = g * kGroupRegisters + j, row = j / 2 % 2;
        s[at] = ptx::exp2_approx(s[at] * p.scale_log2 - base[row]);
        l[row] += s[at];
      }
#pragma unroll
      for (int row = 0; row < 2; ++row) {
        const bool earlier = is_earlier<kMasked>(g, row, state);
        const float sum = quad_sum(l[row]), inverse = __fdividef(1.f, sum);
        const float G = ptx::exp2_anywhere(A[g][row] - state.lse2[row]);
        const float lam = base[row] + __log2f(sum) - A[g][row] + state.lse2[row];
        state.G[g][row] = G;
        state.inverse[g][row] = inverse;
        state.factor[g][row] = earlier ? G * inverse : 1.f;
        state.lam[g][row] = earlier ? lam : state.lse2[row];
      }
    }
    return 0;  // the shuffles of the sums keep the exponentials where they are
  }

  // dP -> dS.
  template <bool kMasked, class Kernel>
  static __device__ __forceinline__ void differentiate(const Kernel& kernel, int n,
                                                       const float (&s)[kBlockN / 2],
                                                       float (&dp)[kBlockN / 2], State& state) {
    const auto& p = kernel.p;
    const bool whole = !kMasked || n < p.whole_tiles;
    const int place = threadIdx.x % 4;
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
      float d[2] = {0.f, 0.f}, w[2];
#pragma unroll
      for (int j = 0; j < kGroupRegisters; ++j) {
        const int at = g * kGroupRegisters + j;
        d[j / 2 % 2] += s[at] * dp[at];
      }
#pragma unroll
      for (int row = 0; row < 2; ++row) {
        const bool earlier = is_earlier<kMasked>(g, row, state);
        const float sum = quad_sum(d[row]) * state.inverse[g][row];
        d[row] = earlier ? sum : state.delta[row];
        w[row] = earlier ? state.G[g][row] * (d[row] - state.delta[row]) : 0.f;
      }
#pragma unroll
      for (int j = 0; j < kGroupRegisters; ++j) {
        const int at = g * kGroupRegisters + j, row = j / 2 % 2;
        const float factor = state.factor[g][row];
        dp[at] = s[at] * (dp[at] * factor - d[row] * factor);
      }
#pragma unroll
      for (int row = 0; row < 2; ++row) {
        float& x = dp[(g + 1) * kGroupRegisters - 3 + 2 * row];
        x = place == 3 ? w[row] : x;
      }
      const int group = whole ? n * kGroups + g : p.whole_blocks + g;
      if (place < 3 && group < p.vectors.num_groups) {
        float* const out = state.out + int64_t{group} * p.vectors.pitch;
#pragma unroll
        for (int row = 0; row < 2; ++row) {
          out[8 * row] = place == 0 ? state.lam[g][row] : place == 1 ? d[row] : w[row];
        }
      }
    }
  }
};

}  // namespace lctx::cuda
