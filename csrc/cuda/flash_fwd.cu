// Math: dense softmax attention, forward: out = softmax(scale q k^T) v over the keys a row sees,
//       and its log-sum-exp.
// Tile map: attn_fwd_launch.cuh chooses the tile; attn_fwd_sm90.cuh is the kernel. Few rows over
//       many keys go to flash_split_fwd.cu.
// Pipeline: one memset of the tile counter, one persistent launch of a block per multiprocessor.
// Memory: q, k, v once (keys and values from L2), out and lse once.
// Limits: bf16, fp16; Dk = Dv, a multiple of 8 up to 256; strides and data at multiples of 16
//       bytes; scale > 0. csrc/api/flash.cpp refuses the rest.
#include "attn_fwd_launch.cuh"
#include "split_plan.h"

namespace lctx::cuda {
namespace {

// Without a window the mask costs half as much.
template <class Tile, bool kWindowed>
void launch_dense(const FlashParams& params, int* counter, int num_sms, Stream stream) {
  // Not measured with windows and at D256.
  using Chosen = std::conditional_t<kWindowed || Tile::kHeadDim == 256, Tile, TurnsTile<Tile>>;
  using Traits = FwdTraits<Chosen, DenseTiles<Tile::kBlockM>, DenseScores<Tile::kBlockN, kWindowed>,
                           StoreRows>;
  const AttnShape& s = params.shape;
  auto p = fwd_params<Traits>(params, counter);
  p.row_shift = row_shift<Tile>(s.Tq);
  p.order = make_order("lctx::flash_fwd", ceil_div(s.Tq, Tile::kBlockM), s.Hq, s.B,
                       heads_per_section(s, s.Tk, 16));
  launch_fwd<Traits>(p, num_sms, stream);
}

template <class Tile>
void launch_packed(const FlashParams& params, int* counter, int num_sms, Stream stream) {
  using Traits = FwdTraits<Tile, PackedTiles<Tile::kBlockM>, DenseScores<Tile::kBlockN>, StoreRows>;
  const AttnShape& s = params.shape;
  auto p = fwd_params<Traits>(params, counter);
  p.cu_seqlens = params.cu_seqlens;
  p.num_docs = static_cast<int>(params.num_docs);
  p.order = make_order("lctx::flash_fwd", s.Tq / Tile::kBlockM + params.num_docs, s.Hq, s.B,
                       heads_per_section(s, s.Tk, 16));
  launch_fwd<Traits>(p, num_sms, stream);
}

}  // namespace

int num_sms() {
  int device = 0, count = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
  return count;
}

int64_t flash_fwd_scratch(const FlashParams& params, int num_sms) {
  return std::max<int64_t>(plan_flash_split(params, num_sms).scratch(params.shape.Dv), 1);
}

void launch_flash_fwd(const FlashParams& params, void* scratch, int num_sms, Stream stream) {
  const AttnShape& s = params.shape;
  if (s.B * s.Tq * s.Hq == 0) return;
  const SplitPlan plan = plan_flash_split(params, num_sms);
  if (plan.units > 0) {
    return launch_flash_split(params, plan, static_cast<float*>(scratch), num_sms, stream);
  }
  int* counter = static_cast<int*>(scratch);
  cudaMemsetAsync(counter, 0, sizeof(int), stream);
  const auto launch = [&](auto tile) {
    using Tile = typename decltype(tile)::type;
    if (params.cu_seqlens != nullptr) {
      launch_packed<Tile>(params, counter, num_sms, stream);
    } else if (params.window > 0) {
      launch_dense<Tile, true>(params, counter, num_sms, stream);
    } else {
      launch_dense<Tile, false>(params, counter, num_sms, stream);
    }
  };
  // Turns make up for shorter blocks.
  const bool turns = params.cu_seqlens == nullptr && params.window == 0;
  choose_type_and_tile(params, s.Tk, launch, turns ? kLongCausal : kLongFull);
}

}  // namespace lctx::cuda
