// Math: landmark attention, backward (lctx::landmark_bwd; the forward is lctx::landmark_fwd), all
//       gradients over uniform blocks of a few keys: see landmark_fused.cuh.
// Tile map: landmark_fused.cuh, head dimensions up to 128; landmark_fused_launch.cuh chooses the
//       width of a group.
// Pipeline: as landmark_fused.cuh.
// Memory: as landmark_fused.cuh.
// Limits: as flash_fwd.cu; blocks of at most widest_dq_group(128) keys.
#include "landmark_fused_launch.cuh"

namespace lctx::cuda {

template void launch_landmark_fused<128>(const LandmarkParams& params, const AttnGrads& grads,
                                         const BwdScratch& scratch, int num_sms, Stream stream);

}  // namespace lctx::cuda
