// Math: dense softmax attention over one more set of keys: (out, lse) <- merge((out, lse),
//       attention over k, v), queries and keys at given positions. What a ring of devices computes
//       for every block of keys it receives.
// Tile map: as flash_fwd.cu.
// Pipeline: as flash_fwd.cu. The carried rows are read into the accumulators, with weight
//       exp(lse), while the first scores are computed; the online softmax goes on from there, so
//       that the merge costs no arithmetic.
// Memory: fp32 out and lse are read and written in place, 8 bytes an element; the first step reads
//       neither; rows that are done are written as 16-bit out instead. A first step of few rows
//       over many keys, as in decoding, goes to flash_split_fwd.cu.
// Limits: those of flash_fwd.cu; no cu_seqlens.
#include "attn_fwd_launch.cuh"
#include "split_plan.h"

namespace lctx::cuda {
namespace {

template <class Tile, bool kWindowed>
void launch_step(const CarryParams& params, int* counter, int num_sms, Stream stream) {
  using Traits = FwdTraits<DenseTile<Tile>, DenseTiles<Tile::kBlockM>,
                           DenseScores<Tile::kBlockN, kWindowed>, CarryRows>;
  const AttnShape& s = params.shape;
  auto p = fwd_params<Traits>(params, counter);
  p.query_offset = static_cast<int>(params.query_start - params.key_start);
  p.carry_out = params.first ? nullptr : static_cast<const float*>(params.carry_out.data);
  p.carry_lse = p.lse;
  p.state_rows = static_cast<int>(params.state_rows);
  p.inverse_scale = static_cast<float>(1 / params.scale);
  p.final_rows = static_cast<int>(params.final_rows);
  p.partial_out = params.final_rows < s.Tq ? static_cast<float*>(params.carry_out.data) : nullptr;
  p.row_shift = row_shift<Tile>(s.Tq);
  p.order = make_order("lctx::flash_carry", ceil_div(s.Tq, Tile::kBlockM), s.Hq, s.B,
                       dense_section(params));
  launch_fwd<Traits>(p, num_sms, stream);
}

// How the keys are split, if they are: the split has no state to begin with, no rows that are done,
// and its queries are the last positions.
SplitPlan plan_first_step(const CarryParams& params, int num_sms) {
  const AttnShape& s = params.shape;
  const bool positions = params.causal || params.window > 0;
  const bool last_ones = params.query_start - params.key_start == s.Tk - s.Tq;
  if (!params.first || params.final_rows > 0 || params.state_rows != s.Tq) return {};
  if (positions && !last_ones) return {};
  return plan_flash_split(params, num_sms, /*fp32_out=*/true);
}

}  // namespace

int64_t flash_carry_scratch(const CarryParams& params, int num_sms) {
  return std::max<int64_t>(plan_first_step(params, num_sms).scratch(params.shape.Dv), 1);
}

void launch_flash_carry(const CarryParams& params, void* scratch, int num_sms, Stream stream) {
  const AttnShape& s = params.shape;
  if (s.B * s.Tq * s.Hq == 0) return;
  const SplitPlan plan = plan_first_step(params, num_sms);
  if (plan.units > 0) {
    FlashParams rows = params;
    rows.out = params.carry_out;
    return launch_flash_split(rows, plan, static_cast<float*>(scratch), num_sms, stream);
  }
  int* counter = static_cast<int*>(scratch);
  cudaMemsetAsync(counter, 0, sizeof(int), stream);
  choose_type_and_tile(params, s.Tk, [&](auto tag) {
    using Tile = typename decltype(tag)::type;
    const auto launch = params.window > 0 ? launch_step<Tile, true> : launch_step<Tile, false>;
    launch(params, counter, num_sms, stream);
  });
}

}  // namespace lctx::cuda
