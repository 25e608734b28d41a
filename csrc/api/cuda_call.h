// The device and the stream that a call with CUDA tensors runs on.
#pragma once

#ifdef LCTX_WITH_CUDA
#include <torch/csrc/stable/accelerator.h>

#include "../cuda/cuda_backend.h"
#include "checks.h"

namespace lctx::api {

// What the Hopper attention kernels take beyond the checks of every backend.
void check_tma(const Call& call, const AttnParams& params);

// The same for a backward, whose kernels have D up to `widest` so far.
void check_bwd(const Call& call, const AttnParams& params, const AttnGrads& grads,
               int64_t widest = 128);

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

// Whether there is nothing to sum over: the gradients are then 0, and written.
bool zero_if_empty(const AttnParams& params, const AttnGrads& grads, cuda::Stream stream);

// Scratch memory of a backward.
struct BwdBuffers {
  cuda::BwdScratch scratch;
  int64_t dq_floats;

  BwdBuffers(const Call& call, const AttnShape& s, int64_t dq_floats, int block_rows = 0);

 private:
  Tensor rows_, dq_sum_, counter_;
};

}  // namespace lctx::api
#endif
