// Math: that of attn_bwd_sm90.cuh, fused, for D 65 to 128.
// Tile map: the same, 80 queries at a time. Of a product of 64 columns the tensor cores read as
// much
//       shared memory as there is time for; of one of 80 they read 10 % less. dQ is computed
//       transposed, since a product has 64 rows: a warpgroup has 64 of its columns.
// Pipeline: S^T and dP^T of a block are issued together. dQ is computed in its own step: the
//       warpgroups meet when dS is shared, then dV, dQ and dK run, and dQ goes its way under dK.
//       Where the exponentials go is left to the compiler: most of them wait for dP^T with the
//       arithmetic that follows, which is faster than all of them under dP^T.
// Memory: that of attn_bwd_sm90.cuh; but dQ leaves by bulk additions from shared memory, a warp's
// 16
//       columns by themselves, so that no other warp has to be waited for. Half of lse2 is loaded
//       when the scores are there: there are registers for half of it.
// Limits: those of attn_bwd_sm90.cuh; not for the statistics of groups.
#pragma once

#include "../common/ptx_words.cuh"
#include "attn_bwd_load.cuh"

namespace lctx::cuda {

template <class Kernel>
struct TallBlocks {
  using Traits = typename Kernel::Traits;
  using T = typename Kernel::T;
  using QueryState = typename Kernel::QueryState;
  static constexpr int kBlockM = Kernel::kBlockM, kBlockN = Kernel::kBlockN;
  static constexpr int kHeadDim = Kernel::kHeadDim;
  static constexpr int kMeeting = 1;          // named barrier of both warpgroups
  static constexpr int kPairs = kBlockM / 8;  // of neighbouring queries, of a thread
  static_assert(kBlockM == kTallRows && kHeadDim == 128 && !Traits::kGroups);
  using Scores = float[kBlockM / 2];
  using Operand = uint32_t[kBlockM / 16][4];

  const Kernel& kernel;
  const int warpgroup;

  // S^T (keys and queries) or dP^T (values and dO).
  __device__ __forceinline__ void issue_scores(int keys, int queries, const QueryState& state,
                                               Scores& d) const {
    wgmma_fence();
    gemm_nt<T, kBlockM, kHeadDim>(d, kernel.smem + keys + warpgroup * chunk_bytes(64), kBlockN,
                                  kernel.query_tile(queries, state, 0), kBlockM);
    wgmma_commit();
  }
  // d += weights * (the rows of Q or dO at `offset`)
  __device__ __forceinline__ void issue_sum(int offset, const QueryState& state,
                                            const Operand& weights,
                                            float (&d)[kHeadDim / 2]) const {
    wgmma_fence();
    gemm_rn<T, kHeadDim, kBlockM>(d, weights, kernel.query_tile(offset, state, 0), kBlockM, true);
    wgmma_commit();
  }
  __device__ __forceinline__ uint32_t ds_tile(const QueryState& state) const {
    return kernel.smem + Traits::kDs + state.stage() * Traits::kDsBytes;
  }
  // 64 rows of dQ^T = K^T dS^T.
  __device__ __forceinline__ void issue_dq(const QueryState& state, Scores& dq) const {
    const uint32_t keys =
        ptx::opaque(static_cast<int>(kernel.smem + Traits::kK + warpgroup * chunk_bytes(kBlockN)));
    wgmma_fence();
    gemm_ss<T, kBlockM, kBlockN, kMajorMN, kMajorK>(dq, keys, kBlockN, ds_tile(state), kBlockM,
                                                    false);
    wgmma_commit();
  }

  // `first`: the first query, from the origin.
  __device__ __forceinline__ void mask(int first, Scores& s) const {
    const int thread = warpgroup_thread();
    const uint32_t seen = kernel.smem + Traits::kSeen + (warpgroup * 64 + fragment_row(thread)) * 8;
    first += fragment_column(thread);
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      const int2 range = ptx::load_shared_int2(seen + row * 64);
      mask_columns<kBlockM>(s, row, range.x - first, range.y - first);
    }
  }
  // lse2 or delta of pairs kFrom .. kTo - 1 of this thread's queries.
  template <int kFrom, int kTo>
  __device__ __forceinline__ void load(int offset, const QueryState& state,
                                       float2 (&x)[kPairs]) const {
    const uint32_t from = kernel.smem + offset + state.stage() * kBlockM * 4 +
                          fragment_column(static_cast<int>(threadIdx.x % 128)) * 4;
#pragma unroll
    for (int j = kFrom; j < kTo; ++j) x[j] = ptx::load_shared_float2(from + 32 * j);
  }
  // S^T -> P^T.
  __device__ __forceinline__ void weigh(const float2 (&lse2)[kPairs], Scores& s) const {
#pragma unroll
    for (int j = 0; j < kPairs; ++j) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float& x = s[4 * j + i];
        x = ptx::exp2_approx(x * kernel.p.scale_log2 - (i % 2 == 0 ? lse2[j].x : lse2[j].y));
      }
    }
  }
  // P^T and dP^T -> dS^T.
  static __device__ __forceinline__ void weigh_gradient(const float2 (&delta)[kPairs],
                                                        const Scores& s, Scores& dp) {
#pragma unroll
    for (int j = 0; j < kPairs; ++j) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        dp[4 * j + i] = s[4 * j + i] * (dp[4 * j + i] - (i % 2 == 0 ? delta[j].x : delta[j].y));
      }
    }
  }
  // dS^T, transposed: rows are queries.
  __device__ __forceinline__ void share_ds(const QueryState& state, const Operand& ds) const {
    const uint32_t thread = static_cast<uint32_t>(warpgroup_thread());
    const uint32_t row = thread % 8 + thread / 16 % 2 * 8;
    const uint32_t unit = thread / 32 * 2 + thread / 8 % 2;
    const uint32_t at = ds_tile(state) + warpgroup * chunk_bytes(kBlockM) + row * kChunkRowBytes +
                        ((unit ^ thread % 8) << 4);
#pragma unroll
    for (int t = 0; t < kBlockM / 16; ++t) {
      ptx::stmatrix_x4_trans(at + t * 16 * kChunkRowBytes, ds[t][0], ds[t][1], ds[t][2], ds[t][3]);
    }
  }
  // To the part of dq_sum that belongs to this warp of the block that the step is of.
  __device__ __forceinline__ void add_dq(const Scores& dq, int block) const {
    const int thread = warpgroup_thread(), warp = warpgroup * 4 + thread / 32;
    const uint32_t at = kernel.smem + Traits::kDq + warp * kTallWarpFloats * 4;
    ptx::tma_store_wait_read<0>();
    __syncwarp();
#pragma unroll
    for (int j = 0; j < kPairs; ++j) {
      ptx::store_shared_16(
          at + thread % 32 * 16 + j * 512,
          make_uint4(__float_as_uint(dq[4 * j]), __float_as_uint(dq[4 * j + 1]),
                     __float_as_uint(dq[4 * j + 2]), __float_as_uint(dq[4 * j + 3])));
    }
    ptx::fence_async_proxy();
    __syncwarp();
    ptx::bulk_reduce_add_by_one(kernel.p.dq_sum + (int64_t{block} * 8 + warp) * kTallWarpFloats, at,
                                kTallWarpFloats * 4);
  }

  __device__ __forceinline__ void run(const typename Kernel::Turn& turn, QueryState& state,
                                      float (&dk)[kHeadDim / 2], float (&dv)[kHeadDim / 2]) const {
    int m = turn.first;
#pragma unroll
    for (int i = 0; i < kHeadDim / 2; ++i) dk[i] = dv[i] = 0.f;
    Scores s, dp;
    for (int left = turn.steps; left > 0; --left) {
      Operand weights, ds;
      Scores dq;
      float2 lse2[kPairs], delta[kPairs];
      kernel.q_pipe.wait(state);
      issue_scores(Traits::kK, Traits::kQ, state, s);
      load<0, kPairs / 2>(Traits::kLse2, state, lse2);
      kernel.dout_pipe.wait(state);
      issue_scores(Traits::kV, Traits::kDout, state, dp);
      const bool masked = kernel.needs_mask(warpgroup, m);
      wgmma_wait<1>();
      if (masked) mask(m * kBlockM, s);
      load<kPairs / 2, kPairs>(Traits::kLse2, state, lse2);
      weigh(lse2, s);
      load<0, kPairs>(Traits::kDelta, state, delta);
      wgmma_wait<0>();
      weigh_gradient(delta, s, dp);
      accumulator_to_a<T, kBlockM>(s, weights);
      accumulator_to_a<T, kBlockM>(dp, ds);
      // Two buffers: whoever has met the other in the step before is through with the one before.
      share_ds(state, ds);
      issue_sum(Traits::kDout, state, weights, dv);
      ptx::fence_async_proxy();
      ptx::named_barrier_sync(kMeeting, 256);
      issue_dq(state, dq);
      wgmma_wait<1>();
      kernel.dout_pipe.release(state);
      issue_sum(Traits::kQ, state, ds, dk);
      const int block = ptx::load_shared_4(kernel.aside(warpgroup) + 12);
      m = kernel.next_block(warpgroup, m);
      wgmma_wait<1>();
      add_dq(dq, block);
      wgmma_wait<0>();
      kernel.q_pipe.release(state);
      state.advance();
    }
  }
};

}  // namespace lctx::cuda
