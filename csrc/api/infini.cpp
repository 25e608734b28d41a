// lctx::infini_fwd: tensors -> InfiniParams -> kernels; and the checks it shares with
// lctx::infini_bwd (infini_bwd.cpp).
#include "infini.h"

#include "../cpu/cpu_backend.h"
#include "cuda_call.h"
#include "thread_pool.h"

namespace lctx::api {

InfiniParams make_params(const Call& call, const InfiniInputs& in, const InfiniOptions& options) {
  InfiniParams params;
  set_attention(call, in.q, in.k, in.v, /*causal=*/true, options.scale, params);
  const AttnShape& s = params.shape;
  call.check(s.Tq == s.Tk, "q has ", s.Tq, " positions, k and v have ", s.Tk,
             "; expected the same");
  call.check(options.segment_len >= 1, "segment_len = ", options.segment_len,
             "; expected at least 1");
  call.check(options.detach_every >= 0, "detach_every = ", options.detach_every,
             "; expected at least 0");
  call.check(in.M.has_value() == in.z.has_value(),
             "only one of M and z is given; expected both or neither");

  params.q_mem = call.rows_or_null({"q_mem", in.q_mem}, {s.B, s.Tq, s.Hq, s.Dk});
  params.k_mem = call.rows_or_null({"k_mem", in.k_mem}, {s.B, s.Tk, s.Hkv, s.Dk});
  params.gate = call.stat({"gate", in.gate}, {s.Hq});
  call.stat({"M", in.M}, {s.B, s.Hkv, s.Dk, s.Dv});
  call.stat({"z", in.z}, {s.B, s.Hkv, s.Dk});
  params.segment_len = options.segment_len;
  params.update = call.choice("update", options.update, "linear", "delta") ? InfiniUpdate::kDelta
                                                                           : InfiniUpdate::kLinear;
  params.first_bypass = call.choice("first", options.first, "gate", "bypass");
  params.detach_every = options.detach_every;
  params.has_mem = in.M.has_value();
  return params;
}

int64_t num_segments(const InfiniParams& params) {
  return params.shape.Tq / params.segment_len + (params.shape.Tq % params.segment_len != 0);
}

void set_state(const OptTensor& source, Tensor target) {
  source ? torch::stable::copy_(target, *source) : torch::stable::zero_(target);
}

#ifdef LCTX_WITH_CUDA
void check_limits(const Call& call, const InfiniParams& params) {
  const AttnShape& s = params.shape;
  check_tma(call, params);
  if (params.q_mem.data != nullptr) {
    call.check_aligned({{"q_mem", params.q_mem, s.B, s.Tq, s.Hq}});
  }
  if (params.k_mem.data != nullptr) {
    call.check_aligned({{"k_mem", params.k_mem, s.B, s.Tk, s.Hkv}});
  }
}
#endif

namespace {

#ifdef LCTX_WITH_CUDA
void launch(const Call& call, const InfiniParams& params, const OptTensor& M, const OptTensor& z) {
  const CudaCall gpu(call);
  const AttnShape& s = params.shape;
  const cuda::InfiniPlan plan = cuda::plan_infini(params, gpu.num_sms());
  const int64_t S = num_segments(params), parts = plan.splits;
  const int64_t decay_parts = params.update == InfiniUpdate::kDelta ? parts : 0;
  Tensor gain_parts = call.new_stat({parts > 1 ? parts - 1 : 0, s.B, s.Hkv, S, s.Dk, s.Dv});
  Tensor z_parts = call.new_stat({parts, s.B, s.Hkv, S, s.Dk});
  Tensor decay = call.new_stat({decay_parts, s.B, s.Hkv, S, s.Dk, s.Dk});
  Tensor norms = call.new_stat({s.B, s.Hkv, S, 4 + s.Dk});
  Tensor half = call.new_rows({s.B, s.Hkv, S, s.Dk, s.Dv});
  Tensor counters = call.new_plain(ScalarType::Int, {1 + s.B * s.Hkv});
  const auto stat = [](const Tensor& x) { return static_cast<float*>(x.mutable_data_ptr()); };
  cuda::InfiniScratch scratch;
  if (M) scratch.M_in = static_cast<const float*>(M->const_data_ptr());
  if (z) scratch.z_in = static_cast<const float*>(z->const_data_ptr());
  scratch.gain_parts = stat(gain_parts);
  scratch.z_parts = stat(z_parts);
  scratch.decay = stat(decay);
  scratch.norms = stat(norms);
  scratch.half = half.mutable_data_ptr();
  scratch.counters = static_cast<int*>(counters.mutable_data_ptr());
  cuda::launch_infini_fwd(params, plan, scratch, gpu.num_sms(), gpu.stream());
}
#endif

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> infini_fwd(
    const Tensor& q, const Tensor& k, const Tensor& v, const OptTensor& q_mem,
    const OptTensor& k_mem, const OptTensor& M, const OptTensor& z, const OptTensor& gate,
    int64_t segment_len, const std::string& update, const std::string& first, int64_t detach_every,
    double scale, bool save_local, bool /*deterministic: always*/) {
  const Call call("lctx::infini_fwd", {LCTX_ARG(q), LCTX_ARG(k), LCTX_ARG(v), LCTX_ARG(q_mem),
                                       LCTX_ARG(k_mem), LCTX_ARG(M), LCTX_ARG(z), LCTX_ARG(gate)});
  InfiniParams params = make_params(call, {q, k, v, q_mem, k_mem, M, z, gate},
                                    {segment_len, update, first, detach_every, scale});
  auto [out, lse] = set_outputs(call, params);
  const AttnShape& s = params.shape;
  const int64_t S = num_segments(params);
  const bool needs_local = save_local || !call.is_cuda();  // a step of its own on the CPU
  Tensor out_local = call.new_rows(needs_local ? Shape{s.B, s.Tq, s.Hq, s.Dv} : Shape{0});
  Tensor M_states = call.new_stat({s.B, s.Hkv, S, s.Dk, s.Dv});
  Tensor z_states = call.new_stat({s.B, s.Hkv, S, s.Dk});
  Tensor M_out = call.new_stat({s.B, s.Hkv, s.Dk, s.Dv});
  Tensor z_out = call.new_stat({s.B, s.Hkv, s.Dk});
  const bool keeps = save_local && call.is_cuda() && params.update == InfiniUpdate::kDelta;
  Tensor decays =
      call.new_plain(ScalarType::BFloat16, keeps ? Shape{2, s.B, s.Hkv, S, s.Dk, s.Dk} : Shape{0});
  if (needs_local) params.out_local = view(out_local);
  if (keeps) params.decays = decays.mutable_data_ptr();
  params.M_states = M_states.mutable_data_ptr();
  params.z_states = z_states.mutable_data_ptr();
  params.M_out = M_out.mutable_data_ptr();
  params.z_out = z_out.mutable_data_ptr();
#ifdef LCTX_WITH_CUDA
  if (call.is_cuda()) check_limits(call, params);
  if (call.is_cuda() && S > 0) {
    launch(call, params, M, z);
    return {out, out_local, lse, M_states, z_states, M_out, z_out, decays};
  }
#endif
  // Without a segment the memory goes out as it came in.
  set_state(M, S == 0 ? M_out : torch::stable::select(M_states, 2, 0));
  set_state(z, S == 0 ? z_out : torch::stable::select(z_states, 2, 0));
  if (S > 0) cpu::infini_fwd(params, thread_pool());
  if (!save_local) out_local = call.new_rows({0});
  return {out, out_local, lse, M_states, z_states, M_out, z_out, decays};
}

}  // namespace
}  // namespace lctx::api

STABLE_TORCH_LIBRARY_IMPL(lctx, CPU, m) { m.impl("infini_fwd", TORCH_BOX(&lctx::api::infini_fwd)); }

#ifdef LCTX_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(lctx, CUDA, m) {
  m.impl("infini_fwd", TORCH_BOX(&lctx::api::infini_fwd));
}
#endif
