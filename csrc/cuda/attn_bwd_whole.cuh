// Math: that of attn_bwd_sm90.cuh, fused, for D <= 64.
// Tile map: the same, 128 queries at a time. Products of 128 columns read shared memory three
//       quarters as often as those of 64, which leave its other readers no time.
// Pipeline: S^T and dP^T of a block are issued together. dQ is computed in its own step: the
//       warpgroups meet when dS^T is shared, then dV, dQ and dK run, and dQ is added under dK.
//       Most of the exponentials wait for dP^T with the arithmetic that follows: they keep the
//       other units busy, which an order that forces them under dP^T does not (10 % slower).
// Memory: that of attn_bwd_sm90.cuh. A thread loads the statistics of 4 of 128 queries and has the
//       others by shuffles: there are no registers for 32.
// Limits: those of attn_bwd_sm90.cuh; not for the statistics of groups.
#pragma once

#include "../common/ptx_words.cuh"
#include "attn_bwd_load.cuh"

namespace lctx::cuda {

template <class Kernel>
struct WholeBlocks {
  using Traits = typename Kernel::Traits;
  using T = typename Kernel::T;
  using QueryState = typename Kernel::QueryState;
  static constexpr int kBlockM = Kernel::kBlockM, kBlockN = Kernel::kBlockN;
  static constexpr int kHeadDim = Kernel::kHeadDim;
  static constexpr int kMeeting = 1;  // named barrier of both warpgroups
  static_assert(kBlockM == 128 && kHeadDim == 64 && !Traits::kGroups);

  const Kernel& kernel;
  const int warpgroup;

  // S^T (keys and queries) or dP^T (values and dO).
  __device__ __forceinline__ void issue_scores(int keys, int queries, const QueryState& state,
                                               float (&d)[64]) const {
    wgmma_fence();
    gemm_nt<T, kBlockM, kHeadDim>(d, kernel.smem + keys + warpgroup * chunk_bytes(64), kBlockN,
                                  kernel.query_tile(queries, state, 0), kBlockM);
    wgmma_commit();
  }
  // d += weights * (the rows of Q or dO at `offset`)
  __device__ __forceinline__ void issue_sum(int offset, const QueryState& state,
                                            const uint32_t (&weights)[8][4], float (&d)[32],
                                            bool started) const {
    wgmma_fence();
    gemm_rn<T, kHeadDim, kBlockM>(d, weights, kernel.query_tile(offset, state, 0), kBlockM,
                                  started);
    wgmma_commit();
  }

  // lse2 or delta: lane 4 i + c has queries 8 i + 2 c + {0, 1}, and those 64 behind.
  struct Statistics {
    float2 x[2];
  };
  __device__ __forceinline__ Statistics load(int offset, const QueryState& state) const {
    const uint32_t lane = threadIdx.x % 32;
    const uint32_t from = kernel.smem + offset + state.stage() * kBlockM * 4 + lane * 8;
    return {ptx::load_shared_float2(from), ptx::load_shared_float2(from + 256)};
  }
  // Of the two neighbouring queries of this thread in column group j.
  static __device__ __forceinline__ float2 of_columns(const Statistics& statistics, int j) {
    const int lane = static_cast<int>(threadIdx.x % 4) + j % 8 * 4;
    return make_float2(__shfl_sync(~0u, statistics.x[j / 8].x, lane),
                       __shfl_sync(~0u, statistics.x[j / 8].y, lane));
  }

  // `first`: the first query, from the origin.
  __device__ __forceinline__ void mask(int first, float (&s)[64]) const {
    const int thread = warpgroup_thread();
    const uint32_t seen = kernel.smem + Traits::kSeen + (warpgroup * 64 + fragment_row(thread)) * 8;
    first += fragment_column(thread);
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      const int2 range = ptx::load_shared_int2(seen + row * 64);
      mask_columns<kBlockM>(s, row, range.x - first, range.y - first);
    }
  }
  // S^T -> P^T.
  __device__ __forceinline__ void weigh(const Statistics& lse2, float (&s)[64]) const {
#pragma unroll
    for (int j = 0; j < 16; ++j) {
      const float2 l = of_columns(lse2, j);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float& x = s[4 * j + i];
        x = ptx::exp2_approx(x * kernel.p.scale_log2 - (i % 2 == 0 ? l.x : l.y));
      }
    }
  }
  // P^T and dP^T -> dS^T.
  static __device__ __forceinline__ void weigh_gradient(const Statistics& delta,
                                                        const float (&s)[64], float (&dp)[64]) {
#pragma unroll
    for (int j = 0; j < 16; ++j) {
      const float2 d = of_columns(delta, j);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        dp[4 * j + i] = s[4 * j + i] * (dp[4 * j + i] - (i % 2 == 0 ? d.x : d.y));
      }
    }
  }
  __device__ __forceinline__ void share_ds(uint32_t buffer, const uint32_t (&ds)[8][4]) const {
    const FragmentAddress<kBlockN> address(kernel.smem + Traits::kDs + buffer * Traits::kDsBytes,
                                           warpgroup * 64, warpgroup_thread());
#pragma unroll
    for (int t = 0; t < 8; ++t) {
      ptx::stmatrix_x4(address(t), ds[t][0], ds[t][1], ds[t][2], ds[t][3]);
    }
  }

  __device__ __forceinline__ void run(const typename Kernel::Turn& turn, QueryState& state,
                                      float (&dk)[32], float (&dv)[32]) const {
    int m = turn.first;
    bool started = false;
    float s[64], dp[64], dq[32];
    for (int left = turn.steps; left > 0; --left) {
      uint32_t weights[8][4], ds[8][4];
      kernel.q_pipe.wait(state);
      issue_scores(Traits::kK, Traits::kQ, state, s);
      const Statistics lse2 = load(Traits::kLse2, state);
      kernel.dout_pipe.wait(state);
      issue_scores(Traits::kV, Traits::kDout, state, dp);
      float* to = kernel.dq_of(warpgroup, ptx::load_shared_4(kernel.aside(warpgroup) + 12));
      const bool masked = kernel.needs_mask(warpgroup, m);
      wgmma_wait<1>();
      if (masked) mask(m * kBlockM, s);
      m = kernel.next_block(warpgroup, m);
      weigh(lse2, s);
      const Statistics delta = load(Traits::kDelta, state);
      wgmma_wait<0>();
      weigh_gradient(delta, s, dp);
      accumulator_to_a<T, kBlockM>(s, weights);
      accumulator_to_a<T, kBlockM>(dp, ds);
      // Two buffers: whoever has met the other in the step before is through with the one before.
      share_ds(state.stage(), ds);
      issue_sum(Traits::kDout, state, weights, dv, started);
      ptx::fence_async_proxy();
      ptx::named_barrier_sync(kMeeting, 256);
      kernel.issue_dq(warpgroup, state.stage(), dq);
      wgmma_wait<1>();
      kernel.dout_pipe.release(state);
      issue_sum(Traits::kQ, state, ds, dk, started);
      wgmma_wait<1>();
      kernel.add_dq(to, dq);
      started = true;
      wgmma_wait<0>();
      kernel.q_pipe.release(state);
      state.advance();
    }
  }
};

}  // namespace lctx::cuda
