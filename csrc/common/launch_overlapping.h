// Launches that may start while the kernel before them in the stream ends.
#pragma once

#include "launch.h"

namespace lctx {

// `overlap`: it may start so, and waits for that kernel before it touches what belongs to it
// (programmatic dependent launch); else it is an ordinary launch.
template <class Params>
void launch_overlapping(const char* name, void (*kernel)(Params), const Params& p, dim3 grid,
                        dim3 block, cudaStream_t stream, bool overlap = true,
                        size_t shared_bytes = 0) {
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = overlap ? 1 : 0;
  cudaLaunchKernelEx(&config, kernel, p);
  check_launch(name, grid, block, stream);
}

}  // namespace lctx
