// What lctx::infini_fwd and lctx::infini_bwd share: the checks of their inputs.
#pragma once

#include "checks.h"

namespace lctx::api {

struct InfiniInputs {
  const Tensor &q, &k, &v;
  const OptTensor &q_mem, &k_mem, &M, &z, &gate;
};

struct InfiniOptions {
  int64_t segment_len;
  const std::string& update;
  const std::string& first;
  int64_t detach_every;
  double scale;
};

InfiniParams make_params(const Call& call, const InfiniInputs& in, const InfiniOptions& options);

#ifdef LCTX_WITH_CUDA
// What the Hopper kernels take beyond that.
void check_limits(const Call& call, const InfiniParams& params);
#endif

int64_t num_segments(const InfiniParams& params);

// target = source, or zeros where there is none.
void set_state(const OptTensor& source, Tensor target);

}  // namespace lctx::api
