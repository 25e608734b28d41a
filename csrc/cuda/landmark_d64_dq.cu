// Math: landmark attention, backward (lctx::landmark_bwd; the forward is lctx::landmark_fwd), the
//       gradient of the queries over uniform blocks of a few keys: see landmark_grads.cuh.
// Tile map: attn_dq_sm90.cuh with LandmarkGrads, head dimensions up to 64; landmark_dq_launch.cuh
//       chooses the width of a group.
// Pipeline: as attn_fwd_launch.cuh.
// Memory: as landmark_grads.cuh.
// Limits: as flash_fwd.cu; blocks of at most widest_dq_group(64) keys.
#include "landmark_dq_launch.cuh"

namespace lctx::cuda {

template void launch_landmark_groups_dq<64>(const LandmarkDqParams& params, int num_sms,
                                            Stream stream);

}  // namespace lctx::cuda
