// Math: Infini-attention (arXiv 2404.07143, section 2.1), forward: causal softmax attention inside
//       segments, gated with what the memory of all earlier segments returns:
//         out = g sigma(q) M_{s-1} / max(sigma(q) z_{s-1}, eps) + (1 - g) A_dot
//       and the memory after the last segment, by the linear or the delta rule.
// Tile map: attn_fwd_sm90.cuh over the segments, with MemoryRows at the end of a tile; before it
//       the memory's kernels: infini_chain_fwd.cu, or infini_sums_fwd.cu, infini_scan_fwd.cu and
//       infini_delta_scan.cu.
// Pipeline: the memory is made in one of two ways (plan_infini). Chains (linear rule): a few
//       multiprocessors walk through the segments of one head each while attention runs on the
//       others, a few segments behind. Parallel: sums of every segment, a scan over D x D states,
//       then attention; the delta rule adds D x D decays, which need the prefix of z.
// Memory: q, k, v, out once for attention; k and v once more for the memory (parallel delta rule: k
//       twice). States: D^2 fp32 and D^2 16-bit numbers per segment and key/value head, the
//       parallel delta rule as many fp32 again.
// Limits: those of flash_fwd.cu, for q_mem and k_mem too; gate and memory fp32; any segment length.
#include <cstdlib>
#include <cstring>

#include "attn_fwd_launch.cuh"
#include "infini_rows.cuh"
#include "infini_states.h"

namespace lctx::cuda {
namespace {

template <class BaseTile>
void launch_rows(const InfiniParams& params, const InfiniPlan& plan, const InfiniStates& states,
                 int* counter, int num_sms, Stream stream) {
  using Tile = MemoryTile<BaseTile>;
  using Traits =
      FwdTraits<Tile, LocalTiles<Tile::kBlockM>, DenseScores<Tile::kBlockN, false>, MemoryRows>;
  const AttnShape& s = params.shape;
  auto p = fwd_params<Traits>(params, counter);
  p.segment_len = states.segment_len;
  p.per_segment = FastDivisor(static_cast<int>(s.Hq));
  p.row_shift = row_shift<Tile>(states.segment_len);
  const int64_t num_states = int64_t{states.chains()} * states.S;
  const int rows = MemoryRows::kBlockRows<FwdKernel<Traits>>;
  p.memory = make_map(states.half, s.dtype,
                      {{s.Dk, s.Dk, 1, num_states, 1},
                       {s.Dk, 0, states.matrix(), 0},
                       {kChunkColumns, rows, 1, 1, 1}});
  p.has_q_mem = params.q_mem.data != nullptr;
  if (p.has_q_mem) p.q_mem = make_rows_map(params.q_mem, s.dtype, s.B, s.Tq, s.Hq, s.Dk, 64);
  p.local_view = params.out_local;
  if (params.out_local.data != nullptr) {
    p.local_out = make_rows_map(params.out_local, s.dtype, s.B, s.Tq, s.Hq, s.Dv, 64);
  }
  p.gate = static_cast<const float*>(params.gate);
  p.norms = states.norms;
  const bool beside = plan.chain_blocks > 0;
  p.ready = beside ? states.ready : nullptr;
  p.S = states.S;
  p.Hkv = states.Hkv;
  p.has_mem = params.has_mem;
  p.first_bypass = params.first_bypass;
  p.order = make_order("lctx::infini_fwd", ceil_div(states.segment_len, Tile::kBlockM),
                       s.Hq * states.S, s.B, heads_per_section(s, states.segment_len, 256));
  launch_fwd<Traits>(p, num_sms, stream, /*overlap=*/beside);
}

// The tiles of attn_fwd_launch.cuh for short rows, for any segment length: 128 x 176 leaves no
// registers for the retrieval.
template <class T>
void choose_tile(const InfiniParams& params, const InfiniPlan& plan, const InfiniStates& states,
                 int* counter, int num_sms, Stream stream) {
  if (states.D <= 64) {
    launch_rows<FwdTile<T, 64, 128, 3, true>>(params, plan, states, counter, num_sms, stream);
  } else if (states.D <= 128) {
    launch_rows<FwdTile<T, 128, 128, 2, true>>(params, plan, states, counter, num_sms, stream);
  } else {
    launch_rows<FwdTile<T, 256, 80, 2, false>>(params, plan, states, counter, num_sms, stream);
  }
}

}  // namespace

// Chains where attention takes longer than they do, so that it seldom waits for them: in clocks, a
// chain 30 per row and 3000 per segment, attention at 65 % of the tensor cores' 4096 operations a
// clock. LCTX_INFINI chooses for tests.
InfiniPlan plan_infini(const InfiniParams& params, int num_sms) {
  const AttnShape& s = params.shape;
  InfiniPlan plan;
  const char* wanted = std::getenv("LCTX_INFINI");
  const int64_t blocks = std::min<int64_t>(s.B * s.Hkv, std::max(num_sms * 3 / 4, 1));
  const double rows = static_cast<double>(std::min(params.segment_len, s.Tq));
  const double rounds = static_cast<double>(ceil_div(s.B * s.Hkv, std::max<int64_t>(blocks, 1)));
  const double chain = rounds * (30 * rows + 3000);
  const double attention =
      static_cast<double>(s.B * s.Hq) * (2 * rows * rows * s.Dk) / (0.65 * 4096 * num_sms);
  const bool worthwhile =
      wanted != nullptr ? std::strcmp(wanted, "chains") == 0 : attention > 1.2 * chain;
  const bool possible =
      params.update == InfiniUpdate::kLinear && (s.Dk == 64 || s.Dk == 128) && s.Hkv <= blocks;
  if (possible && worthwhile) {
    plan.chain_blocks = static_cast<int>(blocks);
  } else {
    plan.splits = infini_splits(params, num_sms);
  }
  return plan;
}

void launch_infini_fwd(const InfiniParams& params, const InfiniPlan& plan,
                       const InfiniScratch& scratch, int num_sms, Stream stream) {
  const InfiniStates states(params, plan, scratch);
  const int64_t chains = params.shape.B * params.shape.Hkv;
  if (chains * states.S == 0) return;
  LCTX_CHECK(chains * states.S <= INT32_MAX, "lctx::infini_fwd: ", chains * states.S,
             " memory states; expected at most 2^31 - 1");
  const DType dtype = params.shape.dtype;
  cudaMemsetAsync(scratch.counters, 0, (1 + chains) * sizeof(int), stream);
  if (plan.chain_blocks > 0) {
    launch_infini_chains(params, states, plan.chain_blocks, stream);
  } else {
    launch_infini_gains(params, states, num_sms, stream);
    launch_infini_z_scan(states, stream);
    if (params.update == InfiniUpdate::kDelta) {
      launch_infini_decays(params, states, /*tf32=*/true, num_sms, stream);
      launch_infini_delta_scan(states, dtype, stream);
    } else {
      launch_infini_linear_scan(states, dtype, stream);
    }
  }
  if (dtype == DType::kBFloat16) {
    choose_tile<__nv_bfloat16>(params, plan, states, scratch.counters, num_sms, stream);
  } else {
    choose_tile<__half>(params, plan, states, scratch.counters, num_sms, stream);
  }
}

}  // namespace lctx::cuda
