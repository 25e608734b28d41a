// Math: as flash_fwd.cu, for grids too small to fill the GPU: decoding one or a few tokens, short
//       pieces of a prompt over a long cache. Keys are split; partial results are merged exactly.
// Tile map: the query heads of a group share the rows of a tile (SplitTiles). Up to 64 rows, memory
//       is the limit, with 128 KB of keys and values on the way to a multiprocessor. Up to 16 rows:
//       attn_few_rows.cuh. Else one consumer warpgroup, in two thread blocks where there is room.
//         D <= 64   64 x 128, two blocks    D <= 128  64 x 64, two     D <= 256  64 x 64, one
//       More rows take the tiles of flash_fwd.cu.
// Pipeline: a static share of the blocks of keys for each thread block (split_plan.h); a second,
//       overlapping launch merges (attn_split_launch.cuh). The same sums in the same order on every
//       run.
// Memory: keys and values once for up to 64 rows; scratch of one partial tile for each
//       multiprocessor and for each tile of rows.
// Limits: those of flash_fwd.cu; no cu_seqlens.
#include "attn_few_rows.cuh"
#include "attn_split_launch.cuh"

namespace lctx::cuda {
namespace {

// Calls run(TypeTag<tile>, TypeTag<its SplitTiles>).
template <class T, int kRowTiles, class Run>
void choose_few_rows_tile(const AttnShape& s, Run&& run) {
  const int64_t D = std::max(s.Dk, s.Dv);
  const TypeTag<SplitTiles<64>> tiles;
  if (D <= 64) {
    run(TypeTag<FewRowsTile<T, 64, kRowTiles>>(), tiles);
  } else if (D <= 128) {
    run(TypeTag<FewRowsTile<T, 128, kRowTiles>>(), tiles);
  } else {
    run(TypeTag<FewRowsTile<T, 256, kRowTiles>>(), tiles);
  }
}

template <class T, class Run>
void choose_decode_tile(const AttnShape& s, Run&& run) {
  const int64_t D = std::max(s.Dk, s.Dv);
  const TypeTag<SplitTiles<64>> tiles;
  if (packed_rows(s) <= 8) {
    choose_few_rows_tile<T, 1>(s, run);
  } else if (packed_rows(s) <= 16) {
    choose_few_rows_tile<T, 2>(s, run);
  } else if (D <= 64) {
    run(TypeTag<PairedTile<T, 64, 128>>(), tiles);
  } else if (D <= 128) {
    run(TypeTag<PairedTile<T, 128, 64>>(), tiles);
  } else {
    run(TypeTag<DecodeTile<T, 256, 64>>(), tiles);
  }
}

template <class Run>
void choose_split_tile(const FlashParams& params, Run&& run) {
  const AttnShape& s = params.shape;
  if (packed_rows(s) > 64) {
    choose_type_and_tile(params, s.Tk, [&](auto tag) {
      run(tag, TypeTag<SplitTiles<decltype(tag)::type::kBlockM>>());
    });
  } else if (s.dtype == DType::kBFloat16) {
    choose_decode_tile<__nv_bfloat16>(s, run);
  } else {
    choose_decode_tile<__half>(s, run);
  }
}

// Whether the split is faster than tiles of whole rows, which need no merge: only where those leave
// multiprocessors idle, by the keys that the busiest one walks.
bool pays(const FlashParams& params, const SplitPlan& plan, int block_m, int block_n, int num_sms) {
  constexpr int64_t kMergeKeys = 512;  // what starting the merge costs
  const AttnShape& s = params.shape;
  if (ceil_div(s.Tq, block_m) * s.Hq * s.B >= num_sms) return false;
  const int64_t keys = plan.blocks_per_unit * block_n;
  const int64_t hidden = params.causal ? std::min(s.Tq, keys) / 2 : 0;  // on average
  return ceil_div(plan.units * keys, num_sms) + kMergeKeys < keys - hidden;
}

template <class Tile, class Tiles>
void launch(TypeTag<Tile>, TypeTag<Tiles>, const FlashParams& params, const SplitPlan& plan,
            float* scratch, int num_sms, Stream stream) {
  using Traits = FwdTraits<Tile, Tiles, DenseScores<Tile::kBlockN>, SplitRows>;
  typename Traits::Params p{};
  set_flash(params, nullptr, p);
  set_key_maps(params, Tile::kBlockN, p);
  launch_split<Traits>(params, plan, p, scratch, num_sms, stream);
}

template <class T, int kHeadDim, int kRowTiles>
void launch(TypeTag<FewRowsTile<T, kHeadDim, kRowTiles>>, TypeTag<SplitTiles<64>>,
            const FlashParams& params, const SplitPlan& plan, float* scratch, int num_sms,
            Stream stream) {
  using Tile = FewRowsTile<T, kHeadDim, kRowTiles>;
  typename Tile::Params p{};
  set_flash(params, nullptr, p);
  set_key_maps(params, Tile::kKeys, p);
  p.q_view = params.q;
  set_split(params, plan, Tile::kBlockM, scratch, p);
  p.deals_pieces = plan.grain == 1 && plan.ctas == plan.units * plan.span_ctas;
  launch_and_merge<Tile>("attn_few_rows_kernel", attn_few_rows_kernel<Tile>, params, plan, p,
                         scratch, num_sms, stream);
}

}  // namespace

SplitPlan plan_flash_split(const FlashParams& params, int num_sms, bool fp32_out) {
  const AttnShape& s = params.shape;
  if (params.cu_seqlens != nullptr || s.B * s.Tq * s.Hq * s.Tk == 0) return {};
  const int64_t first =
      params.window > 0 ? std::max<int64_t>(s.Tk - s.Tq - params.window + 1, 0) : 0;
  SplitPlan plan;
  choose_split_tile(params, [&](auto tag, auto) {
    using Tile = typename decltype(tag)::type;
    const int64_t block = first / Tile::kBlockN;
    plan = plan_split(s, block, ceil_div(s.Tk, Tile::kBlockN) - block, Tile::kBlockM,
                      num_sms * Tile::kPerSm, fp32_out);
    if (Tile::kBlockM > 64 && !pays(params, plan, Tile::kBlockM, Tile::kBlockN, num_sms)) {
      plan = {};
    }
  });
  return plan;
}

void launch_flash_split(const FlashParams& params, const SplitPlan& plan, float* scratch,
                        int num_sms, Stream stream) {
  choose_split_tile(params, [&](auto tile, auto tiles) {
    launch(tile, tiles, params, plan, scratch, num_sms, stream);
  });
}

}  // namespace lctx::cuda
