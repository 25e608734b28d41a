// Math: dQ_i = scale sum_j dS_ij k_j with dS from S = Q K^T and dP = dO V^T (attn_dq_scores.cuh).
//       Every row of dQ is summed by one warpgroup in one order: no atomics, the same bits again.
// Tile map: that of attn_fwd_sm90.cuh, of which this is the sister: the same Tiles, ranges of keys,
//       masks, loads and way out. The two query stages of the tile hold Q and dO.
// Pipeline: per block of keys three products: S, dP and, one block behind, dQ += dS K. They are
//       issued together, and dS is made under dQ. With only two stages dQ goes
//       first, so that its keys make room early, and the other warpgroup's products run meanwhile.
//       Values are released before keys.
// Memory: Q and dO once, K and V once per tile (L2), dQ once. Shared: Q + dO + kStages (K + V) +
//       dQ. Registers as attn_fwd_sm90.cuh, no spills.
// Limits: those of attn_fwd_sm90.cuh.
#pragma once

#include "attn_dq_scores.cuh"
#include "attn_fwd_run.cuh"

namespace lctx::cuda {

// Rows x keys of a tile.
template <class T, int kHeadDim, int kBlockN, int kConsumers, int kStages, bool kStagesDq>
using DqTile = FwdTile<T, kHeadDim, kBlockN, kConsumers, kStagesDq, kStages, /*Q and dO*/ 2>;

template <class Traits_>
struct DqKernel : FwdKernel<Traits_> {
  using Traits = Traits_;
  using Base = FwdKernel<Traits>;
  using Base::k_pipe;
  using Base::kBlockN;
  using Base::kHeadDim;
  using Base::p;
  using Base::q_pipe;
  using Base::smem;
  using Base::v_pipe;
  using typename Base::KVState;
  using typename Base::QState;
  using typename Base::Rows;
  using typename Base::Scores;
  using typename Base::State;
  using typename Base::T;
  using typename Base::Tiles;
  using typename Base::Turn;
  static constexpr bool kProductFirst = Traits::kStages == 2;

  using Base::Base;

  __device__ __forceinline__ void produce() {
    KVState k_state, v_state;
    QState q_state;
    int next = Tiles::first(p);
    while (true) {
      const int index = next;
      this->queue.publish(index);
      if (index >= Tiles::end(p)) break;
      next = Tiles::next(p, index);
      Work work = Tiles::find(p, index);
      const KeyRange keys = this->tile_keys(work);
      work.head = p.per_group.divide(work.head);
      bool first = true;  // in place of keys.end, a register
#pragma unroll 1
      for (int n = keys.end - 1; n >= keys.begin; --n) {
        const KeyBlock block = Scores::block(p, work, n);
        this->template load_block<kHeadDim>(k_pipe, k_state, Traits::kK, block.k, work, block, 0);
        if (first) {
          const Work own = this->find_work_again(index);
          this->load_queries(q_state, &p.q[own.map], own);
        }
        this->template load_block<kHeadDim>(v_pipe, v_state, Traits::kV, block.v, work, block, 0);
        if (first) {
          const Work own = this->find_work_again(index);
          this->load_queries(q_state, &p.dout[own.map], own);
        }
        first = false;
      }
    }
  }

  // The address is made anew, or the descriptors of all columns would stay in registers.
  __device__ __forceinline__ uint32_t query_tile(int warpgroup, const QState& q_state) const {
    return smem + ptx::opaque(warpgroup * tile_bytes(64, kHeadDim)) +
           q_state.stage() * Traits::kQBytes;
  }
  // S = Q K^T of a block whose keys are there. `q_state` is that of Q.
  __device__ __forceinline__ void issue_scores(int warpgroup, const QState& q_state,
                                               const KVState& k_state,
                                               float (&s)[kBlockN / 2]) const {
    wgmma_fence();
    gemm_nt<T, kBlockN, kHeadDim>(s, query_tile(warpgroup, q_state), 64,
                                  smem + Traits::kK + k_state.stage() * Traits::kKBytes, kBlockN);
  }
  // dP = dO V^T, and commits both.
  __device__ __forceinline__ void issue_dp(int warpgroup, QState q_state, const KVState& v_state,
                                           float (&dp)[kBlockN / 2]) const {
    q_state.advance();
    v_pipe.wait(v_state);
    wgmma_fence();
    gemm_nt<T, kBlockN, kHeadDim>(dp, query_tile(warpgroup, q_state), 64,
                                  smem + Traits::kV + v_state.stage() * Traits::kVBytes, kBlockN);
    wgmma_commit();
  }

  // Adds dS K of the block before the one that `k_state` is at.
  __device__ __forceinline__ void issue_dq(KVState k_state, const uint32_t (&ds)[kBlockN / 16][4],
                                           float (&dq)[kHeadDim / 2], bool started) const {
    --k_state.step;
    wgmma_fence();
    gemm_rn<T, kHeadDim, kBlockN>(dq, ds, smem + Traits::kK + k_state.stage() * Traits::kKBytes,
                                  kBlockN, started);
    wgmma_commit();
  }
  __device__ __forceinline__ void release_last(KVState k_state) const {
    --k_state.step;
    k_pipe.release(k_state);
  }

  __device__ __forceinline__ void wait_queries(QState q_state) const {
    q_pipe.wait(q_state);
    q_state.advance();
    q_pipe.wait(q_state);
  }
  __device__ __forceinline__ void release_queries(QState& q_state) const {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      q_pipe.release(q_state);
      q_state.advance();
    }
  }

  __device__ __forceinline__ Turn next_rows(int warpgroup, State& state) {
    const Turn turn = this->next_turn(warpgroup);
    if (turn.index < Tiles::end(p) && !turn.empty) {
      Scores::begin(*this, warpgroup, this->find_work_again(turn.index), state);
    }
    return turn;
  }

  __device__ __forceinline__ void finish(int warpgroup, int index,
                                         float (&dq)[kHeadDim / 2]) const {
    const float factor[2] = {p.scale, p.scale};
    Rows::finish(*this, warpgroup, this->find_work_again(index), dq, factor);
  }

  // Rows without keys.
  __device__ __forceinline__ void finish_empty(int warpgroup, const Turn& turn, QState& q_state,
                                               KVState& k_state, KVState& v_state) const {
    if (turn.loaded) {
      wait_queries(q_state);
      release_queries(q_state);
      this->skip(turn.right, k_state, v_state);
    }
    if (Traits::kShifts) {
      const Work work = this->find_work_again(turn.index);
      if (work.row0 + warpgroup * 64 < work.row_begin) return;
    }
    float dq[kHeadDim / 2] = {};
    finish(warpgroup, turn.index, dq);
  }

  __device__ __forceinline__ void consume(int warpgroup) {
    KVState k_state, v_state;
    QState q_state;
    float s[kBlockN / 2], dp[kBlockN / 2];
    uint32_t ds[kBlockN / 16][4];
    State state;
    Turn turn = next_rows(warpgroup, state);
    while (turn.index < Tiles::end(p)) {
      if (turn.empty) {
        finish_empty(warpgroup, turn, q_state, k_state, v_state);
        turn = next_rows(warpgroup, state);
        continue;
      }
      const int index = turn.index;
      const KeyRange keys = turn.keys;
      float dq[kHeadDim / 2];
      // First block: nothing of this tile to overlap with yet.
      int n = keys.end - 1;
      this->skip(turn.right, k_state, v_state);
      Scores::enter(*this, n, state);
      wait_queries(q_state);
      k_pipe.wait(k_state);
      issue_scores(warpgroup, q_state, k_state, s);
      issue_dp(warpgroup, q_state, v_state, dp);
      k_state.advance();
      wgmma_wait<0>();
      v_pipe.release(v_state);
      v_state.advance();
      if (Scores::needs_mask(keys, n, state)) this->mask_block(index, warpgroup, n, s, state);
      Scores::template differentiate<true>(*this, n, s, dp, state);
      accumulator_to_a<T, kBlockN>(dp, ds);

      bool started = false;
      const auto step = [&](auto masked) {
        constexpr bool kMasked = decltype(masked)::value;
        if constexpr (kProductFirst) issue_dq(k_state, ds, dq, started);
        issue_scores(warpgroup, q_state, k_state, s);
        issue_dp(warpgroup, q_state, v_state, dp);
        if constexpr (!kProductFirst) issue_dq(k_state, ds, dq, started);
        started = true;
        if constexpr (kProductFirst) {
          wgmma_wait<1>();
          release_last(k_state);
          wgmma_wait<0>();
        } else {
          wgmma_wait<1>();
        }
        v_pipe.release(v_state);
        v_state.advance();
        if constexpr (kMasked) this->mask_block(index, warpgroup, n, s, state);
        Scores::template differentiate<kMasked>(*this, n, s, dp, state);
        KVState next = k_state;
        next.advance();
        if (n > keys.begin) k_pipe.wait(next);
        if constexpr (!kProductFirst) {
          wgmma_wait<0>();
          release_last(k_state);
        }
        accumulator_to_a<T, kBlockN>(dp, ds);
        k_state = next;
      };
      if (n > keys.begin) k_pipe.wait(k_state);
      for (--n; n >= keys.begin; --n) {
        Scores::enter(*this, n, state);
        if (Scores::needs_mask(keys, n, state)) {
          step(std::true_type{});
        } else {
          step(std::false_type{});
        }
      }
      release_queries(q_state);
      issue_dq(k_state, ds, dq, started);
      if constexpr (Scores::kLeavesOut || Traits::kShifts) {
        // The next tile comes when all loads of this one are under way, for which all stages may
        // be needed.
        const int left = keys.begin - this->tile_keys(this->find_work_again(index)).begin;
        wgmma_wait<0>();
        release_last(k_state);
        this->skip(left, k_state, v_state);
        turn = next_rows(warpgroup, state);
      } else {
        turn = next_rows(warpgroup, state);
        wgmma_wait<0>();
        release_last(k_state);
      }
      finish(warpgroup, index, dq);
    }
    if (threadIdx.x % 128 == 0) ptx::tma_store_wait<0>();
  }
};

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, 1)
    attn_dq_sm90_kernel(const __grid_constant__ typename Traits::Params p) {
  run_tiles<DqKernel<Traits>>(p);
}

}  // namespace lctx::cuda
