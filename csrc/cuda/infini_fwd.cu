// Math: Infini-attention (arXiv 2404.07143, section 2.1), forward: causal softmax attention inside
//       segments, gated with what the memory of all earlier segments returns:
//         out = g sigma(q) M_{s-1} / max(sigma(q) z_{s-1}, eps) + (1 - g) A_dot
//       and the memory after the last segment, by the linear or the delta rule.
// Tile map: attn_fwd_sm90.cuh over the segments, with MemoryRows at the end of a tile. The memory
// is
//       made in one of two ways (plan_infini). Beside attention: tiles that make a state
//       (infini_state_tiles.cuh) come before those that attend in the same segment, in one kernel.
//       Before it: infini_sums_fwd.cu, infini_scan_fwd.cu and infini_delta_scan_fwd.cu.
// Pipeline: beside, the tiles of a segment wait for states that were begun a segment earlier.
//       Before: sums of every segment, a scan over D x D states, then attention; the delta rule
//       adds D x D decays, which need the prefix of z.
// Memory: q, out once for attention; k, v once from memory, or (before) once more, by the delta
// rule
//       k twice. States: D^2 fp32 and D^2 16-bit numbers per segment and key/value head, before
//       attention by the delta rule as many fp32 again.
// Limits: those of flash_fwd.cu, for q_mem and k_mem too; gate and memory fp32; any segment length.
#include <cmath>
#include <cstdlib>
#include <cstring>

#include "attn_fwd_launch.cuh"
#include "infini_rows.cuh"
#include "infini_states.h"

namespace lctx::cuda {
namespace {

// Key/value heads of a section whose tiles are taken together: they divide those of a segment.
int64_t heads_of_section(const AttnShape& s, int segment_len) {
  int64_t heads = std::min(s.Hkv, heads_per_section(s, segment_len, 256) / (s.Hq / s.Hkv));
  while (s.Hkv % heads != 0) --heads;
  return heads;
}

template <class Traits>
void set_order(const AttnShape& s, const InfiniStates& states, bool beside,
               typename Traits::Params& p) {
  const int64_t m_blocks = ceil_div(states.segment_len, Traits::kBlockM);
  const int64_t kv_heads = heads_of_section(s, states.segment_len), group = s.Hq / s.Hkv;
  p.order = make_order("lctx::infini_fwd", m_blocks, s.Hq * states.S, s.B, kv_heads * group);
  if constexpr (Traits::Rows::kMakesStates) {
    const int64_t before = beside ? kv_heads : 0;
    const int64_t section = kv_heads * group * m_blocks + before;
    const int64_t tiles = s.B * states.S * (s.Hkv / kv_heads) * section;
    LCTX_CHECK(tiles <= INT32_MAX, "lctx::infini_fwd: ", tiles,
               " tiles; expected at most 2^31 - 1");
    p.per_section = FastDivisor(static_cast<int>(section));
    p.states_per_section = static_cast<int>(before);
    p.num_tiles = static_cast<int>(tiles);
  }
}

template <class BaseTile, bool kMakesStates, bool kDelta>
void launch_rows(const InfiniParams& params, bool beside, const InfiniStates& states, int* counter,
                 int num_sms, Stream stream) {
  using Tile = MemoryTile<BaseTile, kMakesStates>;
  using Rows = MemoryRows<kMakesStates, kDelta>;
  using Tiles =
      std::conditional_t<kMakesStates, MemoryTiles<Tile::kBlockM>, LocalTiles<Tile::kBlockM>>;
  using Traits = FwdTraits<Tile, Tiles, DenseScores<Tile::kBlockN, false>, Rows>;
  const AttnShape& s = params.shape;
  auto p = fwd_params<Traits>(params, counter);
  p.segment_len = states.segment_len;
  p.per_segment = FastDivisor(static_cast<int>(s.Hq));
  p.row_shift = row_shift<Tile>(states.segment_len);
  const int64_t num_states = int64_t{states.chains()} * states.S;
  const int rows = Rows::template kBlockRows<FwdKernel<Traits>>;
  p.memory = make_map(states.half, s.dtype,
                      {{s.Dk, s.Dk, 1, num_states, 1},
                       {s.Dk, 0, states.matrix(), 0},
                       {kChunkColumns, rows, 1, 1, 1}});
  p.has_q_mem = params.q_mem.data != nullptr;
  if (p.has_q_mem) p.q_mem = make_rows_map(params.q_mem, s.dtype, s.B, s.Tq, s.Hq, s.Dk, 64);
  const TensorView& k_mem = params.k_mem.data != nullptr ? params.k_mem : params.k;
  p.k_mem = make_rows_map(k_mem, s.dtype, s.B, s.Tk, s.Hkv, s.Dk, Tile::kBlockN);
  p.local_view = params.out_local;
  if (params.out_local.data != nullptr) {
    p.local_out = make_rows_map(params.out_local, s.dtype, s.B, s.Tq, s.Hq, s.Dv, 64);
  }
  p.gate = static_cast<const float*>(params.gate);
  p.states = states;
  p.waits = beside;
  p.has_mem = params.has_mem;
  p.first_bypass = params.first_bypass;
  set_order<Traits>(s, states, beside, p);
  launch_fwd<Traits>(p, num_sms, stream);
}

// The tiles of attn_fwd_launch.cuh for short rows, for any segment length: 128 x 176 leaves no
// registers for the retrieval.
template <class T>
void choose_tile(const InfiniParams& params, bool beside, const InfiniStates& states, int* counter,
                 int num_sms, Stream stream) {
  const bool delta = beside && params.update == InfiniUpdate::kDelta;
  const auto run = [&](auto launch) { launch(params, beside, states, counter, num_sms, stream); };
  using Wide = TurnsTile<FwdTile<T, 128, 128, 2, true>>;
  if (states.D <= 64) {
    run(launch_rows<TurnsTile<FwdTile<T, 64, 128, 3, true>>, false, false>);
  } else if (states.D <= 128 && !delta) {
    run(launch_rows<Wide, true, false>);
  } else if (states.D <= 128) {
    run(launch_rows<Wide, true, true>);
  } else {
    run(launch_rows<FwdTile<T, 256, 80, 2, false>, false, false>);
  }
}

}  // namespace

// Beside attention where it takes longer than the states do, one after the other, so that it seldom
// waits for them. In clocks, per segment: the step itself 4000, before which the delta rule has
// 4500 per 128 rows; attention at 65 % of the tensor cores' 4096 operations a clock. LCTX_INFINI
// chooses for tests.
InfiniPlan plan_infini(const InfiniParams& params, int num_sms) {
  const AttnShape& s = params.shape;
  const bool delta = params.update == InfiniUpdate::kDelta;
  InfiniPlan plan;
  const char* wanted = std::getenv("LCTX_INFINI");
  const double rows = static_cast<double>(std::min(params.segment_len, s.Tq));
  const double step = 4000 + (delta ? 4500 * std::ceil(rows / 128) : 0);
  const double attention =
      static_cast<double>(s.Hq) * (2 * rows * rows * s.Dk) / (0.65 * 4096 * num_sms);
  const bool worthwhile =
      wanted != nullptr ? std::strcmp(wanted, "beside") == 0 : attention > 1.2 * step;
  plan.beside = worthwhile && s.Dk > 64 && s.Dk <= 128;
  if (!plan.beside) plan.splits = infini_splits(params, num_sms);
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
  if (!plan.beside) {
    launch_infini_gains(params, states, num_sms, stream);
    launch_infini_z_scan(states, stream);
    if (params.update == InfiniUpdate::kDelta) {
      const bool keeps = states.decays != nullptr;
      launch_infini_decays(params, states, /*tf32=*/!keeps, num_sms, stream);
      if (keeps) launch_infini_keep_decays(states, stream);
      launch_infini_delta_scan(states, dtype, stream);
    } else {
      launch_infini_linear_scan(states, dtype, stream);
    }
  }
  if (dtype == DType::kBFloat16) {
    choose_tile<__nv_bfloat16>(params, plan.beside, states, scratch.counters, num_sms, stream);
  } else {
    choose_tile<__half>(params, plan.beside, states, scratch.counters, num_sms, stream);
  }
}

}  // namespace lctx::cuda
