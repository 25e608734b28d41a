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
#include "landmark_grads.cuh"

namespace lctx::cuda {

// Whole blocks, 128 / kWidth of them a tile; the keys of an incomplete last one are a tile of their
// own.
template <int kWidth>
struct UniformGroupKeys {
  struct Params {
    int block_size;
    int padding;       // kWidth - block_size
    int whole_blocks;  // blocks with a landmark
    int whole_tiles;   // tiles of whole blocks
  };
  static constexpr bool kStrided = false, kPadded = true;
  static constexpr int kGroups = 128 / kWidth;

  template <class P>
  static __device__ __forceinline__ int first_block(const P& p, const KeyWork& work) {
    return work.map == 0 ? work.piece * kGroups : p.whole_blocks;
  }

  template <class P>
  static __device__ __forceinline__ KeyWork find(const P& p, int index) {
    const TileOrder::Tile tile = p.order[index];
    KeyWork work;
    work.head = tile.head;
    work.batch = tile.batch;
    set_heads(p, work);
    work.piece = tile.m_block;
    work.map = ptx::opaque(tile.m_block < p.whole_tiles ? 0 : 1);
    work.key0 = first_block(p, work) * p.block_size;
    work.key_end = p.Tk;
    work.query_begin = 0;
    work.query_end = p.Tq;
    work.shift = p.query_offset;
    return work;
  }

  // Coordinates of the tile in its map: of whole blocks (key of the block, block), else (key, 0).
  template <class P>
  static __device__ __forceinline__ int2 keys_at(const P& p, const KeyWork& work) {
    return work.map == 0 ? make_int2(-p.padding, work.piece * kGroups)
                         : make_int2(work.key0 - p.padding, 0);
  }
};

template <int kWidth>
struct StoreUniformGroups {
  struct Params {};
  static constexpr bool kPrefetches = false, kReadsKeys = false;

  template <class Kernel, int N>
  static __device__ __forceinline__ void finish(const Kernel& kernel, int warpgroup,
                                                const KeyWork& work, const float (&dk)[N],
                                                const float (&dv)[N]) {
    const auto& p = kernel.p;
    const int key_end = work.map == 0 ? p.whole_blocks * p.block_size : p.Tk;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int row = warpgroup * 64 + fragment_row(warpgroup_thread()) + 8 * i;
      const int column = row % kWidth - p.padding;
      const int key = work.key0 + row / kWidth * p.block_size + column;
      const bool exists = column >= 0 && key < key_end;
      StoreKeys::store_row(kernel, work, key, exists, dv, i, 1.f, p.dv);
      StoreKeys::store_row(kernel, work, key, exists, dk, i, p.scale, p.dk);
    }
  }
};

template <class T_, int kHeadDim_, int kWidth_>
struct LandmarkFusedTile : BwdTile<T_, kHeadDim_, /*fused=*/true> {
  using Base = BwdTile<T_, kHeadDim_, true>;
  using Base::kBlockM, Base::kHalves, Base::kStages, Base::kConsumers;
  static constexpr int kWidth = kWidth_;
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
  using Scores = LandmarkGrads<T, 64, kWidth, /*kByLandmark=*/false>;

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
    return {ptx::load_shared_int2(aside(warpgroup) + 24), ptx::load_shared_int2(aside(warpgroup) + 16),
            ptx::load_shared_4(aside(warpgroup) + 12)};
  }
  // Steps on; returns the block of dq_sum of the step before this one.
  __device__ __forceinline__ int next_place(int warpgroup, const Place& place, int& m) const {
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
    return last;
  }

  struct Ahead {
    float s[kHalves][32];
    float lse2[kHalves][2];
    Place place;
    bool masked;
  };
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

  // What is known of the groups before dP. Nothing of a row but its sums crosses threads, so that
  // all four of a row do its arithmetic: a shuffle waits while products read shared memory.
  struct Groups {
    uint32_t earlier;     // bit 2 g + row: the row sees group g by its landmark
    float A[kGroups][2];  // score of the landmark
    float l[kGroups][2];  // sum of exponentials, at first this thread's share
    float G[kGroups][2];
  };
  // Several groups are settled before dP is issued, or there are no registers.
  static constexpr bool kSettlesEarly = kGroups > 1;
  static constexpr float kLeastSum = 1e-20f, kMostSum = 1e30f, kLeastG = 1e-30f;

  static __device__ __forceinline__ void sum_over_row(float (&x)[2]) {
#pragma unroll
    for (int step = 1; step < 4; step *= 2) {
#pragma unroll
      for (int row = 0; row < 2; ++row) x[row] += __shfl_xor_sync(~0u, x[row], step);
    }
  }

  // S of a group -> exponentials relative to `base`.
  static __device__ __forceinline__ void exponentials(float scale_log2, int g,
                                                      const float (&base)[2], float (&s)[32],
                                                      float (&l)[2]) {
    float sum[2][2] = {};
#pragma unroll
    for (int j = 0; j < kGroupRegisters; ++j) {
      float& x = s[g * kGroupRegisters + j];
      x = x * scale_log2 - base[j / 2 % 2];
    }
#pragma unroll
    for (int j = 0; j < kGroupRegisters; ++j) {
      float& x = s[g * kGroupRegisters + j];
      x = ptx::exp2_approx(x);
      sum[j / 2 % 2][j % 2] += x;
    }
    l[0] = sum[0][0] + sum[0][1];
    l[1] = sum[1][0] + sum[1][1];
  }

  // S -> exponentials relative to the rows' lse, which is what they are in the own block. Returns
  // 0, known only when all are there.
  __device__ __forceinline__ uint32_t weigh(const float (&lse2)[2], float (&s)[32],
                                            Groups& groups) const {
    Scores::take_landmarks(p, s, groups.A);
    uint32_t all = ~0u;
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
      exponentials(p.scale_log2, g, lse2, s, groups.l[g]);
      all &= __float_as_uint(groups.l[g][0]) & __float_as_uint(groups.l[g][1]);
    }
    return all == ~0u ? 1 : 0;  // that is no sum
  }
  static __device__ __forceinline__ bool is_earlier(const float (&lse2)[2], const Groups& groups,
                                                    int g, int row) {
    return (groups.earlier >> (2 * g + row) & 1) != 0 && lse2[row] < INFINITY;
  }
  static __device__ __forceinline__ bool out_of_range(const float (&lse2)[2],
                                                      const Groups& groups) {
    bool out = false;
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
#pragma unroll
      for (int row = 0; row < 2; ++row) {
        const float l = groups.l[g][row];
        out |= is_earlier(lse2, groups, g, row) && !(l > kLeastSum && l < kMostSum);
      }
    }
    return __any_sync(~0u, out);
  }
  // Exponentials -> P.
  __device__ __forceinline__ void settle(int warpgroup, const QueryState& state, int row0, int half,
                                         bool masked, const float (&lse2)[2], float (&s)[32],
                                         Groups& groups) const {
#pragma unroll
    for (int g = 0; g < kGroups; ++g) sum_over_row(groups.l[g]);
    if (__builtin_expect(out_of_range(lse2, groups), false)) {
      // Once more, relative to the groups' maxima.
      warp_scores<T, kHeadDim, kBlockM, kBlockN>(
          s, query_tile(Traits::kQ, state, half), smem + Traits::kK + warpgroup * chunk_bytes(64));
      hide(warpgroup, row0, masked, s);
      Scores::take_landmarks(p, s, groups.A);
#pragma unroll
      for (int g = 0; g < kGroups; ++g) {
        float base[2];
        Scores::template find_base<true>(p, g, s, base);
#pragma unroll
        for (int row = 0; row < 2; ++row) {
          if (!is_earlier(lse2, groups, g, row)) base[row] = lse2[row];
        }
        exponentials(p.scale_log2, g, base, s, groups.l[g]);
        sum_over_row(groups.l[g]);
      }
    }
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
      float factors[2];
#pragma unroll
      for (int row = 0; row < 2; ++row) {
        const bool earlier = is_earlier(lse2, groups, g, row);
        groups.G[g][row] = ptx::exp2_anywhere(groups.A[g][row] - lse2[row]);
        factors[row] = earlier ? __fdividef(groups.G[g][row], groups.l[g][row]) : 1.f;
      }
#pragma unroll
      for (int j = 0; j < kGroupRegisters; ++j) {
        s[g * kGroupRegisters + j] *= factors[j / 2 % 2];
      }
    }
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
      ptx::stmatrix_x4(address(t), pack2<T>(x[0], x[1]), pack2<T>(x[2], x[3]),
                       pack2<T>(x[4], x[5]), pack2<T>(x[6], x[7]));
    }
  }
  // P and dP -> dS, packed.
  __device__ __forceinline__ void differentiate(const float (&lse2)[2], const float (&delta)[2],
                                                const float (&weights)[32], float (&dp)[32],
                                                const Groups& groups,
                                                uint32_t (&ds)[4][4]) const {
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
      float sums[2][2] = {};
#pragma unroll
      for (int j = 0; j < kGroupRegisters; ++j) {
        const int at = g * kGroupRegisters + j;
        sums[j / 2 % 2][j % 2] += weights[at] * dp[at];
      }
      float sum[2] = {sums[0][0] + sums[0][1], sums[1][0] + sums[1][1]};  // G d
      sum_over_row(sum);
      float d[2], w[2];
#pragma unroll
      for (int row = 0; row < 2; ++row) {
        const bool earlier = is_earlier(lse2, groups, g, row);
        const float G = groups.G[g][row];
        // Weights below are nothing, whatever d.
        const float past = G > kLeastG ? __fdividef(sum[row], G) : 0.f;
        d[row] = earlier ? past : delta[row];
        w[row] = earlier ? sum[row] - G * delta[row] : 0.f;
      }
#pragma unroll
      for (int j = 0; j < kGroupRegisters; ++j) {
        const int at = g * kGroupRegisters + j;
        dp[at] = weights[at] * (dp[at] - d[j / 2 % 2]);
      }
#pragma unroll
      for (int row = 0; row < 2; ++row) {
        float& x = dp[(g + 1) * kGroupRegisters - 3 + 2 * row];
        x = threadIdx.x % 4 == 3 ? w[row] : x;
      }
    }
    accumulator_to_a<T, 64>(dp, ds);
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
      float (&s)[32] = ahead.s[half];
      const float (&lse2)[2] = ahead.lse2[half];
      const int row0 = m * kBlockM + half * 64;
      Groups groups;
      groups.earlier = hide(warpgroup, row0, ahead.masked, s);
      const uint32_t zero = weigh(lse2, s, groups);
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
      differentiate(lse2, delta, s, dp, groups, ds);
      share(half, ds);
      meet(warpgroup);
      issue_sum(ds_of(warpgroup, buffer, half), Traits::kQ, state, half, dk, started || half > 0);
      if (half + 1 < kHalves) issue_dp(warpgroup, state, half + 1, dp);
    }
  }
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
