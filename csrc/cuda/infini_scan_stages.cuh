// Math: none; the loop over the stages of the matrix that the two scans of the delta rule multiply
//       with (infini_delta_scan_fwd.cu, infini_delta_scan_bwd.cu).
// Tile map: warpgroup w has rows 64 w .. of it.
// Pipeline: a stage is given back when the products of the one after it have been issued.
// Memory: the stages.
// Limits: `kernel` has smem, pipe, state and Traits::kStageBytes.
#pragma once

#include "../common/pipeline.cuh"
#include "../common/wgmma.cuh"

namespace lctx::cuda {

// issue(i, rows) starts the products of stage i, whose rows of this warpgroup are at `rows`.
template <class Kernel, int kCount, class Issue>
__device__ __forceinline__ void multiply_stages(Kernel& kernel, Issue&& issue) {
  auto last = kernel.state;
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    kernel.pipe.wait(kernel.state);
    const uint32_t rows = kernel.smem + kernel.state.stage() * Kernel::Traits::kStageBytes +
                          threadIdx.x / 128 * chunk_bytes(64);
    wgmma_fence();
    issue(i, rows);
    wgmma_commit();
    if (i > 0) {
      wgmma_wait<1>();
      kernel.pipe.release(last);
    }
    last = kernel.state;
    kernel.state.advance();
  }
  wgmma_wait<0>();
  kernel.pipe.release(last);
}

}  // namespace lctx::cuda
