// The body and the launch that the kernels of Infini's memory share.
#pragma once

#include <algorithm>

#include "../common/launch.h"
#include "../common/pipeline.cuh"

namespace lctx::cuda {

// Tiles start at multiples of 1024 bytes; kernels ask for 1024 bytes more than they use.
__device__ __forceinline__ char* aligned_shared() {
  extern __shared__ char shared[];
  return shared + ((1024 - (ptx::smem_address(shared) & 1023)) & 1023);
}

// A kernel of kConsumerThreads consumers and, behind them, one producer thread on kernel.pipe. With
// a whole producer warpgroup the consumers, two of them, take most of its registers.
template <class Kernel, class Params>
__device__ __forceinline__ void run_pipelined(const Params& p) {
  using Traits = typename Kernel::Traits;
  Kernel kernel(p, aligned_shared());
  if (threadIdx.x == 0) {
    kernel.pipe.init(Traits::kConsumerThreads / 32);
    ptx::fence_mbarrier_init();
  }
  __syncthreads();
  constexpr bool kTakes = Traits::kThreads == Traits::kConsumerThreads + 128;
  static_assert(!kTakes || Traits::kConsumerThreads == 256, "24 + 2 x 240 registers");
  if (threadIdx.x < Traits::kConsumerThreads) {
    if constexpr (kTakes) ptx::setmaxnreg_inc<240>();
    kernel.consume();
  } else {
    if constexpr (kTakes) ptx::setmaxnreg_dec<24>();
    if (threadIdx.x == Traits::kConsumerThreads) kernel.produce();
  }
}

template <class Traits, class Params>
void launch_memory(const char* name, void (*kernel)(Params), const Params& p, dim3 grid,
                   cudaStream_t stream) {
  const dim3 block(Traits::kThreads);
  cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, Traits::kSharedBytes);
  kernel<<<grid, block, Traits::kSharedBytes, stream>>>(p);
  check_launch(name, grid, block, stream);
}

}  // namespace lctx::cuda
