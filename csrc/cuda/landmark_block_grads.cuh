// Math: the gradient of the scores in landmark attention over blocks of any length, in two passes;
//       names as in landmark_grads.cuh.
//       BlockSums   lam, d and W of every group and row: l and d = sum of t dP of a block by the
//                   online softmax over its tiles
//       BlockGrads  dS from them, as from the statistics of a row in dense attention
// Tile map: as landmark_blocks.cuh. BlockSums leaves out the rows' own blocks, where the vectors
//       are the row's (lse2, delta, 0).
// Pipeline: BlockSums: S and dP of a block at a time, the warpgroups in turns. BlockGrads: as
//       attn_dq_sm90.cuh, a tile's vectors being read while its products run.
// Memory: 12 bytes a group and row written once, and read once a tile.
// Limits: as landmark_blocks.cuh.
#pragma once

#include "attn_dq_sm90.cuh"
#include "landmark_blocks.cuh"
#include "landmark_bwd.h"

namespace lctx::cuda {

template <int kBlockN>
struct BlockGradsBase : BlockScores<kBlockN> {
  using Base = BlockScores<kBlockN>;
  static constexpr bool kFolds = false;
  static constexpr bool kLeavesOut = false;

  struct Params : Base::Params, DqParams {
    const int* groups;   // (B, max_tiles)
    const int2* bounds;  // (batches): of the chunk that is tiles [first_tile, end_tile)
    int batches, first_tile, end_tile;
    LandmarkVectors vectors;
  };

  // The tables of a batch.
  template <class P>
  static __device__ __forceinline__ LandmarkTile tile_of(const P& p, int first_tile, int n) {
    return p.tiles[first_tile + n];
  }
  // Of a tile of the chunk's blocks.
  template <class P>
  static __device__ __forceinline__ int group_of(const P& p, int first_tile, int n) {
    return p.groups[first_tile + min(max(n, p.first_tile), p.end_tile - 1)];
  }

  // Of the thread's first row in the vectors of group 0.
  template <class Kernel>
  static __device__ __forceinline__ int64_t vector_offset(const Kernel& kernel, int warpgroup,
                                                          const Work& work) {
    const auto& p = kernel.p;
    const int64_t head = work.batch * int64_t{p.Hq} + work.head;
    return head * p.vectors.num_groups * p.vectors.pitch + work.row0 + warpgroup * 64 +
           fragment_row(warpgroup_thread());
  }
};

template <int kBlockN>
struct BlockGrads : BlockGradsBase<kBlockN> {
  using Base = BlockGradsBase<kBlockN>;
  struct State {
    LandmarkTile tile, next;  // the next one to be entered
    int next_group;
    int64_t at;                // in the vectors of group 0
    int first_tile;            // of the batch
    float lam[2], d[2], w[2];  // of the rows and the tile's block
  };

  template <class Kernel>
  static __device__ __forceinline__ void begin(const Kernel& kernel, int warpgroup,
                                               const Work& work, State& state) {
    state.at = Base::vector_offset(kernel, warpgroup, work);
    state.first_tile = work.batch * kernel.p.max_tiles;
    const KeyRange keys = kernel.keys_of(work, work.position0 + warpgroup * 64,
                                         min(64, work.row_end - work.row0 - warpgroup * 64));
    prepare(kernel.p, max(keys.end - 1, 0), state);
  }

  template <class P>
  static __device__ __forceinline__ void prepare(const P& p, int n, State& state) {
    state.next = Base::tile_of(p, state.first_tile, n);
    state.next_group = Base::group_of(p, state.first_tile, n);
  }

  // Before the products of tile n.
  template <class Kernel>
  static __device__ __forceinline__ void enter(const Kernel& kernel, int n, State& state) {
    const auto& p = kernel.p;
    state.tile = state.next;
    const int64_t at = state.at + int64_t{state.next_group} * p.vectors.pitch;
    prepare(p, max(n - 1, 0), state);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      state.lam[i] = p.vectors.lam[at + 8 * i];
      state.d[i] = p.vectors.dsum[at + 8 * i];
      state.w[i] = p.vectors.w[at + 8 * i];
    }
  }

  static __device__ __forceinline__ bool needs_mask(const KeyRange& keys, int n,
                                                    const State& state) {
    return n >= keys.full_end || state.tile.row0 < state.tile.begin();
  }

  template <class P>
  static __device__ __forceinline__ void mask(const P& p, const Work& work, int position0, int n,
                                              float (&s)[kBlockN / 2], State& state) {
    typename Base::State rows;
    rows.tile = state.tile;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int position = position0 + fragment_row(warpgroup_thread()) + 8 * i;
      rows.earlier[i] = n < Base::row_of(p, work, position).first;
    }
    Base::mask(p, work, position0, n, s, rows);
  }

  template <bool kMasked, class Kernel>
  static __device__ __forceinline__ void differentiate(const Kernel& kernel, int,
                                                       float (&s)[kBlockN / 2],
                                                       float (&dp)[kBlockN / 2],
                                                       const State& state) {
    differentiate_scores<kBlockN>(kernel.p, s, dp, state.lam, state.d);
    const bool leaves = state.tile.has_landmark() && threadIdx.x % 4 == 3;
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      float& x = dp[kBlockN / 2 - 3 + 2 * row];
      x = leaves ? state.w[row] : x;
    }
  }
};

template <int kBlockN>
struct BlockSums : BlockGradsBase<kBlockN> {
  using Base = BlockGradsBase<kBlockN>;
  struct State : Base::State, DqRows {
    float d[2];      // this thread's share of sum e dP
    int64_t at;      // in the vectors of group 0
    int first_tile;  // of the batch
    int group;
  };

  // Tiles of the chunk's blocks that are earlier ones for some row.
  template <class P>
  static __device__ __forceinline__ KeyRange range(const P& p, const Work& work, int first,
                                                   int last) {
    KeyRange keys;
    if (last < first) return keys;
    const int2 bounds = p.bounds[work.batch];
    keys.begin = bounds.x;
    keys.end = min(Base::row_of(p, work, last).first, bounds.y);
    keys.full_end = keys.end;
    return keys;
  }

  template <class Kernel>
  static __device__ __forceinline__ void write(const Kernel& kernel, int group, const State& state,
                                               const float (&lam)[2], const float (&d)[2],
                                               const float (&w)[2]) {
    const LandmarkVectors& vectors = kernel.p.vectors;
    const int place = threadIdx.x % 4;
    if (place == 3) return;
    float* const vector = place == 0 ? vectors.lam : place == 1 ? vectors.dsum : vectors.w;
    float* const out = vector + state.at + group * vectors.pitch;
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      out[8 * row] = place == 0 ? lam[row] : place == 1 ? d[row] : w[row];
    }
  }

  // The vectors of the last row's own block, which no other row has as an earlier one.
  template <class Kernel>
  static __device__ __forceinline__ void begin(const Kernel& kernel, int warpgroup,
                                               const Work& work, int n, State& state) {
    const auto& p = kernel.p;
    state.load(kernel, warpgroup, work);
    state.at = Base::vector_offset(kernel, warpgroup, work);
    state.first_tile = work.batch * p.max_tiles;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int row = warpgroup * 64 + fragment_row(warpgroup_thread()) + 8 * i;
      state.first[i] = Base::row_of(p, work, work.position0 + row).first;
    }
    const int row = min(warpgroup * 64 + 63, work.row_end - 1 - work.row0);
    const LandmarkRow own = Base::row_of(p, work, work.position0 + row);
    prepare(p, max(n, 0), state);
    const float none[2] = {0.f, 0.f};
    const int2 bounds = p.bounds[work.batch];
    if (own.first < own.end && own.first >= bounds.x && own.first < bounds.y) {
      write(kernel, Base::group_of(p, state.first_tile, own.first), state, state.lse2, state.delta,
            none);
    }
  }

  template <class P>
  static __device__ __forceinline__ void prepare(const P& p, int n, State& state) {
    state.next = Base::tile_of(p, state.first_tile, n);
  }

  // While the products of tile n run; tile n - 1 is looked up ahead.
  template <class P>
  static __device__ __forceinline__ void enter(const P& p, int n, bool first, State& state) {
    const int begin = state.tile.begin();
    state.tile = state.next;
    state.group = Base::group_of(p, state.first_tile, n);
    prepare(p, max(n - 1, 0), state);
    if (!first && state.tile.begin() == begin) return;
    Base::start_block(n, state);
    state.d[0] = state.d[1] = 0.f;
  }

  // Takes in tile n.
  template <class P>
  static __device__ __forceinline__ void add(const P& p, float (&s)[kBlockN / 2],
                                             const float (&dp)[kBlockN / 2], State& state) {
    float alpha[2];
    Base::template weigh<true>(p, s, state, alpha);
#pragma unroll
    for (int row = 0; row < 2; ++row) state.d[row] *= alpha[row];
#pragma unroll
    for (int i = 0; i < kBlockN / 2; ++i) state.d[i / 2 % 2] += s[i] * dp[i];
  }

  // After the first tile of a block, the last one taken in.
  template <class Kernel>
  static __device__ __forceinline__ void close(const Kernel& kernel, State& state) {
    float lam[2], d[2], w[2];
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      const float l = quad_sum(state.l[row]), sum = quad_sum(state.d[row]);
      const float G = ptx::exp2_anywhere(state.landmark[row] - state.lse2[row]);
      const float base = state.m[row] * kernel.p.scale_log2 - state.landmark[row];
      const bool earlier = state.earlier[row];
      d[row] = earlier ? __fdividef(sum, l) : state.delta[row];
      w[row] = earlier ? G * (d[row] - state.delta[row]) : 0.f;
      lam[row] = earlier ? base + __log2f(l) + state.lse2[row] : state.lse2[row];
    }
    write(kernel, state.group, state, lam, d, w);
  }
};

// The pass of BlockSums: the loads and turns of the gradient, without its last product.
template <class Traits_>
struct BlockSumsKernel : DqKernel<Traits_> {
  using Traits = Traits_;
  using Base = DqKernel<Traits>;
  using Base::k_pipe;
  using Base::kBlockN;
  using Base::p;
  using Base::v_pipe;
  using typename Base::KVState;
  using typename Base::QState;
  using typename Base::Scores;
  using typename Base::State;
  using typename Base::Tiles;
  using typename Base::Turn;

  using Base::Base;

  // Whether this warpgroup has rows that see keys.
  __device__ __forceinline__ bool sees(const Work& work, int warpgroup) const {
    const int row = work.row0 + warpgroup * 64;
    const int rows = min(64, work.row_end - row);
    return row >= work.row_begin && rows > 0 && work.position0 + warpgroup * 64 + rows > 0;
  }

  __device__ __forceinline__ void consume(int warpgroup) {
    KVState k_state, v_state;
    QState q_state;
    float s[kBlockN / 2], dp[kBlockN / 2];
    State state;
    while (true) {
      const Turn turn = this->next_turn(warpgroup);
      if (turn.index >= Tiles::end(p)) break;
      const Work work = this->find_work_again(turn.index);
      if (sees(work, warpgroup)) Scores::begin(*this, warpgroup, work, turn.keys.end - 1, state);
      if (!turn.loaded) continue;
      this->wait_queries(q_state);
      this->skip(turn.right, k_state, v_state);
      for (int n = turn.keys.end - 1; !turn.empty && n >= turn.keys.begin; --n) {
        k_pipe.wait(k_state);
        this->issue_scores(warpgroup, q_state, k_state, s);
        this->issue_dp(warpgroup, q_state, v_state, dp);
        Scores::enter(p, n, n == turn.keys.end - 1, state);
        wgmma_wait<0>();
        k_pipe.release(k_state);
        k_state.advance();
        v_pipe.release(v_state);
        v_state.advance();
        if (state.tile.row0 < state.tile.begin()) {
          this->mask_block(turn.index, warpgroup, n, s, state);
        }
        Scores::add(p, s, dp, state);
        if (state.tile.row0 <= state.tile.begin()) Scores::close(*this, state);
      }
      this->release_queries(q_state);
    }
  }
};

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, 1)
    landmark_sums_sm90_kernel(const __grid_constant__ typename Traits::Params p) {
  if (is_empty_chunk(p.bounds, p.batches)) return;
  run_tiles<BlockSumsKernel<Traits>>(p);
}

}  // namespace lctx::cuda
