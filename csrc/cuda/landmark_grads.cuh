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
  };

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

  // Sums over the ordinary keys of a group, complete in all four threads of a row. s: exponentials.
  template <class P>
  static __device__ __forceinline__ void sum_group(const P& p, int g, const float (&base)[2],
                                                   float (&s)[kBlockN / 2],
                                                   const float (&dp)[kBlockN / 2], float (&l)[2],
                                                   float (&d)[2]) {
    l[0] = l[1] = d[0] = d[1] = 0.f;
#pragma unroll
    for (int j = 0; j < kGroupRegisters; ++j) {
      const int at = g * kGroupRegisters + j, row = j / 2 % 2;
      s[at] = ptx::exp2_approx(s[at] * p.scale_log2 - base[row]);
      l[row] += s[at];
      d[row] += s[at] * dp[at];
    }
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      l[row] = quad_sum(l[row]);
      d[row] = quad_sum(d[row]);
    }
  }

  // dP -> dS. Returns 0.
  template <bool kMasked, class Kernel>
  static __device__ __forceinline__ uint32_t differentiate(const Kernel& kernel, int n,
                                                           float (&s)[kBlockN / 2],
                                                           float (&dp)[kBlockN / 2], State& state) {
    const auto& p = kernel.p;
    if (!kMasked && p.padding > 0) Base::mask_padding(p, s);
    float A[kGroups][2];
    Base::take_landmarks(p, s, A);
    const bool whole = !kMasked || n < p.whole_tiles;
    const int place = threadIdx.x % 4;
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
      float base[2], l[2], d[2], factor[2], w[2], lam[2];
      Base::template find_base<kMasked>(p, g, s, base);
      bool earlier[2];
#pragma unroll
      for (int row = 0; row < 2; ++row) {
        earlier[row] = !kMasked || (state.earlier >> (2 * g + row) & 1);
        if (!earlier[row]) base[row] = state.lse2[row];
      }
      sum_group(p, g, base, s, dp, l, d);
#pragma unroll
      for (int row = 0; row < 2; ++row) {
        const float G = ptx::exp2_anywhere(A[g][row] - state.lse2[row]);
        const float inverse = __fdividef(1.f, l[row]);
        factor[row] = earlier[row] ? G * inverse : 1.f;
        d[row] = earlier[row] ? d[row] * inverse : state.delta[row];
        w[row] = earlier[row] ? G * (d[row] - state.delta[row]) : 0.f;
        lam[row] = earlier[row] ? base[row] + __log2f(l[row]) - A[g][row] + state.lse2[row]
                                : state.lse2[row];
      }
#pragma unroll
      for (int j = 0; j < kGroupRegisters; ++j) {
        const int at = g * kGroupRegisters + j, row = j / 2 % 2;
        dp[at] = s[at] * (dp[at] * factor[row] - d[row] * factor[row]);
      }
#pragma unroll
      for (int row = 0; row < 2; ++row) {
        float& x = dp[(g + 1) * kGroupRegisters - 3 + 2 * row];
        x = place == 3 ? w[row] : x;
      }
      const int group = whole ? n * kGroups + g : p.whole_blocks + g;
      if (place < 3 && group < p.vectors.num_groups) {
        float* const out = state.out + group * p.vectors.pitch;
#pragma unroll
        for (int row = 0; row < 2; ++row) {
          out[8 * row] = place == 0 ? lam[row] : place == 1 ? d[row] : w[row];
        }
      }
    }
    return 0;  // the shuffles of the sums keep the exponentials where they are
  }
};

}  // namespace lctx::cuda
