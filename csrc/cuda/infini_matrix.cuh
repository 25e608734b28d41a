// D x D states as operands: fp32 matrices in global memory to pairs of 16-bit tiles in shared
// memory whose sum they are (high + low), so that a product errs by the other operand alone.
#pragma once

#include "../common/feature_map.cuh"
#include "../common/ptx_words.cuh"
#include "../common/wgmma.cuh"

namespace lctx::cuda {

// The 16-bit numbers nearest to x, and to what is left of it.
template <class T>
struct SplitPair {
  uint32_t high, low;

  __device__ __forceinline__ SplitPair(float x, float y) {
    high = pack2<T>(x, y);
    const float2 rounded = unpack2<T>(high);
    low = pack2<T>(x - rounded.x, y - rounded.y);
  }
};

// factor times an accumulator of N columns, as A operand of two bf16 terms.
template <int N>
struct SplitOperand {
  uint32_t terms[2][N / 16][4];

  __device__ __forceinline__ SplitOperand(const float (&x)[N / 2], float factor) {
#pragma unroll
    for (int t = 0; t < N / 16; ++t) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int at = 8 * t + 2 * i;
        const SplitPair<__nv_bfloat16> pair(factor * x[at], factor * x[at + 1]);
        terms[0][t][i] = pair.high;
        terms[1][t][i] = pair.low;
      }
    }
  }
};

// kThreads threads share a matrix of up to kDim x kDim: kUnits units of eight columns each.
template <class T, int kDim, int kThreads>
struct MatrixUnits {
  static constexpr int kPerRow = kDim / 8, kUnits = kDim * kPerRow / kThreads;
  float4 x[kUnits][2];

  static __device__ __forceinline__ int row(int i) {
    return (threadIdx.x + i * kThreads) / kPerRow;
  }
  static __device__ __forceinline__ int unit() { return threadIdx.x % kPerRow; }

  // Zero outside D x D.
  __device__ __forceinline__ void load(const float* matrix, int D) {
#pragma unroll
    for (int i = 0; i < kUnits; ++i) {
      const bool inside = row(i) < D && unit() * 8 < D;
      const auto* from =
          reinterpret_cast<const float4*>(matrix + (inside ? row(i) * D + unit() * 8 : 0));
#pragma unroll
      for (int j = 0; j < 2; ++j) x[i][j] = inside ? from[j] : make_float4(0.f, 0.f, 0.f, 0.f);
    }
  }
  // The largest magnitude that this thread holds.
  __device__ __forceinline__ float largest() const {
    float most = 0.f;
#pragma unroll
    for (int i = 0; i < kUnits; ++i) {
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const float4& v = x[i][j];
        most = fmaxf(most, fmaxf(fmaxf(fabsf(v.x), fabsf(v.y)), fmaxf(fabsf(v.z), fabsf(v.w))));
      }
    }
    return most;
  }
  // factor * matrix to the tiles; `low` 0: only rounded.
  __device__ __forceinline__ void store(float factor, uint32_t high, uint32_t low) const {
#pragma unroll
    for (int i = 0; i < kUnits; ++i) {
      uint4 h, l;
      uint32_t* const hs[4] = {&h.x, &h.y, &h.z, &h.w};
      uint32_t* const ls[4] = {&l.x, &l.y, &l.z, &l.w};
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const float4& v = x[i][j / 2];
        const SplitPair<T> pair((j % 2 == 0 ? v.x : v.z) * factor,
                                (j % 2 == 0 ? v.y : v.w) * factor);
        *hs[j] = pair.high;
        *ls[j] = pair.low;
      }
      const int at = swizzled_unit(kDim, row(i), unit());
      ptx::store_shared_16(high + at, h);
      if (low != 0) ptx::store_shared_16(low + at, l);
    }
  }
};

// sigma of a fragment's pairs (ldmatrix_x4 of queries or keys).
template <class T, int kSteps>
struct RowFragments {
  uint32_t x[kSteps][4];  // as loaded: [t][2 half + row]: columns 16 t + 8 half + {0, 1} of a row

  template <int kRows>
  __device__ __forceinline__ void load(const FragmentAddress<kRows>& address) {
#pragma unroll
    for (int t = 0; t < kSteps; ++t) ptx::ldmatrix_x4(address(t), x[t]);
  }
  // Calls use(row 0 or 1, first register of the accumulator, first column less the thread's, word,
  // sigma). Computes sigma anew every time: there are no registers for it.
  template <class Use>
  __device__ __forceinline__ void for_pairs(Use&& use) {
#pragma unroll
    for (int t = 0; t < kSteps; ++t) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
#pragma unroll
        for (int row = 0; row < 2; ++row) {
          uint32_t& word = x[t][2 * half + row];
          word = static_cast<uint32_t>(ptx::opaque(static_cast<int>(word)));
          use(row, 8 * t + 4 * half + 2 * row, 16 * t + 8 * half, word, elu_plus_one2<T>(word));
        }
      }
    }
  }
};

// The same with sigma kept in fp32.
template <class T, int kSteps>
struct RowPairs {
  float2 s[kSteps][4];

  template <int kRows>
  __device__ __forceinline__ void load(const FragmentAddress<kRows>& address) {
#pragma unroll
    for (int t = 0; t < kSteps; ++t) {
      uint32_t x[4];
      ptx::ldmatrix_x4(address(t), x);
#pragma unroll
      for (int i = 0; i < 4; ++i) s[t][i] = elu_plus_one2<T>(x[i]);
    }
  }
  // Times the rows' weights, rounded, to where they came from.
  template <int kRows>
  __device__ __forceinline__ void store(const FragmentAddress<kRows>& address, float weight0,
                                        float weight1) const {
#pragma unroll
    for (int t = 0; t < kSteps; ++t) {
      uint32_t x[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float weight = i % 2 == 0 ? weight0 : weight1;
        x[i] = pack2<T>(s[t][i].x * weight, s[t][i].y * weight);
      }
      ptx::stmatrix_x4(address(t), x[0], x[1], x[2], x[3]);
    }
  }
  // Calls use(row 0 or 1, first register of the accumulator, first column less the thread's, pair).
  template <class Use>
  __device__ __forceinline__ void for_pairs(Use&& use) const {
#pragma unroll
    for (int t = 0; t < kSteps; ++t) {
#pragma unroll
      for (int i = 0; i < 4; ++i) use(i % 2, 8 * t + 2 * i, 16 * t + i / 2 * 8, s[t][i]);
    }
  }
};

// Sums over the 16 rows of a warp of terms that come as for_pairs gives them.
struct ColumnTerms {
  float terms[8] = {};

  // The columns whose sum this thread gets: of every 32 the one that is so far behind the first.
  static __device__ __forceinline__ int own_column() {
    const int lane = threadIdx.x % 32, i = lane / 4;
    return i / 4 * 16 + i / 2 % 2 * 8 + i % 2 + fragment_column(lane);
  }

  // Takes in two terms. After those of the last rows of 32 columns calls use(which 32, sum).
  template <class Use>
  __device__ __forceinline__ void add(int row, int column, float x, float y, Use&& use) {
    const int first = column / 8 % 4 * 2;
    terms[first] = row == 0 ? x : terms[first] + x;
    terms[first + 1] = row == 0 ? y : terms[first + 1] + y;
    if (row == 0 || first != 6) return;
#pragma unroll
    for (int n = 4; n > 0; n /= 2) {
      const bool upper = threadIdx.x & 4 * n;
#pragma unroll
      for (int i = 0; i < n; ++i) {
        const float kept = upper ? terms[i + n] : terms[i], sent = upper ? terms[i] : terms[i + n];
        terms[i] = kept + __shfl_xor_sync(~0u, sent, 4 * n);
      }
    }
    use(column / 32, terms[0]);
  }
};

}  // namespace lctx::cuda
