// lctx::flash_fwd, lctx::flash_bwd: tensors -> FlashParams -> kernels.
#include "../cpu/cpu_backend.h"
#include "checks.h"
#include "cuda_call.h"
#include "thread_pool.h"

namespace lctx::api {
namespace {

void set_documents(const Call& call, const OptTensor& cu_seqlens, FlashParams& params) {
  if (!cu_seqlens) return;
  const AttnShape& s = params.shape;
  call.check(s.B == 1 && s.Tq == s.Tk, "cu_seqlens is given with B = ", s.B, ", Tq = ", s.Tq,
             ", Tk = ", s.Tk, "; expected B = 1 and Tq = Tk");
  call.check(cu_seqlens->dim() == 1 && cu_seqlens->size(0) >= 1,
             "cu_seqlens is not a list of boundaries; expected shape "
             "(documents + 1,)");
  params.cu_seqlens =
      static_cast<const int32_t*>(call.plain(LCTX_ARG(cu_seqlens), ScalarType::Int, {kAny}));
  params.num_docs = cu_seqlens->size(0) - 1;
  if (call.is_cuda()) return;  // reading them would wait for the GPU
  const int32_t* bounds = params.cu_seqlens;
  bool ordered = bounds[0] == 0 && bounds[params.num_docs] == s.Tq;
  for (int64_t i = 0; i < params.num_docs; ++i) ordered = ordered && bounds[i] <= bounds[i + 1];
  call.check(ordered, "cu_seqlens does not run from 0 to T = ", s.Tq, " without decreasing");
}

FlashParams make_params(const Call& call, const Tensor& q, const Tensor& k, const Tensor& v,
                        const OptTensor& cu_seqlens, bool causal, double scale, int64_t window) {
  FlashParams params;
  set_attention(call, q, k, v, causal, scale, params);
  call.check(window >= 0, "window = ", window, "; expected at least 1, or 0 for none");
  params.window = window;
  set_documents(call, cu_seqlens, params);
  return params;
}

std::tuple<Tensor, Tensor> flash_fwd(const Tensor& q, const Tensor& k, const Tensor& v,
                                     const OptTensor& cu_seqlens, bool causal, double scale,
                                     int64_t window, bool /*deterministic: always*/) {
  const Call call("lctx::flash_fwd", {LCTX_ARG(q), LCTX_ARG(k), LCTX_ARG(v), LCTX_ARG(cu_seqlens)});
  FlashParams params = make_params(call, q, k, v, cu_seqlens, causal, scale, window);
  auto outputs = set_outputs(call, params);
#ifdef LCTX_WITH_CUDA
  if (call.is_cuda()) {
    check_tma(call, params);
    const CudaCall gpu(call);
    const int num_sms = gpu.num_sms();
    Tensor scratch = call.new_stat({cuda::flash_fwd_scratch(params, num_sms)});
    cuda::launch_flash_fwd(params, scratch.mutable_data_ptr(), num_sms, gpu.stream());
    return outputs;
  }
#endif
  cpu::flash_fwd(params, thread_pool());
  return outputs;
}

#ifdef LCTX_WITH_CUDA
// dQ comes with dK and dV, or from a kernel of its own.
void flash_bwd_cuda(const Call& call, const FlashParams& params, const AttnGrads& grads,
                    bool deterministic) {
  const CudaCall gpu(call);
  if (zero_if_empty(params, grads, gpu.stream())) return;
  check_bwd(call, params, grads, 256);
  const bool queries = grads.dq.data != nullptr, keys = grads.dk.data != nullptr;
  const bool ordered = deterministic && params.cu_seqlens == nullptr;
  const bool fused = queries && keys && (ordered || !deterministic) && params.shape.Dk <= 128;
  const int rows = cuda::flash_block_rows(params, fused, ordered);
  const int64_t dq_floats = fused ? cuda::flash_dq_sum_floats(params.shape, rows) : 0;
  const int64_t turns = fused && ordered ? cuda::flash_turns(params.shape, rows) : 0;
  const int64_t key_floats =
      turns > 0 ? 0 : cuda::flash_key_sum_floats(params, fused, gpu.num_sms());
  BwdBuffers buffers(call, params.shape, turns + dq_floats + key_floats, rows);
  cuda::BwdScratch& scratch = buffers.scratch;
  // Where there are turns, they alone have to be zero.
  cuda::launch_bwd_rows(params, grads, scratch, turns > 0 ? turns : buffers.dq_floats,
                        gpu.stream());
  if (turns > 0) scratch.turns = reinterpret_cast<int*>(scratch.dq_sum);
  scratch.dq_sum += turns;
  scratch.key_sums = scratch.dq_sum + dq_floats;
  if (keys) cuda::launch_flash_bwd(params, grads, scratch, fused, gpu.num_sms(), gpu.stream());
  if (fused) {
    cuda::launch_unpack_dq(params, grads, scratch.dq_sum, gpu.stream(), rows, scratch.turns);
  } else if (queries) {
    cuda::launch_flash_dq(params, grads, scratch.lse2, scratch.delta, scratch.counter,
                          gpu.num_sms(), gpu.stream());
  }
}
#endif

std::tuple<Tensor, Tensor, Tensor> flash_bwd(const Tensor& dout, const OptTensor& dlse,
                                             const Tensor& q, const Tensor& k, const Tensor& v,
                                             const Tensor& out, const Tensor& lse,
                                             const OptTensor& cu_seqlens, bool causal, double scale,
                                             int64_t window, [[maybe_unused]] bool deterministic,
                                             bool needs_q, bool needs_k, bool needs_v) {
  const Call call("lctx::flash_bwd",
                  {LCTX_ARG(q), LCTX_ARG(k), LCTX_ARG(v), LCTX_ARG(out), LCTX_ARG(lse),
                   LCTX_ARG(dout), LCTX_ARG(dlse), LCTX_ARG(cu_seqlens)});
  FlashParams params = make_params(call, q, k, v, cu_seqlens, causal, scale, window);
  set_saved(call, LCTX_ARG(out), lse, params);
  AttnGrads grads;
  const Wanted wanted{needs_q, needs_k, needs_v};
#ifdef LCTX_WITH_CUDA
  if (call.is_cuda()) {
    auto results = set_grads(call, dout, dlse, params, grads, wanted);
    flash_bwd_cuda(call, params, grads, deterministic);
    return only(call, wanted, results);
  }
#endif
  auto results = set_grads(call, dout, dlse, params, grads);  // the CPU has one kernel for all
  cpu::flash_bwd(params, grads, thread_pool());
  return only(call, wanted, results);
}

}  // namespace
}  // namespace lctx::api

STABLE_TORCH_LIBRARY_IMPL(lctx, CPU, m) {
  m.impl("flash_fwd", TORCH_BOX(&lctx::api::flash_fwd));
  m.impl("flash_bwd", TORCH_BOX(&lctx::api::flash_bwd));
}

#ifdef LCTX_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(lctx, CUDA, m) {
  m.impl("flash_fwd", TORCH_BOX(&lctx::api::flash_fwd));
  m.impl("flash_bwd", TORCH_BOX(&lctx::api::flash_bwd));
}
#endif
