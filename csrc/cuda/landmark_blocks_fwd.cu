// Math: landmark attention, forward (lctx::landmark_fwd), blocks of any length: see
//       landmark_blocks.cuh.
// Tile map: attn_fwd_sm90.cuh with BlockScores. Head dimensions above 128 are two tiles of half of
//       the value columns, which both compute the scores.
// Pipeline: landmark_tables.cu makes the tables; then as attn_fwd_launch.cuh. Nothing is read on
//       the host.
// Memory: as flash_fwd.cu; tables of 8 bytes a position and 8 bytes a tile.
// Limits: as flash_fwd.cu.
#include "attn_fwd_launch.cuh"
#include "landmark_blocks.cuh"
#include "landmark_kernels.h"
#include "landmark_tables.h"

namespace lctx::cuda {
namespace {

template <class Tile>
void launch_blocks(const LandmarkParams& params, int* scratch, int num_sms, Stream stream) {
  constexpr int kParts = Tile::kHeadDim / Tile::kValueDim;
  using Tiles = ValuePartTiles<Tile::kBlockM, kParts, Tile::kValueDim>;
  using Traits = FwdTraits<Tile, Tiles, BlockScores<Tile::kBlockN>, StoreRows>;
  const AttnShape& s = params.shape;
  auto p = fwd_params<Traits>(params, scratch);
  const LandmarkTables tables(scratch + 2, s, Tile::kBlockN);
  p.rows = tables.rows;
  p.tiles = tables.tiles;
  p.max_tiles = tables.max_tiles;
  p.row_shift = row_shift<Tile>(s.Tq);
  p.order = make_order("lctx::landmark_fwd", ceil_div(s.Tq, Tile::kBlockM), s.Hq * kParts, s.B,
                       heads_per_section(s, s.Tk, 16) * kParts);
  launch_landmark_tables(params, Tile::kBlockN, tables, stream);
  launch_fwd<Traits>(p, num_sms, stream);
}

template <class T>
void choose_blocks(const LandmarkParams& params, int* scratch, int num_sms, Stream stream) {
  const int64_t D = std::max(params.shape.Dk, params.shape.Dv);
  if (D <= 64) {
    launch_blocks<FwdTile<T, 64, 64, 3, true, 2, 2, 64, true>>(params, scratch, num_sms, stream);
  } else if (D <= 128) {
    launch_blocks<FwdTile<T, 128, 128, 2, false, 2, 1, 128, true>>(params, scratch, num_sms,
                                                                   stream);
  } else {
    launch_blocks<FwdTile<T, 256, 64, 2, false, 2, 1, 128, true>>(params, scratch, num_sms, stream);
  }
}

}  // namespace

int64_t landmark_blocks_ints(const AttnShape& s) {
  return 2 + LandmarkTables::ints(s, /*block_n=*/64, /*with_groups=*/false);
}

void launch_landmark_blocks(const LandmarkParams& params, int* scratch, int num_sms,
                            Stream stream) {
  if (params.shape.dtype == DType::kBFloat16) {
    choose_blocks<__nv_bfloat16>(params, scratch, num_sms, stream);
  } else {
    choose_blocks<__half>(params, scratch, num_sms, stream);
  }
}

}  // namespace lctx::cuda
