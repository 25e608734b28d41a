// Math: dense softmax attention, forward: out = softmax(scale q k^T) v over the keys a row sees,
//       and its log-sum-exp.
// Tile map: attn_fwd_launch.cuh chooses the tile; attn_fwd_sm90.cuh is the kernel. Few rows over
//       many keys go to flash_split_fwd.cu.
// Pipeline: one memset of the tile counter, one persistent launch of a block per multiprocessor.
// Memory: q, k, v once (keys and values from L2), out and lse once.
// Limits: bf16, fp16; Dk = Dv, a multiple of 8 up to 256; strides and data at multiples of 16
//       bytes; scale > 0. csrc/api/flash.cpp refuses the rest.
#include "attn_fwd_launch.cuh"
#include "attn_fwd_tail.cuh"
#include "split_plan.h"

namespace lctx::cuda {
namespace {

// Without a window the mask costs half as much.
template <class Tile, bool kWindowed>
void launch_dense(const FlashParams& params, int* counter, int num_sms, Stream stream,
                  int tiles_left = 0) {
  using Traits = FwdTraits<DenseTile<Tile>, DenseTiles<Tile::kBlockM>,
                           DenseScores<Tile::kBlockN, kWindowed>, StoreRows>;
  const AttnShape& s = params.shape;
  auto p = fwd_params<Traits>(params, counter);
  p.row_shift = row_shift<Tile>(s.Tq);
  p.order = make_order("lctx::flash_fwd", ceil_div(s.Tq, Tile::kBlockM), s.Hq, s.B,
                       dense_section(params));
  p.order.num_tiles -= tiles_left;
  launch_fwd<Traits>(p, num_sms, stream);
}

// Tiles that all have the same keys and would leave multiprocessors idle in the last round.
template <class Tile>
TailPlan plan_tail(const FlashParams& params, int num_sms) {
  const AttnShape& s = params.shape;
  if (Tile::kQStages > 1 || params.causal || params.window > 0 || params.cu_seqlens != nullptr) {
    return {};
  }
  return TailPlan(ceil_div(s.Tq, Tile::kBlockM) * s.Hq * s.B, ceil_div(s.Tk, Tile::kBlockN),
                  num_sms);
}

// The tiles that launch_dense left.
template <class Tile>
void launch_tail(const FlashParams& params, const TailPlan& tail, int* scratch, int num_sms,
                 Stream stream) {
  using Traits =
      FwdTraits<Tile, TailTiles<Tile::kBlockM>, DenseScores<Tile::kBlockN, false>, TailRows>;
  const AttnShape& s = params.shape;
  auto p = fwd_params<Traits>(params, scratch + 1);
  p.order = make_order("lctx::flash_fwd", ceil_div(s.Tq, Tile::kBlockM), s.Hq, s.B,
                       dense_section(params));
  p.whole = p.order.num_tiles - tail.tiles;
  p.order.num_tiles = tail.tiles * tail.parts;
  p.part_blocks = tail.blocks;
  p.per_tile = FastDivisor(tail.parts);
  p.partial = reinterpret_cast<float*>(scratch) + 4;  // after the counters, aligned
  p.lse = p.partial + tail.rows(Tile::kBlockM) * Tile::kValueDim;
  launch_fwd<Traits>(p, num_sms, stream, /*overlap=*/true);

  const TailMerge merge{p.partial, p.lse,   params.out, static_cast<float*>(params.lse),
                        p.order,   p.whole, tail.parts, p.Hq,
                        p.Tq,      p.D};
  launch_overlapping("tail_merge_kernel", tail_merge_kernel<Tile>, merge,
                     dim3(tail.tiles * Tile::kBlockM / kTailWarps), dim3(32 * kTailWarps), stream);
}

// Without a mask.
template <class Tile>
void launch_full(const FlashParams& params, int* scratch, int num_sms, Stream stream) {
  const TailPlan tail = plan_tail<Tile>(params, num_sms);
  const int64_t keys = params.shape.Tk, keys_left = keys % Tile::kBlockN;
  using Short = ShortFirstTile<Tile>;
  bool short_first = false;
  if constexpr (Tile::kBlockN > 2 * Short::kFirstN) {
    // On longer rows the plain loop is better scheduled.
    short_first =
        keys > Tile::kBlockN && keys < kLongCausal && keys_left > 0 && keys_left <= Short::kFirstN;
    if (short_first) launch_dense<Short, false>(params, scratch, num_sms, stream, tail.tiles);
  }
  if (!short_first) launch_dense<Tile, false>(params, scratch, num_sms, stream, tail.tiles);
  if (tail.parts > 0) launch_tail<Tile>(params, tail, scratch, num_sms, stream);
}

template <class Tile>
void launch_packed(const FlashParams& params, int* counter, int num_sms, Stream stream) {
  using Traits =
      FwdTraits<DenseTile<Tile>, PackedTiles<Tile::kBlockM>, DenseScores<Tile::kBlockN>, StoreRows>;
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
  const SplitPlan plan = plan_flash_split(params, num_sms);
  int64_t words = std::max<int64_t>(plan.scratch(params.shape.Dv), 2);
  if (plan.units > 0) return words;
  choose_type_and_tile(params, params.shape.Tk, [&](auto tag) {
    using Tile = typename decltype(tag)::type;
    const TailPlan tail = plan_tail<Tile>(params, num_sms);
    words += 4 + tail.words(Tile::kBlockM, Tile::kValueDim);
  });
  return words;
}

void launch_flash_fwd(const FlashParams& params, void* scratch, int num_sms, Stream stream) {
  const AttnShape& s = params.shape;
  if (s.B * s.Tq * s.Hq == 0) return;
  const SplitPlan plan = plan_flash_split(params, num_sms);
  if (plan.units > 0) {
    return launch_flash_split(params, plan, static_cast<float*>(scratch), num_sms, stream);
  }
  int* counter = static_cast<int*>(scratch);
  cudaMemsetAsync(counter, 0, 2 * sizeof(int), stream);
  choose_type_and_tile(params, s.Tk, [&](auto tile) {
    using Tile = typename decltype(tile)::type;
    if (params.cu_seqlens != nullptr) {
      launch_packed<Tile>(params, counter, num_sms, stream);
    } else if (params.window > 0) {
      launch_dense<Tile, true>(params, counter, num_sms, stream);
    } else {
      if constexpr (Tile::kQStages == 1) {
        if (!params.causal) return launch_full<Tile>(params, counter, num_sms, stream);
      }
      launch_dense<Tile, false>(params, counter, num_sms, stream);
    }
  });
}

}  // namespace lctx::cuda
