// lctx::carry_bwd_keys: dk and dv of a rank's own keys on a GPU, from the sums of the ring.
#include "cuda_call.h"

#ifdef LCTX_WITH_CUDA

namespace lctx::api {
namespace {

void carry_bwd_keys(const Tensor& dk, const Tensor& dv, const OptTensor& home_k,
                    const OptTensor& home_v, int64_t begin, const Tensor& dk_out,
                    const Tensor& dv_out) {
  const Call call("lctx::carry_bwd_keys", {LCTX_ARG(dk_out), LCTX_ARG(dv_out), LCTX_ARG(dk),
                                           LCTX_ARG(dv), LCTX_ARG(home_k), LCTX_ARG(home_v)});
  CarryKeysParams params;
  params.dtype = call.dtype();
  params.B = dk_out.size(0), params.T = dk_out.size(1), params.H = dk_out.size(2);
  params.begin = begin, params.end = home_k ? begin + home_k->size(1) : begin;
  const int64_t B = params.B, T = params.T, H = params.H, rows = params.end - begin;
  call.check(begin >= 0 && params.end <= T && bool(home_k) == bool(home_v), "home has rows ", begin,
             " to ", params.end, "; expected some of the ", T, " rows, of k and v alike");
  const auto set = [&](KeySums& x, const Arg& sum, const Arg& home, const Arg& out, int64_t D) {
    x.D = D;
    x.sum = call.stat_rows(sum, {B, T, H, D});
    x.out = call.rows(out, {B, T, H, D});
    if (home.tensor) x.home = call.stat_rows(home, {B, rows, H, D});
    call.check(D % 8 == 0, "the head size is ", D, "; expected a multiple of 8");
    call.check_aligned({{out.name, x.out, B, T, H}, {sum.name, x.sum, B, T, H}});
    if (home.tensor) call.check_aligned({{home.name, x.home, B, rows, H}});
  };
  set(params.k, LCTX_ARG(dk), LCTX_ARG(home_k), LCTX_ARG(dk_out), dk_out.size(3));
  set(params.v, LCTX_ARG(dv), LCTX_ARG(home_v), LCTX_ARG(dv_out), dv_out.size(3));
  const int64_t units = B * T * H * std::max(params.k.D, params.v.D) / 8;
  call.check(units <= INT32_MAX, units, " times 8 elements; expected at most 2^31 - 1");
  if (units > 0) cuda::launch_carry_bwd_keys(params, CudaCall(call).stream());
}

}  // namespace
}  // namespace lctx::api

STABLE_TORCH_LIBRARY_IMPL(lctx, CUDA, m) {
  m.impl("carry_bwd_keys", TORCH_BOX(&lctx::api::carry_bwd_keys));
}
#endif
