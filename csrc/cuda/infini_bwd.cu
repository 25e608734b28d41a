// Math: the backward of infini_fwd.cu: the memory's part here and in infini_*_bwd.cu.
// Tile map: that of its parts.
// Pipeline: gradients of the rows through retrieval, and its share of dM and dz of every segment
//       (infini_retrieve_bwd.cu); row statistics and the gate (infini_stats_bwd.cu), by the delta
//       rule beside the next where the segments are few; the scans from the last segment to the
//       first (infini_scan_bwd.cu, infini_delta_scan_bwd.cu); gradients of keys and values
//       (infini_update_bwd.cu), for the delta rule before the scan of dz. Above D = 128
//       infini_wide_*.cu take the place of retrieval and update.
// Memory: D x D floats per segment and key/value head for dM, above D = 128 twice as many more for
//       the terms of M and dM. The decays come from the forward.
// Limits: those of its parts.
#include <algorithm>

#include "infini_wide.h"

namespace lctx::cuda {
namespace {

constexpr int kLongScan = 32;  // segments

InfiniGradStates make_states(const InfiniParams& params, const InfiniGrads& grads,
                             const InfiniBwdPlan& plan, const InfiniBwdScratch& scratch) {
  const AttnShape& s = params.shape;
  InfiniGradStates x{};
  x.B = static_cast<int>(s.B);
  x.Hq = static_cast<int>(s.Hq);
  x.Hkv = static_cast<int>(s.Hkv);
  x.S = static_cast<int>(ceil_div(s.Tq, params.segment_len));
  x.D = static_cast<int>(s.Dk);
  x.T = static_cast<int>(s.Tq);
  x.segment_len = static_cast<int>(std::min(params.segment_len, s.Tq));
  x.pitch = static_cast<int>(bwd_pitch(s));
  x.detach_every = static_cast<int>(std::min<int64_t>(params.detach_every, INT32_MAX));
  const int64_t blocks = ceil_div(x.segment_len, kGradRows);
  x.splits = plan.splits;
  x.part_blocks = static_cast<int>(ceil_div(blocks * x.group(), plan.splits));
  x.key_splits = plan.key_splits;
  x.key_part_blocks = static_cast<int>(ceil_div(blocks, plan.key_splits));
  x.has_mem = params.has_mem;
  x.first_bypass = params.first_bypass;
  x.M_states = static_cast<const float*>(params.M_states);
  x.z_states = static_cast<const float*>(params.z_states);
  x.norms = scratch.norms;
  x.gate = static_cast<const float*>(params.gate);
  x.dM_out = static_cast<const float*>(grads.dM_out);
  x.dz_out = static_cast<const float*>(grads.dz_out);
  x.dM_in = static_cast<float*>(grads.dM_in);
  x.dz_in = static_cast<float*>(grads.dz_in);
  x.dM = scratch.dM;
  x.dz = scratch.dz;
  x.dz_keys = params.update == InfiniUpdate::kDelta ? scratch.dz_keys : nullptr;
  x.retrieved = scratch.retrieved;
  x.lse2 = scratch.lse2;
  x.delta = scratch.delta;
  x.dgate_parts = scratch.dgate_parts;
  x.dgate = static_cast<float*>(grads.dgate);
  return x;
}

}  // namespace

InfiniBwdPlan plan_infini_bwd(const InfiniParams& params, int num_sms) {
  const AttnShape& s = params.shape;
  const int64_t units = s.B * s.Hkv * ceil_div(s.Tq, params.segment_len);
  const int64_t blocks = ceil_div(std::min(params.segment_len, s.Tq), kGradRows);
  const auto splits = [&](int64_t most, int64_t parts) {
    return static_cast<int>(std::clamp<int64_t>(num_sms / std::max<int64_t>(units * parts, 1), 1,
                                                std::max<int64_t>(most, 1)));
  };
  const int64_t parts = s.Dk > 128 ? 4 : 1;  // of dM, by blocks of their own
  return {splits(blocks * (s.Hq / s.Hkv), parts), splits(blocks, 1), infini_row_blocks(s)};
}

void launch_infini_memory_bwd(const InfiniParams& params, const InfiniGrads& grads,
                              const InfiniBwdPlan& plan, const InfiniBwdScratch& scratch,
                              int num_sms, Stream stream) {
  const InfiniGradStates states = make_states(params, grads, plan, scratch);
  InfiniScratch again;
  again.norms = scratch.norms;
  const InfiniStates forward(params, InfiniPlan(), again);
  const bool delta = params.update == InfiniUpdate::kDelta, is_wide = params.shape.Dk > 128;
  const InfiniWide wide = make_infini_wide(params, scratch);
  launch_infini_norms(forward, stream);
  if (is_wide) {
    const TensorView& dq = grads.dq_mem.data != nullptr ? grads.dq_mem : grads.dq;
    launch_infini_split(params, states, wide, /*gradients=*/false, stream);
    launch_infini_wide_retrieve_bwd(params, grads, states, wide, dq, num_sms, stream);
    launch_infini_wide_sums_bwd(params, grads, states, wide, num_sms, stream);
  } else {
    launch_infini_retrieve_bwd(params, grads, states, scratch.dq_sum, num_sms, stream);
  }
  if (delta) {
    launch_infini_delta_scan_bwd(states, params.decays, stream);
    // The scan is a chain of steps that leaves most of a multiprocessor idle. A long one loses more
    // beside the statistics than they gain.
    const bool overlap = !is_wide && states.S < kLongScan;
    launch_infini_row_stats(params, grads, states, overlap, stream);
  } else {
    launch_infini_row_stats(params, grads, states, /*overlap=*/false, stream);
    launch_infini_linear_scan_bwd(states, stream);
    launch_infini_z_scan_bwd(states, stream);
  }
  const bool own_k = grads.dk_mem.data == nullptr;
  const TensorView& dk = own_k ? scratch.dk_add : grads.dk_mem;
  if (is_wide) {
    launch_infini_split(params, states, wide, /*gradients=*/true, stream);
    launch_infini_wide_update_bwd(params, states, wide, dk, scratch.dv_add, num_sms, stream);
  } else {
    launch_infini_update_bwd(params, states, dk, scratch.dv_add, num_sms, stream);
  }
  if (!delta) return;
  launch_infini_z_scan_bwd(states, stream);
  if (!own_k) launch_infini_add_dz(params, scratch.dz, params.k_mem, dk, stream);
}

}  // namespace lctx::cuda
