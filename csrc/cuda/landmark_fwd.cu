// Math: landmark attention, forward (Mohtashami & Jaggi 2023, arXiv 2305.16300, section 3.1): one
//       softmax over the ordinary keys of the row's own block and the landmarks of earlier blocks,
//       whose weights are shared out by softmaxes over the ordinary keys of their blocks.
// Tile map: short uniform blocks: landmark_scores.cuh, several to a key tile, compiled in
//       landmark_d64_fwd.cu, landmark_d128_fwd.cu, landmark_d256_fwd.cu by head dimension. Longer
//       blocks and landmarks at any places: landmark_blocks.cuh, in landmark_blocks_fwd.cu.
// Pipeline: a memset of the tile counter, tables where they are needed, one persistent launch. Few
//       rows over many short blocks: keys split as in flash_split_fwd.cu.
// Memory: as flash_fwd.cu.
// Limits: as flash_fwd.cu.
#include <cuda_runtime_api.h>

#include <algorithm>

#include "landmark_kernels.h"

namespace lctx::cuda {
namespace {

bool in_groups(const LandmarkParams& params) {
  const int64_t D = std::max(params.shape.Dk, params.shape.Dv);
  return params.block_size > 0 && params.block_size <= widest_group(D);
}

}  // namespace

int64_t landmark_scratch_ints(const LandmarkParams& params, int num_sms) {
  const int64_t D = std::max(params.shape.Dk, params.shape.Dv);
  if (!in_groups(params)) return landmark_blocks_ints(params.shape);
  return D <= 64    ? landmark_groups_ints<64>(params, num_sms)
         : D <= 128 ? landmark_groups_ints<128>(params, num_sms)
                    : landmark_groups_ints<256>(params, num_sms);
}

void launch_landmark_fwd(const LandmarkParams& params, int* scratch, int num_sms, Stream stream) {
  const AttnShape& s = params.shape;
  if (s.B * s.Tq * s.Hq == 0) return;
  const int64_t D = std::max(s.Dk, s.Dv);
  if (!in_groups(params)) {
    cudaMemsetAsync(scratch, 0, sizeof(int), stream);
    launch_landmark_blocks(params, scratch, num_sms, stream);
  } else if (D <= 64) {
    launch_landmark_groups<64>(params, scratch, num_sms, stream);
  } else if (D <= 128) {
    launch_landmark_groups<128>(params, scratch, num_sms, stream);
  } else {
    launch_landmark_groups<256>(params, scratch, num_sms, stream);
  }
}

}  // namespace lctx::cuda
