// sigma(K) = elu(K) + 1 on tiles of keys in shared memory, for the kernels of Infini's memory.
#pragma once

#include "../common/feature_map.cuh"
#include "../common/wgmma.cuh"

namespace lctx::cuda {

// Eight neighbouring columns of a row.
struct KeyUnit {
  float2 x[4];

  template <class T>
  __device__ __forceinline__ uint4 pack(float factor = 1.f) const {
    return {pack2<T>(x[0].x * factor, x[0].y * factor), pack2<T>(x[1].x * factor, x[1].y * factor),
            pack2<T>(x[2].x * factor, x[2].y * factor), pack2<T>(x[3].x * factor, x[3].y * factor)};
  }
  __device__ __forceinline__ void add_to(float (&sums)[8]) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      sums[2 * i] += x[i].x;
      sums[2 * i + 1] += x[i].y;
    }
  }
  __device__ __forceinline__ float dot(const float (&z)[8]) const {
    float sum = 0.f;
#pragma unroll
    for (int i = 0; i < 4; ++i) sum += x[i].x * z[2 * i] + x[i].y * z[2 * i + 1];
    return sum;
  }
};

// 1 / max(norm, least) of four rows, whose norms are the sums of x over kLanes neighbouring lanes.
template <int kLanes>
struct RowFactors {
  float own;  // lanes i kLanes / 4 .. of a row have that of x[i]

  __device__ __forceinline__ RowFactors(const float (&x)[4], float least) {
    const bool upper = threadIdx.x & (kLanes / 2), odd = threadIdx.x & (kLanes / 4);
    float a = upper ? x[2] : x[0], b = upper ? x[3] : x[1];
    a += __shfl_xor_sync(~0u, upper ? x[0] : x[2], kLanes / 2);
    b += __shfl_xor_sync(~0u, upper ? x[1] : x[3], kLanes / 2);
    float sum = odd ? b : a;
    sum += __shfl_xor_sync(~0u, odd ? a : b, kLanes / 4);
#pragma unroll
    for (int step = kLanes / 8; step > 0; step /= 2) sum += __shfl_xor_sync(~0u, sum, step);
    own = ptx::reciprocal(fmaxf(sum, least));
  }
  __device__ __forceinline__ float operator[](int i) const {
    return __shfl_sync(~0u, own, i * (kLanes / 4), kLanes);
  }
};

// How kThreads threads share a tile of kRows x kColumns: a thread has the same eight columns in
// every kRowsAtOnce-th row.
template <class T, int kRows, int kColumns, int kThreads>
struct KeyTile {
  static constexpr int kUnits = kColumns / 8;  // of 16 bytes, in a row
  static constexpr int kRowsAtOnce = kThreads / kUnits;
  static constexpr int kBatch = 4;  // loads in flight
  static_assert(kRows % (kBatch * kRowsAtOnce) == 0, "whole batches");

  static __device__ __forceinline__ int unit() { return threadIdx.x % kUnits; }
  static __device__ __forceinline__ int first_row() { return threadIdx.x / kUnits; }

  // sigma in place, 0 from row `rows` on. Calls use(row, unit's sigma as KeyUnit) for every unit of
  // this thread; all threads of a row are at it at the same time.
  template <class Use>
  static __device__ __forceinline__ void transform(uint32_t tile, int rows, Use&& use) {
#pragma unroll 1
    for (int first = first_row(); first < kRows; first += kBatch * kRowsAtOnce) {
      uint4 in[kBatch];
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        in[i] = ptx::load_shared_16(tile + swizzled_unit(kRows, first + i * kRowsAtOnce, unit()));
      }
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        const int row = first + i * kRowsAtOnce;
        const uint32_t words[4] = {in[i].x, in[i].y, in[i].z, in[i].w};
        KeyUnit key;
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          key.x[j] = elu_plus_one2<T>(words[j]);
          if (row >= rows) key.x[j] = {0.f, 0.f};
        }
        ptx::store_shared_16(tile + swizzled_unit(kRows, row, unit()), key.template pack<T>());
        use(row, key);
      }
    }
  }

  // The same with rows over their norms, max(z . row, least), too: use(row, sigma, 1 / norm).
  template <class Use>
  static __device__ __forceinline__ void transform(uint32_t tile, int rows, const float (&z)[8],
                                                   float least, Use&& use) {
#pragma unroll 1
    for (int first = first_row(); first < kRows; first += kBatch * kRowsAtOnce) {
      uint4 in[2];  // no registers for all four
      KeyUnit key[kBatch];
      float norm[kBatch];
      const auto load = [&](int i) {
        return ptx::load_shared_16(tile + swizzled_unit(kRows, first + i * kRowsAtOnce, unit()));
      };
      in[0] = load(0);
      in[1] = load(1);
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        const uint32_t words[4] = {in[i % 2].x, in[i % 2].y, in[i % 2].z, in[i % 2].w};
        if (i + 2 < kBatch) in[i % 2] = load(i + 2);
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const float2 x = unpack2<T>(words[j]);
          key[i].x[j] = {elu_plus_one(x.x), elu_plus_one(x.y)};
          if (first + i * kRowsAtOnce >= rows) key[i].x[j] = {0.f, 0.f};
        }
        norm[i] = key[i].dot(z);
      }
      const RowFactors<kUnits> factors(norm, least);
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        const int row = first + i * kRowsAtOnce;
        ptx::store_shared_16(tile + swizzled_unit(kRows, row, unit()), key[i].template pack<T>());
        use(row, key[i], factors[i]);
      }
    }
  }

  // Rows of values from `rows` on: 0 times what they hold could be NaN.
  static __device__ __forceinline__ void clear_rows(uint32_t tile, int rows) {
    for (int i = rows * kUnits + threadIdx.x; i < kRows * kUnits; i += kThreads) {
      ptx::store_shared_16(tile + swizzled_unit(kRows, i / kUnits, i % kUnits), {0, 0, 0, 0});
    }
  }

  // Adds the threads' sums of their columns, through `buffer` (kRowsAtOnce x kColumns floats);
  // thread i < kColumns gets column i. `sync` is a barrier of all threads.
  template <class Sync>
  static __device__ __forceinline__ float add_rows(float* buffer, const float (&sums)[8],
                                                   Sync&& sync) {
    float* mine = buffer + first_row() * kColumns + unit() * 8;
#pragma unroll
    for (int i = 0; i < 8; ++i) mine[i] = sums[i];
    sync();
    float sum = 0.f;
    if (threadIdx.x < kColumns) {
      for (int i = 0; i < kRowsAtOnce; ++i) sum += buffer[i * kColumns + threadIdx.x];
    }
    return sum;
  }
};

}  // namespace lctx::cuda
