// Math: dense softmax attention, backward: dq, dk and dv from dout.
// Tile map: attn_bwd_sm90.cuh is the kernel; blocks of 128 keys.
// Pipeline: row statistics (bwd_rows.cu), the main kernel, dQ to its dtype (unpack_dq.cu).
// Memory: those of its parts.
// Limits: those of its parts.
#include "attn_bwd_launch.cuh"

namespace lctx::cuda {
namespace {

template <class Tile, bool kWindowed>
void launch_dense(const FlashParams& params, const AttnGrads& grads, const BwdScratch& scratch,
                  int num_sms, Stream stream) {
  using Traits = BwdTraits<Tile, DenseKeys<Tile::kBlockN>, StoreKeys, kWindowed>;
  const AttnShape& s = params.shape;
  typename Traits::Params p{};
  set_attention_bwd<Tile>(params, grads, scratch, p);
  p.window = static_cast<int>(std::min<int64_t>(params.window, INT32_MAX / 2));
  p.order = KeyOrder(make_order("lctx::flash_bwd", ceil_div(s.Tk, Tile::kBlockN), s.Hkv, s.B,
                                bwd_section(s, s.Tq)));
  launch_bwd<Traits>(p, num_sms, stream);
}

template <class Tile>
void launch_packed(const FlashParams& params, const AttnGrads& grads, const BwdScratch& scratch,
                   int num_sms, Stream stream) {
  using Traits = BwdTraits<Tile, PackedKeys<Tile::kBlockN>, StoreKeys, true>;
  const AttnShape& s = params.shape;
  typename Traits::Params p{};
  set_attention_bwd<Tile>(params, grads, scratch, p);
  p.window = static_cast<int>(std::min<int64_t>(params.window, INT32_MAX / 2));
  p.cu_seqlens = params.cu_seqlens;
  p.num_docs = static_cast<int>(params.num_docs);
  p.order = KeyOrder(make_order("lctx::flash_bwd", s.Tk / Tile::kBlockN + params.num_docs, s.Hkv,
                                s.B, bwd_section(s, s.Tq)));
  launch_bwd<Traits>(p, num_sms, stream);
}

}  // namespace

void launch_flash_bwd(const FlashParams& params, const AttnGrads& grads, const BwdScratch& scratch,
                      bool fused, int num_sms, Stream stream) {
  choose_bwd_tile<256, true>(params, fused, [&](auto tile) {
    using Tile = typename decltype(tile)::type;
    if (params.cu_seqlens != nullptr) {
      launch_packed<Tile>(params, grads, scratch, num_sms, stream);
    } else if (params.window > 0) {
      launch_dense<Tile, true>(params, grads, scratch, num_sms, stream);
    } else {
      launch_dense<Tile, false>(params, grads, scratch, num_sms, stream);
    }
  });
}

}  // namespace lctx::cuda
