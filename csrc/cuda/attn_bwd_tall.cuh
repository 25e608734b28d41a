// Math: that of attn_bwd_sm90.cuh, fused: dilated attention with D <= 64, dense attention with
//       D <= 64, or without a mask with D <= 128 (with one, blocks of 64 are faster).
// Tile map: the same, 80 queries at a time, or 128 for D <= 64. Of a product of 64 columns tensor
//       cores read as much shared memory as there is time for; of one of 80 they read 10 % less.
//       There dQ is computed transposed, since a product has 64 rows: a warpgroup has 64 of its
//       columns; for D <= 64 it has 64 of its queries.
// Pipeline: S^T and dP^T of a block are issued together; for D > 64 S^T one block ahead, behind dQ.
//       dQ is computed in its own step: the warpgroups meet when dS is shared. Where the
//       exponentials go is left to the compiler: most of them wait for dP^T with the arithmetic
//       that follows, which is faster than all of them under dP^T.
// Memory: that of attn_bwd_sm90.cuh; but dQ leaves by bulk additions from shared memory, a warp's
//       part by itself, so that no other warp has to be waited for. kOrdered: two threads of the
//       producer warpgroup add whole blocks, of odd and even steps. Statistics: those of a thread's
//       queries, half of lse2 when the scores are there (there are registers for half of it); for
//       D <= 64 a thread loads 4 of 128 and has the others by shuffles.
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
  static constexpr bool kNarrow = kHeadDim == 64, kAhead = !kNarrow;
  static constexpr int kWarpFloats = tall_warp_floats(kHeadDim);
  static_assert(kBlockM == tall_block_rows(kHeadDim) && !Traits::kGroups);
  using Scores = float[kBlockM / 2];
  using Queries = float[kWarpFloats / 32];  // dQ
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
  // 64 rows of dQ^T = K^T dS^T, or of dQ.
  __device__ __forceinline__ void issue_dq(const QueryState& state, Queries& dq) const {
    const uint32_t keys = ptx::opaque(static_cast<int>(
        kernel.smem + Traits::kK + (kNarrow ? 0 : warpgroup * chunk_bytes(kBlockN))));
    wgmma_fence();
    if constexpr (kNarrow) {
      gemm_ss<T, kHeadDim, kBlockN, kMajorK, kMajorMN>(
          dq, ds_tile(state) + warpgroup * chunk_bytes(64), kBlockM, keys, kBlockN, false);
    } else {
      gemm_ss<T, kBlockM, kBlockN, kMajorMN, kMajorK>(dq, keys, kBlockN, ds_tile(state), kBlockM,
                                                      false);
    }
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
  // lse2 or delta of pair j of this thread's queries.
  struct Loaded {
    float2 x[kPairs];
    __device__ __forceinline__ float2 operator[](int j) const { return x[j]; }
  };
  // Lane 4 i + c has queries 8 i + 2 c + {0, 1}, and those 64 behind.
  struct Shuffled {
    float2 x[2];
    __device__ __forceinline__ float2 operator[](int j) const {
      const int lane = static_cast<int>(threadIdx.x % 4) + j % 8 * 4;
      return make_float2(__shfl_sync(~0u, x[j / 8].x, lane), __shfl_sync(~0u, x[j / 8].y, lane));
    }
  };
  using Statistics = std::conditional_t<kNarrow, Shuffled, Loaded>;
  // Pairs kFrom .. kTo - 1.
  template <int kFrom, int kTo>
  __device__ __forceinline__ void load(int offset, const QueryState& state, Statistics& y) const {
    uint32_t from = kernel.smem + offset + state.stage() * kBlockM * 4;
    if constexpr (kNarrow) {
      if constexpr (kFrom > 0) return;
      from += threadIdx.x % 32 * 8;
      y.x[0] = ptx::load_shared_float2(from);
      y.x[1] = ptx::load_shared_float2(from + 256);
    } else {
      from += fragment_column(static_cast<int>(threadIdx.x % 128)) * 4;
#pragma unroll
      for (int j = kFrom; j < kTo; ++j) y.x[j] = ptx::load_shared_float2(from + 32 * j);
    }
  }
  // S^T -> P^T.
  __device__ __forceinline__ void weigh(const Statistics& lse2, Scores& s) const {
#pragma unroll
    for (int j = 0; j < kPairs; ++j) {
      const float2 l = lse2[j];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float& x = s[4 * j + i];
        x = ptx::exp2_approx(x * kernel.p.scale_log2 - (i % 2 == 0 ? l.x : l.y));
      }
    }
  }
  // P^T and dP^T -> dS^T.
  static __device__ __forceinline__ void weigh_gradient(const Statistics& delta, const Scores& s,
                                                        Scores& dp) {
#pragma unroll
    for (int j = 0; j < kPairs; ++j) {
      const float2 d = delta[j];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        dp[4 * j + i] = s[4 * j + i] * (dp[4 * j + i] - (i % 2 == 0 ? d.x : d.y));
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
  // To the part of dq_sum that belongs to this warp of the block that the step is of. `next`: the
  // state of the step behind.
  __device__ __forceinline__ void add_dq(const Queries& dq, int block, QueryState next) const {
    const int thread = warpgroup_thread(), warp = warpgroup * 4 + thread / 32;
    const uint32_t at = kernel.smem + Traits::kDq + warp * kWarpFloats * 4;
    if constexpr (Kernel::kOrdered) {
      ptx::mbarrier_wait(kernel.dq_empty(next.stage()), next.phase() ^ 1);
    } else {
      ptx::tma_store_wait_read<0>();
    }
    __syncwarp();
#pragma unroll
    for (int j = 0; j < kWarpFloats / 128; ++j) {
      ptx::store_shared_16(
          at + thread % 32 * 16 + j * 512,
          make_uint4(__float_as_uint(dq[4 * j]), __float_as_uint(dq[4 * j + 1]),
                     __float_as_uint(dq[4 * j + 2]), __float_as_uint(dq[4 * j + 3])));
    }
    ptx::fence_async_proxy();
    __syncwarp();
    if constexpr (Kernel::kOrdered) {
      if (thread % 32 == 0) ptx::mbarrier_arrive(kernel.dq_full(next.stage()));
    } else {
      ptx::bulk_reduce_add_by_one(kernel.p.dq_sum + (int64_t{block} * 8 + warp) * kWarpFloats, at,
                                  kWarpFloats * 4);
    }
  }

  // The block of dq_sum of this step; m is that of the queries of the next one.
  __device__ __forceinline__ int go_on(int& m) const {
    if constexpr (Kernel::kOrdered) {
      kernel.go_to_next_block(warpgroup);
      return 0;
    } else {
      const int block = ptx::load_shared_4(kernel.aside(warpgroup) + 12);
      m = kernel.next_block(warpgroup, m);
      return block;
    }
  }

  // dV, dQ and dK of a block, dQ leaving under dK.
  __device__ __forceinline__ void sum_in_turn(const QueryState& state, const Operand& weights,
                                              const Operand& ds, int& m, float (&dk)[kHeadDim / 2],
                                              float (&dv)[kHeadDim / 2]) const {
    Queries dq;
    issue_sum(Traits::kDout, state, weights, dv);
    ptx::fence_async_proxy();
    ptx::named_barrier_sync(kMeeting, 256);
    issue_dq(state, dq);
    wgmma_wait<1>();
    kernel.dout_pipe.release(state);
    issue_sum(Traits::kQ, state, ds, dk);
    const int block = go_on(m);
    wgmma_wait<1>();
    add_dq(dq, block, {state.step + 1});
    wgmma_wait<0>();
    kernel.q_pipe.release(state);
  }
  // dV, dK and dQ of a block, dQ leaving under the scores of the next one, if there are `more`;
  // else they are those of stale data, and ignored. `state` becomes that of the next one.
  __device__ __forceinline__ void sum_and_go_on(QueryState& state, bool more,
                                                const Operand& weights, const Operand& ds, int& m,
                                                Scores& s, float (&dk)[kHeadDim / 2],
                                                float (&dv)[kHeadDim / 2]) const {
    Queries dq;
    issue_sum(Traits::kDout, state, weights, dv);
    issue_sum(Traits::kQ, state, ds, dk);
    ptx::fence_async_proxy();
    ptx::named_barrier_sync(kMeeting, 256);
    issue_dq(state, dq);
    wgmma_wait<2>();
    kernel.dout_pipe.release(state);
    const int block = go_on(m);
    wgmma_wait<1>();
    kernel.q_pipe.release(state);
    state.advance();
    if (more) kernel.q_pipe.wait(state);
    issue_scores(Traits::kK, Traits::kQ, state, s);
    wgmma_wait<1>();
    add_dq(dq, block, state);
    wgmma_wait<0>();
  }

  __device__ __forceinline__ void run(const typename Kernel::Turn& turn, QueryState& state,
                                      float (&dk)[kHeadDim / 2], float (&dv)[kHeadDim / 2]) const {
    int m = turn.first;
#pragma unroll
    for (int i = 0; i < kHeadDim / 2; ++i) dk[i] = dv[i] = 0.f;
    Scores s, dp;
    if constexpr (kAhead) {
      kernel.q_pipe.wait(state);
      issue_scores(Traits::kK, Traits::kQ, state, s);
      wgmma_wait<0>();
    }
    for (int left = turn.steps; left > 0; --left) {
      Operand weights, ds;
      Statistics lse2, delta;
      if constexpr (!kAhead) {
        kernel.q_pipe.wait(state);
        issue_scores(Traits::kK, Traits::kQ, state, s);
      }
      load<0, kPairs / 2>(Traits::kLse2, state, lse2);
      kernel.dout_pipe.wait(state);
      issue_scores(Traits::kV, Traits::kDout, state, dp);
      if constexpr (Kernel::kOrdered) m = kernel.ordered_block(warpgroup);
      const bool masked = kernel.needs_mask(warpgroup, m);
      if constexpr (!kAhead) wgmma_wait<1>();
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
      if constexpr (kAhead) {
        sum_and_go_on(state, left > 1, weights, ds, m, s, dk, dv);
      } else {
        sum_in_turn(state, weights, ds, m, dk, dv);
        state.advance();
      }
    }
  }
};

}  // namespace lctx::cuda
