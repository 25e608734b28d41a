// Math: which keys a row sees in dense attention (causal, window) and how scores become weights:
//       the online softmax.
// Tile map: keys in blocks of kBlockN, counted from the first key of the tile's work.
// Pipeline: blocks that every row sees whole run without a mask (KeyRange::needs_mask).
// Memory: none.
// Limits: positions below 2^31.
#pragma once

#include "../common/online_softmax_sm90.cuh"
#include "../common/wgmma.cuh"
#include "attn_fwd_tiles.cuh"

namespace lctx::cuda {

// Blocks [begin, end) of keys that the rows of a tile see, empty if end <= begin; of these, blocks
// [full_begin, full_end) are seen whole by all of them.
struct KeyRange {
  int begin = 0, end = 0, full_begin = 0, full_end = 0;

  __device__ __forceinline__ bool needs_mask(int n) const {
    return n < full_begin || n >= full_end;
  }
};

// Where a block of keys and values is loaded from: coordinates of its first row.
struct KeyBlock {
  const CUtensorMap *k, *v;
  int row, phase;
};

// What a Scores policy does unless it says otherwise.
template <int kBlockN>
struct PlainScores {
  // Whether accumulators of several blocks of keys are folded into outer ones
  // (landmark_blocks.cuh).
  static constexpr bool kFolds = false;
  // Whether O is rescaled while the next scores are computed, not before; measured.
  static constexpr bool kRescalesLate = false;
  // Whether maxima change so rarely that looking first is cheaper than rescaling.
  static constexpr bool kRescalesRarely = false;
  // Whether a warpgroup may leave many blocks to the left that others of its tile see.
  static constexpr bool kLeavesMany = false;

  template <class State>
  static __device__ __forceinline__ bool needs_mask(const KeyRange& keys, int n, const State&) {
    return keys.needs_mask(n);
  }

  // What weigh() left in s and state, as A operand of P V.
  template <class T, class State, int N>
  static __device__ __forceinline__ void to_a(const float (&s)[N], const State&,
                                              uint32_t (&a)[N / 8][4]) {
    accumulator_to_a<T, 2 * N>(s, a);
  }
};

template <int kBlockN, bool kWindowed = true>
struct DenseScores : PlainScores<kBlockN> {
  struct Params {};
  using State = RowState;

  // What positions first .. last see.
  template <class P>
  static __device__ __forceinline__ KeyRange range(const P& p, const Work& work, int first,
                                                   int last) {
    const int num_keys = work.num_keys;
    int high = p.causal ? min(last, num_keys - 1) : num_keys - 1, low = 0;
    if (kWindowed && p.window > 0) {
      high = min(high, last + p.window - 1);
      low = max(low, first - p.window + 1);
    }
    KeyRange keys;
    keys.begin = low / kBlockN;
    keys.end = high < 0 || last < first ? 0 : high / kBlockN + 1;
    int full_high = p.causal ? min(first, num_keys - 1) : num_keys - 1, full_low = 0;
    if (kWindowed && p.window > 0) {
      full_high = min(full_high, first + p.window - 1);
      full_low = max(full_low, last - p.window + 1);
    }
    keys.full_begin = (full_low + kBlockN - 1) / kBlockN;
    keys.full_end = full_high < 0 ? 0 : (full_high + 1) / kBlockN;
    return keys;
  }

  template <class P>
  static __device__ __forceinline__ KeyBlock block(const P& p, const Work& work, int n) {
    const int map = ptx::opaque(work.map);
    return {&p.k[map], &p.v[map], work.key0 + n * kBlockN, work.phase};
  }

  // Sets the scores that a row does not see to -inf. Fragment row 0 sits at `position0`.
  template <class P, int N>
  static __device__ __forceinline__ void mask(const P& p, const Work& work, int position0, int n,
                                              float (&s)[N], State&) {
    const int thread = warpgroup_thread();
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      const int position = position0 + P::Tiles::position_of(p, fragment_row(thread) + 8 * row);
      int high = p.causal ? min(position, work.num_keys - 1) : work.num_keys - 1, low = 0;
      if (kWindowed && p.window > 0) {
        high = min(high, position + p.window - 1);
        low = max(low, position - p.window + 1);
      }
      // Relative to this thread's first column, so that the loop compares with constants.
      high -= n * kBlockN + fragment_column(thread);
      low -= n * kBlockN + fragment_column(thread);
#pragma unroll
      for (int j = 0; j < N / 4; ++j) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          if (8 * j + i > high || 8 * j + i < low) s[4 * j + 2 * row + i] = -INFINITY;
        }
      }
    }
  }

  // Scores -> weights. `kMasked`: mask() ran on them. Returns in alpha the factor on what was
  // accumulated before.
  template <bool kMasked, class P, int N>
  static __device__ __forceinline__ void weigh(const P& p, float (&s)[N], State& state,
                                               float (&alpha)[2]) {
    state.template update<2 * N>(s, p.scale_log2, alpha);
  }
  // The same; calls between() when alpha and the weights of kFirst / 8 of the columns are known.
  template <int kFirst, class P, class Between>
  static __device__ __forceinline__ void weigh_in_two(const P& p, float (&s)[kBlockN / 2],
                                                      State& state, float (&alpha)[2],
                                                      Between&& between) {
    state.template update<kBlockN, kFirst>(s, p.scale_log2, alpha, between);
  }
};

}  // namespace lctx::cuda
