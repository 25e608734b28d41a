// Math: landmark attention, backward (lctx::landmark_bwd), the gradient of the queries over blocks
//       of any length: see landmark_block_grads.cuh.
// Tile map: attn_dq_launch.cuh chooses the tile.
// Pipeline: the tables of landmark_tables.cu, the pass of BlockSums, that of BlockGrads.
// Memory: as landmark_block_grads.cuh, and the tables.
// Limits: as flash_fwd.cu.
#include "landmark_block_grads.cuh"
#include "landmark_dq_launch.cuh"

namespace lctx::cuda {
namespace {

template <class Traits>
typename Traits::Params block_params(const LandmarkDqParams& params, const LandmarkTables& tables) {
  typename Traits::Params p{};
  set_landmark_dq<Traits>(params, p);
  p.rows = tables.rows;
  p.tiles = tables.tiles;
  p.groups = tables.groups;
  p.max_tiles = tables.max_tiles;
  return p;
}

template <class Tile>
void launch_blocks(const LandmarkDqParams& params, int num_sms, Stream stream) {
  using Tiles = DenseTiles<Tile::kBlockM>;
  using Sums = FwdTraits<Tile, Tiles, BlockSums<Tile::kBlockN>, StoreRows>;
  using Grads = FwdTraits<Tile, Tiles, BlockGrads<Tile::kBlockN>, StoreRows>;
  const LandmarkTables tables(params.scratch + 2, params.shape, Tile::kBlockN,
                              /*with_groups=*/true);
  launch_landmark_tables(params, Tile::kBlockN, tables, stream);
  auto sums = block_params<Sums>(params, tables);
  sums.counter = params.scratch + 1;
  launch_tiles<Sums>("landmark_sums_sm90_kernel", landmark_sums_sm90_kernel<Sums>, sums, num_sms,
                     stream, /*overlap=*/false);
  launch_dq<Grads>(block_params<Grads>(params, tables), num_sms, stream);
}

}  // namespace

int64_t landmark_blocks_dq_ints(const AttnShape& s) {
  return 2 + LandmarkTables::ints(s, /*block_n=*/48, /*with_groups=*/true);
}

void launch_landmark_blocks_dq(const LandmarkDqParams& params, int num_sms, Stream stream) {
  choose_dq_tile(params, [&](auto tile) {
    launch_blocks<typename decltype(tile)::type>(params, num_sms, stream);
  });
}

}  // namespace lctx::cuda
