// Math: the backward of one step of a ring, on statistics and a sum of dQ that all steps share
//       (lctx::carry_bwd_begin, carry_bwd_step, carry_bwd_end; lctx::flash_carry_bwd without them).
// Tile map: carry_step.cuh. Where dQ is added in an order: attn_bwd_tall.cuh, in its blocks.
//       What a step adds to a block of rows goes behind what the launches before it in its stream
//       have added. Launches of several streams at once have rows of their own; in a block that has
//       rows of both each adds zeros to those of the other.
// Pipeline: the main kernel alone, behind one that zeroes its counters.
// Memory: those of its parts.
// Limits: those of attn_bwd_sm90.cuh; D <= 128.
#include "carry_step.cuh"

namespace lctx::cuda {

int64_t carry_step_counters(const CarryParams& params, const BwdScratch& scratch, int64_t heads,
                            int64_t blocks) {
  if (scratch.block_rows == 0) return 1;
  const AttnShape& s = params.shape;
  return 1 + ((s.B - 1) * heads + s.Hq - 1) * blocks + ceil_div(s.Tq, scratch.block_rows);
}

void launch_carry_bwd_step(const CarryParams& params, const CarryGrads& grads,
                           const BwdScratch& scratch, int64_t heads, int64_t blocks, int num_sms,
                           Stream stream) {
  zero(scratch.counter, carry_step_counters(params, scratch, heads, blocks) * sizeof(int), stream);
  const auto launch = [&](auto tile, auto is_ordered) {
    using Tile = typename decltype(tile)::type;
    constexpr bool kOrdered = is_ordered.value;
    if constexpr (Tile::kFused && Tile::kTall == kOrdered) {
      const auto results = params.window > 0 ? launch_step_of<Tile, StoreKeys, true, kOrdered>
                                             : launch_step_of<Tile, StoreKeys, false, kOrdered>;
      const auto sums = params.window > 0 ? launch_step<Tile, true, kOrdered>
                                          : launch_step<Tile, false, kOrdered>;
      const auto run = grads.results ? results : sums;
      run(params, grads, scratch, heads, blocks, num_sms, stream);
    }
  };
  if (scratch.block_rows > 0) {
    choose_bwd_tile<128, 128>(
        params, true, [&](auto tile) { launch(tile, std::true_type()); }, true);
  } else {
    choose_bwd_tile(params, true, [&](auto tile) { launch(tile, std::false_type()); });
  }
}

}  // namespace lctx::cuda
