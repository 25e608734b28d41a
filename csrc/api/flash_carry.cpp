// lctx::flash_carry: tensors -> CarryParams -> kernels.
#include "flash_carry.h"

#include <algorithm>

#include "../cpu/cpu_backend.h"
#include "cuda_call.h"
#include "thread_pool.h"

namespace lctx::api {

void set_carry(const Call& call, const Tensor& q, const Tensor& k, const Tensor& v, bool causal,
               double scale, int64_t window, int64_t query_start, int64_t key_start,
               CarryParams& params) {
  set_attention(call, q, k, v, causal, scale, params);
  call.check(window >= 0, "window = ", window, "; expected at least 1, or 0 for none");
  const int64_t span = query_start - key_start;
  call.check(span + params.shape.Tq <= INT32_MAX && span >= -INT32_MAX,
             "query_start = ", query_start, " and key_start = ", key_start,
             " are more than 2^31 - 1 positions apart");
  params.window = window;
  params.query_start = query_start;
  params.key_start = key_start;
}

CarryParams carry_params(const Call& call, const Tensor& q, const Tensor& k, const Tensor& v,
                         const Tensor& lse, bool causal, double scale, int64_t window,
                         int64_t query_start, int64_t key_start) {
  CarryParams params;
  set_carry(call, q, k, v, causal, scale, window, query_start, key_start, params);
  const AttnShape& s = params.shape;
  params.lse = call.stat_slice(LCTX_ARG(lse), {s.B, s.Hq, s.Tq});
  params.lse_stride_b = lse.stride(0);
  params.lse_stride_h = lse.stride(1);
  return params;
}

#ifdef LCTX_WITH_CUDA
void set_state_rows(const Call& call, CarryParams& params) {
  const AttnShape& s = params.shape;
  const int64_t from_batch = s.B > 1 ? params.lse_stride_b / s.Hq : s.Tq;
  params.state_rows = s.Hq > 1 ? params.lse_stride_h : from_batch;
  const TensorView& x = params.carry_out;
  const auto fits = [](int64_t size, int64_t stride, int64_t wanted) {
    return size <= 1 || stride == wanted;
  };
  call.check(params.state_rows >= s.Tq &&
                 fits(s.B, params.lse_stride_b, s.Hq * params.state_rows) &&
                 fits(s.B, x.stride_b, params.state_rows * s.Hq * s.Dv) &&
                 fits(s.Tq, x.stride_t, s.Hq * s.Dv) && fits(s.Hq, x.stride_h, s.Dv),
             "carry_out and lse are no rows of contiguous tensors of equal length; expected "
             "x[:, a:b] and lse[:, :, a:b] of such tensors on a GPU");
  call.check(reinterpret_cast<uintptr_t>(x.data) % 16 == 0,
             "carry_out begins between two multiples of 16 bytes; expected at one on a GPU");
}
#endif

namespace {

Tensor flash_carry(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& carry_out,
                   const Tensor& lse, bool causal, double scale, int64_t window,
                   int64_t query_start, int64_t key_start, bool last, bool first,
                   const OptTensor& out, int64_t final_rows) {
  const Call call("lctx::flash_carry", {LCTX_ARG(q), LCTX_ARG(k), LCTX_ARG(v), LCTX_ARG(carry_out),
                                        LCTX_ARG(lse), LCTX_ARG(out)});
  CarryParams params =
      carry_params(call, q, k, v, lse, causal, scale, window, query_start, key_start);
  const AttnShape& s = params.shape;
  params.carry_out = call.stat_rows(LCTX_ARG(carry_out), {s.B, s.Tq, s.Hq, s.Dv});
  params.first = first;
  const Shape all{s.B, s.Tq, s.Hq, s.Dv};
  call.check(final_rows >= 0 && final_rows <= s.Tq && (final_rows == 0 || (out && !last)),
             "final_rows = ", final_rows, "; expected 0, or up to ", s.Tq,
             " with `out` and not last");
  params.final_rows = last ? s.Tq : final_rows;
  Tensor result = call.new_rows(last && !out ? all : Shape{0, 0, 0, 0});
  if (out) params.out = call.rows(LCTX_ARG(out), all);
  if (last && !out) params.out = view(result);
#ifdef LCTX_WITH_CUDA
  if (call.is_cuda()) {
    check_tma(call, params);
    set_state_rows(call, params);
    if (out) call.check_aligned({{"out", params.out, s.B, s.Tq, s.Hq}});
    const CudaCall gpu(call);
    const int num_sms = gpu.num_sms();
    Tensor scratch = call.new_stat({cuda::flash_carry_scratch(params, num_sms)});
    cuda::launch_flash_carry(params, scratch.mutable_data_ptr(), num_sms, gpu.stream());
    return result;
  }
#endif
  call.check(params.final_rows % std::max<int64_t>(s.Tq, 1) == 0, "final_rows = ", final_rows,
             "; expected 0 or ", s.Tq, " on a CPU");
  if (params.final_rows == 0) params.out = {};
  cpu::flash_carry(params, thread_pool());
  return result;
}

}  // namespace
}  // namespace lctx::api

STABLE_TORCH_LIBRARY_IMPL(lctx, CPU, m) {
  m.impl("flash_carry", TORCH_BOX(&lctx::api::flash_carry));
}

#ifdef LCTX_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(lctx, CUDA, m) {
  m.impl("flash_carry", TORCH_BOX(&lctx::api::flash_carry));
}
#endif
