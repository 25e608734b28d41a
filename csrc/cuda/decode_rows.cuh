// A few rows of queries over ranges of keys and values, on the cores of a cluster of thread blocks:
// what landmark_decode and infini_decode share. The keys are so few that all of them are on the way
// at once; scores stay in shared memory between the two passes.
#pragma once

#include <cooperative_groups.h>

#include <algorithm>

#include "../common/dtype.cuh"
#include "../common/feature_map.cuh"
#include "../common/launch.h"
#include "../common/math.cuh"
#include "../common/ptx.cuh"
#include "cuda_backend.h"

namespace lctx::cuda {

constexpr int kDecodeWarps = 8, kDecodeThreads = 32 * kDecodeWarps;
constexpr int kDecodeLoads = 4;  // of 16 bytes that a lane has on the way, keys and values each
constexpr int kDecodeClusterMost = 8;  // thread blocks
constexpr int kDecodeSharedMost = 224 * 1024;

// kLanes lanes of a warp, 8 columns each, read a key; kRows rows of queries at most.
template <class T_, int kLanes_, int kRows_>
struct DecodeTile {
  using T = T_;
  static constexpr int kLanes = kLanes_, kRows = kRows_;
  static constexpr int kColumns = 8 * kLanes, kSub = 32 / kLanes, kPiece = kSub * kDecodeLoads;
};

// Neighbouring keys. A row at position t sees the first min(visible + t, values) of them; a last
// one without a value is the landmark, whose score is the weight of all.
struct KeyRange {
  const void *k, *v;
  int64_t stride_k, stride_v;
  int keys, values, visible, slot;  // the scores' place among those of all ranges
  int query;                        // which of the prepared queries meets these keys
};

// Where things lie in shared memory, in floats; the ranges come first.
struct DecodeLayout {
  int queries, scores, slots, tops, factors, sums, result, row_lse, held, floats;
  int ranges;

  DecodeLayout() = default;
  __host__ __device__ DecodeLayout(int rows, int columns, int num_ranges, int num_queries,
                                   int num_slots)
      : slots(num_slots), ranges(num_ranges) {
    queries = static_cast<int>(sizeof(KeyRange) / sizeof(float)) * num_ranges;
    queries = (queries + 3) / 4 * 4;
    scores = queries + num_queries * rows * columns;
    tops = scores + rows * num_slots;
    factors = tops + rows * num_ranges;
    sums = (factors + rows * num_ranges + 3) / 4 * 4;
    result = sums + kDecodeWarps * rows * columns;
    held = result + rows * columns;
    row_lse = held + rows * columns;
    floats = row_lse + rows;
  }
  int64_t bytes() const { return int64_t{4} * floats; }
};

__device__ __forceinline__ float warp_max(float x) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) x = fmaxf(x, __shfl_xor_sync(~0u, x, step));
  return x;
}

__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) x += __shfl_xor_sync(~0u, x, step);
  return x;
}

template <class Tile>
struct DecodeBlock {
  using T = typename Tile::T;
  static constexpr int kRows = Tile::kRows, kColumns = Tile::kColumns;
  float* shared;
  DecodeLayout at;
  int D, warp, lane, column, sub;  // the lane's first column, its key among those of a load

  __device__ DecodeBlock(float* memory, const DecodeLayout& layout, int head_dim)
      : shared(memory), at(layout), D(head_dim) {
    warp = threadIdx.x / 32;
    lane = threadIdx.x % 32;
    column = lane % Tile::kLanes * 8;
    sub = lane / Tile::kLanes;
  }

  __device__ KeyRange& range(int i) { return reinterpret_cast<KeyRange*>(shared)[i]; }
  __device__ float* query(int i, int row) {
    return shared + at.queries + (i * kRows + row) * kColumns;
  }

  // The warp's pieces of all ranges, dealt round robin.
  struct Cursor {
    int range, piece;
  };
  __device__ Cursor settle(Cursor c) {
#pragma unroll 1
    for (; c.range < at.ranges; ++c.range) {
      const int pieces = (range(c.range).keys + Tile::kPiece - 1) / Tile::kPiece;
      if (c.piece < pieces) break;
      c.piece -= pieces;
    }
    return c;
  }
  __device__ Cursor first() { return settle({0, warp}); }
  __device__ Cursor next(Cursor c) { return settle({c.range, c.piece + kDecodeWarps}); }
  __device__ bool exists(Cursor c) const { return c.range < at.ranges; }

  __device__ void load(Cursor c, bool values, uint4 (&x)[kDecodeLoads]) {
    const KeyRange& r = range(c.range);
    const T* data = static_cast<const T*>(values ? r.v : r.k) + column;
    const int64_t stride = values ? r.stride_v : r.stride_k;
    const int last = (values ? r.values : r.keys) - 1;
#pragma unroll
    for (int l = 0; l < kDecodeLoads; ++l) {
      const int key = min(c.piece * Tile::kPiece + l * Tile::kSub + sub, last);
      x[l] = column < D ? *reinterpret_cast<const uint4*>(data + key * stride)
                        : make_uint4(0, 0, 0, 0);
    }
  }

  __device__ static void unpack(const uint4& x, float (&y)[8]) {
    const uint32_t words[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 pair = unpack2<T>(words[i]);
      y[2 * i] = pair.x;
      y[2 * i + 1] = pair.y;
    }
  }

  // Sum over the lanes of a key of the products with a row's columns.
  __device__ static float dot(const float* row, const uint4& x) {
    const float4 a = *reinterpret_cast<const float4*>(row);
    const float4 b = *reinterpret_cast<const float4*>(row + 4);
    float y[8];
    unpack(x, y);
    float sum = a.x * y[0] + a.y * y[1] + a.z * y[2] + a.w * y[3] + b.x * y[4] + b.y * y[5] +
                b.z * y[6] + b.w * y[7];
#pragma unroll
    for (int step = Tile::kLanes / 2; step > 0; step /= 2) {
      sum += __shfl_xor_sync(~0u, sum, step);
    }
    return sum;
  }

  __device__ void score(Cursor c, const uint4 (&x)[kDecodeLoads], int rows) {
    const KeyRange& r = range(c.range);
    float* scores = shared + at.scores + r.slot;
#pragma unroll 1
    for (int row = 0; row < rows; ++row) {
      const float* q = query(r.query, row) + column;
#pragma unroll
      for (int l = 0; l < kDecodeLoads; ++l) {
        const float sum = dot(q, x[l]);
        const int key = c.piece * Tile::kPiece + l * Tile::kSub + sub;
        if (column == 0 && key < r.keys) scores[row * at.slots + key] = sum;
      }
    }
  }

  // Scores, which are log2 of weights, to weights inside of their range; what all ranges weigh.
  // position(row): t of the row.
  template <class Position>
  __device__ void normalize(int rows, const Position& position) {
    float *tops = shared + at.tops, *factors = shared + at.factors;
#pragma unroll 1
    for (int i = warp; i < rows * at.ranges; i += kDecodeWarps) {
      const int row = i / at.ranges, n = i - row * at.ranges;
      const KeyRange& r = range(n);
      float* scores = shared + at.scores + row * at.slots + r.slot;
      const int seen = min(r.visible + position(row), r.values);
      float top = -INFINITY, sum = 0.f;
#pragma unroll 1
      for (int j = lane; j < seen; j += 32) top = fmaxf(top, scores[j]);
      top = warp_max(top);
      const float gate = r.keys > r.values ? scores[r.values] : 0.f;
#pragma unroll 1
      for (int j = lane; j < r.values; j += 32) {
        const float weight = j < seen ? ptx::exp2_anywhere(scores[j] - top) : 0.f;
        scores[j] = weight;
        sum += weight;
      }
      sum = warp_sum(sum);
      if (lane == 0) {
        const bool has_gate = r.keys > r.values;
        tops[i] = seen <= 0 ? -INFINITY : has_gate ? gate : top + __log2f(sum);
        factors[i] = seen <= 0 ? 0.f : __fdividef(1.f, sum);
      }
    }
    __syncthreads();
#pragma unroll 1
    for (int row = warp; row < rows; row += kDecodeWarps) {
      float top = -INFINITY, sum = 0.f;
#pragma unroll 1
      for (int n = lane; n < at.ranges; n += 32) top = fmaxf(top, tops[row * at.ranges + n]);
      top = warp_max(top);
      const bool none = top == -INFINITY;
#pragma unroll 1
      for (int n = lane; n < at.ranges; n += 32) {
        sum += none ? 0.f : ptx::exp2_anywhere(tops[row * at.ranges + n] - top);
      }
      sum = warp_sum(sum);
      const float lse = none ? -INFINITY : top + __log2f(sum);
#pragma unroll 1
      for (int n = lane; n < at.ranges; n += 32) {
        factors[row * at.ranges + n] *=
            none ? 0.f : ptx::exp2_anywhere(tops[row * at.ranges + n] - lse);
      }
      if (lane == 0) shared[at.row_lse + row] = lse;
    }
    __syncthreads();
  }

  __device__ void add(Cursor c, const uint4 (&x)[kDecodeLoads], float (&sums)[kRows][8]) {
    const KeyRange& r = range(c.range);
    const float* scores = shared + at.scores + r.slot;
#pragma unroll
    for (int l = 0; l < kDecodeLoads; ++l) {
      const int key = c.piece * Tile::kPiece + l * Tile::kSub + sub;
      float y[8];
      unpack(x[l], y);
#pragma unroll
      for (int row = 0; row < kRows; ++row) {
        const float weight = key < r.values ? scores[row * at.slots + key] *
                                                  shared[at.factors + row * at.ranges + c.range]
                                            : 0.f;
#pragma unroll
        for (int i = 0; i < 8; ++i) sums[row][i] += weight * y[i];
      }
    }
  }

  // The sum over all warps of every lane's columns, into `to`, (kRows, kColumns).
  __device__ void reduce(float (&sums)[kRows][8], float* to) {
    float* parts = shared + at.sums;
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
#pragma unroll
      for (int i = 0; i < 8; ++i) {
#pragma unroll
        for (int step = 16; step >= Tile::kLanes; step /= 2) {
          sums[row][i] += __shfl_xor_sync(~0u, sums[row][i], step);
        }
        if (sub == 0) parts[(warp * kRows + row) * kColumns + column + i] = sums[row][i];
      }
    }
    __syncthreads();
#pragma unroll 1
    for (int i = threadIdx.x; i < kRows * kColumns; i += kDecodeThreads) {
      float sum = 0.f;
#pragma unroll
      for (int w = 0; w < kDecodeWarps; ++w) sum += parts[w * kRows * kColumns + i];
      to[i] = sum;
    }
    __syncthreads();
  }

  // Ranges are ready and visible to all threads; prepare() makes the queries while keys and values
  // are on their way. The result is in shared memory, rows that do not exist have weights of
  // nothing.
  template <class Prepare, class Position>
  __device__ void attend(int rows, const Prepare& prepare, const Position& position) {
    uint4 keys[kDecodeLoads], values[kDecodeLoads], ahead[kDecodeLoads];
    Cursor c = first();
    if (exists(c)) {
      load(c, false, keys);
      load(c, true, values);
    }
    prepare();
    __syncthreads();
#pragma unroll 1
    while (exists(c)) {
      const Cursor after = next(c);
      if (exists(after)) load(after, false, ahead);
      score(c, keys, rows);
#pragma unroll
      for (int l = 0; l < kDecodeLoads; ++l) keys[l] = ahead[l];
      c = after;
    }
#pragma unroll 1
    for (int i = threadIdx.x; i < (kRows - rows) * at.slots; i += kDecodeThreads) {
      shared[at.scores + rows * at.slots + i] = 0.f;
    }
#pragma unroll 1
    for (int i = threadIdx.x; i < (kRows - rows) * at.ranges; i += kDecodeThreads) {
      shared[at.factors + rows * at.ranges + i] = 0.f;
    }
    __syncthreads();
    normalize(rows, position);
    float sums[kRows][8] = {};
#pragma unroll 1
    for (c = first(); exists(c);) {
      const Cursor after = next(c);
      if (exists(after)) load(after, true, ahead);
      add(c, values, sums);
#pragma unroll
      for (int l = 0; l < kDecodeLoads; ++l) values[l] = ahead[l];
      c = after;
    }
    reduce(sums, shared + at.result);
  }
};

// What the thread blocks of a cluster found, its columns dealt to all of them: finish(row, column,
// value) and finish_row(row, lse in log2). Nobody leaves before all have read.
template <class Tile, class Finish, class FinishRow>
__device__ void merge_cluster(DecodeBlock<Tile>& block, int rows, const Finish& finish,
                              const FinishRow& finish_row) {
  const auto cluster = cooperative_groups::this_cluster();
  const int parts = static_cast<int>(cluster.num_blocks());
  const float* lses = block.shared + block.at.row_lse;
  const float* results = block.shared + block.at.result;
  cluster.sync();
#pragma unroll 1
  for (int i = static_cast<int>(cluster.block_rank()) * kDecodeThreads + threadIdx.x;
       i < rows * Tile::kColumns; i += parts * kDecodeThreads) {
    const int row = i / Tile::kColumns, column = i % Tile::kColumns;
    if (column >= block.D) continue;
    float lse[kDecodeClusterMost], x[kDecodeClusterMost], top = -1e38f, total = 0.f, sum = 0.f;
#pragma unroll
    for (int part = 0; part < kDecodeClusterMost; ++part) {
      lse[part] = part < parts ? cluster.map_shared_rank(lses, part)[row] : -INFINITY;
      x[part] = part < parts ? cluster.map_shared_rank(results, part)[i] : 0.f;
    }
#pragma unroll
    for (int part = 0; part < kDecodeClusterMost; ++part) top = fmaxf(top, lse[part]);
#pragma unroll
    for (int part = 0; part < kDecodeClusterMost; ++part) {
      const float weight = ptx::exp2_anywhere(lse[part] - top);
      total += weight;
      sum += weight * x[part];
    }
    finish(row, column, total == 0.f ? 0.f : __fdividef(sum, total));
    if (column == 0) finish_row(row, total == 0.f ? -INFINITY : top + __log2f(total));
  }
  cluster.sync();
}

constexpr float kLog2E = 1.4426950408889634f, kLn2 = 0.6931471805599453f;

inline int decode_lanes(int64_t D) { return D <= 64 ? 8 : D <= 128 ? 16 : 32; }

// Calls run(TypeTag<tile of kRows rows>()).
template <int kRows, class Run>
void choose_decode_lanes(DType dtype, int64_t D, Run&& run) {
  const auto with_type = [&](auto type) {
    using T = typename decltype(type)::type;
    if (D <= 64) return run(TypeTag<DecodeTile<T, 8, kRows>>());
    if (D <= 128) return run(TypeTag<DecodeTile<T, 16, kRows>>());
    return run(TypeTag<DecodeTile<T, 32, kRows>>());
  };
  if (dtype == DType::kBFloat16) return with_type(TypeTag<__nv_bfloat16>());
  return with_type(TypeTag<__half>());
}

// The same for the tile of up to `rows` rows.
template <class Run>
void choose_decode_rows(DType dtype, int64_t D, int rows, Run&& run) {
  if (rows <= 1) return choose_decode_lanes<1>(dtype, D, run);
  if (rows <= 4) return choose_decode_lanes<4>(dtype, D, run);
  return choose_decode_lanes<8>(dtype, D, run);
}

// Launches `clusters` clusters of `cluster` thread blocks; with `overlaps`, before the kernel ahead
// in the stream has ended (the kernel waits for it).
template <class Params>
void launch_decode(void (*kernel)(Params), const Params& params, const char* name, int64_t clusters,
                   int cluster, int64_t shared_bytes, bool overlaps, Stream stream) {
  cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                       static_cast<int>(shared_bytes));
  cudaLaunchAttribute attributes[2]{};
  attributes[0].id = cudaLaunchAttributeClusterDimension;
  attributes[0].val.clusterDim = {static_cast<unsigned>(cluster), 1, 1};
  attributes[1].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[1].val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(clusters * cluster));
  config.blockDim = dim3(kDecodeThreads);
  config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
  config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = overlaps ? 2 : 1;
  cudaLaunchKernelEx(&config, kernel, params);
  check_launch(name, config.gridDim, config.blockDim, stream);
}

}  // namespace lctx::cuda
