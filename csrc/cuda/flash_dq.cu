// Math: dense softmax attention, backward, the gradient of the queries alone; see attn_dq_sm90.cuh.
// Tile map: attn_dq_launch.cuh chooses the tile.
// Pipeline: one memset of the tile counter, one persistent launch of a block per multiprocessor.
// Memory: q, dout, k, v once (keys and values from L2), lse2 and delta once, dq once.
// Limits: as flash_fwd.cu; dout and dq as q.
#include "attn_dq_launch.cuh"

namespace lctx::cuda {
namespace {

template <class Tile, bool kWindowed>
void launch_dense(const FlashParams& params, const DqInputs& inputs, int* counter, int num_sms,
                  Stream stream) {
  using Traits =
      FwdTraits<Tile, DenseTiles<Tile::kBlockM>, DenseGrads<Tile::kBlockN, kWindowed>, StoreRows>;
  typename Traits::Params p{};
  set_flash(params, counter, p);
  set_dq<Tile>("lctx::flash_bwd", params, inputs, p);
  launch_dq<Traits>(p, num_sms, stream);
}

// The search for the document leaves no registers for the tile of three warpgroups.
template <class T, int kHeadDim>
using PackedDqTile = std::conditional_t<kHeadDim == 64, DqTile<T, 64, 128, 2, 3, false>,
                                        typename DqTiles<T, kHeadDim>::type>;

template <class Tile>
void launch_packed(const FlashParams& params, const DqInputs& inputs, int* counter, int num_sms,
                   Stream stream) {
  using Traits = FwdTraits<Tile, PackedTiles<Tile::kBlockM>, DenseGrads<Tile::kBlockN>, StoreRows>;
  const AttnShape& s = params.shape;
  typename Traits::Params p{};
  set_flash(params, counter, p);
  set_dq<Tile>("lctx::flash_bwd", params, inputs, p);
  p.row_shift = 0;
  p.cu_seqlens = params.cu_seqlens;
  p.num_docs = static_cast<int>(params.num_docs);
  p.order = make_order("lctx::flash_bwd", s.Tq / Tile::kBlockM + params.num_docs, s.Hq, s.B,
                       heads_per_section(s, s.Tk, 16));
  launch_dq<Traits>(p, num_sms, stream);
}

}  // namespace

void launch_flash_dq(const FlashParams& params, const AttnGrads& grads, const float* lse2,
                     const float* delta, int* counter, int num_sms, Stream stream) {
  const AttnShape& s = params.shape;
  if (s.B * s.Tq * s.Hq == 0) return;
  cudaMemsetAsync(counter, 0, sizeof(int), stream);
  FlashParams to_dq = params;
  to_dq.out = grads.dq;
  const DqInputs inputs{grads.dout, lse2, delta};
  choose_type_and_dim(s, [&](auto type, auto dim) {
    using T = typename decltype(type)::type;
    using Tile = typename DqTiles<T, dim.value>::type;
    if (params.cu_seqlens != nullptr) {
      launch_packed<PackedDqTile<T, dim.value>>(to_dq, inputs, counter, num_sms, stream);
    } else if (params.window > 0) {
      launch_dense<Tile, true>(to_dq, inputs, counter, num_sms, stream);
    } else {
      launch_dense<Tile, false>(to_dq, inputs, counter, num_sms, stream);
    }
  });
}

}  // namespace lctx::cuda
