// Math: what becomes of finished dK and dV of a tile.
//       StoreKeys   dK = scale * sum, dV = sum, in the input dtype
//       StoreSharedKeys   the same for SharedKeys: those of shared tiles are added to fp32 sums
//       StoreGroupKeys   the same for the pieces of landmark attention
// Tile map: 64 keys of a warpgroup.
// Pipeline: from registers, while the next tile is loaded. kPrefetches: prefetch() when a tile
//       begins; kReadsKeys: read_keys() while its keys are still there.
// Memory: dK and dV once, 16 bytes a thread.
// Limits: none of their own.
#pragma once

#include "../common/epilogue.cuh"
#include "attn_bwd_tiles.cuh"

namespace lctx::cuda {

struct StoreKeys {
  struct Params {};
  static constexpr bool kPrefetches = false, kReadsKeys = false;

  template <class Kernel, int N>
  static __device__ __forceinline__ void finish(const Kernel& kernel, int warpgroup,
                                                const KeyWork& work, const float (&dk)[N],
                                                const float (&dv)[N]) {
    store(kernel, warpgroup, work, dv, 1.f, kernel.p.dv);
    store(kernel, warpgroup, work, dk, kernel.p.scale, kernel.p.dk);
  }

  template <class Kernel, int N>
  static __device__ __forceinline__ void store(const Kernel& kernel, int warpgroup,
                                               const KeyWork& work, const float (&d)[N],
                                               float factor, const TensorView& view) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int key =
          work.key0 + kernel.first_key(warpgroup) + fragment_row(warpgroup_thread()) + 8 * i;
      store_row(kernel, work, key, key < work.key_end, d, i, factor, view,
                kernel.first_column(warpgroup));
    }
  }

  template <class Kernel, int N>
  static __device__ __forceinline__ void store_row(const Kernel& kernel, const KeyWork& work,
                                                   int key, bool exists, const float (&d)[N], int i,
                                                   float factor, const TensorView& view,
                                                   int first_column = 0) {
    using T = typename Kernel::T;
    T* row = static_cast<T*>(view.data) + work.batch * view.stride_b +
             kernel.position(work, key) * view.stride_t + work.head * view.stride_h;
    write_fragment_row<T, 2 * N>(d, i, factor, row, first_column, kernel.p.D, exists);
  }
};

// Sums of a tile: [dV, dK][warp][8 columns j][lane][4], in the order of the registers.
struct StoreSharedKeys {
  struct Params {
    float* key_sums;
  };
  static constexpr bool kPrefetches = false, kReadsKeys = false;

  template <class Kernel, int N>
  static __device__ __forceinline__ void finish(const Kernel& kernel, int warpgroup,
                                                const KeyWork& work, const float (&dk)[N],
                                                const float (&dv)[N]) {
    if (work.shared == 0) {
      StoreKeys::finish(kernel, warpgroup, work, dk, dv);
      return;
    }
    const QueryRange range = kernel.queries(work, 0, Kernel::kBlockN);
    if (range.end <= range.begin) return;
    const int thread = warpgroup * 128 + warpgroup_thread();
    float* to = key_sums_of<N>(kernel.p.key_sums, work.shared - 1, 0, thread);
#pragma unroll
    for (int j = 0; j < N / 4; ++j) {
      ptx::red_add_v4(to + j * 128, dv[4 * j], dv[4 * j + 1], dv[4 * j + 2], dv[4 * j + 3]);
    }
    to = key_sums_of<N>(kernel.p.key_sums, work.shared - 1, 1, thread);
#pragma unroll
    for (int j = 0; j < N / 4; ++j) {
      ptx::red_add_v4(to + j * 128, dk[4 * j], dk[4 * j + 1], dk[4 * j + 2], dk[4 * j + 3]);
    }
  }

  // Of a thread of both warpgroups, with N values of each.
  template <int N>
  static __device__ __forceinline__ float* key_sums_of(float* sums, int tile, int which,
                                                       int thread) {
    return sums + (int64_t{tile} * 16 + which * 8 + thread / 32) * (32 * N) + thread % 32 * 4;
  }
};

// The same for the pieces of LandmarkKeys, of which the last keys count.
struct StoreGroupKeys {
  struct Params {};
  static constexpr bool kPrefetches = false, kReadsKeys = false;

  template <class Kernel, int N>
  static __device__ __forceinline__ void finish(const Kernel& kernel, int warpgroup,
                                                const KeyWork& work, const float (&dk)[N],
                                                const float (&dv)[N]) {
    const auto& p = kernel.p;
    const auto piece = p.tiles[work.piece + kernel.first_key(warpgroup) / 64];
    const int column = kernel.first_column(warpgroup);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int key = piece.row0 + fragment_row(warpgroup_thread()) + 8 * i;
      const bool exists = key >= piece.begin() && key < work.key_end;
      StoreKeys::store_row(kernel, work, key, exists, dv, i, 1.f, p.dv, column);
      StoreKeys::store_row(kernel, work, key, exists, dk, i, p.scale, p.dk, column);
    }
  }
};

}  // namespace lctx::cuda
