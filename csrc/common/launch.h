// What follows every kernel launch.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdlib>

#include "check.h"

namespace lctx {

// Throws std::runtime_error if the launch failed. With LCTX_SYNC=1 in the environment it also waits
// for the kernel, so that an error is reported by the kernel that made it.
inline void check_launch(const char* kernel, dim3 grid, dim3 block, cudaStream_t stream) {
  cudaError_t error = cudaGetLastError();
  static const char* const sync = std::getenv("LCTX_SYNC");
  if (error == cudaSuccess && sync != nullptr && *sync == '1')
    error = cudaStreamSynchronize(stream);
  if (error == cudaSuccess) return;
  throw std::runtime_error(concat(kernel, " failed: ", cudaGetErrorString(error), "; grid (",
                                  grid.x, ", ", grid.y, ", ", grid.z, "), block (", block.x, ", ",
                                  block.y, ", ", block.z, ")"));
}

}  // namespace lctx
