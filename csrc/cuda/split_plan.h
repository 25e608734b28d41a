// How few rows over many keys are dealt to thread blocks; decided from shapes alone.
#pragma once

#include <algorithm>

#include "../common/math.cuh"
#include "cuda_backend.h"

namespace lctx::cuda {

// A unit is a tile of rows with all its keys; a slot holds the partial result of a unit in a thread
// block. A span is what `span_ctas` thread blocks share evenly: a unit, or all of them.
struct SplitPlan {
  int64_t units = 0;  // 0: keys are not split
  int64_t head_bits = 0, slot_rows = 0, m_blocks = 0, head_blocks = 0;
  int64_t first_block = 0, blocks_per_unit = 0;
  int64_t ctas = 0, span_ctas = 0, grain = 1, slots = 0;  // slots 0: no unit is split
  bool fp32_out = false;  // of the merge, which then takes all units

  // Blocks of keys of a span.
  int64_t span() const { return units * blocks_per_unit / (ctas / span_ctas); }
  // In floats: partial rows, then their lse.
  int64_t scratch(int64_t D) const { return slots * slot_rows * (D + 1); }
};

// A unit of so few blocks is not worth a second kernel.
constexpr int64_t kWholeBlocks = 4;

// The busiest thread block may have a sixteenth more to do, if then none has parts of two units:
// every part has an end, and all of them end at once.
constexpr int64_t kEvenness = 16;

// `blocks` blocks of keys from `first_block` on are what the rows see at most.
inline SplitPlan plan_split(const AttnShape& s, int64_t first_block, int64_t blocks, int block_m,
                            int num_sms, bool fp32_out = false) {
  SplitPlan plan;
  plan.fp32_out = fp32_out;
  const int64_t G = s.Hq / s.Hkv;
  while (int64_t{1} << plan.head_bits < std::min<int64_t>(G, 64)) ++plan.head_bits;
  const int64_t rows = s.Tq << plan.head_bits;
  plan.slot_rows = std::min<int64_t>(rows, block_m);
  plan.m_blocks = ceil_div(rows, block_m);
  plan.head_blocks = ceil_div(G, 64);
  plan.units = s.B * s.Hkv * plan.head_blocks * plan.m_blocks;
  plan.first_block = first_block;
  plan.blocks_per_unit = blocks;
  const int64_t all = plan.units * blocks;
  const int64_t longest = ceil_div(blocks, std::max<int64_t>(num_sms / plan.units, 1));
  const int64_t shortest = ceil_div(all, std::min<int64_t>(all, num_sms));
  const bool apart = plan.units <= num_sms && longest * kEvenness <= shortest * (kEvenness + 1);
  const bool whole = !fp32_out && (blocks <= kWholeBlocks || (apart && longest == blocks));
  plan.grain = whole ? blocks : 1;
  if (apart && !whole) {
    plan.span_ctas = ceil_div(blocks, longest);
    plan.ctas = plan.units * plan.span_ctas;
  } else {
    plan.ctas = plan.span_ctas = std::min<int64_t>(all / plan.grain, num_sms);
  }
  plan.slots = whole ? 0 : plan.ctas + plan.units - 1;
  const int64_t most = plan.units * std::max<int64_t>(plan.blocks_per_unit, plan.slot_rows);
  if (most > INT32_MAX / 2) return {};
  return plan;
}

// Rows of a position side by side, of all its heads.
constexpr int64_t packed_rows(const AttnShape& s) {
  return s.Tq * next_power_of_two(std::min<int64_t>(s.Hq / s.Hkv, 64));
}

// flash_split_fwd.cu; `scratch` as many floats as the plan says. With `fp32_out` out is fp32.
SplitPlan plan_flash_split(const FlashParams& params, int num_sms, bool fp32_out = false);
void launch_flash_split(const FlashParams& params, const SplitPlan& plan, float* scratch,
                        int num_sms, Stream stream);

}  // namespace lctx::cuda
