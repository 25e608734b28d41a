// Math: landmark attention's grouped softmax (arXiv 2305.16300, section 3.1) over blocks of any
//       length. Inside a block p the plain online softmax (m, l, O) over its ordinary keys; a
//       finished block is folded into outer accumulators:
//         A = the landmark's score, or m for the row's own block; M' = max(M, A)
//         O_outer <- exp(M - M') O_outer + w O / l,  Z <- exp(M - M') Z + w,  w = exp(A - M')
//       (own block: w O and w l). out = O_outer / Z, lse = M + log Z.
// Tile map: a block is cut into tiles of kBlockN keys from its end, so that its landmark is the
//       last column of its last tile; the first tile may reach into the block before, which is
//       masked. Tiles are walked right to left: a block begins with its landmark and is folded when
//       the next one begins. Blocks without ordinary keys have no tiles. landmark_tables.h says
//       where a tile lies and which tiles a row sees.
// Pipeline: as attn_fwd_sm90.cuh; the fold takes the place of the rescaling of O.
// Memory: outer accumulators in shared memory, fp32, each thread its own. A table entry per tile
//       (8 bytes) and per position (8 bytes), read through L1.
// Limits: positions below 2^30.
#pragma once

#include "attn_fwd_scores.cuh"
#include "landmark_tables.h"

namespace lctx::cuda {

template <int kBlockN>
struct BlockScores : PlainScores<kBlockN> {
  static constexpr bool kFolds = true;

  struct Params {
    const LandmarkTile* tiles;  // (B, max_tiles)
    const LandmarkRow* rows;    // (B, Tk)
    int max_tiles;
  };

  struct State : RowState {  // of the block under way
    // Not held back: faster here (docs/hopper_landmark.md).
    __device__ __forceinline__ uint32_t settled() const { return 0; }

    float M[2] = {kEmptyRowMax, kEmptyRowMax};
    float Z[2] = {0.f, 0.f};
    float landmark[2] = {0.f, 0.f};  // its score times scale_log2
    float keep[2], add[2];           // O_outer <- keep O_outer + add O
    int first[2] = {0, 0};           // LandmarkRow::first of the rows
    bool earlier[2] = {false, false};
    bool closes = false;   // this tile begins another block than the one before
    bool pending = false;  // o is that of a complete block, to be folded
    LandmarkTile tile, next;
    const LandmarkTile* tiles;

    // Enters the finished block into (M, Z); what is left is to fold its O.
    __device__ __forceinline__ void close(float scale_log2) {
#pragma unroll
      for (int row = 0; row < 2; ++row) {
        const float sum = quad_sum(l[row]);
        const float A = earlier[row] ? landmark[row] : m[row] * scale_log2;
        const float top = fmaxf(M[row], A);
        const float w = ptx::exp2_approx(A - top);
        keep[row] = ptx::exp2_approx(M[row] - top);
        add[row] = earlier[row] ? __fdividef(w, sum) : w;
        Z[row] = Z[row] * keep[row] + (earlier[row] ? w : w * sum);
        M[row] = top;
      }
    }

    __device__ __forceinline__ void finish(float scale_log2, float (&inverse)[2], float (&lse)[2]) {
      close(scale_log2);
#pragma unroll
      for (int row = 0; row < 2; ++row) {
        const bool empty = Z[row] == 0.f;
        inverse[row] = empty ? 0.f : 1.f / Z[row];
        lse[row] = empty ? -INFINITY : (M[row] + log2f(Z[row])) * 0.69314718055994530942f;
      }
    }
  };

  template <class P>
  static __device__ __forceinline__ LandmarkRow row_of(const P& p, const Work& work, int position) {
    if (position < 0) return {0, 0};
    return p.rows[work.batch * int64_t{p.Tk} + min(position, p.Tk - 1)];
  }

  template <class P>
  static __device__ __forceinline__ KeyRange range(const P& p, const Work& work, int first,
                                                   int last) {
    KeyRange keys;
    if (last < first) return keys;
    keys.end = row_of(p, work, last).end;
    keys.full_end = row_of(p, work, first).first;
    return keys;
  }

  template <class P>
  static __device__ __forceinline__ KeyBlock block(const P& p, const Work& work, int n) {
    const int row = p.tiles[work.batch * int64_t{p.max_tiles} + n].row0;
    return {&p.k[0], &p.v[0], row, 0};
  }

  static __device__ __forceinline__ bool needs_mask(const KeyRange& keys, int n,
                                                    const State& state) {
    return n >= keys.full_end || state.tile.row0 < state.tile.begin();
  }

  static __device__ __forceinline__ void start_block(int n, State& state) {
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      state.m[row] = kEmptyRowMax;
      state.l[row] = 0.f;
      state.earlier[row] = n < state.first[row];
    }
  }

  // A thread's outer accumulators: four at a time, the threads of a warpgroup side by side.
  template <class Kernel>
  static __device__ __forceinline__ float4* outer(const Kernel& kernel, int warpgroup) {
    const uint32_t first =
        kernel.smem + Kernel::Traits::kOuter + warpgroup * 64 * Kernel::kValueDim * 4;
    return static_cast<float4*>(__cvta_shared_to_generic(first)) + warpgroup_thread();
  }

  // Before tile n, the first of the walk.
  template <class Kernel>
  static __device__ __forceinline__ void begin(const Kernel& kernel, int warpgroup,
                                               const Work& work, int n, State& state) {
    const auto& p = kernel.p;
    const int thread = warpgroup_thread();
    state.tiles = p.tiles + work.batch * int64_t{p.max_tiles};
    state.tile = state.tiles[n];
    state.next = state.tiles[max(n - 1, 0)];
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      const int position = work.position0 + warpgroup * 64 + fragment_row(thread) + 8 * row;
      state.first[row] = row_of(p, work, position).first;
    }
    start_block(n, state);
    float4* const at = outer(kernel, warpgroup);
#pragma unroll
    for (int j = 0; j < Kernel::kValueDim / 8; ++j) {
      at[j * 128] = make_float4(0.f, 0.f, 0.f, 0.f);
    }
  }

  // Before tile n, any other.
  static __device__ __forceinline__ void enter(int n, State& state) {
    state.closes = state.next.begin() != state.tile.begin();
    state.tile = state.next;
    state.next = state.tiles[max(n - 1, 0)];
  }

  // The same, once the products of tile n are on their way.
  template <class P>
  static __device__ __forceinline__ void turn(const P& p, int n, State& state) {
    state.pending = state.closes;
    if (!state.closes) return;
    state.close(p.scale_log2);
    start_block(n, state);
  }

  // Sets the scores that a row does not see to -inf.
  template <class P>
  static __device__ __forceinline__ void mask(const P&, const Work&, int position0, int,
                                              float (&s)[kBlockN / 2], State& state) {
    const int thread = warpgroup_thread();
    const int column0 = state.tile.row0 + fragment_column(thread);
    const int low = state.tile.begin() - column0;
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      const int position = position0 + fragment_row(thread) + 8 * row;
      const int high = state.earlier[row] ? kBlockN : position - column0;
#pragma unroll
      for (int j = 0; j < kBlockN / 8; ++j) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          if (8 * j + i > high || 8 * j + i < low) s[4 * j + 2 * row + i] = -INFINITY;
        }
      }
    }
  }

  template <bool kMasked, class P>
  static __device__ __forceinline__ void weigh(const P& p, float (&s)[kBlockN / 2], State& state,
                                               float (&alpha)[2]) {
    const bool leaves = state.tile.has_landmark() && threadIdx.x % 4 == 3;
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      float& x = s[kBlockN / 2 - 3 + 2 * row];
      // Scaled first: a shuffle straight from an accumulator makes ptxas serialise the products.
      const float score = __shfl_sync(~0u, x * p.scale_log2, 3, 4);
      if (state.tile.has_landmark()) state.landmark[row] = score;
      x = leaves ? -INFINITY : x;
    }
    state.template update<kBlockN>(s, p.scale_log2, alpha);
  }

  // Folds o if its block is complete, else scales it to the new maximum. Returns whether it folded.
  template <class Kernel, int N>
  static __device__ __forceinline__ bool fold(const Kernel& kernel, int warpgroup, float (&o)[N],
                                              const float (&alpha)[2], State& state) {
    if (!state.pending) {
      scale_rows<2 * N>(o, alpha);
      return false;
    }
    float4* const at = outer(kernel, warpgroup);
#pragma unroll
    for (int j = 0; j < N / 4; ++j) {
      float4 x = at[j * 128];
      x.x = x.x * state.keep[0] + o[4 * j] * state.add[0];
      x.y = x.y * state.keep[0] + o[4 * j + 1] * state.add[0];
      x.z = x.z * state.keep[1] + o[4 * j + 2] * state.add[1];
      x.w = x.w * state.keep[1] + o[4 * j + 3] * state.add[1];
      at[j * 128] = x;
    }
    return true;
  }

  // After the last product: the last block's fold, into o.
  template <class Kernel, int N>
  static __device__ __forceinline__ void complete(const Kernel& kernel, int warpgroup,
                                                  float (&o)[N], const State& state) {
    float4* const at = outer(kernel, warpgroup);
#pragma unroll
    for (int j = 0; j < N / 4; ++j) {
      const float4 x = at[j * 128];
      o[4 * j] = x.x * state.keep[0] + o[4 * j] * state.add[0];
      o[4 * j + 1] = x.y * state.keep[0] + o[4 * j + 1] * state.add[0];
      o[4 * j + 2] = x.z * state.keep[1] + o[4 * j + 2] * state.add[1];
      o[4 * j + 3] = x.w * state.keep[1] + o[4 * j + 3] * state.add[1];
    }
  }
};

// Row blocks of the whole sequence, kParts tiles of kColumns value columns each.
template <int kBlockM, int kParts, int kColumns>
struct ValuePartTiles : DenseTiles<kBlockM> {
  template <class P>
  static __device__ __forceinline__ Work find(const P& p, int index) {
    Work work = DenseTiles<kBlockM>::find(p, index);
    work.column = work.head % kParts * kColumns;
    work.head /= kParts;
    return work;
  }
};

}  // namespace lctx::cuda
