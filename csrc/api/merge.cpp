// lctx::merge_fwd, lctx::merge_bwd: tensors -> MergeParams -> kernels, on the CPU and on the GPU.
#include "../cpu/cpu_backend.h"
#include "checks.h"
#include "cuda_call.h"
#include "thread_pool.h"

namespace lctx::api {
namespace {

MergeParams make_params(const Call& call, const Tensor& out_a, const Tensor& lse_a,
                        const Tensor& out_b, const Tensor& lse_b) {
  MergeParams params;
  params.out_a = call.rows(LCTX_ARG(out_a), {kAny, kAny, kAny, kAny});
  params.dtype = call.dtype();
  params.B = out_a.size(0);
  params.T = out_a.size(1);
  params.H = out_a.size(2);
  params.D = out_a.size(3);
  params.out_b = call.rows(LCTX_ARG(out_b), {params.B, params.T, params.H, params.D});
  params.lse_a = call.stat(LCTX_ARG(lse_a), {params.B, params.H, params.T});
  params.lse_b = call.stat(LCTX_ARG(lse_b), {params.B, params.H, params.T});
  return params;
}

std::tuple<Tensor, Tensor> merge_fwd(const Tensor& out_a, const Tensor& lse_a, const Tensor& out_b,
                                     const Tensor& lse_b) {
  const Call call("lctx::merge_fwd",
                  {LCTX_ARG(out_a), LCTX_ARG(lse_a), LCTX_ARG(out_b), LCTX_ARG(lse_b)});
  MergeParams params = make_params(call, out_a, lse_a, out_b, lse_b);
  Tensor out = call.new_rows({params.B, params.T, params.H, params.D});
  Tensor lse = call.new_stat({params.B, params.H, params.T});
  params.out = view(out);
  params.lse = lse.mutable_data_ptr();
#ifdef LCTX_WITH_CUDA
  if (call.is_cuda()) {
    const CudaCall gpu(call);
    cuda::launch_merge_fwd(params, gpu.stream());
    return {out, lse};
  }
#endif
  cpu::merge_fwd(params, thread_pool());
  return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> merge_bwd(const Tensor& dout, const OptTensor& dlse,
                                                     const Tensor& out_a, const Tensor& lse_a,
                                                     const Tensor& out_b, const Tensor& lse_b,
                                                     const Tensor& out, const Tensor& lse) {
  const Call call("lctx::merge_bwd",
                  {LCTX_ARG(out_a), LCTX_ARG(lse_a), LCTX_ARG(out_b), LCTX_ARG(lse_b),
                   LCTX_ARG(out), LCTX_ARG(lse), LCTX_ARG(dout), LCTX_ARG(dlse)});
  MergeParams params = make_params(call, out_a, lse_a, out_b, lse_b);
  const Shape rows = {params.B, params.T, params.H, params.D};
  const Shape stats = {params.B, params.H, params.T};
  params.out = call.rows(LCTX_ARG(out), rows);
  params.lse = call.stat(LCTX_ARG(lse), stats);
  MergeGrads grads;
  grads.dout = call.rows(LCTX_ARG(dout), rows);
  grads.dlse = call.stat(LCTX_ARG(dlse), stats);
  Tensor dout_a = call.new_rows(rows), dout_b = call.new_rows(rows);
  Tensor dlse_a = call.new_stat(stats), dlse_b = call.new_stat(stats);
  grads.dout_a = view(dout_a);
  grads.dout_b = view(dout_b);
  grads.dlse_a = dlse_a.mutable_data_ptr();
  grads.dlse_b = dlse_b.mutable_data_ptr();
#ifdef LCTX_WITH_CUDA
  if (call.is_cuda()) {
    const CudaCall gpu(call);
    cuda::launch_merge_bwd(params, grads, gpu.stream());
    return {dout_a, dlse_a, dout_b, dlse_b};
  }
#endif
  cpu::merge_bwd(params, grads, thread_pool());
  return {dout_a, dlse_a, dout_b, dlse_b};
}

}  // namespace
}  // namespace lctx::api

STABLE_TORCH_LIBRARY_IMPL(lctx, CPU, m) {
  m.impl("merge_fwd", TORCH_BOX(&lctx::api::merge_fwd));
  m.impl("merge_bwd", TORCH_BOX(&lctx::api::merge_bwd));
}

#ifdef LCTX_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(lctx, CUDA, m) {
  m.impl("merge_fwd", TORCH_BOX(&lctx::api::merge_fwd));
  m.impl("merge_bwd", TORCH_BOX(&lctx::api::merge_bwd));
}
#endif
