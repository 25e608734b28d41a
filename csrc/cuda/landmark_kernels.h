// Between landmark_fwd.cu, which chooses, and the files that compile landmark attention's kernels.
#pragma once

#include "cuda_backend.h"

namespace lctx::cuda {

// landmark_d64_fwd.cu, landmark_d128_fwd.cu, landmark_d256_fwd.cu: uniform blocks of at most
// widest_group(kHeadDim) keys.
template <int kHeadDim>
void launch_landmark_groups(const LandmarkParams& params, int* scratch, int num_sms, Stream stream);
// Its scratch.
template <int kHeadDim>
int64_t landmark_groups_ints(const LandmarkParams& params, int num_sms);

constexpr int widest_group(int64_t head_dim) { return head_dim <= 128 ? 128 : 64; }

// landmark_blocks_fwd.cu: any blocks. `scratch`: landmark_blocks_ints on the device, the first
// zero.
void launch_landmark_blocks(const LandmarkParams& params, int* scratch, int num_sms, Stream stream);
int64_t landmark_blocks_ints(const AttnShape& s);

}  // namespace lctx::cuda
