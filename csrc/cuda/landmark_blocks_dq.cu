// Math: landmark attention, backward (lctx::landmark_bwd; the forward is lctx::landmark_fwd), the
//       gradient of the queries over blocks of any length: see landmark_block_grads.cuh.
// Tile map: 192 x 64 (D <= 64), 128 x 64 (D <= 128), 128 x 32 (D <= 256).
// Pipeline: the tables of landmark_tables.cu, the pass of BlockSums, that of BlockGrads; where
//       the kernel of the keys sums dq (landmark_dkv.cu) the first alone.
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
  p.bounds = tables.bounds + params.chunk * params.shape.B;
  p.batches = static_cast<int>(params.shape.B);
  p.first_tile = params.chunk * tables.chunk_tiles;
  p.end_tile = std::min(p.first_tile + tables.chunk_tiles, p.max_tiles);
  return p;
}

// 64 keys, which divide the usual lengths of blocks.
template <class T, int kHeadDim>
using BlocksDqTile = std::conditional_t<kHeadDim == 256, DqTile<T, 256, 32, 2, 3, false>,
                                        DqTile<T, kHeadDim, 64, kHeadDim == 64 ? 3 : 2, 4, true>>;

// Without accumulators there are registers for three warpgroups.
template <class T, int kHeadDim>
using BlockSumsTile =
    std::conditional_t<kHeadDim == 128, DqTile<T, 128, 64, 3, 3, false>, BlocksDqTile<T, kHeadDim>>;

template <class Tile, class SumsTile>
void launch_blocks(const LandmarkDqParams& params, int num_sms, Stream stream) {
  using Sums =
      FwdTraits<SumsTile, DenseTiles<SumsTile::kBlockM>, BlockSums<Tile::kBlockN>, StoreRows>;
  using Grads = FwdTraits<Tile, DenseTiles<Tile::kBlockM>, BlockGrads<Tile::kBlockN>, StoreRows>;
  const LandmarkTables own(params.scratch + 2, params.shape, Tile::kBlockN, /*with_groups=*/true);
  const LandmarkTables& tables = params.tables != nullptr ? *params.tables : own;
  if (params.tables == nullptr) {
    launch_landmark_tables(params, Tile::kBlockN, tables, stream);
  }
  auto sums = block_params<Sums>(params, tables);
  sums.counter = params.scratch + 1;
  launch_tiles<Sums>("landmark_sums_sm90_kernel", landmark_sums_sm90_kernel<Sums>, sums, num_sms,
                     stream, /*overlap=*/false);
  if (params.dq_sum != nullptr) return;
  launch_dq<Grads>(block_params<Grads>(params, tables), num_sms, stream);
}

}  // namespace

int64_t landmark_blocks_dq_ints(const AttnShape& s) {
  return 2 + LandmarkTables::ints(s, /*block_n=*/32, /*with_groups=*/true);
}

void launch_landmark_blocks_dq(const LandmarkDqParams& params, int num_sms, Stream stream) {
  choose_type_and_dim(params.shape, [&](auto type, auto dim) {
    using T = typename decltype(type)::type;
    launch_blocks<BlocksDqTile<T, dim.value>, BlockSumsTile<T, dim.value>>(params, num_sms, stream);
  });
}

}  // namespace lctx::cuda
