// Math: what becomes of finished dK and dV of a tile.
//       StoreKeys   dK = scale * sum, dV = sum, in the input dtype
// Tile map: 64 keys of a warpgroup.
// Pipeline: from registers, while the next tile is loaded.
// Memory: dK and dV once, 16 bytes a thread.
// Limits: none of their own.
#pragma once

#include "../common/epilogue.cuh"
#include "attn_bwd_tiles.cuh"

namespace lctx::cuda {

struct StoreKeys {
  struct Params {};

  // The head of K and V that a tile reads.
  template <class P>
  static __device__ __forceinline__ int kv_head(const P&, const KeyWork& work) {
    return work.head;
  }

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
    using T = typename Kernel::T;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int key = work.key0 + warpgroup * 64 + fragment_row(warpgroup_thread()) + 8 * i;
      T* row = static_cast<T*>(view.data) + work.batch * view.stride_b +
               kernel.position(work, key) * view.stride_t + work.head * view.stride_h;
      write_fragment_row<T, 2 * N>(d, i, factor, row, 0, kernel.p.D, key < work.key_end);
    }
  }
};

}  // namespace lctx::cuda
