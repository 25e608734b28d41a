// The backward of Infini's memory for head dimensions above 128, where a state does not fit shared
// memory: what lies between its kernels. Host and device.
#pragma once

#include "infini_grads.h"

namespace lctx::cuda {

struct InfiniWide {
  // Two terms of every state and of its gradient (chains, S, D, D), whose sum is the number times
  // its scale: first all high terms, then all low ones. States come with the scale of their norms.
  void *M, *dM;
  float* dM_inverse;  // (chains, S): 1 / scale, a power of two
  float* weights;     // (B, Hq, T, 2): a, -a times the row's slope (infini_wide_retrieve_bwd.cu)
};

InfiniWide make_infini_wide(const InfiniParams& params, const InfiniBwdScratch& scratch);

// gradients: of dM_of(0, ...) with scales of their own; else of the states.
void launch_infini_split(const InfiniParams& params, const InfiniGradStates& states,
                         const InfiniWide& wide, bool gradients, Stream stream);
// As launch_infini_retrieve_bwd; what the memory adds to dq goes to `dq`, in the inputs' type.
void launch_infini_wide_retrieve_bwd(const InfiniParams& params, const InfiniGrads& grads,
                                     const InfiniGradStates& states, const InfiniWide& wide,
                                     const TensorView& dq, int num_sms, Stream stream);
void launch_infini_wide_sums_bwd(const InfiniParams& params, const InfiniGrads& grads,
                                 const InfiniGradStates& states, const InfiniWide& wide,
                                 int num_sms, Stream stream);
// As launch_infini_update_bwd.
void launch_infini_wide_update_bwd(const InfiniParams& params, const InfiniGradStates& states,
                                   const InfiniWide& wide, const TensorView& dk,
                                   const TensorView& dv, int num_sms, Stream stream);

}  // namespace lctx::cuda
