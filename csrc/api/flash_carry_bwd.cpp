// lctx::flash_carry_bwd, lctx::attn_delta: tensors -> CarryParams, CarryGrads -> kernels.
#include "../cpu/cpu_backend.h"
#include "cuda_call.h"
#include "flash_carry.h"
#include "thread_pool.h"

namespace lctx::api {
namespace {

#ifdef LCTX_WITH_CUDA
// Pairs of neighbouring floats are added at once.
void check_sum(const Call& call, const char* name, const TensorView& x) {
  call.check(reinterpret_cast<uintptr_t>(x.data) % 8 == 0 &&
                 (x.stride_b | x.stride_t | x.stride_h) % 2 == 0,
             name, " has strides (", x.stride_b, ", ", x.stride_t, ", ", x.stride_h,
             ", 1); expected data and strides at multiples of 8 bytes on a GPU");
}

void launch(const Call& call, const CarryParams& params, const CarryGrads& grads, bool fused) {
  const AttnShape& s = params.shape;
  if (s.B * s.Tq * s.Tk == 0) return;
  check_tma(call, params);
  call.check_aligned({{"dout", grads.dout, s.B, s.Tq, s.Hq}});
  check_sum(call, "dq", grads.dq);
  check_sum(call, "dk", grads.dk);
  check_sum(call, "dv", grads.dv);
  const CudaCall gpu(call);
  const BwdBuffers buffers(call, s, fused ? cuda::flash_dq_sum_floats(s) : 0);
  cuda::launch_flash_carry_bwd(params, grads, buffers.scratch, buffers.dq_floats, fused,
                               gpu.num_sms(), gpu.stream());
}
#endif

void flash_carry_bwd(const Tensor& dout, const Tensor& q, const Tensor& k, const Tensor& v,
                     const Tensor& lse, const Tensor& delta, const Tensor& dq, const Tensor& dk,
                     const Tensor& dv, bool causal, double scale, int64_t window,
                     int64_t query_start, int64_t key_start, [[maybe_unused]] bool deterministic,
                     bool first) {
  const Call call("lctx::flash_carry_bwd",
                  {LCTX_ARG(q), LCTX_ARG(k), LCTX_ARG(v), LCTX_ARG(dout), LCTX_ARG(lse),
                   LCTX_ARG(delta), LCTX_ARG(dq), LCTX_ARG(dk), LCTX_ARG(dv)});
  const CarryParams params =
      carry_params(call, q, k, v, lse, causal, scale, window, query_start, key_start);
  const AttnShape& s = params.shape;
  CarryGrads grads;
  grads.dout = call.rows(LCTX_ARG(dout), {s.B, s.Tq, s.Hq, s.Dv});
  grads.delta = call.stat_slice(LCTX_ARG(delta), {s.B, s.Hq, s.Tq});
  const auto same_stride = [&](int64_t dim) {
    return lse.size(dim) <= 1 || lse.numel() == 0 || delta.stride(dim) == lse.stride(dim);
  };
  call.check(same_stride(0) && same_stride(1),
             "delta and lse have different strides; expected slices of equal tensors");
  grads.dq = call.stat_rows(LCTX_ARG(dq), {s.B, s.Tq, s.Hq, s.Dk});
  grads.dk = call.stat_rows(LCTX_ARG(dk), {s.B, s.Tk, s.Hkv, s.Dk});
  grads.dv = call.stat_rows(LCTX_ARG(dv), {s.B, s.Tk, s.Hkv, s.Dv});
  grads.first = first;
#ifdef LCTX_WITH_CUDA
  if (call.is_cuda()) return launch(call, params, grads, !deterministic && s.Dk <= 128);
#endif
  cpu::flash_carry_bwd(params, grads, thread_pool());
}

Tensor attn_delta(const Tensor& dout, const OptTensor& dlse, const Tensor& out) {
  const Call call("lctx::attn_delta", {LCTX_ARG(dout), LCTX_ARG(dlse), LCTX_ARG(out)});
  const int64_t B = dout.size(0), T = dout.size(1), H = dout.size(2), D = dout.size(3);
  AttnParams params;
  params.shape = {call.dtype(), B, T, T, H, H, D, D};
  AttnGrads grads;
  grads.dout = call.rows(LCTX_ARG(dout), {kAny, kAny, kAny, kAny});
  params.out = call.rows(LCTX_ARG(out), {B, T, H, D});
  grads.dlse = call.stat(LCTX_ARG(dlse), {B, H, T});
  Tensor delta = call.new_stat({B, H, T});
#ifdef LCTX_WITH_CUDA
  if (call.is_cuda()) {
    call.check(call.dtype() == DType::kBFloat16 || call.dtype() == DType::kFloat16,
               "the tensors are float32 or float64; expected bfloat16 or float16 on a GPU");
    const CudaCall gpu(call);
    cuda::launch_attn_delta(params, grads, static_cast<float*>(delta.mutable_data_ptr()),
                            gpu.stream());
    return delta;
  }
#endif
  cpu::attn_delta(params, grads, delta.mutable_data_ptr(), thread_pool());
  return delta;
}

}  // namespace
}  // namespace lctx::api

STABLE_TORCH_LIBRARY_IMPL(lctx, CPU, m) {
  m.impl("flash_carry_bwd", TORCH_BOX(&lctx::api::flash_carry_bwd));
  m.impl("attn_delta", TORCH_BOX(&lctx::api::attn_delta));
}

#ifdef LCTX_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(lctx, CUDA, m) {
  m.impl("flash_carry_bwd", TORCH_BOX(&lctx::api::flash_carry_bwd));
  m.impl("attn_delta", TORCH_BOX(&lctx::api::attn_delta));
}
#endif
