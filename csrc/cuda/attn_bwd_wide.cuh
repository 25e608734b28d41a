// Math: that of attn_bwd_sm90.cuh without dQ, for head dimensions above 128.
// Tile map: 64 keys a block. dK and dV of 64 keys and 256 columns do not fit one warpgroup: each of
//       two has half of the columns, and computes P^T and dS^T for half of a block's 64 queries.
// Pipeline: P^T and dS^T of both halves meet in shared memory: both warpgroups write, meet, and
//       multiply with all 64 queries. Scores of the next block are issued behind these products.
// Memory: as attn_bwd_sm90.cuh. Shared: K, V, two stages of Q and dO, P^T, dS^T: 213 KB.
// Limits: those of attn_fwd_sm90.cuh.
#pragma once

#include "attn_bwd_load.cuh"
#include "attn_fwd_scores.cuh"

namespace lctx::cuda {

template <class Traits_>
struct WideBwdKernel : BwdLoads<Traits_> {
  using Base = BwdLoads<Traits_>;
  using Traits = Traits_;
  using Base::BwdLoads;
  using Base::find_work_again, Base::key_state, Base::num_steps, Base::queries;
  using Base::k_pipe, Base::v_pipe, Base::q_pipe, Base::dout_pipe;
  using Base::kBlockM, Base::kBlockN, Base::kHeadDim;
  using Base::p, Base::smem, Base::queue;
  using typename Base::QueryState;
  using typename Base::T;
  using typename Base::Tiles;
  static constexpr int kWritten = 1, kFree = 2;  // named barriers
  static constexpr int kHalfM = kBlockM / 2, kHalfColumns = kHeadDim / 2;
  static_assert(kBlockM == 64 && kBlockN == 64, "one chunk of queries, one warpgroup of keys");

  // Keys of a tile that a warpgroup has, and its first column of dK and dV.
  static __device__ __forceinline__ int first_key(int) { return 0; }
  static __device__ __forceinline__ int first_column(int warpgroup) {
    return warpgroup * kHalfColumns;
  }

  // S^T = K Q^T, or dP^T = V dO^T, of this warpgroup's half of the queries.
  __device__ __forceinline__ void issue_scores(int warpgroup, int keys, int rows,
                                               const QueryState& state,
                                               float (&s)[kHalfM / 2]) const {
    wgmma_fence();
    gemm_nt<T, kHalfM, kHeadDim>(
        s, smem + keys, kBlockN,
        smem + rows + state.stage() * Traits::kQueryBytes + warpgroup * chunk_bytes(kHalfM),
        kBlockM);
    wgmma_commit();
  }
  // This warpgroup's columns of d += weights * (the block of Q or dO at `rows`).
  __device__ __forceinline__ void issue_sum(int warpgroup, int weights, int rows,
                                            const QueryState& state, float (&d)[kHalfColumns / 2],
                                            bool started) const {
    wgmma_fence();
    gemm_ss<T, kHalfColumns, kBlockM, kMajorK, kMajorMN>(
        d, smem + weights, kBlockN,
        smem + rows + state.stage() * Traits::kQueryBytes +
            warpgroup * (kHalfColumns / kChunkColumns) * chunk_bytes(kBlockM),
        kBlockM, started);
    wgmma_commit();
  }

  __device__ __forceinline__ uint32_t seen(int warpgroup, int key) const {
    return smem + Traits::kSeen + (warpgroup * 64 + key) * 8;
  }
  // The queries that see each key; every warp keeps those of its own 16 keys.
  __device__ __forceinline__ void note_seen(int warpgroup, const KeyWork& work) const {
    const int lane = static_cast<int>(threadIdx.x % 32);
    const int key = static_cast<int>(threadIdx.x % 128 / 32) * 16 + lane;
    if (lane < 16) {
      int2 range;
      if constexpr (Traits::kGroups) {
        range = Tiles::queries_of_row(p, work, key);
      } else {
        range = queries_of<Traits::kWindowed>(p, work, work.key0 + key);
      }
      ptx::store_shared_int2(seen(warpgroup, key),
                             make_int2(range.x - work.origin, range.y - work.origin));
    }
    __syncwarp();
  }
  __device__ __forceinline__ void mask(int warpgroup, int m, float (&s)[kHalfM / 2]) const {
    const int thread = warpgroup_thread();
    const int first = m * kBlockM + warpgroup * kHalfM + fragment_column(thread);
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      const int2 range = ptx::load_shared_int2(seen(warpgroup, fragment_row(thread) + 8 * row));
      mask_columns<kHalfM>(s, row, range.x - first, range.y - first);
    }
  }
  __device__ __forceinline__ float2 stat(int offset, int warpgroup, const QueryState& state,
                                         int j) const {
    return ptx::load_shared_float2(smem + offset +
                                   (state.stage() * kBlockM + warpgroup * kHalfM) * 4 + 32 * j +
                                   fragment_column(threadIdx.x % 128) * 4);
  }
  // The landmark of a group is the last key of its last piece: it carries nothing, and the gradient
  // of its scores is a statistic.
  __device__ __forceinline__ void set_landmark(int warpgroup, const QueryState& state,
                                               float (&s)[kHalfM / 2],
                                               float (&dp)[kHalfM / 2]) const {
    const bool own = threadIdx.x % 128 >= 124;
#pragma unroll
    for (int j = 0; j < kHalfM / 8; ++j) {
      const float2 w = stat(Traits::kLandmark, warpgroup, state, j);
      s[4 * j + 2] = own ? 0.f : s[4 * j + 2];
      s[4 * j + 3] = own ? 0.f : s[4 * j + 3];
      dp[4 * j + 2] = own ? w.x : dp[4 * j + 2];
      dp[4 * j + 3] = own ? w.y : dp[4 * j + 3];
    }
  }
  // A half of P^T or dS^T to shared memory.
  __device__ __forceinline__ void share(int tile, int warpgroup,
                                        const float (&d)[kHalfM / 2]) const {
    uint32_t packed[kHalfM / 16][4];
    accumulator_to_a<T, kHalfM>(d, packed);
    const FragmentAddress<kBlockN> address(smem + tile, 0, warpgroup_thread());
#pragma unroll
    for (int t = 0; t < kHalfM / 16; ++t) {
      ptx::stmatrix_x4(address(warpgroup * (kHalfM / 16) + t), packed[t][0], packed[t][1],
                       packed[t][2], packed[t][3]);
    }
  }

  __device__ __forceinline__ void consume(int warpgroup) {
    QueryState state;
    while (true) {
      const int index = queue.take();
      if (index >= p.order.num_tiles) break;
      float dk[kHalfColumns / 2], dv[kHalfColumns / 2];
      const KeyWork work = Tiles::find(p, index);
      const QueryRange range = queries(work, 0, kBlockN);
      bool has_landmark = false;
      if constexpr (Traits::kGroups) has_landmark = Tiles::has_landmark(p, work, 0);
      k_pipe.wait(key_state());
      v_pipe.wait(key_state());
      if (range.end <= range.begin) {
        k_pipe.release(key_state());
        v_pipe.release(key_state());
#pragma unroll
        for (int i = 0; i < kHalfColumns / 2; ++i) dk[i] = dv[i] = 0.f;
        Traits::Keys::finish(*this, warpgroup, work, dk, dv);
        continue;
      }
      note_seen(warpgroup, work);
      if constexpr (Traits::Keys::kPrefetches) Traits::Keys::prefetch(*this, warpgroup, work);
      sum_up(warpgroup, range, num_steps(work, range), has_landmark, state, dk, dv);
      if constexpr (Traits::Keys::kReadsKeys) {
        Traits::Keys::read_keys(*this, warpgroup, find_work_again(index), dk);
      }
      k_pipe.release(key_state());
      v_pipe.release(key_state());
      Traits::Keys::finish(*this, warpgroup, find_work_again(index), dk, dv);
    }
  }

  __device__ __forceinline__ void sum_up(int warpgroup, const QueryRange& range, int steps,
                                         bool has_landmark, QueryState& state,
                                         float (&dk)[kHalfColumns / 2],
                                         float (&dv)[kHalfColumns / 2]) const {
    float s[kHalfM / 2], dp[kHalfM / 2];
    bool started = false;
    q_pipe.wait(state);
    issue_scores(warpgroup, Traits::kK, Traits::kQ, state, s);
    dout_pipe.wait(state);
    issue_scores(warpgroup, Traits::kV, Traits::kDout, state, dp);
    wgmma_wait<0>();
    int m = range.begin;
    for (int left = steps; left > 0; --left) {
      if (range.needs_mask(m)) mask(warpgroup, m, s);
#pragma unroll
      for (int j = 0; j < kHalfM / 8; ++j) {
        const float2 lse2 = stat(Traits::kLse2, warpgroup, state, j);
        const float2 delta = stat(Traits::kDelta, warpgroup, state, j);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          float& x = s[4 * j + i];
          x = ptx::exp2_approx(x * p.scale_log2 - (i % 2 == 0 ? lse2.x : lse2.y));
          dp[4 * j + i] = x * (dp[4 * j + i] - (i % 2 == 0 ? delta.x : delta.y));
        }
      }
      if (Traits::kGroups && has_landmark) set_landmark(warpgroup, state, s, dp);
      ptx::named_barrier_sync(kFree, 256);  // the products of the block before have ended
      share(Traits::kWeights, warpgroup, s);
      share(Traits::kWeights + Traits::kDsBytes, warpgroup, dp);
      ptx::fence_async_proxy();
      ptx::named_barrier_sync(kWritten, 256);
      issue_sum(warpgroup, Traits::kWeights, Traits::kDout, state, dv, started);
      issue_sum(warpgroup, Traits::kWeights + Traits::kDsBytes, Traits::kQ, state, dk, started);
      started = true;
      const QueryState last = state;
      state.advance();
      // After the last block the scores are those of stale data, and ignored.
      if (left > 1) q_pipe.wait(state);
      issue_scores(warpgroup, Traits::kK, Traits::kQ, state, s);
      if (left > 1) dout_pipe.wait(state);
      issue_scores(warpgroup, Traits::kV, Traits::kDout, state, dp);
      wgmma_wait<2>();
      q_pipe.release(last);
      dout_pipe.release(last);
      if (++m == range.end) m = range.begin;
      wgmma_wait<0>();
    }
  }
};

}  // namespace lctx::cuda
