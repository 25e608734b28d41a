// Math: none; the thread block around the main loop of attn_fwd_sm90.cuh or one derived from it.
// Tile map: one warpgroup that loads, the others compute.
// Pipeline: barriers are made while the tensor maps arrive; the rest is the kernel's.
// Memory: shared memory from the first multiple of 1024 bytes on.
// Limits: registers are moved between warpgroups in kernels of several consumers only.
#pragma once

#include "attn_fwd_sm90.cuh"

namespace lctx::cuda {

template <class Kernel>
__device__ __forceinline__ void run_tiles(const typename Kernel::Traits::Params& p) {
  using Traits = typename Kernel::Traits;
  constexpr bool kMovesRegisters = Traits::kConsumers > 1 || Traits::kPerSm > 1;
  extern __shared__ char shared[];
  char* base = shared + ((1024 - (ptx::smem_address(shared) & 1023)) & 1023);
  Kernel kernel(p, base);
  if constexpr (!Traits::Rows::kRetrieves && !Traits::Rows::kMarks) ptx::grid_dependents_launch();
  if constexpr (Traits::Rows::kRetrieves) Traits::Rows::init(kernel);
  if constexpr (Traits::Rows::kMarks) {
    if (threadIdx.x == 0) Traits::Rows::init(kernel);
  }
  if (threadIdx.x == 0) kernel.init();
  if (threadIdx.x == 32) {  // meanwhile
    ptx::prefetch_tensor_map(&p.k[0]);
    ptx::prefetch_tensor_map(&p.q[0]);
    ptx::prefetch_tensor_map(&p.v[0]);
    if constexpr (Traits::kStagesO && !Traits::Tiles::kSplitsKeys) {
      ptx::prefetch_tensor_map(&p.out[0]);
    }
  }
  __syncthreads();
  if (threadIdx.x < 128) {
    if constexpr (kMovesRegisters) ptx::setmaxnreg_dec<Traits::kProducerRegisters>();
    if (threadIdx.x == 0) kernel.produce();
    if constexpr (Traits::Rows::kMakesStates) {
      if (threadIdx.x / 32 == 1) Traits::Rows::template States<Kernel>::publish_all(kernel);
    }
    if constexpr (Traits::Rows::kMarks) {
      if (threadIdx.x / 32 == 1) Traits::Rows::mark(kernel);
    }
  } else {
    if constexpr (kMovesRegisters) ptx::setmaxnreg_inc<Traits::kConsumerRegisters>();
    // Through a shuffle, so that the compiler knows it is the same for the whole warp.
    kernel.consume(__shfl_sync(~0u, threadIdx.x / 128 - 1, 0));
  }
}

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, Traits::kPerSm)
    attn_fwd_sm90_kernel(const __grid_constant__ typename Traits::Params p) {
  run_tiles<FwdKernel<Traits>>(p);
}

}  // namespace lctx::cuda
