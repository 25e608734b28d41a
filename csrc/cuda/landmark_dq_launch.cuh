// Math: none; the host side of landmark attention's gradient of the queries, short uniform blocks.
// Tile map: blocks of l keys go to LandmarkGrads with the smallest width that holds them: 16, 32 or
//       64. Rows x keys: 192 x 64 (D <= 64; 128 x 64 for several groups), 128 x 64 (D <= 128).
// Pipeline: as attn_fwd_launch.cuh.
// Memory: as landmark_grads.cuh.
// Limits: l <= 64, D <= 128.
#pragma once

#include "attn_dq_launch.cuh"
#include "landmark_bwd.h"
#include "landmark_grads.cuh"
#include "landmark_launch.cuh"

namespace lctx::cuda {

// Everything but what the Scores want.
template <class Tile, class Params>
void set_landmark_dq(const LandmarkDqParams& params, Params& p) {
  set_attention(params, params.scratch, p);
  set_dq<Tile>("lctx::landmark_bwd", params, {params.dout, params.lse2, params.delta}, p);
  p.vectors = params.vectors;
}

template <class Tile, int kWidth>
void launch_groups_dq(const LandmarkDqParams& params, int num_sms, Stream stream) {
  // With three warpgroups there are no registers for it.
  constexpr bool kByLandmark = kWidth == 64 && Tile::kConsumers == 2;
  using Scores = LandmarkGrads<typename Tile::T, Tile::kBlockN, kWidth, kByLandmark>;
  using Traits = FwdTraits<Tile, DenseTiles<Tile::kBlockM>, Scores, StoreRows>;
  typename Traits::Params p{};
  set_landmark_dq<Tile>(params, p);
  set_groups<Scores, kWidth>(params, p);
  launch_dq<Traits>(p, num_sms, stream);
}

template <class T, int kHeadDim, int kWidth>
using GroupsDqTile = DqTile<T, kHeadDim, 64, kHeadDim == 64 && kWidth == 64 ? 3 : 2, 4, true>;

template <int kHeadDim>
void launch_landmark_groups_dq(const LandmarkDqParams& params, int num_sms, Stream stream) {
  const auto with_type = [&](auto type) {
    using T = typename decltype(type)::type;
    if (params.block_size <= 16) {
      launch_groups_dq<GroupsDqTile<T, kHeadDim, 16>, 16>(params, num_sms, stream);
    } else if (params.block_size <= 32) {
      launch_groups_dq<GroupsDqTile<T, kHeadDim, 32>, 32>(params, num_sms, stream);
    } else {
      launch_groups_dq<GroupsDqTile<T, kHeadDim, 64>, 64>(params, num_sms, stream);
    }
  };
  if (params.shape.dtype == DType::kBFloat16) {
    with_type(TypeTag<__nv_bfloat16>());
  } else {
    with_type(TypeTag<__half>());
  }
}

}  // namespace lctx::cuda
