// Math: tiles of the last round in parts of their keys: out = sum_s w_s out_s / sum_s w_s,
//       w_s = exp(lse_s - max lse), lse = max lse + log sum_s w_s, over the parts s in their order.
// Tile map: where few tiles are left when every multiprocessor has had as many as the others, each
//       of them is dealt to several in equal ranges of keys (TailPlan). Merge: a warp a row.
// Pipeline: three launches that overlap at their ends (programmatic dependent launch): whole
//       tiles, parts, merge. Always the same sums in the same order.
// Memory: fp32 partial rows of a part for each multiprocessor at most, and their lse.
// Limits: masks under which all tiles have the same keys; those of attn_fwd_sm90.cuh.
#pragma once

#include <algorithm>

#include "attn_fwd_rows.cuh"

namespace lctx::cuda {

constexpr int kTailParts = 8;  // most of a tile

struct TailPlan {
  int tiles = 0, parts = 0, blocks = 0;  // tiles in parts, parts of each, blocks of keys of a part

  // `num_tiles` tiles of `num_blocks` blocks each.
  TailPlan() = default;
  TailPlan(int64_t num_tiles, int64_t num_blocks, int num_sms) {
    constexpr int64_t kLeast = 3;  // blocks of keys that a part's end is worth
    const int left = static_cast<int>(num_tiles % num_sms);
    if (left == 0 || num_tiles < num_sms) return;
    const int64_t most = std::min<int64_t>({kTailParts, num_sms / left, num_blocks / kLeast});
    if (most < 2) return;
    tiles = left;
    blocks = static_cast<int>(ceil_div(num_blocks, most));
    parts = static_cast<int>(ceil_div(num_blocks, blocks));
  }

  int64_t rows(int block_m) const { return int64_t{tiles} * parts * block_m; }
  // In 32-bit words: partial rows, their lse.
  int64_t words(int block_m, int columns) const { return rows(block_m) * (columns + 1); }
};

template <int kBlockM>
struct TailTiles : DenseTiles<kBlockM> {
  struct Params {
    int whole;             // tiles that are not in parts
    int part_blocks;       // blocks of keys of a part
    FastDivisor per_tile;  // parts
  };
  static constexpr bool kSplitsKeys = true;

  template <class P>
  static __device__ __forceinline__ Work find(const P& p, int index) {
    const int tile = p.per_tile.divide(index);
    Work work = DenseTiles<kBlockM>::find(p, p.whole + tile);
    work.slot = index;
    work.block_begin = (index - tile * p.per_tile.divisor) * p.part_blocks;
    work.block_end = work.block_begin + p.part_blocks;
    return work;
  }
};

// FwdParams::lse is (slots, kBlockM).
struct TailRows : StoreRows {
  struct Params {
    float* partial;  // (slots, kBlockM, kValueDim)
  };
  static constexpr bool kFollows = true;

  template <class Kernel>
  static __device__ __forceinline__ float* lse(const Kernel& kernel, const Work& work, int row) {
    return kernel.p.lse + work.slot * Kernel::Traits::kBlockM + row - work.row0;
  }

  template <class Kernel>
  static __device__ __forceinline__ void finish(const Kernel& kernel, int warpgroup,
                                                const Work& work, float (&o)[Kernel::kValueDim / 2],
                                                const float (&inverse)[2]) {
    const int thread = warpgroup_thread();
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int row = work.slot * Kernel::Traits::kBlockM + warpgroup * 64 + fragment_row(thread);
      float* to =
          kernel.p.partial + int64_t{row + 8 * i} * Kernel::kValueDim + fragment_column(thread);
#pragma unroll
      for (int j = 0; j < Kernel::kValueDim / 8; ++j) {
        *reinterpret_cast<float2*>(to + 8 * j) =
            make_float2(o[4 * j + 2 * i] * inverse[i], o[4 * j + 2 * i + 1] * inverse[i]);
      }
    }
  }
};

struct TailMerge {
  const float *partial, *partial_lse;
  TensorView out;
  float* lse;
  TileOrder order;
  int whole, parts, Hq, Tq, D;
};

constexpr int kTailWarps = 8;

template <class Tile>
__global__ void __launch_bounds__(32 * kTailWarps)
    tail_merge_kernel(const __grid_constant__ TailMerge p) {
  using T = typename Tile::T;
  constexpr int kRows = Tile::kBlockM, kColumns = Tile::kValueDim;
  constexpr int kVectors = kColumns > 128 ? 2 : 1;
  const int lane = threadIdx.x % 32;
  const int of_all = blockIdx.x * kTailWarps + threadIdx.x / 32;  // rows of the tiles in parts
  const int number = of_all / kRows, row = of_all % kRows;
  const TileOrder::Tile tile = p.order[p.whole + number];
  const int64_t position = tile.m_block * kRows + row;
  if (position >= p.Tq) return;
  const int64_t first = int64_t{number} * p.parts * kRows + row;

  ptx::grid_dependency_wait();
  const float lse = lane < p.parts ? p.partial_lse[first + lane * kRows] : -INFINITY;
  float4 x[kTailParts][kVectors];
#pragma unroll
  for (int s = 0; s < kTailParts; ++s) {
#pragma unroll
    for (int c = 0; c < kVectors; ++c) {
      const int column = lane * 4 + c * 128;
      if (s < p.parts && column < p.D) {
        x[s][c] =
            *reinterpret_cast<const float4*>(p.partial + (first + s * kRows) * kColumns + column);
      }
    }
  }
  float top = lse;
#pragma unroll
  for (int step = kTailParts / 2; step > 0; step /= 2) {
    top = fmaxf(top, __shfl_xor_sync(~0u, top, step));
  }
  float weight = expf(lse - top), total = weight;  // every part has keys
#pragma unroll
  for (int step = kTailParts / 2; step > 0; step /= 2) total += __shfl_xor_sync(~0u, total, step);
  weight /= total;
  if (lane == 0) {
    p.lse[(int64_t{tile.batch} * p.Hq + tile.head) * p.Tq + position] = top + logf(total);
  }
  T* out = static_cast<T*>(p.out.data) + tile.batch * p.out.stride_b + position * p.out.stride_t +
           tile.head * p.out.stride_h;
#pragma unroll
  for (int c = 0; c < kVectors; ++c) {
    const int column = lane * 4 + c * 128;
    float4 sum = make_float4(0.f, 0.f, 0.f, 0.f);
#pragma unroll
    for (int s = 0; s < kTailParts; ++s) {
      const float w = __shfl_sync(~0u, weight, s);
      if (s >= p.parts) continue;
      sum.x += w * x[s][c].x;
      sum.y += w * x[s][c].y;
      sum.z += w * x[s][c].z;
      sum.w += w * x[s][c].w;
    }
    if (column < p.D) {
      *reinterpret_cast<uint2*>(out + column) =
          make_uint2(pack2<T>(sum.x, sum.y), pack2<T>(sum.z, sum.w));
    }
  }
}

}  // namespace lctx::cuda
