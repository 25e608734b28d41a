// Math: none; the host side of landmark_fused.cuh.
// Tile map: blocks of l keys go to the smallest width that holds them: 16, 32 or 64. The order of
//       early_steps is for D = 128 without padding: 9 % faster there at 16k, 4 % slower with it.
// Pipeline: a memset of the tile counter, one persistent launch.
// Memory: as landmark_fused.cuh.
// Limits: as landmark_fused.cuh.
#pragma once

#include "attn_bwd_launch.cuh"
#include "landmark_bwd.h"
#include "landmark_fused.cuh"
#include "landmark_launch.cuh"

namespace lctx::cuda {

template <class Tile>
void launch_fused_groups(const LandmarkParams& params, const AttnGrads& grads,
                         const BwdScratch& scratch, int num_sms, Stream stream) {
  constexpr int kWidth = Tile::kWidth;
  using Keys = UniformGroupKeys<kWidth>;
  using Traits = BwdTraits<Tile, Keys, StoreUniformGroups<kWidth>, false>;
  const AttnShape& s = params.shape;
  typename Traits::Params p{};
  set_attention_bwd<Tile>(params, grads, scratch, p);
  p.q[1] = p.q[0];
  p.dout[1] = p.dout[0];
  p.k[1] = p.k[0];  // the incomplete block
  p.v[1] = p.v[0];
  p.k[0] = make_blocks_map(params.k, s, s.Dk, params.block_size, kWidth, Keys::kGroups, 256);
  p.v[0] = make_blocks_map(params.v, s, s.Dv, params.block_size, kWidth, Keys::kGroups, 256);
  p.block_size = static_cast<int>(params.block_size);
  p.padding = kWidth - p.block_size;
  p.whole_blocks = static_cast<int>(s.Tk / params.block_size);
  p.whole_tiles = static_cast<int>(ceil_div(p.whole_blocks, Keys::kGroups));
  const int64_t tiles = p.whole_tiles + (s.Tk % params.block_size != 0 ? 1 : 0);
  p.order = KeyOrder(make_order("lctx::landmark_bwd", tiles, s.Hkv, s.B, bwd_section(s, s.Tq)));
  if (p.order.num_tiles == 0) return;
  const auto kernel = landmark_bwd_sm90_kernel<Traits>;
  cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, Traits::kSharedBytes);
  const dim3 grid(std::min(num_sms, p.order.num_tiles)), block(Traits::kThreads);
  kernel<<<grid, block, Traits::kSharedBytes, stream>>>(p);
  check_launch("landmark_bwd_sm90_kernel", grid, block, stream);
}

template <int kHeadDim>
void launch_landmark_fused(const LandmarkParams& params, const AttnGrads& grads,
                           const BwdScratch& scratch, int num_sms, Stream stream) {
  const auto with_type = [&](auto type) {
    using T = typename decltype(type)::type;
    if (params.block_size <= 16) {
      launch_fused_groups<LandmarkFusedTile<T, kHeadDim, 16>>(params, grads, scratch, num_sms,
                                                              stream);
    } else if (params.block_size <= 32) {
      launch_fused_groups<LandmarkFusedTile<T, kHeadDim, 32>>(params, grads, scratch, num_sms,
                                                              stream);
    } else if (params.block_size < 64) {
      launch_fused_groups<LandmarkFusedTile<T, kHeadDim, 64>>(params, grads, scratch, num_sms,
                                                              stream);
    } else {
      using Tile = LandmarkFusedTile<T, kHeadDim, 64, /*kEarly=*/kHeadDim == 128>;
      launch_fused_groups<Tile>(params, grads, scratch, num_sms, stream);
    }
  };
  if (params.shape.dtype == DType::kBFloat16) {
    with_type(TypeTag<__nv_bfloat16>());
  } else {
    with_type(TypeTag<__half>());
  }
}

}  // namespace lctx::cuda
