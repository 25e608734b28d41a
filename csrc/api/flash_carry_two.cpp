// lctx::flash_carry_two: tensors -> CarryTwoParams -> kernel.
#include <algorithm>

#include "cuda_call.h"
#include "flash_carry.h"

#ifdef LCTX_WITH_CUDA
namespace lctx::api {
namespace {

void flash_carry_two(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& far_k,
                     const Tensor& far_v, const Tensor& carry_out, const Tensor& lse,
                     const Tensor& out, bool causal, double scale, int64_t first_row,
                     int64_t final_rows) {
  const Call call("lctx::flash_carry_two",
                  {LCTX_ARG(q), LCTX_ARG(k), LCTX_ARG(v), LCTX_ARG(far_k), LCTX_ARG(far_v),
                   LCTX_ARG(carry_out), LCTX_ARG(lse), LCTX_ARG(out)});
  CarryTwoParams params;
  set_carry(call, q, k, v, causal, scale, 0, 0, 0, params);
  const AttnShape& s = params.shape;
  call.check(s.Tq == s.Tk, "q has ", s.Tq, " rows, k has ", s.Tk, "; expected as many");
  params.far_k = call.rows(LCTX_ARG(far_k), {s.B, kAny, s.Hkv, s.Dk});
  params.far_v = call.rows(LCTX_ARG(far_v), {s.B, far_k.size(1), s.Hkv, s.Dv});
  params.far_rows = far_k.size(1);
  params.lse = call.stat_slice(LCTX_ARG(lse), {s.B, s.Hq, s.Tq});
  params.lse_stride_b = lse.stride(0);
  params.lse_stride_h = lse.stride(1);
  params.out = call.rows(LCTX_ARG(out), {s.B, s.Tq, s.Hq, s.Dv});
  call.check(params.far_rows >= 1 && s.Tk + params.far_rows <= INT32_MAX - 1024, "far_k has ",
             params.far_rows, " rows; expected at least 1, and 2^31 - 1024 keys");
  call.check(first_row >= 0 && first_row < s.Tq, "first_row = ", first_row, "; expected 0 to ",
             s.Tq - 1);
  call.check(final_rows >= 0 && final_rows <= s.Tq, "final_rows = ", final_rows, "; expected 0 to ",
             s.Tq);
  params.carry_out = call.stat_rows(LCTX_ARG(carry_out), {s.B, s.Tq, s.Hq, s.Dv});
  params.first_row = first_row;
  params.final_rows = final_rows;
  check_tma(call, params);
  call.check_aligned({{"far_k", params.far_k, s.B, params.far_rows, s.Hkv},
                      {"far_v", params.far_v, s.B, params.far_rows, s.Hkv},
                      {"out", params.out, s.B, s.Tq, s.Hq}});
  set_state_rows(call, params);
  const CudaCall gpu(call);
  Tensor counter = call.new_plain(ScalarType::Int, {1});
  cuda::launch_flash_carry_two(params, static_cast<int*>(counter.mutable_data_ptr()), gpu.num_sms(),
                               gpu.stream());
}

}  // namespace
}  // namespace lctx::api

STABLE_TORCH_LIBRARY_IMPL(lctx, CUDA, m) {
  m.impl("flash_carry_two", TORCH_BOX(&lctx::api::flash_carry_two));
}
#endif
