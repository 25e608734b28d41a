// Math: none; the host side of landmark attention's forward, shared by its .cu files.
// Tile map: uniform blocks of l keys go to LandmarkScores with the smallest width that holds them:
//       16, 32, 56 (D <= 128), 64 or 128 (D <= 128); everything else to BlockScores.
// Pipeline: as attn_fwd_launch.cuh.
// Memory: as attn_fwd_launch.cuh.
// Limits: as flash_fwd.cu.
#pragma once

#include <type_traits>

#include "attn_split_launch.cuh"
#include "landmark_kernels.h"
#include "landmark_scores.cuh"

namespace lctx::cuda {

// Keys as (column, key of the block, block, head, batch), in boxes of whole tiles.
inline CUtensorMap make_blocks_map(const TensorView& x, const AttnShape& s, int64_t D,
                                   int64_t block_size, int width, int groups, int l2_bytes) {
  return make_map(x.data, s.dtype,
                  {{D, block_size, std::max<int64_t>(s.Tk / block_size, 1), s.Hkv, s.B},
                   {x.stride_t, x.stride_t * block_size, x.stride_h, x.stride_b},
                   {kChunkColumns, width, groups, 1, 1}},
                  l2_bytes);
}

// Keys and values as LandmarkScores wants them.
template <class Scores, int kWidth, class Params>
void set_groups(const LandmarkParams& params, Params& p, int l2_bytes = 256) {
  const AttnShape& s = params.shape;
  p.k[1] = p.k[0];  // the incomplete block
  p.v[1] = p.v[0];
  if (s.Tk > 0) {
    p.k[0] =
        make_blocks_map(params.k, s, s.Dk, params.block_size, kWidth, Scores::kGroups, l2_bytes);
    p.v[0] =
        make_blocks_map(params.v, s, s.Dv, params.block_size, kWidth, Scores::kGroups, l2_bytes);
  }
  p.block_size = static_cast<int>(params.block_size);
  p.padding = kWidth - p.block_size;
  p.whole_blocks = static_cast<int>(s.Tk / params.block_size);
  p.whole_tiles = static_cast<int>(ceil_div(p.whole_blocks, Scores::kGroups));
  p.per_block = FastDivisor(p.block_size);
}

// Few rows: keys are split at tiles, thus between blocks. Partial results are merged like dense
// ones, as lse is the logarithm of the outer sum over the part's blocks.
template <class T, int kHeadDim, int kBlockN, int kWidth>
void launch_split_groups(const LandmarkParams& params, const SplitPlan& plan, float* scratch,
                         int num_sms, Stream stream) {
  using Tile = DecodeTile<T, kHeadDim, kBlockN>;
  using Scores = LandmarkScores<T, kBlockN, kWidth>;
  using Traits = FwdTraits<Tile, SplitTiles<64>, Scores, SplitRows>;
  typename Traits::Params p{};
  set_attention(params, nullptr, p);
  set_key_maps(params, kBlockN, p);
  set_groups<Scores, kWidth>(params, p, kStreamL2Bytes);
  launch_split<Traits>(params, plan, p, scratch, num_sms, stream);
}

inline SplitPlan plan_split_groups(const LandmarkParams& params, int groups, int num_sms) {
  const AttnShape& s = params.shape;
  if (packed_rows(s) > 64 || s.B * s.Hq * s.Tq * s.Tk == 0) return {};
  const int64_t tiles = ceil_div(s.Tk / params.block_size, groups);
  return plan_split(s, 0, tiles + (s.Tk % params.block_size != 0), 64, num_sms);
}

template <class Tile, int kWidth>
void launch_groups(const LandmarkParams& params, int* scratch, int num_sms, Stream stream) {
  using Scores = LandmarkScores<typename Tile::T, Tile::kBlockN, kWidth>;
  using Traits = FwdTraits<Tile, DenseTiles<Tile::kBlockM>, Scores, StoreRows>;
  const AttnShape& s = params.shape;
  if (const SplitPlan plan = plan_split_groups(params, Scores::kGroups, num_sms); plan.units > 0) {
    return launch_split_groups<typename Tile::T, Tile::kHeadDim, Tile::kBlockN, kWidth>(
        params, plan, reinterpret_cast<float*>(scratch), num_sms, stream);
  }
  cudaMemsetAsync(scratch, 0, sizeof(int), stream);
  auto p = fwd_params<Traits>(params, scratch);
  set_groups<Scores, kWidth>(params, p);
  p.row_shift = row_shift<Tile>(s.Tq);
  p.order = make_order("lctx::landmark_fwd", ceil_div(s.Tq, Tile::kBlockM), s.Hq, s.B,
                       heads_per_section(s, s.Tk, 16));
  launch_fwd<Traits>(p, num_sms, stream);
}

// The tile of kBlockN keys for a head dimension.
template <class T, int kHeadDim, int kBlockN>
using GroupsTile = FwdTile<T, kHeadDim, kBlockN, kHeadDim == 64 ? 3 : 2, kHeadDim != 256>;

// Calls run(TypeTag<FwdTile>(), width of its groups) for blocks of `l` keys.
template <class T, int kHeadDim, class Run>
void choose_groups(int64_t l, Run&& run) {
  constexpr int kKeys = kHeadDim == 256 ? 64 : 128, kFewKeys = kHeadDim == 128 ? 128 : 64;
  if (l <= 16) {
    run(TypeTag<GroupsTile<T, kHeadDim, kFewKeys>>(), std::integral_constant<int, 16>());
  } else if (l <= 32) {
    run(TypeTag<GroupsTile<T, kHeadDim, kFewKeys>>(), std::integral_constant<int, 32>());
  } else if (kHeadDim <= 128 && 48 < l && l <= 56) {
    if constexpr (kHeadDim <= 128) {
      run(TypeTag<GroupsTile<T, kHeadDim, 112>>(), std::integral_constant<int, 56>());
    }
  } else if (l <= 64) {
    run(TypeTag<GroupsTile<T, kHeadDim, kKeys>>(), std::integral_constant<int, 64>());
  } else if constexpr (kHeadDim <= 128) {
    run(TypeTag<GroupsTile<T, kHeadDim, kKeys>>(), std::integral_constant<int, 128>());
  }
}

template <int kHeadDim>
void launch_landmark_groups(const LandmarkParams& params, int* scratch, int num_sms,
                            Stream stream) {
  const auto launch = [&](auto tile, auto width) {
    launch_groups<typename decltype(tile)::type, width.value>(params, scratch, num_sms, stream);
  };
  if (params.shape.dtype == DType::kBFloat16) {
    choose_groups<__nv_bfloat16, kHeadDim>(params.block_size, launch);
  } else {
    choose_groups<__half, kHeadDim>(params.block_size, launch);
  }
}

template <int kHeadDim>
int64_t landmark_groups_ints(const LandmarkParams& params, int num_sms) {
  int64_t ints = 1;
  choose_groups<__half, kHeadDim>(params.block_size, [&](auto tile, auto width) {
    constexpr int kGroups = decltype(tile)::type::kBlockN / decltype(width)::value;
    const SplitPlan plan = plan_split_groups(params, kGroups, num_sms);
    ints = std::max(ints, plan.scratch(params.shape.Dv));
  });
  return ints;
}

}  // namespace lctx::cuda
