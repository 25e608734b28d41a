// Math: landmark attention, backward (lctx::landmark_bwd; lctx::landmark_fwd has the forward), the
//       gradients of keys and values, and fused those of the queries too, from what the queries'
//       kernel has written (landmark_bwd.h).
// Tile map: attn_bwd_sm90.cuh with LandmarkKeys: pieces of at most 64 keys of one block each.
// Pipeline: a memset of the tile counter, the tables of landmark_tables.cu, one persistent launch.
// Memory: as attn_bwd_sm90.cuh and landmark_keys.cuh; the tables.
// Limits: as attn_bwd_sm90.cuh.
#include "attn_bwd_launch.cuh"
#include "landmark_keys.cuh"

namespace lctx::cuda {
namespace {

// Pieces of a batch, an even number.
int64_t num_pieces(const LandmarkParams& params) {
  const int64_t Tk = params.shape.Tk, l = params.block_size;
  const int64_t pieces =
      l > 0 ? Tk / l * ceil_div(l, 64) + ceil_div(Tk % l, 64) : LandmarkTables::most_tiles(Tk, 64);
  return ceil_div(pieces, 2) * 2;
}

template <class Tile>
void launch_pieces(const LandmarkDqParams& params, const AttnGrads& grads, int num_sms,
                   Stream stream) {
  constexpr int kPieces = Tile::kVectors;
  using Traits = BwdTraits<Tile, LandmarkKeys<kPieces>, StoreGroupKeys, false>;
  const AttnShape& s = params.shape;
  typename Traits::Params p{};
  BwdScratch scratch;
  scratch.counter = params.scratch;
  scratch.dq_sum = params.dq_sum;
  set_attention_bwd<Tile>(params, grads, scratch, p);
  p.k[0] = make_rows_map(params.k, s.dtype, s.B, s.Tk, s.Hkv, s.Dk, 64);
  p.v[0] = make_rows_map(params.v, s.dtype, s.B, s.Tk, s.Hkv, s.Dv, 64);
  const LandmarkTables tables(params.scratch + 2, s, 64, /*with_groups=*/true, num_pieces(params));
  // Tiles that the tables leave out lie behind all keys.
  cudaMemsetAsync(tables.tiles, 0x3f, s.B * tables.max_tiles * sizeof(LandmarkTile), stream);
  launch_landmark_tables(params, 64, tables, stream);
  p.tiles = tables.tiles;
  p.groups = tables.groups;
  p.max_tiles = tables.max_tiles;
  p.vectors = params.vectors;
  p.order = KeyOrder(
      make_order("lctx::landmark_bwd", p.max_tiles / kPieces, s.Hkv, s.B, bwd_section(s, s.Tq)));
  launch_bwd<Traits>(p, num_sms, stream);
}

}  // namespace

int64_t landmark_dkv_ints(const AttnShape& s) {
  return 2 + LandmarkTables::ints(s, 64, /*with_groups=*/true) + 3 * s.B;
}

void launch_landmark_dkv(const LandmarkDqParams& params, const AttnGrads& grads, int num_sms,
                         Stream stream) {
  const AttnShape& s = params.shape;
  if (s.B * s.Tk * s.Hkv == 0) return;
  cudaMemsetAsync(params.scratch, 0, sizeof(int), stream);
  const auto with_type = [&](auto type) {
    using T = typename decltype(type)::type;
    const auto with_tile = [&](auto fused) {
      if (s.Dk <= 64) {
        launch_pieces<BwdTile<T, 64, fused.value, true>>(params, grads, num_sms, stream);
      } else if (s.Dk <= 128) {
        launch_pieces<BwdTile<T, 128, fused.value, true>>(params, grads, num_sms, stream);
      } else if constexpr (!fused.value) {
        launch_pieces<BwdTile<T, 256, false, true>>(params, grads, num_sms, stream);
      }
    };
    if (params.dq_sum != nullptr) {
      with_tile(std::true_type());
    } else {
      with_tile(std::false_type());
    }
  };
  if (s.dtype == DType::kBFloat16) {
    with_type(TypeTag<__nv_bfloat16>());
  } else {
    with_type(TypeTag<__half>());
  }
}

}  // namespace lctx::cuda
