// lctx::infini_fwd, lctx::infini_bwd: tensors -> InfiniParams -> kernels.
#include "../cpu/cpu_backend.h"
#include "checks.h"
#include "thread_pool.h"

namespace lctx::api {
namespace {

struct Inputs {
  const Tensor &q, &k, &v;
  const OptTensor &q_mem, &k_mem, &M, &z, &gate;
};

struct Options {
  int64_t segment_len;
  const std::string& update;
  const std::string& first;
  int64_t detach_every;
  double scale;
};

InfiniParams make_params(const Call& call, const Inputs& in, const Options& options) {
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

// target = source, or zeros where there is none.
void set_state(const OptTensor& source, Tensor target) {
  source ? torch::stable::copy_(target, *source) : torch::stable::zero_(target);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> infini_fwd(
    const Tensor& q, const Tensor& k, const Tensor& v, const OptTensor& q_mem,
    const OptTensor& k_mem, const OptTensor& M, const OptTensor& z, const OptTensor& gate,
    int64_t segment_len, const std::string& update, const std::string& first, int64_t detach_every,
    double scale, bool /*deterministic: always*/) {
  const Call call("lctx::infini_fwd", {LCTX_ARG(q), LCTX_ARG(k), LCTX_ARG(v), LCTX_ARG(q_mem),
                                       LCTX_ARG(k_mem), LCTX_ARG(M), LCTX_ARG(z), LCTX_ARG(gate)});
  InfiniParams params = make_params(call, {q, k, v, q_mem, k_mem, M, z, gate},
                                    {segment_len, update, first, detach_every, scale});
  auto [out, lse] = set_outputs(call, params);
  const AttnShape& s = params.shape;
  const int64_t S = num_segments(params);
  Tensor out_local = call.new_rows({s.B, s.Tq, s.Hq, s.Dv});
  Tensor M_states = call.new_stat({s.B, s.Hkv, S, s.Dk, s.Dv});
  Tensor z_states = call.new_stat({s.B, s.Hkv, S, s.Dk});
  Tensor M_out = call.new_stat({s.B, s.Hkv, s.Dk, s.Dv});
  Tensor z_out = call.new_stat({s.B, s.Hkv, s.Dk});
  params.out_local = view(out_local);
  params.M_states = M_states.mutable_data_ptr();
  params.z_states = z_states.mutable_data_ptr();
  params.M_out = M_out.mutable_data_ptr();
  params.z_out = z_out.mutable_data_ptr();
  // Without a segment the memory goes out as it came in.
  set_state(M, S == 0 ? M_out : torch::stable::select(M_states, 2, 0));
  set_state(z, S == 0 ? z_out : torch::stable::select(z_states, 2, 0));
  if (S > 0) cpu::infini_fwd(params, thread_pool());
  return {out, out_local, lse, M_states, z_states, M_out, z_out};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> infini_bwd(
    const Tensor& dout, const OptTensor& dM_out, const OptTensor& dz_out, const Tensor& q,
    const Tensor& k, const Tensor& v, const OptTensor& q_mem, const OptTensor& k_mem,
    const OptTensor& M, const OptTensor& z, const OptTensor& gate, const Tensor& out_local,
    const Tensor& lse, const Tensor& M_states, const Tensor& z_states, int64_t segment_len,
    const std::string& update, const std::string& first, int64_t detach_every, double scale,
    bool /*deterministic: always*/) {
  const Call call(
      "lctx::infini_bwd",
      {LCTX_ARG(q), LCTX_ARG(k), LCTX_ARG(v), LCTX_ARG(q_mem), LCTX_ARG(k_mem), LCTX_ARG(M),
       LCTX_ARG(z), LCTX_ARG(gate), LCTX_ARG(out_local), LCTX_ARG(lse), LCTX_ARG(M_states),
       LCTX_ARG(z_states), LCTX_ARG(dout), LCTX_ARG(dM_out), LCTX_ARG(dz_out)});
  InfiniParams params = make_params(call, {q, k, v, q_mem, k_mem, M, z, gate},
                                    {segment_len, update, first, detach_every, scale});
  const AttnShape& s = params.shape;
  const int64_t S = num_segments(params);
  set_saved(call, {"out", OptTensor()}, lse, params);
  params.out_local = call.rows(LCTX_ARG(out_local), {s.B, s.Tq, s.Hq, s.Dv});
  params.M_states = call.stat(LCTX_ARG(M_states), {s.B, s.Hkv, S, s.Dk, s.Dv});
  params.z_states = call.stat(LCTX_ARG(z_states), {s.B, s.Hkv, S, s.Dk});

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
  if (S > 0) {
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

STABLE_TORCH_LIBRARY_IMPL(lctx, CPU, m) {
  m.impl("infini_fwd", TORCH_BOX(&lctx::api::infini_fwd));
  m.impl("infini_bwd", TORCH_BOX(&lctx::api::infini_bwd));
}
