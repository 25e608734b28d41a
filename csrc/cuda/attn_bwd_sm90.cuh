// Math: with P_ij = exp(scale q_i . k_j - lse_i), dP_ij = dO_i . v_j, dS_ij = P_ij (dP_ij -
//       delta_i): dV_j = sum_i P_ij dO_i,  dK_j = scale sum_i dS_ij q_i,  dQ_i = scale sum_j dS_ij
//       k_j.
// Tile map: persistent blocks of a producer warpgroup (two threads) and two warpgroups of 64 keys;
//       a tile is (batch, key/value head, 128 keys), its queries are walked in blocks of kBlockM,
//       head by head of the group. Scores are computed transposed, S^T = K Q^T, so that P^T and
//       dS^T are A operands as they stand in the registers. Policies: Tiles (attn_bwd_tiles.cuh:
//       which keys and queries) and Keys (attn_bwd_keys.cuh: what becomes of finished dK and dV).
//       kFused: dQ too, five products; it is added in fp32, in an order that changes from run to
//       run, but for OrderedKeys. Else dK and dV only, four products, bitwise reproducible
//       (attn_dq_sm90.cuh has dQ).
//       Fused, attn_bwd_whole.cuh has the steps at D = 64, attn_bwd_tall.cuh where that is faster.
// Pipeline: Q with lse2, dO with delta, in kStages stages of their own barriers. Fused: dS^T goes
//       through shared memory, since dQ sums over the keys of both warpgroups, in three buffers;
//       dQ of a block is computed one step late, so that neither warpgroup waits for the other.
//       S^T of the next block is issued under dQ or dK of this one, and its statistics are loaded:
//       no load from shared memory stands between two products.
// Memory: K and V once; Q, dO, lse2 and delta once per tile (L2); dQ added once per tile (L2).
//       Registers: 24/240, no spills: dK, dV, S^T, dP^T are 192 of them.
// Limits: those of attn_fwd_sm90.cuh. Above D = 128 attn_bwd_wide.cuh takes the consumers' place.
#pragma once

#include "../common/ptx_words.cuh"
#include "attn_bwd_load.cuh"
#include "attn_bwd_tall.cuh"
#include "attn_bwd_whole.cuh"
#include "attn_bwd_wide.cuh"

namespace lctx::cuda {

// Self_: the kernel that derives from it and puts its own functions in the place of some.
template <class Traits_, class Self_ = void>
struct BwdKernel : BwdLoads<Traits_> {
  using Base = BwdLoads<Traits_>;
  using Traits = Traits_;
  using Self = std::conditional_t<std::is_void_v<Self_>, BwdKernel, Self_>;
  __device__ __forceinline__ const Self& self() const { return static_cast<const Self&>(*this); }
  using Base::BwdLoads;

  // Keys of a tile that a warpgroup has, and its first column of dK and dV.
  static __device__ __forceinline__ int first_key(int warpgroup) { return warpgroup * 64; }
  static __device__ __forceinline__ int first_column(int) { return 0; }
  using Base::aside, Base::last_block, Base::next_block;
  using Base::k_pipe, Base::v_pipe, Base::q_pipe, Base::dout_pipe;
  using Base::kBlockM, Base::kBlockN, Base::kHalves, Base::kHeadDim;
  using Base::kDsBarrier;
  using Base::num_steps, Base::find_work_again, Base::key_state, Base::queries;
  using Base::p, Base::smem, Base::queue;
  using typename Base::QueryState;
  using typename Base::T;
  using typename Base::Tiles;

  // ---- consumers: 64 keys of a warpgroup, 64 queries (a half of a block for D 64) at a time ----

  __device__ __forceinline__ uint32_t query_tile(int offset, const QueryState& state,
                                                 int half) const {
    return smem + offset + state.stage() * Traits::kQueryBytes + half * chunk_bytes(64);
  }
  __device__ __forceinline__ void issue_scores(int warpgroup, const QueryState& state, int half,
                                               float (&s)[32]) const {
    wgmma_fence();
    gemm_nt<T, 64, kHeadDim>(s, smem + Traits::kK + warpgroup * chunk_bytes(64), kBlockN,
                             query_tile(Traits::kQ, state, half), kBlockM);
    wgmma_commit();
  }
  __device__ __forceinline__ void issue_dp(int warpgroup, const QueryState& state, int half,
                                           float (&dp)[32]) const {
    wgmma_fence();
    gemm_nt<T, 64, kHeadDim>(dp, smem + Traits::kV + warpgroup * chunk_bytes(64), kBlockN,
                             query_tile(Traits::kDout, state, half), kBlockM);
    wgmma_commit();
  }
  // d += weights * (the rows of Q or dO at `offset`)
  __device__ __forceinline__ void issue_sum(int offset, const QueryState& state, int half,
                                            const uint32_t (&weights)[4][4],
                                            float (&d)[kHeadDim / 2], bool started) const {
    wgmma_fence();
    gemm_rn<T, kHeadDim, 64>(d, weights, query_tile(offset, state, half), kBlockM, started);
    wgmma_commit();
  }

  // This warpgroup's part of dQ of the block whose dS^T is in `buffer` (dq_sum.cuh).
  __device__ __forceinline__ void issue_dq(int warpgroup, uint32_t buffer, float (&dq)[32]) const {
    const int part = warpgroup * chunk_bytes(kBlockN);
    // Opaque: the compiler would keep descriptors of a buffer from one step to the next.
    const uint32_t ds =
        ptx::opaque(static_cast<int>(smem + Traits::kDs + buffer * Traits::kDsBytes));
    wgmma_fence();
    gemm_tn<T, 64, kBlockN>(dq, ds + (kHeadDim == 64 ? part : 0), kBlockN,
                            smem + Traits::kK + (kHeadDim == 64 ? 0 : part), kBlockN, false);
    wgmma_commit();
  }
  __device__ __forceinline__ float* dq_of(int warpgroup, int block) const {
    return p.dq_sum + (int64_t{block} * 2 + warpgroup) * kDqPartFloats + warpgroup_thread() * 4;
  }
  __device__ __forceinline__ void add_dq(float* to, const float (&dq)[32]) const {
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      ptx::red_add_v4(to + j * 512, dq[4 * j], dq[4 * j + 1], dq[4 * j + 2], dq[4 * j + 3]);
    }
  }

  // The queries, from the origin, that see each key, in shared memory: registers are scarce in the
  // main loop. Every warp keeps those of its own 16 keys.
  __device__ __forceinline__ void note_seen(int warpgroup, const KeyWork& work) const {
    const int lane = static_cast<int>(threadIdx.x % 32);
    const int key = warpgroup * 64 + static_cast<int>(threadIdx.x % 128 / 32) * 16 + lane;
    if (lane < 16) {
      int2 seen;
      if constexpr (Traits::kGroups) {
        seen = Tiles::queries_of_row(p, work, key);
      } else {
        seen = queries_of<Traits::kWindowed>(p, work, work.key0 + key);
      }
      ptx::store_shared_int2(smem + Traits::kSeen + key * 8,
                             make_int2(seen.x - work.origin, seen.y - work.origin));
    }
    __syncwarp();
  }
  // What the main loop has to know of the keys; returns what those of the warpgroup are seen by.
  __device__ __forceinline__ QueryRange note_keys(int warpgroup, const KeyWork& work,
                                                  const QueryRange&) const {
    note_seen(warpgroup, work);
    if constexpr (Traits::kGroups) {
      ptx::store_shared_4(aside(warpgroup) + 8, Tiles::has_landmark(p, work, warpgroup));
      return Tiles::template queries_of_piece<kBlockM, Traits::kFused>(p, work, warpgroup);
    } else {
      return queries(work, warpgroup * 64, 64);
    }
  }
  // `first`: the first query, from the origin.
  __device__ __forceinline__ void mask(int warpgroup, int first, float (&s)[32]) const {
    const int thread = warpgroup_thread();
    const uint32_t seen = smem + Traits::kSeen + (warpgroup * 64 + fragment_row(thread)) * 8;
    first += fragment_column(thread);
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      const int2 range = ptx::load_shared_int2(seen + row * 64);
      mask_columns<64>(s, row, range.x - first, range.y - first);
    }
  }

  // Statistics of the two neighbouring queries of column group j.
  __device__ __forceinline__ float2 stat(int offset, const QueryState& state, int half,
                                         int j) const {
    const int vector = Traits::kGroups ? static_cast<int>(threadIdx.x / 128 - 1) : 0;
    return ptx::load_shared_float2(
        smem + offset + ((state.stage() * Traits::kVectors + vector) * kBlockM + half * 64) * 4 +
        32 * j + fragment_column(threadIdx.x % 128) * 4);
  }

  // lse2 or delta, loaded before the scores are there: shared memory is as busy as the tensor
  // cores, and a load takes long.
  __device__ __forceinline__ void load_stats(int offset, const QueryState& state, int half,
                                             float2 (&stats)[8]) const {
#pragma unroll
    for (int j = 0; j < 8; ++j) stats[j] = stat(offset, state, half, j);
  }
  __device__ __forceinline__ bool needs_mask(int warpgroup, int m) const {
    const int2 full = ptx::load_shared_int2(aside(warpgroup) + 16);
    return m < full.x || m >= full.y;
  }
  // The same scores and statistics, of the next block.
  struct Ahead {
    float s[kHalves][32];
    float2 lse2[kHalves][8];
    bool masked;
  };
  __device__ __forceinline__ void issue_ahead(int warpgroup, const QueryState& state,
                                              Ahead& ahead) const {
#pragma unroll
    for (int half = 0; half < kHalves; ++half) issue_scores(warpgroup, state, half, ahead.s[half]);
#pragma unroll
    for (int half = 0; half < kHalves; ++half) {
      load_stats(Traits::kLse2, state, half, ahead.lse2[half]);
    }
  }

  // S^T -> P^T, in s and packed.
  __device__ __forceinline__ void weigh(const float2 (&lse2)[8], float (&s)[32],
                                        uint32_t (&weights)[4][4]) const {
#pragma unroll
    for (int j = 0; j < 8; ++j) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float& x = s[4 * j + i];
        x = ptx::exp2_approx(x * p.scale_log2 - (i % 2 == 0 ? lse2[j].x : lse2[j].y));
      }
    }
    accumulator_to_a<T, 64>(s, weights);
  }
  // 0, known only when all weights are there: no packed word of weights is all ones.
  static __device__ __forceinline__ uint32_t zero_behind(const uint32_t (&weights)[4][4]) {
    uint32_t all = ~0u;
#pragma unroll
    for (int i = 0; i < 16; ++i) all &= weights[i / 4][i % 4];
    return all == ~0u ? 1 : 0;
  }
  // P^T and dP^T -> dS^T, packed.
  __device__ __forceinline__ void weigh_gradient(const float2 (&delta)[8], const float (&s)[32],
                                                 float (&dp)[32], uint32_t (&weights)[4][4]) const {
#pragma unroll
    for (int j = 0; j < 8; ++j) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        dp[4 * j + i] = s[4 * j + i] * (dp[4 * j + i] - (i % 2 == 0 ? delta[j].x : delta[j].y));
      }
    }
    accumulator_to_a<T, 64>(dp, weights);
  }

  // The landmark of a group is the last key of its last 64: it carries nothing, and the gradient
  // of its scores is a statistic.
  __device__ __forceinline__ bool has_landmark(int warpgroup) const {
    return threadIdx.x % 128 >= 96 && ptx::load_shared_4(aside(warpgroup) + 8) != 0;
  }
  __device__ __forceinline__ void clear_landmark(int warpgroup, uint32_t (&weights)[4][4]) const {
    if (!has_landmark(warpgroup)) return;
    const bool own = threadIdx.x % 128 >= 124;
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      uint32_t& x = weights[j / 2][j % 2 * 2 + 1];
      x = own ? 0 : x;
    }
  }
  __device__ __forceinline__ void set_landmark(int warpgroup, const QueryState& state, int half,
                                               uint32_t (&ds)[4][4]) const {
    if (!has_landmark(warpgroup)) return;
    const bool own = threadIdx.x % 128 >= 124;
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      if (Traits::kFused && j % 2 == 0) __syncwarp();  // or there are no registers for the loads
      const float2 w = stat(Traits::kLandmark, state, half, j);
      uint32_t& x = ds[j / 2][j % 2 * 2 + 1];
      x = own ? pack2<T>(w.x, w.y) : x;
    }
  }

  // dS^T of a half to the buffer that dQ is computed from, by both warpgroups.
  __device__ __forceinline__ void share_ds(int warpgroup, uint32_t buffer, int half,
                                           const uint32_t (&ds)[4][4]) const {
    const uint32_t tile =
        smem + Traits::kDs + buffer * Traits::kDsBytes + half * chunk_bytes(kBlockN);
    const FragmentAddress<kBlockN> address(tile, warpgroup * 64, warpgroup_thread());
#pragma unroll
    for (int t = 0; t < 4; ++t) {
      ptx::stmatrix_x4(address(t), ds[t][0], ds[t][1], ds[t][2], ds[t][3]);
    }
  }

  // What a warpgroup does with a tile: `steps` blocks of queries, of which `first` is the first.
  struct Turn {
    int first, steps;
  };

  // Whether Ahead::place is what the end of a step needs to know, loaded under the products.
  static constexpr bool kPlaceAhead = false;

  __device__ __forceinline__ void consume(int warpgroup) {
    QueryState state;  // of Q, dO and dS^T
    while (true) {
      int index = queue.take();
      if (index >= p.order.num_tiles) break;
      float dk[kHeadDim / 2], dv[kHeadDim / 2];
      const KeyWork work = Tiles::find(p, index);
      const QueryRange all = queries(work, 0, kBlockN);
      k_pipe.wait(key_state());
      v_pipe.wait(key_state());
      if (all.end <= all.begin) {
        k_pipe.release(key_state());
        v_pipe.release(key_state());
#pragma unroll
        for (int i = 0; i < kHeadDim / 2; ++i) dk[i] = dv[i] = 0.f;
        Traits::Keys::finish(*this, warpgroup, work, dk, dv);
        continue;
      }
      if constexpr (Traits::Keys::kPrefetches) Traits::Keys::prefetch(*this, warpgroup, work);
      const QueryRange own = self().note_keys(warpgroup, work, all);
      const Turn turn{Base::kOrdered && work.down ? all.end - 1 : all.begin, num_steps(work, all)};
      const int block =
          (work.batch * p.Hq + work.first_head) * p.blocks_per_head + work.block0 + all.begin;
      // What only the end of the tile needs waits in shared memory.
      ptx::store_shared_int2(aside(warpgroup), make_int2(index, queue.state.step));
      ptx::store_shared_4(aside(warpgroup) + 12, Base::kOrdered ? turn.first : block);
      ptx::store_shared_int2(aside(warpgroup) + 16, make_int2(own.full_begin, own.full_end));
      ptx::store_shared_int2(aside(warpgroup) + 24, work.down
                                                        ? make_int2(all.end - 1, all.begin - 1)
                                                        : make_int2(all.begin, all.end));
      __syncwarp();
      if constexpr (Traits::kTall) {
        TallBlocks<BwdKernel>{*this, warpgroup}.run(turn, state, dk, dv);
      } else if constexpr (Traits::kWhole) {
        WholeBlocks<BwdKernel>{*this, warpgroup}.run(turn, state, dk, dv);
      } else if constexpr (Traits::kFused) {
        self().fused_steps(warpgroup, turn, state, dk, dv);
      } else {
        split_steps(warpgroup, turn, state, dk, dv);
      }
      const int2 kept = ptx::load_shared_int2(aside(warpgroup));
      index = kept.x;
      queue.state.step = kept.y;
      __syncwarp();
      if constexpr (Traits::Keys::kReadsKeys) {
        Traits::Keys::read_keys(*this, warpgroup, find_work_again(index), dk);
      }
      k_pipe.release(key_state());
      v_pipe.release(key_state());
      Traits::Keys::finish(*this, warpgroup, find_work_again(index), dk, dv);
    }
    if constexpr (Traits::kTall) ptx::tma_store_wait_read<0>();
  }

  // dV and dK of a block whose scores are there. `share` runs before the last product of a half is
  // issued.
  template <class Share>
  __device__ __forceinline__ void add_block(int warpgroup, int m, const QueryState& state,
                                            Ahead& ahead, float (&dk)[kHeadDim / 2],
                                            float (&dv)[kHeadDim / 2], bool started,
                                            Share&& share) const {
    float dp[32];
    float2 delta[8];
    uint32_t weights[4][4], ds[4][4];
    if constexpr (!Traits::kFused) {
      dout_pipe.wait(state);
      issue_dp(warpgroup, state, 0, dp);
    }
#pragma unroll
    for (int half = 0; half < kHalves; ++half) {
      float (&s)[32] = ahead.s[half];
      if (ahead.masked) mask(warpgroup, m * kBlockM + half * 64, s);
      weigh(ahead.lse2[half], s, weights);
      if constexpr (Traits::kGroups) clear_landmark(warpgroup, weights);
      if (Traits::kFused && half == 0) {
        // dP^T takes the registers that dQ is still being added from: not before the weights.
        dout_pipe.wait(state, zero_behind(weights));
        load_stats(Traits::kDelta, state, half, delta);
        issue_dp(warpgroup, state, 0, dp);
      } else {
        load_stats(Traits::kDelta, state, half, delta);
      }
      issue_sum(Traits::kDout, state, half, weights, dv, started || half > 0);
      wgmma_wait<1>();
      weigh_gradient(delta, s, dp, ds);
      if constexpr (Traits::kGroups) set_landmark(warpgroup, state, half, ds);
      share(half, ds);
      issue_sum(Traits::kQ, state, half, ds, dk, started || half > 0);
      if (half + 1 < kHalves) issue_dp(warpgroup, state, half + 1, dp);
    }
  }

  // The sums of a block have ended.
  __device__ __forceinline__ void release_block(int, const QueryState& last) const {
    q_pipe.release(last);
    dout_pipe.release(last);
  }

  __device__ __forceinline__ void fused_steps(int warpgroup, const Turn& turn, QueryState& state,
                                              float (&dk)[kHeadDim / 2],
                                              float (&dv)[kHeadDim / 2]) const {
    constexpr uint32_t kBuffers = Traits::kDsBuffers;
    const uint32_t ds_barrier = smem + kDsBarrier;
    int m = turn.first;
    const auto buffer = [&] {
      if constexpr (kBuffers == Traits::kStages) {
        return state.stage();
      } else {
        return state.step % kBuffers;
      }
    };
    const auto last_buffer = [&] { return buffer() == 0 ? kBuffers - 1 : buffer() - 1; };
    bool started = false;
    float dq[32];
    typename Self::Ahead ahead;
    q_pipe.wait(state);
    self().issue_ahead(warpgroup, state, ahead);
    ahead.masked = needs_mask(warpgroup, m);
    wgmma_wait<0>();
    for (int left = turn.steps; left > 0; --left) {
      self().add_block(warpgroup, m, state, ahead, dk, dv, started,
                       [&](int half, const uint32_t (&ds)[4][4]) {
                         // Both warpgroups are through with the step before: its dS^T is whole, and
                         // the buffer that was read two steps ago is free.
                         if (half == 0) ptx::mbarrier_wait(ds_barrier, state.parity() ^ 1);
                         self().share_ds(warpgroup, buffer(), half, ds);
                         if (half + 1 < kHalves) return;
                         ptx::fence_async_proxy();
                         __syncwarp();
                         if (threadIdx.x % 32 == 0) ptx::mbarrier_arrive(ds_barrier);
                       });
      self().issue_dq(warpgroup, last_buffer(), dq);
      // Under the products: what follows them is on nobody else's time.
      float* to = nullptr;
      if constexpr (Self::kPlaceAhead) {
        to = dq_of(warpgroup, self().next_place(warpgroup, ahead, m));
      } else {
        to = dq_of(warpgroup, last_block(warpgroup, m));
        m = next_block(warpgroup, m);
        ahead.masked = needs_mask(warpgroup, m);
      }
      const QueryState last = state;
      state.advance();
      // After the last block the scores are those of stale data, and ignored.
      if (left > 1) q_pipe.wait(state);
      wgmma_wait<1>();
      self().release_block(warpgroup, last);
      self().issue_ahead(warpgroup, state, ahead);
      wgmma_wait<kHalves>();
      // In the first step what was computed is of the tile before, or of nothing.
      if (started) add_dq(to, dq);
      started = true;
      wgmma_wait<0>();
    }
    ptx::mbarrier_wait(ds_barrier, state.parity() ^ 1);
    self().issue_dq(warpgroup, last_buffer(), dq);
    wgmma_wait<0>();
    add_dq(dq_of(warpgroup, last_block(warpgroup, m)), dq);
  }

  __device__ __forceinline__ void split_steps(int warpgroup, const Turn& turn, QueryState& state,
                                              float (&dk)[kHeadDim / 2],
                                              float (&dv)[kHeadDim / 2]) const {
    bool started = false;
    Ahead ahead;
    int m = turn.first;
    q_pipe.wait(state);
    issue_ahead(warpgroup, state, ahead);
    ahead.masked = needs_mask(warpgroup, m);
    wgmma_wait<0>();
    for (int left = turn.steps; left > 0; --left) {
      add_block(warpgroup, m, state, ahead, dk, dv, started, [](int, const uint32_t (&)[4][4]) {});
      started = true;
      const int2 bounds = ptx::load_shared_int2(aside(warpgroup) + 24);
      if (++m == bounds.y) m = bounds.x;
      ahead.masked = needs_mask(warpgroup, m);
      const QueryState last = state;
      state.advance();
      // After the last block the scores are those of stale data, and ignored.
      if (left > 1) q_pipe.wait(state);
      issue_ahead(warpgroup, state, ahead);
      wgmma_wait<kHalves>();
      q_pipe.release(last);
      dout_pipe.release(last);
      wgmma_wait<0>();
    }
  }
};

template <class Kernel>
__device__ __forceinline__ void run_bwd(const typename Kernel::Traits::Params& p, char* base) {
  Kernel kernel(p, base);
  if (threadIdx.x == 0) kernel.init();
  if (threadIdx.x == 32) {  // meanwhile
    ptx::prefetch_tensor_map(&p.q[0]);
    ptx::prefetch_tensor_map(&p.k[0]);
    ptx::prefetch_tensor_map(&p.dout[0]);
    ptx::prefetch_tensor_map(&p.v[0]);
  }
  __syncthreads();
  if (threadIdx.x < 128) {
    ptx::setmaxnreg_dec<24>();
    if (threadIdx.x == 0) kernel.template produce<true>();
    if (threadIdx.x == 32) kernel.template produce<false>();
    if constexpr (Kernel::kOrdered) {
      if (threadIdx.x == 64) kernel.add_in_turn(0);
      if (threadIdx.x == 96) kernel.add_in_turn(1);
    }
    if constexpr (Kernel::Traits::kGroups) {
      if (threadIdx.x == 64) kernel.template produce_group_statistics<true>();
      if (threadIdx.x == 96) kernel.template produce_group_statistics<false>();
    }
  } else {
    ptx::setmaxnreg_inc<240>();
    // Through a shuffle, so that the compiler knows it is the same for the whole warp.
    kernel.consume(__shfl_sync(~0u, threadIdx.x / 128 - 1, 0));
  }
}

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, 1)
    attn_bwd_sm90_kernel(const __grid_constant__ typename Traits::Params p) {
  extern __shared__ char shared[];
  if constexpr (Traits::kGroups) {
    if (Traits::Tiles::has_nothing(p)) return;
  }
  const uint32_t offset = (1024 - (ptx::smem_address(shared) & 1023)) & 1023;
  if (offset > Traits::kAlignment) __trap();  // never: there is no other shared memory before it
  run_bwd<std::conditional_t<Traits::kWide, WideBwdKernel<Traits>, BwdKernel<Traits>>>(
      p, shared + offset);
}

}  // namespace lctx::cuda
