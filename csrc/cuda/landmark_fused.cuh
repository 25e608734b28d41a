// Math: landmark attention, backward, uniform blocks of a few keys: dq, dk and dv in one pass of
//       five products. Names as in landmark_grads.cuh, whose statistics of a group and a row are
//       made where the group's scores are, and kept nowhere.
// Tile map: attn_bwd_sm90.cuh with 128 columns of keys laid out as in landmark_scores.cuh: 64 /
//       kWidth blocks a warpgroup, each at the end of its group of kWidth columns.
// Pipeline: that of the fused form there. Scores are not transposed: the keys of a group are in
//       four threads of a row, which sum them up in two shuffles. So P and dS reach their products
//       with dO and Q through shared memory: P is written, and the warpgroup meets, under dP; dS is
//       there for dQ anyway. A warpgroup's P has one buffer, free when all of its warps have seen
//       the product with the last one end.
// Memory: as attn_bwd_sm90.cuh; no statistics but the rows'.
// Limits: blocks of at most 64 keys, D <= 128.
#pragma once

#include "attn_bwd_sm90.cuh"
#include "landmark_group_keys.cuh"
#include "landmark_weights.cuh"

namespace lctx::cuda {

// kEarly_: the order of early_steps.
template <class T_, int kHeadDim_, int kWidth_, bool kEarly_ = false>
struct LandmarkFusedTile : BwdTile<T_, kHeadDim_, /*fused=*/true> {
  using Base = BwdTile<T_, kHeadDim_, true>;
  using Base::kBlockM, Base::kHalves, Base::kStages, Base::kConsumers;
  static constexpr int kWidth = kWidth_;
  static constexpr bool kEarly = kEarly_;
  static constexpr int kWeightBytes = kHalves * tile_bytes(64, 64);  // P of a warpgroup
  static constexpr int kWeights = Base::kDs + Base::kDsBuffers * Base::kDsBytes;
  static constexpr int kLse2 = kWeights + kConsumers * kWeightBytes;
  static constexpr int kDelta = kLse2 + kStages * kBlockM * 4;
  static constexpr int kAsideBytes = 40;
  static constexpr int kAside = kDelta + kStages * kBlockM * 4;
  static constexpr int kBarriers = kAside + (4 * kConsumers + 1) * kAsideBytes;
  static constexpr int kSharedBytes = kBarriers + 256;
};

template <class Traits_>
struct LandmarkBwdKernel : BwdKernel<Traits_, LandmarkBwdKernel<Traits_>> {
  using Base = BwdKernel<Traits_, LandmarkBwdKernel>;
  using Traits = Traits_;
  using Base::aside, Base::query_tile, Base::needs_mask;
  using Base::Base;
  using Base::kBlockM, Base::kBlockN, Base::kHalves, Base::kHeadDim, Base::kConsumerWarps;
  using Base::p, Base::smem, Base::q_pipe, Base::dout_pipe;
  using typename Base::QueryState;
  using typename Base::T;
  using typename Base::Tiles;
  static constexpr int kWidth = Traits::kWidth, kGroups = 64 / kWidth;
  static constexpr int kGroupRegisters = kWidth / 2;
  using Scores = LandmarkScores<T, 64, kWidth>;
  using Weights = LandmarkWeights<T, kWidth>;
  using Groups = typename Weights::Groups;
  // Several groups are settled before dP is issued, or there are no registers.
  static constexpr bool kSettlesEarly = kGroups > 1;

  // One a warpgroup: P may be written.
  static constexpr int kWeightsBarrier = Base::kQueue + TileQueue::kBytes;
  static_assert(kWeightsBarrier + 16 <= Traits::kBarriers + 256, "no room for the barriers");

  __device__ __forceinline__ void init() const {
    for (int i = 0; i < 2; ++i) ptx::mbarrier_init(smem + kWeightsBarrier + 8 * i, 4);
    Base::init();
  }

  // ---- what the products read ----

  __device__ __forceinline__ void issue_scores(int warpgroup, const QueryState& state, int half,
                                               float (&s)[32]) const {
    wgmma_fence();
    gemm_nt<T, 64, kHeadDim>(s, query_tile(Traits::kQ, state, half), kBlockM,
                             smem + Traits::kK + warpgroup * chunk_bytes(64), kBlockN);
    wgmma_commit();
  }
  __device__ __forceinline__ void issue_dp(int warpgroup, const QueryState& state, int half,
                                           float (&dp)[32]) const {
    wgmma_fence();
    gemm_nt<T, 64, kHeadDim>(dp, query_tile(Traits::kDout, state, half), kBlockM,
                             smem + Traits::kV + warpgroup * chunk_bytes(64), kBlockN);
    wgmma_commit();
  }
  // d += (the 64 x 64 weights at `weights`, in rows of 128 bytes)^T (the rows of Q or dO at
  // `offset`).
  __device__ __forceinline__ void issue_sum(uint32_t weights, int offset, const QueryState& state,
                                            int half, float (&d)[kHeadDim / 2],
                                            bool started) const {
    wgmma_fence();
    gemm_tn<T, kHeadDim, 64>(d, ptx::opaque(static_cast<int>(weights)), 64,
                             query_tile(offset, state, half), kBlockM, started);
    wgmma_commit();
  }
  __device__ __forceinline__ uint32_t weights_of(int warpgroup, int half) const {
    return smem + Traits::kWeights + warpgroup * Traits::kWeightBytes + half * chunk_bytes(64);
  }
  // Where a warpgroup's dS is, 64 columns of a block's.
  __device__ __forceinline__ uint32_t ds_of(int warpgroup, uint32_t buffer, int half) const {
    return smem + Traits::kDs + buffer * Traits::kDsBytes + warpgroup * chunk_bytes(kBlockM) +
           half * chunk_bytes(64);
  }
  __device__ __forceinline__ void issue_dq(int warpgroup, uint32_t buffer, float (&dq)[32]) const {
    const uint32_t ds =
        ptx::opaque(static_cast<int>(smem + Traits::kDs + buffer * Traits::kDsBytes));
    wgmma_fence();
    gemm_ss<T, 64, kBlockN, kMajorK, kMajorMN>(
        dq, ds + (kHeadDim == 64 ? warpgroup * chunk_bytes(64) : 0), kBlockM,
        smem + Traits::kK + (kHeadDim == 64 ? 0 : warpgroup * chunk_bytes(kBlockN)), kBlockN,
        false);
    wgmma_commit();
  }
  __device__ __forceinline__ void share_ds(int warpgroup, uint32_t buffer, int half,
                                           const uint32_t (&ds)[4][4]) const {
    const FragmentAddress<64> address(ds_of(warpgroup, buffer, half), 0, warpgroup_thread());
#pragma unroll
    for (int t = 0; t < 4; ++t) {
      ptx::stmatrix_x4(address(t), ds[t][0], ds[t][1], ds[t][2], ds[t][3]);
    }
    if (half + 1 < kHalves) ptx::fence_async_proxy();
  }
  static __device__ __forceinline__ void meet(int warpgroup) {
    ptx::named_barrier_sync(1 + warpgroup, 128);
  }

  __device__ __forceinline__ void release_block(int warpgroup, const QueryState& last) const {
    Base::release_block(warpgroup, last);
    if (threadIdx.x % 32 == 0) {
      ptx::mbarrier_arrive(smem + kWeightsBarrier + 8 * warpgroup);
    }
  }

  // ---- masks and statistics ----

  __device__ __forceinline__ QueryRange note_keys(int warpgroup, const KeyWork& work,
                                                  const QueryRange& all) const {
    const int block = Tiles::first_block(p, work) + warpgroup * kGroups;
    const int exist = work.map == 0 ? p.whole_blocks - block : warpgroup == 0 ? 1 : 0;
    const int first_row = block * p.block_size - work.shift;
    ptx::store_shared_int2(aside(warpgroup) + 32, make_int2(first_row, exist));
    QueryRange own = all;
    own.full_begin = (max(first_row + kGroups * p.block_size, 0) + kBlockM - 1) / kBlockM;
    own.full_end = work.map == 0 && exist >= kGroups ? all.end : 0;
    return own;
  }

  // Sets the scores that a row does not see to -inf, but not those of landmarks that it sees.
  // Returns bit 2 g + row: the row sees group g by its landmark.
  __device__ __forceinline__ uint32_t mask(int warpgroup, int row0, float (&s)[32]) const {
    const int thread = warpgroup_thread();
    const int2 groups = ptx::load_shared_int2(aside(warpgroup) + 32);
    const int column = fragment_column(thread), low = p.padding - column;
    uint32_t earlier = 0;
#pragma unroll
    for (int row = 0; row < 2; ++row) {
#pragma unroll
      for (int g = 0; g < kGroups; ++g) {
        // The row's place among the keys of the block: before, inside or behind.
        const int at = row0 + fragment_row(thread) + 8 * row - groups.x - g * p.block_size;
        const int place = g < groups.y ? at : -1;
        const bool behind = place >= p.block_size;
        if (behind) earlier |= 1u << (2 * g + row);
        const int high = (behind ? kWidth - 1 : min(p.padding + place, kWidth - 2)) - column;
#pragma unroll
        for (int j = 0; j < kWidth / 8; ++j) {
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            if (8 * j + i > high || 8 * j + i < low) {
              s[g * kGroupRegisters + 4 * j + 2 * row + i] = -INFINITY;
            }
          }
        }
      }
    }
    return earlier;
  }

  // Of row `row` (0 or 1) of this thread.
  __device__ __forceinline__ float stat(int offset, const QueryState& state, int half,
                                        int row) const {
    const int at = state.stage() * kBlockM + half * 64 + row * 8 +
                   fragment_row(static_cast<int>(threadIdx.x % 128));
    return __int_as_float(ptx::load_shared_4(smem + offset + at * 4));
  }

  // Of a step in its tile: see fused_steps.
  static constexpr bool kPlaceAhead = true;
  struct Place {
    int2 bounds, full;
    int block;
  };
  __device__ __forceinline__ Place load_place(int warpgroup) const {
    return {ptx::load_shared_int2(aside(warpgroup) + 24),
            ptx::load_shared_int2(aside(warpgroup) + 16),
            ptx::load_shared_4(aside(warpgroup) + 12)};
  }
  struct Ahead {
    float s[kHalves][32];
    float lse2[kHalves][2];
    Place place;
    bool masked;
  };
  // Steps on; returns the block of dq_sum of the step before this one.
  __device__ __forceinline__ int next_place(int warpgroup, Ahead& ahead, int& m) const {
    const Place& place = ahead.place;
    const int between = this->blocks_between(place.bounds);
    const int last = place.block - 1 - (m > place.bounds.x ? 0 : between);
    int block = place.block + 1;
    if (++m == place.bounds.y) {
      m = place.bounds.x;
      block += between;
    }
    __syncwarp();
    ptx::store_shared_4(aside(warpgroup) + 12, block);
    __syncwarp();
    ahead.masked = m < place.full.x || m >= place.full.y;
    return last;
  }

  __device__ __forceinline__ void issue_ahead(int warpgroup, const QueryState& state,
                                              Ahead& ahead) const {
#pragma unroll
    for (int half = 0; half < kHalves; ++half) issue_scores(warpgroup, state, half, ahead.s[half]);
#pragma unroll
    for (int half = 0; half < kHalves; ++half) {
#pragma unroll
      for (int row = 0; row < 2; ++row) {
        ahead.lse2[half][row] = stat(Traits::kLse2, state, half, row);
      }
    }
  }

  // S relative to the rows' lse, which exponentials in the own block are.
  __device__ __forceinline__ void begin_weighing(int warpgroup, int row0, bool masked,
                                                 const float (&lse2)[2], float (&s)[32],
                                                 Groups& groups) const {
    groups.earlier = hide(warpgroup, row0, masked, s);
    Scores::take_landmarks(p, s, groups.A);
#pragma unroll
    for (int g = 0; g < kGroups; ++g) Weights::scale(p.scale_log2, g, lse2, s);
  }
  // Exponentials -> P.
  __device__ __forceinline__ void settle(int warpgroup, const QueryState& state, int row0, int half,
                                         bool masked, const float (&lse2)[2], float (&s)[32],
                                         Groups& groups) const {
#pragma unroll
    for (int g = 0; g < kGroups; ++g) Weights::sum_over_row(groups.l[g]);
    if (__builtin_expect(Weights::out_of_range(lse2, groups), false)) {
      // Once more, relative to the groups' maxima.
      warp_scores<T, kHeadDim, kBlockM, kBlockN>(s, query_tile(Traits::kQ, state, half),
                                                 smem + Traits::kK + warpgroup * chunk_bytes(64));
      hide(warpgroup, row0, masked, s);
      Scores::take_landmarks(p, s, groups.A);
#pragma unroll
      for (int g = 0; g < kGroups; ++g) {
        float base[2];
        Scores::template find_base<true>(p, g, s, base);
#pragma unroll
        for (int row = 0; row < 2; ++row) {
          if (!Weights::is_earlier(lse2, groups, g, row)) base[row] = lse2[row];
        }
        Weights::scale(p.scale_log2, g, base, s);
      }
      Weights::template exponentials<0, 32>(s, groups);
#pragma unroll
      for (int g = 0; g < kGroups; ++g) Weights::sum_over_row(groups.l[g]);
    }
    Weights::weigh_groups(lse2, s, groups);
  }
  // Sets what the rows do not see to -inf; returns Groups::earlier.
  __device__ __forceinline__ uint32_t hide(int warpgroup, int row0, bool masked,
                                           float (&s)[32]) const {
    if (masked) return mask(warpgroup, row0, s);
    if (p.padding > 0) Scores::mask_padding(p, s);
    return ~0u;
  }
  static __device__ __forceinline__ void put(uint32_t tile, const float (&s)[32]) {
    const FragmentAddress<64> address(tile, 0, warpgroup_thread());
#pragma unroll
    for (int t = 0; t < 4; ++t) {
      const float* x = s + 8 * t;
      ptx::stmatrix_x4(address(t), pack2<T>(x[0], x[1]), pack2<T>(x[2], x[3]), pack2<T>(x[4], x[5]),
                       pack2<T>(x[6], x[7]));
    }
  }
  // From exponentials to dS, with dV.
  __device__ __forceinline__ void weigh(int warpgroup, int row0, const QueryState& state, int half,
                                        Ahead& ahead, Groups& groups, float (&dp)[32],
                                        float (&dv)[kHeadDim / 2], bool started,
                                        uint32_t (&ds)[4][4]) const {
    float (&s)[32] = ahead.s[half];
    const float (&lse2)[2] = ahead.lse2[half];
    const uint32_t zero = Weights::zero_behind(groups);
    if constexpr (kSettlesEarly) {
      settle(warpgroup, state, row0, half, ahead.masked, lse2, s, groups);
    }
    if (half == 0) {
      // dP takes the registers that dQ is still being added from: not before the exponentials.
      dout_pipe.wait(state, zero);
      issue_dp(warpgroup, state, 0, dp);
      ptx::mbarrier_wait(smem + kWeightsBarrier + 8 * warpgroup, state.parity() ^ 1);
    }
    const float delta[2] = {stat(Traits::kDelta, state, half, 0),
                            stat(Traits::kDelta, state, half, 1)};
    if constexpr (!kSettlesEarly) {
      settle(warpgroup, state, row0, half, ahead.masked, lse2, s, groups);
    }
    put(weights_of(warpgroup, half), s);
    ptx::fence_async_proxy();
    meet(warpgroup);
    issue_sum(weights_of(warpgroup, half), Traits::kDout, state, half, dv, started || half > 0);
    if (half + 1 == kHalves) ahead.place = load_place(warpgroup);
    wgmma_wait<1>();
    Weights::differentiate(lse2, delta, s, dp, groups, ds);
  }

  // dV and dK of a block whose scores are there.
  template <class Share>
  __device__ __forceinline__ void add_block(int warpgroup, int m, const QueryState& state,
                                            Ahead& ahead, float (&dk)[kHeadDim / 2],
                                            float (&dv)[kHeadDim / 2], bool started,
                                            Share&& share) const {
    constexpr uint32_t kBuffers = Traits::kDsBuffers;
    const uint32_t buffer =
        kBuffers == Traits::kStages ? state.stage() : ds_buffer(state) % kBuffers;
    float dp[32];
    uint32_t ds[4][4];
#pragma unroll
    for (int half = 0; half < kHalves; ++half) {
      const int row0 = m * kBlockM + half * 64;
      Groups groups;
      begin_weighing(warpgroup, row0, ahead.masked, ahead.lse2[half], ahead.s[half], groups);
      Weights::template exponentials<0, 32>(ahead.s[half], groups);
      weigh(warpgroup, row0, state, half, ahead, groups, dp, dv, started, ds);
      share(half, ds);
      meet(warpgroup);
      issue_sum(ds_of(warpgroup, buffer, half), Traits::kQ, state, half, dk, started || half > 0);
      if (half + 1 < kHalves) issue_dp(warpgroup, state, half + 1, dp);
    }
  }

  // Scores of the next block go in front of dK and dQ of this one, and half of its exponentials are
  // made under them. Between two steps nothing runs: the compiler follows products no further.
  __device__ __forceinline__ void early_steps(int warpgroup, const typename Base::Turn& turn,
                                              QueryState& state, float (&dk)[kHeadDim / 2],
                                              float (&dv)[kHeadDim / 2]) const {
    static_assert(kHalves == 1 && Traits::kDsBuffers == 3 && Traits::kStages == 3);
    const uint32_t ds_barrier = smem + Base::kDsBarrier;
    const auto last_buffer = [&] { return state.stage() == 0 ? 2 : state.stage() - 1; };
    int m = turn.first;
    bool started = false;
    float dq[32], dp[32];
    uint32_t ds[4][4];
    Ahead ahead;
    Groups groups;
    q_pipe.wait(state);
    issue_ahead(warpgroup, state, ahead);
    ahead.masked = needs_mask(warpgroup, m);
    wgmma_wait<0>();
    begin_weighing(warpgroup, m * 64, ahead.masked, ahead.lse2[0], ahead.s[0], groups);
    Weights::template exponentials<0, kEarlyExponentials>(ahead.s[0], groups);
    for (int left = turn.steps; left > 0; --left) {
      Weights::template exponentials<kEarlyExponentials, 32>(ahead.s[0], groups);
      weigh(warpgroup, m * 64, state, 0, ahead, groups, dp, dv, started, ds);
      const QueryState last = state;
      const uint32_t buffer = state.stage(), buffer_before = last_buffer();
      state.advance();
      // After the last block the scores are those of stale data, and ignored.
      if (left > 1) q_pipe.wait(state);
      issue_ahead(warpgroup, state, ahead);
      ptx::mbarrier_wait(ds_barrier, last.parity() ^ 1);
      share_ds(warpgroup, buffer, 0, ds);
      ptx::fence_async_proxy();
      __syncwarp();
      if (threadIdx.x % 32 == 0) ptx::mbarrier_arrive(ds_barrier);
      meet(warpgroup);
      issue_sum(ds_of(warpgroup, buffer, 0), Traits::kQ, last, 0, dk, started);
      issue_dq(warpgroup, buffer_before, dq);
      float* to = this->dq_of(warpgroup, next_place(warpgroup, ahead, m));
      wgmma_wait<2>();
      begin_weighing(warpgroup, m * 64, ahead.masked, ahead.lse2[0], ahead.s[0], groups);
      Weights::template exponentials<0, kEarlyExponentials>(ahead.s[0], groups);
      wgmma_wait<1>();
      release_block(warpgroup, last);
      wgmma_wait<0>();
      if (started) this->add_dq(to, dq);
      started = true;
    }
    ptx::mbarrier_wait(ds_barrier, state.parity() ^ 1);
    issue_dq(warpgroup, last_buffer(), dq);
    wgmma_wait<0>();
    const int2 bounds = ptx::load_shared_int2(aside(warpgroup) + 24);
    const int block = ptx::load_shared_4(aside(warpgroup) + 12);
    this->add_dq(
        this->dq_of(warpgroup, m > bounds.x ? block - 1 : block - 1 - this->blocks_between(bounds)),
        dq);
  }
  __device__ __forceinline__ void fused_steps(int warpgroup, const typename Base::Turn& turn,
                                              QueryState& state, float (&dk)[kHeadDim / 2],
                                              float (&dv)[kHeadDim / 2]) const {
    if constexpr (Traits::kEarly) {
      early_steps(warpgroup, turn, state, dk, dv);
    } else {
      Base::fused_steps(warpgroup, turn, state, dk, dv);
    }
  }
  static constexpr int kEarlyExponentials = 16;

  template <class State>
  static __device__ __forceinline__ uint32_t ds_buffer(const State& state) {
    if constexpr (Traits::kDsBuffers == Traits::kStages) {
      return state.stage();
    } else {
      return state.step;
    }
  }
};

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, 1)
    landmark_bwd_sm90_kernel(const __grid_constant__ typename Traits::Params p) {
  extern __shared__ __align__(1024) char aligned[];
  run_bwd<LandmarkBwdKernel<Traits>>(p, aligned);
}

}  // namespace lctx::cuda
