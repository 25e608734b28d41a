// Math: the gradient of the scores in dense attention:
//         P_ij = exp2(scale_log2 s_ij - lse2_i), dS_ij = P_ij (dP_ij - delta_i)
//       lse2: the row's log-sum-exp times log2 e, +inf for a row without keys; delta_i = dO_i . O_i
//       - dlse_i.
// Tile map: as attn_fwd_scores.cuh.
// Pipeline: the two numbers of a row are read while the tile before ends.
// Memory: lse2 and delta once, fp32 (B, Hq, stat_pitch).
// Limits: as attn_fwd_scores.cuh.
#pragma once

#include "attn_fwd_scores.cuh"

namespace lctx::cuda {

struct DqParams {
  CUtensorMap dout[2];
  const float *lse2, *delta;
  int stat_pitch;
  float scale;
};

// The two rows of a thread.
struct DqRows {
  float lse2[2], delta[2];

  template <class Kernel>
  __device__ __forceinline__ void load(const Kernel& kernel, int warpgroup, const Work& work) {
    const auto& p = kernel.p;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int row = work.row0 + warpgroup * 64 + fragment_row(warpgroup_thread()) + 8 * i;
      const bool inside = row >= work.row_begin && row < work.row_end;
      const int64_t at = (static_cast<int64_t>(work.batch) * p.Hq + work.head) * p.stat_pitch +
                         kernel.position(work, inside ? row : work.row_begin);
      lse2[i] = inside ? p.lse2[at] : INFINITY;
      delta[i] = inside ? p.delta[at] : 0.f;
    }
  }
};

// S and dP -> dS from the rows' (lse2, delta).
template <int kBlockN, class P>
__device__ __forceinline__ void differentiate_scores(const P& p, const float (&s)[kBlockN / 2],
                                                     float (&dp)[kBlockN / 2],
                                                     const float (&lse2)[2],
                                                     const float (&delta)[2]) {
#pragma unroll
  for (int j = 0; j < kBlockN / 2; ++j) {
    const float w = ptx::exp2_approx(s[j] * p.scale_log2 - lse2[j / 2 % 2]);
    dp[j] = w * (dp[j] - delta[j / 2 % 2]);
  }
}

template <int kBlockN, bool kWindowed = true>
struct DenseGrads : DenseScores<kBlockN, kWindowed> {
  using Params = DqParams;
  using State = DqRows;
  // Whether some rows of a tile may see keys to the right of the first that others see.
  static constexpr bool kLeavesOut = kWindowed;

  template <class Kernel>
  static __device__ __forceinline__ void begin(const Kernel& kernel, int warpgroup,
                                               const Work& work, State& state) {
    state.load(kernel, warpgroup, work);
  }

  // Before the products of block n.
  template <class Kernel>
  static __device__ __forceinline__ void enter(const Kernel&, int, State&) {}

  template <class P>
  static __device__ __forceinline__ void mask(const P& p, const Work& work, int position0, int n,
                                              float (&s)[kBlockN / 2], State&) {
    RowState unused;
    DenseScores<kBlockN, kWindowed>::mask(p, work, position0, n, s, unused);
  }

  // dP -> dS of block n.
  template <bool kMasked, class Kernel>
  static __device__ __forceinline__ void differentiate(const Kernel& kernel, int,
                                                       float (&s)[kBlockN / 2],
                                                       float (&dp)[kBlockN / 2],
                                                       const State& state) {
    differentiate_scores<kBlockN>(kernel.p, s, dp, state.lse2, state.delta);
  }
};

}  // namespace lctx::cuda
