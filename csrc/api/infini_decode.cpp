// lctx::infini_decode: tensors -> InfiniDecodeParams -> kernels.
#include "../cpu/cpu_backend.h"
#include "checks.h"
#include "cuda_call.h"
#include "thread_pool.h"

namespace lctx::api {
namespace {

std::tuple<Tensor, Tensor> infini_decode(const Tensor& q, const Tensor& k, const Tensor& v,
                                         const Tensor& q_mem, const Tensor& k_mem,
                                         const Tensor& open_k, const Tensor& open_k_mem,
                                         const Tensor& open_v, const OptTensor& M,
                                         const OptTensor& z, const OptTensor& gate,
                                         int64_t open_len, bool bypass, double scale) {
  const Call call(
      "lctx::infini_decode",
      {LCTX_ARG(q), LCTX_ARG(k), LCTX_ARG(v), LCTX_ARG(q_mem), LCTX_ARG(k_mem), LCTX_ARG(open_k),
       LCTX_ARG(open_k_mem), LCTX_ARG(open_v), LCTX_ARG(M), LCTX_ARG(z), LCTX_ARG(gate)});
  InfiniDecodeParams p;
  set_attention(call, q, k, v, /*causal=*/true, scale, p);
  const AttnShape& s = p.shape;
  call.check(s.Tk == s.Tq, "q has ", s.Tq, " new tokens, k and v have ", s.Tk);
  p.q_mem = call.rows(LCTX_ARG(q_mem), {s.B, s.Tq, s.Hq, s.Dk});
  p.k_mem = call.rows(LCTX_ARG(k_mem), {s.B, s.Tq, s.Hkv, s.Dk});
  p.segment_len = open_k.dim() == 4 ? open_k.size(2) : 0;
  const Shape keys = {s.B, s.Hkv, p.segment_len, s.Dk};
  p.open_k = call.rows(LCTX_ARG(open_k), keys).data;
  p.open_k_mem = call.rows(LCTX_ARG(open_k_mem), keys).data;
  p.open_v = call.rows(LCTX_ARG(open_v), {s.B, s.Hkv, p.segment_len, s.Dv}).data;
  call.check(open_k.is_contiguous() && open_k_mem.is_contiguous() && open_v.is_contiguous(),
             "open_k, open_k_mem or open_v is not contiguous; expected contiguous tensors");
  call.check(open_len >= 0 && open_len + s.Tq <= p.segment_len, "open_len = ", open_len, " and ",
             s.Tq, " new tokens; expected at most ", p.segment_len, " together");
  p.open_len = open_len;
  call.check(M.has_value() == z.has_value(), "M and z are not given together; expected both");
  p.M = call.stat(LCTX_ARG(M), {s.B, s.Hkv, s.Dk, s.Dv});
  p.z = call.stat(LCTX_ARG(z), {s.B, s.Hkv, s.Dk});
  p.gate = call.stat(LCTX_ARG(gate), {s.Hq});
  p.bypass = bypass;
  auto [out, lse] = set_outputs(call, p);
  if (s.B * s.Tq == 0) return {out, lse};
#ifdef LCTX_WITH_CUDA
  if (call.is_cuda()) {
    check_tma(call, p);
    call.check_aligned({{"q_mem", p.q_mem, s.B, s.Tq, s.Hq}, {"k_mem", p.k_mem, s.B, s.Tq, s.Hkv}});
    const CudaCall gpu(call);
    cuda::launch_infini_decode(p, gpu.num_sms(), gpu.stream());
    return {out, lse};
  }
#endif
  cpu::infini_decode(p, thread_pool());
  return {out, lse};
}

}  // namespace
}  // namespace lctx::api

STABLE_TORCH_LIBRARY_IMPL(lctx, CPU, m) {
  m.impl("infini_decode", TORCH_BOX(&lctx::api::infini_decode));
}

#ifdef LCTX_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(lctx, CUDA, m) {
  m.impl("infini_decode", TORCH_BOX(&lctx::api::infini_decode));
}
#endif
