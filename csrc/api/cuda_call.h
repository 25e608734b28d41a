// The device and the stream that a call with CUDA tensors runs on.
#pragma once

#ifdef LCTX_WITH_CUDA
#include <torch/csrc/stable/accelerator.h>

#include "../cuda/cuda_backend.h"
#include "checks.h"

namespace lctx::api {

// What the Hopper attention kernels take beyond the checks of every backend.
void check_tma(const Call& call, const AttnParams& params);

class CudaCall {
 public:
  explicit CudaCall(const Call& call);
  cuda::Stream stream() const { return stream_; }
  // Multiprocessors of the current device.
  int num_sms() const { return cuda::num_sms(); }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  cuda::Stream stream_;
};

}  // namespace lctx::api
#endif
