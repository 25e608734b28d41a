// Math: landmark attention's grouped softmax (arXiv 2305.16300, section 3.1) over uniform blocks of
//       l keys, several to a key tile. With m_g, l_g maximum and sum of exp over the ordinary keys
//       of block g, A_g = the landmark's score, or m_g for the row's own block:
//         w_g = exp(A_g - M), M the running maximum of the A_g
//         weight of key j: exp(s_j - m_g) c_g, c_g = w_g / l_g, own block: w_g
//         Z = sum of w_g, own block: w_g l_g; out = sum / Z, lse = M + log Z
// Tile map: a key tile of kBlockN columns is kBlockN / kWidth groups, one block each. A group's
//       columns end with the block's landmark, which is thus a register known at compile time; the
//       kWidth - l columns before the block are padding (zeros, masked). The keys of an incomplete
//       last block are a tile of their own: the block is group 0, the other groups are empty.
// Pipeline: exponentials are packed to 16 bits, and multiplied by c_g as pairs when P V of the
//       tile before has finished. Tiles of earlier blocks alone need no mask but the padding's.
// Memory: none. K and V come through maps (column, key of the block, block, head, batch).
// Limits: 2 <= l <= kWidth, a multiple of 8.
#pragma once

#include "attn_fwd_scores.cuh"

namespace lctx::cuda {

template <class T, int kBlockN, int kWidth>
struct LandmarkScores : PlainScores<kBlockN> {
  static constexpr int kGroups = kBlockN / kWidth;
  static constexpr int kGroupRegisters = kWidth / 2;
  // Chunks of 8 columns that may hold padding: a width serves all lengths down to the next one.
  static constexpr int kPaddedChunks = kWidth == 16 ? 2 : kWidth == 56 ? 1 : kWidth / 16;
  static constexpr bool kRescalesLate = true;
  static constexpr bool kRescalesRarely = true;  // a tile adds one number a group to the maximum
  static_assert(kBlockN % kWidth == 0 && kWidth % 8 == 0);

  struct Params {
    int block_size;
    int padding;       // kWidth - block_size
    int whole_blocks;  // blocks with a landmark
    int whole_tiles;   // tiles of whole blocks; the incomplete block is the tile after them
    FastDivisor per_block;
  };

  // The four threads of a row pair share the arithmetic that is per group and row: thread q does
  // that of row q % 2 and, where there are several groups, of every other one from q / 2 on.
  static constexpr int kShare = kGroups > 1 ? kGroups / 2 : 1;
  static_assert(kGroups == 1 || kGroups % 2 == 0);

  struct State {
    float M = kEmptyRowMax;
    float Z = 0.f;                     // this thread's groups
    uint32_t earlier;                  // bit 2 g + row: the row sees group g by its landmark
    uint32_t factor[kGroups][2];       // c_g twice, packed
    uint32_t packed[kBlockN / 16][4];  // exponentials

    // The shuffles of the sums keep the exponentials where they are (see RowState::settled).
    __device__ __forceinline__ uint32_t settled() const { return 0; }

    __device__ __forceinline__ void finish(float, float (&inverse)[2], float (&lse)[2]) const {
      const float sum = kGroups > 1 ? Z + __shfl_xor_sync(~0u, Z, 2) : Z;
      const bool empty = sum == 0.f;
      both_rows(empty ? 0.f : 1.f / sum, inverse);
      both_rows(empty ? -INFINITY : (M + log2f(sum)) * 0.69314718055994530942f, lse);
    }
  };

  static __device__ __forceinline__ bool is_second_row() { return threadIdx.x & 1; }
  static __device__ __forceinline__ bool has_odd_groups() { return threadIdx.x & 2; }

  // A value of this thread's row, for both rows.
  static __device__ __forceinline__ void both_rows(float x, float (&rows)[2]) {
    const float other = __shfl_xor_sync(~0u, x, 1);
    rows[0] = is_second_row() ? other : x;
    rows[1] = is_second_row() ? x : other;
  }

  // What positions first .. last see; a position sees no key after itself.
  template <class P>
  static __device__ __forceinline__ KeyRange range(const P& p, const Work&, int first, int last) {
    KeyRange keys;
    if (last < first || last < 0) return keys;
    const int block = p.per_block.divide(last);
    keys.end = block >= p.whole_blocks ? p.whole_tiles + 1 : block / kGroups + 1;
    keys.full_end = p.per_block.divide(max(first, 0)) / kGroups;
    return keys;
  }

  template <class P>
  static __device__ __forceinline__ KeyBlock block(const P& p, const Work&, int n) {
    const int map = ptx::opaque(n < p.whole_tiles ? 0 : 1);
    const int row = (map == 0 ? 0 : p.whole_blocks * p.block_size) - p.padding;
    return {&p.k[map], &p.v[map], row, map == 0 ? n * kGroups : 0};
  }

  // Sets the scores that a row does not see to -inf, but not those of landmarks that it sees.
  template <class P>
  static __device__ __forceinline__ void mask(const P& p, const Work&, int position0, int n,
                                              float (&s)[kBlockN / 2], State& state) {
    const int thread = warpgroup_thread();
    const bool whole = n < p.whole_tiles;
    const int block = whole ? n * kGroups : p.whole_blocks;
    const int groups = whole ? p.whole_blocks - block : 1;
    const int low = p.padding - fragment_column(thread);
    state.earlier = 0;
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      const int position = position0 + P::Tiles::position_of(p, fragment_row(thread) + 8 * row);
#pragma unroll
      for (int g = 0; g < kGroups; ++g) {
        // The row's place among the keys of the block: before, inside or behind.
        const int place = g < groups ? position - (block + g) * p.block_size : -1;
        const bool earlier = place >= p.block_size;
        if (earlier) state.earlier |= 1u << (2 * g + row);
        const int high =
            (earlier ? kWidth - 1 : min(p.padding + place, kWidth - 2)) - fragment_column(thread);
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
  }

  // The same for the padding alone.
  template <class P>
  static __device__ __forceinline__ void mask_padding(const P& p, float (&s)[kBlockN / 2]) {
    const int low = p.padding - fragment_column(warpgroup_thread());
#pragma unroll
    for (int j = 0; j < kPaddedChunks; ++j) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const bool pad = 8 * j + i < low;
#pragma unroll
        for (int g = 0; g < kGroups; ++g) {
#pragma unroll
          for (int row = 0; row < 2; ++row) {
            float& x = s[g * kGroupRegisters + 4 * j + 2 * row + i];
            x = pad ? -INFINITY : x;
          }
        }
      }
    }
  }

  // The scores of the landmarks, times scale_log2, for all four threads of a row. They leave `s`.
  template <class P>
  static __device__ __forceinline__ void take_landmarks(const P& p, float (&s)[kBlockN / 2],
                                                        float (&A)[kGroups][2]) {
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
#pragma unroll
      for (int row = 0; row < 2; ++row) {
        float& x = s[(g + 1) * kGroupRegisters - 3 + 2 * row];
        // Scaled first: a shuffle straight from an accumulator makes ptxas serialise the products.
        A[g][row] = __shfl_sync(~0u, x * p.scale_log2, 3, 4);
        x = threadIdx.x % 4 == 3 ? -INFINITY : x;
      }
    }
  }

  // m_g times scale_log2.
  template <bool kMasked, class P>
  static __device__ __forceinline__ void find_base(const P& p, int g, const float (&s)[kBlockN / 2],
                                                   float (&base)[2]) {
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      float m = kMasked ? kEmptyRowMax : -INFINITY;
#pragma unroll
      for (int j = 0; j < kWidth / 8; ++j) {
        const float* x = s + g * kGroupRegisters + 4 * j + 2 * row;
        m = fmaxf(m, fmaxf(x[0], x[1]));
      }
      base[row] = quad_max(m) * p.scale_log2;
    }
  }

  // Exponentials of a group, packed, and this thread's share of their sums.
  template <class P>
  static __device__ __forceinline__ void exponentials(const P& p, int g,
                                                      const float (&s)[kBlockN / 2],
                                                      const float (&base)[2], State& state,
                                                      float (&sum)[2]) {
    sum[0] = sum[1] = 0.f;
#pragma unroll
    for (int j = 0; j < kWidth / 8; ++j) {
#pragma unroll
      for (int row = 0; row < 2; ++row) {
        const float* x = s + g * kGroupRegisters + 4 * j + 2 * row;
        const float e0 = ptx::exp2_approx(x[0] * p.scale_log2 - base[row]);
        const float e1 = ptx::exp2_approx(x[1] * p.scale_log2 - base[row]);
        sum[row] += e0 + e1;
        const int chunk = g * (kWidth / 8) + j;  // of 8 columns
        state.packed[chunk / 2][chunk % 2 * 2 + row] = pack2<T>(e0, e1);
      }
    }
  }

  // From the A_g of both rows: the new M, the factor on what was accumulated before, and w_g of
  // this thread's groups.
  static __device__ __forceinline__ void weigh_groups(const float (&A)[kGroups][2], State& state,
                                                      float (&alpha)[2], float (&w)[kShare]) {
    float mine[kGroups], top = state.M;
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
      mine[g] = is_second_row() ? A[g][1] : A[g][0];
      top = fmaxf(top, mine[g]);
    }
    const float factor = ptx::exp2_approx(state.M - top);
#pragma unroll
    for (int h = 0; h < kShare; ++h) {
      const float a = kGroups > 1 && has_odd_groups() ? mine[2 * h + 1] : mine[2 * h];
      w[h] = ptx::exp2_approx(a - top);
    }
    state.M = top;
    state.Z *= factor;
    both_rows(factor, alpha);
  }

  // l_g of this thread's groups.
  static __device__ __forceinline__ void sum_groups(const float (&sum)[kGroups][2],
                                                    float (&l)[kShare]) {
    float mine[kGroups];
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
      const float other = is_second_row() ? sum[g][0] : sum[g][1];
      mine[g] = (is_second_row() ? sum[g][1] : sum[g][0]) + __shfl_xor_sync(~0u, other, 1);
    }
#pragma unroll
    for (int h = 0; h < kShare; ++h) {
      const float odd = mine[kGroups > 1 ? 2 * h + 1 : 0], even = mine[2 * h];
      l[h] =
          (has_odd_groups() ? odd : even) + __shfl_xor_sync(~0u, has_odd_groups() ? even : odd, 2);
    }
  }

  template <bool kMasked, class P>
  static __device__ __forceinline__ void weigh(const P& p, float (&s)[kBlockN / 2], State& state,
                                               float (&alpha)[2]) {
    if (!kMasked && p.padding > 0) mask_padding(p, s);
    float A[kGroups][2], base[kGroups][2], sum[kGroups][2], w[kShare], l[kShare];
    take_landmarks(p, s, A);
    if constexpr (kMasked) {
#pragma unroll
      for (int g = 0; g < kGroups; ++g) {
        find_base<kMasked>(p, g, s, base[g]);
#pragma unroll
        for (int row = 0; row < 2; ++row) {
          if (!(state.earlier >> (2 * g + row) & 1)) A[g][row] = base[g][row];
        }
      }
    }
    weigh_groups(A, state, alpha, w);
    // Group by group: the maximum of one under the exponentials of the one before.
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
      if constexpr (!kMasked) find_base<kMasked>(p, g, s, base[g]);
      exponentials(p, g, s, base[g], state, sum[g]);
    }
    sum_groups(sum, l);
    uint32_t factor[kShare];
#pragma unroll
    for (int h = 0; h < kShare; ++h) {
      const int bit = kGroups > 1 ? 4 * h + threadIdx.x % 4 : threadIdx.x % 2;
      const bool own = kMasked && !(state.earlier >> bit & 1);
      state.Z += own ? w[h] * l[h] : w[h];
      const float c = own ? w[h] : __fdividef(w[h], l[h]);
      factor[h] = pack2<T>(c, c);
    }
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
#pragma unroll
      for (int row = 0; row < 2; ++row) {
        state.factor[g][row] = __shfl_sync(~0u, factor[g / 2], g % 2 * 2 + row, 4);
      }
    }
  }

  template <class>
  static __device__ __forceinline__ void to_a(const float (&)[kBlockN / 2], const State& state,
                                              uint32_t (&a)[kBlockN / 16][4]) {
#pragma unroll
    for (int t = 0; t < kBlockN / 16; ++t) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int group = (2 * t + i / 2) / (kWidth / 8);
        a[t][i] = multiply2<T>(state.packed[t][i], state.factor[group][i % 2]);
      }
    }
  }
};

}  // namespace lctx::cuda
