// Math: landmark attention, forward (lctx::landmark_fwd), uniform blocks of a few keys: see
//       landmark_scores.cuh.
// Tile map: attn_fwd_sm90.cuh with LandmarkScores, head dimensions up to 64; landmark_launch.cuh
//       chooses the width of a group.
// Pipeline: as attn_fwd_launch.cuh.
// Memory: as flash_fwd.cu.
// Limits: as flash_fwd.cu; blocks of at most widest_group(64) keys.
#include "landmark_launch.cuh"

namespace lctx::cuda {

template void launch_landmark_groups<64>(const LandmarkParams& params, int* scratch, int num_sms,
                                         Stream stream);
template int64_t landmark_groups_ints<64>(const LandmarkParams& params, int num_sms);

}  // namespace lctx::cuda
