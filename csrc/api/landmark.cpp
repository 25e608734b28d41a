// lctx::landmark_fwd, lctx::landmark_bwd: tensors -> LandmarkParams -> kernels.
#include "../cpu/cpu_backend.h"
#include "checks.h"
#include "cuda_call.h"
#include "thread_pool.h"

namespace lctx::api {
namespace {

LandmarkParams make_params(const Call& call, const Tensor& q, const Tensor& k, const Tensor& v,
                           const OptTensor& is_landmark, int64_t block_size, double scale) {
  LandmarkParams params;
  set_attention(call, q, k, v, /*causal=*/true, scale, params);
  if (is_landmark) {
    call.check(block_size == 0, "block_size = ", block_size,
               " and is_landmark are both given; expected one of them");
  } else {
    call.check(block_size >= 2, "block_size = ", block_size,
               " without is_landmark; expected at least 2");
  }
  params.block_size = block_size;
  params.is_landmark = static_cast<const bool*>(
      call.plain(LCTX_ARG(is_landmark), ScalarType::Bool, {params.shape.B, params.shape.Tk}));
  return params;
}

std::tuple<Tensor, Tensor> landmark_fwd(const Tensor& q, const Tensor& k, const Tensor& v,
                                        const OptTensor& is_landmark, int64_t block_size,
                                        double scale, bool /*deterministic: always*/) {
  const Call call("lctx::landmark_fwd",
                  {LCTX_ARG(q), LCTX_ARG(k), LCTX_ARG(v), LCTX_ARG(is_landmark)});
  LandmarkParams params = make_params(call, q, k, v, is_landmark, block_size, scale);
  auto outputs = set_outputs(call, params);
#ifdef LCTX_WITH_CUDA
  if (call.is_cuda()) {
    check_tma(call, params);
    const CudaCall gpu(call);
    const int num_sms = gpu.num_sms();
    Tensor scratch =
        call.new_plain(ScalarType::Int, {cuda::landmark_scratch_ints(params, num_sms)});
    cuda::launch_landmark_fwd(params, static_cast<int*>(scratch.mutable_data_ptr()), num_sms,
                              gpu.stream());
    return outputs;
  }
#endif
  cpu::landmark_fwd(params, thread_pool());
  return outputs;
}

#ifdef LCTX_WITH_CUDA
void landmark_bwd_cuda(const Call& call, const LandmarkParams& params, const AttnGrads& grads,
                       bool deterministic) {
  const CudaCall gpu(call);
  if (zero_if_empty(params, grads, gpu.stream())) return;
  check_bwd(call, params, grads, /*widest=*/256);
  const bool fused = !deterministic && cuda::landmark_fuses(params);
  BwdBuffers buffers(call, params.shape, fused ? cuda::flash_dq_sum_floats(params.shape) : 0);
  if (!fused) buffers.scratch.dq_sum = nullptr;
  Tensor vectors = call.new_stat({cuda::landmark_vector_floats(params)});
  Tensor ints = call.new_plain(ScalarType::Int, {cuda::landmark_bwd_ints(params)});
  cuda::launch_bwd_rows(params, grads, buffers.scratch, buffers.dq_floats, gpu.stream());
  cuda::launch_landmark_bwd(
      params, grads, buffers.scratch, static_cast<float*>(vectors.mutable_data_ptr()),
      static_cast<int*>(ints.mutable_data_ptr()), gpu.num_sms(), gpu.stream());
}
#endif

std::tuple<Tensor, Tensor, Tensor> landmark_bwd(const Tensor& dout, const OptTensor& dlse,
                                                const Tensor& q, const Tensor& k, const Tensor& v,
                                                const Tensor& out, const Tensor& lse,
                                                const OptTensor& is_landmark, int64_t block_size,
                                                double scale, [[maybe_unused]] bool deterministic) {
  const Call call("lctx::landmark_bwd",
                  {LCTX_ARG(q), LCTX_ARG(k), LCTX_ARG(v), LCTX_ARG(out), LCTX_ARG(lse),
                   LCTX_ARG(dout), LCTX_ARG(dlse), LCTX_ARG(is_landmark)});
  LandmarkParams params = make_params(call, q, k, v, is_landmark, block_size, scale);
  set_saved(call, LCTX_ARG(out), lse, params);
  AttnGrads grads;
  auto results = set_grads(call, dout, dlse, params, grads);
#ifdef LCTX_WITH_CUDA
  if (call.is_cuda()) {
    landmark_bwd_cuda(call, params, grads, deterministic);
    return results;
  }
#endif
  cpu::landmark_bwd(params, grads, thread_pool());
  return results;
}

}  // namespace
}  // namespace lctx::api

STABLE_TORCH_LIBRARY_IMPL(lctx, CPU, m) {
  m.impl("landmark_fwd", TORCH_BOX(&lctx::api::landmark_fwd));
  m.impl("landmark_bwd", TORCH_BOX(&lctx::api::landmark_bwd));
}

#ifdef LCTX_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(lctx, CUDA, m) {
  m.impl("landmark_fwd", TORCH_BOX(&lctx::api::landmark_fwd));
  m.impl("landmark_bwd", TORCH_BOX(&lctx::api::landmark_bwd));
}
#endif
