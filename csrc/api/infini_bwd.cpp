// lctx::infini_bwd, the backward of lctx::infini_fwd: tensors -> InfiniParams, InfiniGrads ->
// kernels.
#include "../cpu/cpu_backend.h"
#include "cuda_call.h"
#include "infini.h"
#include "thread_pool.h"

namespace lctx::api {
namespace {

#ifdef LCTX_WITH_CUDA
void launch(const Call& call, const InfiniParams& params, const InfiniGrads& grads,
            bool deterministic) {
  const CudaCall gpu(call);
  const AttnShape& s = params.shape;
  const cuda::InfiniBwdPlan plan = cuda::plan_infini_bwd(params, gpu.num_sms());
  const int64_t S = num_segments(params);
  const int64_t key_parts = params.update == InfiniUpdate::kDelta ? plan.key_splits : 0;
  const bool own_q = params.q_mem.data == nullptr, own_k = params.k_mem.data == nullptr;
  Tensor norms = call.new_stat({s.B, s.Hkv, S, 4 + s.Dk});
  Tensor dM = call.new_stat({plan.splits, s.B, s.Hkv, S, s.Dk, s.Dv});
  Tensor dz = call.new_stat({plan.splits, s.B, s.Hkv, S, s.Dk});
  Tensor dz_keys = call.new_stat({key_parts, s.B, s.Hkv, S, s.Dk});
  Tensor retrieved = call.new_stat({s.B, s.Hq, s.Tq});
  Tensor rows = call.new_stat({2, s.B, s.Hq, cuda::bwd_pitch(s)});
  Tensor dgate_parts = call.new_stat({s.Hq, s.B, plan.row_blocks});
  const bool sums = s.Dk <= 128 && (own_q || !deterministic);
  Tensor dq_sum = call.new_stat({sums ? cuda::flash_dq_sum_floats(s) : 0});
  Tensor wide_halves = call.new_rows({cuda::infini_wide_halves(params)});
  Tensor wide_floats = call.new_stat({cuda::infini_wide_floats(params)});
  if (!own_q) torch::stable::zero_(dq_sum);
  Tensor counters = call.new_plain(ScalarType::Int, {2});
  const auto stat = [](const Tensor& x) { return static_cast<float*>(x.mutable_data_ptr()); };
  cuda::InfiniBwdScratch scratch;
  scratch.norms = stat(norms);
  scratch.dM = stat(dM);
  scratch.dz = stat(dz);
  scratch.dz_keys = stat(dz_keys);
  scratch.retrieved = stat(retrieved);
  scratch.lse2 = stat(rows);
  scratch.delta = scratch.lse2 + s.B * s.Hq * cuda::bwd_pitch(s);
  scratch.dgate_parts = stat(dgate_parts);
  scratch.dq_sum = stat(dq_sum);
  scratch.counters = static_cast<int*>(counters.mutable_data_ptr());
  scratch.wide_halves = wide_halves.mutable_data_ptr();
  scratch.wide_floats = stat(wide_floats);
  if (own_k) scratch.dk_add = grads.dk;
  scratch.dv_add = grads.dv;
  cuda::launch_infini_memory_bwd(params, grads, plan, scratch, gpu.num_sms(), gpu.stream());
  cuda::launch_infini_local_bwd(params, grads, scratch, deterministic, gpu.num_sms(), gpu.stream());
}
#endif

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> infini_bwd(
    const Tensor& dout, const OptTensor& dM_out, const OptTensor& dz_out, const Tensor& q,
    const Tensor& k, const Tensor& v, const OptTensor& q_mem, const OptTensor& k_mem,
    const OptTensor& M, const OptTensor& z, const OptTensor& gate, const Tensor& out_local,
    const Tensor& lse, const Tensor& M_states, const Tensor& z_states, const Tensor& decays,
    int64_t segment_len, const std::string& update, const std::string& first, int64_t detach_every,
    double scale, bool deterministic) {
  const Call call(
      "lctx::infini_bwd",
      {LCTX_ARG(q), LCTX_ARG(k), LCTX_ARG(v), LCTX_ARG(q_mem), LCTX_ARG(k_mem), LCTX_ARG(M),
       LCTX_ARG(z), LCTX_ARG(gate), LCTX_ARG(out_local), LCTX_ARG(lse), LCTX_ARG(M_states),
       LCTX_ARG(z_states), LCTX_ARG(decays), LCTX_ARG(dout), LCTX_ARG(dM_out), LCTX_ARG(dz_out)});
  InfiniParams params = make_params(call, {q, k, v, q_mem, k_mem, M, z, gate},
                                    {segment_len, update, first, detach_every, scale});
  const AttnShape& s = params.shape;
  const int64_t S = num_segments(params);
  set_saved(call, {"out", OptTensor()}, lse, params);
  params.out_local = call.rows(LCTX_ARG(out_local), {s.B, s.Tq, s.Hq, s.Dv});
  params.M_states = call.stat(LCTX_ARG(M_states), {s.B, s.Hkv, S, s.Dk, s.Dv});
  params.z_states = call.stat(LCTX_ARG(z_states), {s.B, s.Hkv, S, s.Dk});
  const bool kept = call.is_cuda() && params.update == InfiniUpdate::kDelta;
  params.decays = call.plain(LCTX_ARG(decays), ScalarType::BFloat16,
                             kept ? Shape{2, s.B, s.Hkv, S, s.Dk, s.Dk} : Shape{0});

  InfiniGrads grads;
  auto [dq, dk, dv] = set_grads(call, dout, std::nullopt, params, grads);
  grads.dM_out = call.stat(LCTX_ARG(dM_out), {s.B, s.Hkv, s.Dk, s.Dv});
  grads.dz_out = call.stat(LCTX_ARG(dz_out), {s.B, s.Hkv, s.Dk});
  Tensor dq_mem = call.new_rows(q_mem ? Shape{s.B, s.Tq, s.Hq, s.Dk} : Shape{0});
  Tensor dk_mem = call.new_rows(k_mem ? Shape{s.B, s.Tk, s.Hkv, s.Dk} : Shape{0});
  Tensor dM = call.new_stat(M ? Shape{s.B, s.Hkv, s.Dk, s.Dv} : Shape{0});
  Tensor dz = call.new_stat(z ? Shape{s.B, s.Hkv, s.Dk} : Shape{0});
  Tensor dgate = call.new_stat(gate ? Shape{s.Hq} : Shape{0});
  if (q_mem) grads.dq_mem = view(dq_mem);
  if (k_mem) grads.dk_mem = view(dk_mem);
  if (M) grads.dM_in = dM.mutable_data_ptr();
  if (z) grads.dz_in = dz.mutable_data_ptr();
  if (gate) grads.dgate = dgate.mutable_data_ptr();
  const bool empty = S == 0 || s.B == 0;
#ifdef LCTX_WITH_CUDA
  if (call.is_cuda()) {
    AttnParams local = params;
    local.out = params.out_local;
    check_bwd(call, local, grads, /*widest=*/256);
    check_limits(call, params);
  }
  if (call.is_cuda() && !empty) {
    launch(call, params, grads, deterministic);
    return {dq, dk, dv, dq_mem, dk_mem, dM, dz, dgate};
  }
#else
  static_cast<void>(deterministic);  // always
#endif
  if (!empty) {
    cpu::infini_bwd(params, grads, thread_pool());
  } else {
    if (M) set_state(dM_out, dM);
    if (z) set_state(dz_out, dz);
    torch::stable::zero_(dgate);
  }
  return {dq, dk, dv, dq_mem, dk_mem, dM, dz, dgate};
}

}  // namespace
}  // namespace lctx::api

STABLE_TORCH_LIBRARY_IMPL(lctx, CPU, m) { m.impl("infini_bwd", TORCH_BOX(&lctx::api::infini_bwd)); }

#ifdef LCTX_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(lctx, CUDA, m) {
  m.impl("infini_bwd", TORCH_BOX(&lctx::api::infini_bwd));
}
#endif
