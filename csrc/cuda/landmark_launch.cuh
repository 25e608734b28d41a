// Math: none; the host side of landmark attention's forward, shared by its .cu files.
// Tile map: uniform blocks of l keys go to LandmarkScores with the smallest width that holds them:
//       16, 32, 56 (D <= 128), 64 or 128 (D <= 128); everything else to BlockScores.
// Pipeline: as attn_fwd_launch.cuh.
// Memory: as attn_fwd_launch.cuh.
// Limits: as flash_fwd.cu.
#pragma once

#include "attn_fwd_launch.cuh"
#include "landmark_scores.cuh"

namespace lctx::cuda {

// landmark_d64_fwd.cu, landmark_d128_fwd.cu, landmark_d256_fwd.cu: uniform blocks of at most
// widest_group(kHeadDim) keys.
template <int kHeadDim>
void launch_landmark_groups(const LandmarkParams& params, int* counter, int num_sms, Stream stream);

constexpr int widest_group(int64_t head_dim) { return head_dim <= 128 ? 128 : 64; }

// landmark_blocks_fwd.cu: any blocks. `scratch`: landmark_blocks_ints on the device, the first
// zero.
void launch_landmark_blocks(const LandmarkParams& params, int* scratch, int num_sms, Stream stream);
int64_t landmark_blocks_ints(const AttnShape& s);

// Keys as (column, key of the block, block, head, batch), in boxes of whole tiles.
inline CUtensorMap make_blocks_map(const TensorView& x, const AttnShape& s, int64_t D,
                                   int64_t block_size, int width, int groups) {
  return make_map(x.data, s.dtype,
                  {{D, block_size, std::max<int64_t>(s.Tk / block_size, 1), s.Hkv, s.B},
                   {x.stride_t, x.stride_t * block_size, x.stride_h, x.stride_b},
                   {kChunkColumns, width, groups, 1, 1}});
}

template <class Tile, int kWidth>
void launch_groups(const LandmarkParams& params, int* counter, int num_sms, Stream stream) {
  using Scores = LandmarkScores<typename Tile::T, Tile::kBlockN, kWidth>;
  using Traits = FwdTraits<Tile, DenseTiles<Tile::kBlockM>, Scores, StoreRows>;
  const AttnShape& s = params.shape;
  typename Traits::Params p{};
  set_attention(params, counter, p);
  set_maps<Tile>(params, p);
  p.k[1] = p.k[0];  // the incomplete block
  p.v[1] = p.v[0];
  if (s.Tk > 0) {
    p.k[0] = make_blocks_map(params.k, s, s.Dk, params.block_size, kWidth, Scores::kGroups);
    p.v[0] = make_blocks_map(params.v, s, s.Dv, params.block_size, kWidth, Scores::kGroups);
  }
  p.block_size = static_cast<int>(params.block_size);
  p.padding = kWidth - p.block_size;
  p.whole_blocks = static_cast<int>(s.Tk / params.block_size);
  p.whole_tiles = static_cast<int>(ceil_div(p.whole_blocks, Scores::kGroups));
  p.per_block = FastDivisor(p.block_size);
  p.row_shift = row_shift<Tile>(s.Tq);
  p.order = make_order("lctx::landmark_fwd", ceil_div(s.Tq, Tile::kBlockM), s.Hq, s.B,
                       heads_per_section(s, s.Tk, 16));
  launch_fwd<Traits>(p, num_sms, stream);
}

// The tile of kBlockN keys for a head dimension.
template <class T, int kHeadDim, int kBlockN>
using GroupsTile = FwdTile<T, kHeadDim, kBlockN, kHeadDim == 64 ? 3 : 2, kHeadDim != 256>;

template <class T, int kHeadDim>
void choose_groups(const LandmarkParams& params, int* counter, int num_sms, Stream stream) {
  constexpr int kKeys = kHeadDim == 256 ? 64 : 128;
  const int64_t l = params.block_size;
  if (l <= 16) {
    using Tile = GroupsTile<T, kHeadDim, kHeadDim == 128 ? 128 : 64>;
    launch_groups<Tile, 16>(params, counter, num_sms, stream);
  } else if (l <= 32) {
    using Tile = GroupsTile<T, kHeadDim, kHeadDim == 128 ? 128 : 64>;
    launch_groups<Tile, 32>(params, counter, num_sms, stream);
  } else if (kHeadDim <= 128 && 48 < l && l <= 56) {
    if constexpr (kHeadDim <= 128) {
      launch_groups<GroupsTile<T, kHeadDim, 112>, 56>(params, counter, num_sms, stream);
    }
  } else if (l <= 64) {
    launch_groups<GroupsTile<T, kHeadDim, kKeys>, 64>(params, counter, num_sms, stream);
  } else if constexpr (kHeadDim <= 128) {
    launch_groups<GroupsTile<T, kHeadDim, kKeys>, 128>(params, counter, num_sms, stream);
  }
}

template <int kHeadDim>
void launch_landmark_groups(const LandmarkParams& params, int* counter, int num_sms,
                            Stream stream) {
  if (params.shape.dtype == DType::kBFloat16) {
    choose_groups<__nv_bfloat16, kHeadDim>(params, counter, num_sms, stream);
  } else {
    choose_groups<__half, kHeadDim>(params, counter, num_sms, stream);
  }
}

}  // namespace lctx::cuda
