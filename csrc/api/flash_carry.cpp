// lctx::flash_carry: tensors -> CarryParams -> kernels.
#include "checks.h"
#include "cuda_call.h"

#ifdef LCTX_WITH_CUDA
namespace lctx::api {
namespace {

Tensor flash_carry(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& carry_out,
                   const Tensor& lse, bool causal, double scale, int64_t window,
                   int64_t query_start, int64_t key_start, bool last) {
  const Call call("lctx::flash_carry",
                  {LCTX_ARG(q), LCTX_ARG(k), LCTX_ARG(v), LCTX_ARG(carry_out), LCTX_ARG(lse)});
  CarryParams params;
  set_attention(call, q, k, v, causal, scale, params);
  check_tma(call, params);
  const AttnShape& s = params.shape;
  call.check(window >= 0, "window = ", window, "; expected at least 1, or 0 for none");
  const int64_t span = query_start - key_start;
  call.check(span + s.Tq <= INT32_MAX && span >= -INT32_MAX, "query_start = ", query_start,
             " and key_start = ", key_start, " are more than 2^31 - 1 positions apart");
  params.window = window;
  params.query_start = query_start;
  params.key_start = key_start;
  params.carry_out = call.stat(LCTX_ARG(carry_out), {s.B, s.Tq, s.Hq, s.Dv});
  params.lse = call.stat(LCTX_ARG(lse), {s.B, s.Hq, s.Tq});

  const CudaCall gpu(call);
  Tensor out = call.new_rows(last ? Shape{s.B, s.Tq, s.Hq, s.Dv} : Shape{0, 0, 0, 0});
  if (last) params.out = view(out);
  Tensor counter = call.new_plain(ScalarType::Int, {1});
  cuda::launch_flash_carry(params, static_cast<int*>(counter.mutable_data_ptr()), gpu.num_sms(),
                           gpu.stream());
  return out;
}

}  // namespace
}  // namespace lctx::api

STABLE_TORCH_LIBRARY_IMPL(lctx, CUDA, m) {
  m.impl("flash_carry", TORCH_BOX(&lctx::api::flash_carry));
}
#endif
