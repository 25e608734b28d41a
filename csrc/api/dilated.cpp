// lctx::dilated_fwd, lctx::dilated_bwd: tensors -> DilatedParams -> kernels.
#include "../cpu/cpu_backend.h"
#include "checks.h"
#include "cuda_call.h"
#include "thread_pool.h"

namespace lctx::api {
namespace {

struct Options {
  const std::vector<int64_t>& segment_lengths;
  const std::vector<int64_t>& dilation_rates;
  bool causal;
  double scale;
  const std::string& head_offset;
  const std::string& mix_grad;
};

DilatedParams make_params(const Call& call, const Tensor& q, const Tensor& k, const Tensor& v,
                          const OptTensor& seqlens, const Options& options) {
  DilatedParams params;
  set_attention(call, q, k, v, options.causal, options.scale, params);
  const AttnShape& s = params.shape;
  call.check(s.Tq == s.Tk, "q has ", s.Tq, " positions, k and v have ", s.Tk,
             "; expected the same");

  const auto& lengths = options.segment_lengths;
  const auto& rates = options.dilation_rates;
  call.check(!lengths.empty() && lengths.size() == rates.size(), "there are ", lengths.size(),
             " segment_lengths and ", rates.size(),
             " dilation_rates; expected the same number, at least 1");
  for (size_t m = 0; m < lengths.size(); ++m) {
    call.check(lengths[m] >= 1 && rates[m] >= 1, "branch ", m, " has segment length ", lengths[m],
               " and dilation rate ", rates[m], "; expected at least 1");
  }
  params.segment_lengths = lengths.data();
  params.dilation_rates = rates.data();
  params.num_branches = static_cast<int64_t>(lengths.size());
  params.head_offset_block = call.choice("head_offset", options.head_offset, "mod", "block");
  params.mix_detached = call.choice("mix_grad", options.mix_grad, "exact", "detached");

  params.seqlens =
      static_cast<const int32_t*>(call.plain(LCTX_ARG(seqlens), ScalarType::Int, {s.B}));
  if (call.is_cuda()) return params;  // reading seqlens would wait for the GPU
  for (int64_t b = 0; params.seqlens != nullptr && b < s.B; ++b) {
    call.check(params.seqlens[b] >= 0 && params.seqlens[b] <= s.Tq, "seqlens[", b,
               "] = ", params.seqlens[b], "; expected 0 to T = ", s.Tq);
  }
  return params;
}

#ifdef LCTX_WITH_CUDA
void launch(const Call& call, const DilatedParams& params) {
  check_tma(call, params);
  const AttnShape& s = params.shape;
  for (int64_t m = 0; m < params.num_branches; ++m) {
    call.check(params.dilation_rates[m] <= (1 << 30), "branch ", m, " has dilation rate ",
               params.dilation_rates[m], "; expected at most 2^30 on a GPU");
  }
  const CudaCall gpu(call);
  const bool needs_partial =
      params.num_branches > 1 || params.dilation_rates[0] != 1 || params.seqlens != nullptr;
  Tensor partial = call.new_stat(needs_partial ? Shape{s.B, s.Tq, s.Hq, s.Dv} : Shape{0});
  Tensor counters = call.new_plain(ScalarType::Int, {params.num_branches});
  cuda::launch_dilated_fwd(params, static_cast<float*>(partial.mutable_data_ptr()),
                           static_cast<int*>(counters.mutable_data_ptr()), gpu.num_sms(),
                           gpu.stream());
}
#endif

std::tuple<Tensor, Tensor> dilated_fwd(const Tensor& q, const Tensor& k, const Tensor& v,
                                       const OptTensor& seqlens,
                                       const std::vector<int64_t>& segment_lengths,
                                       const std::vector<int64_t>& dilation_rates, bool causal,
                                       double scale, const std::string& head_offset,
                                       const std::string& mix_grad,
                                       bool /*deterministic: always*/) {
  const Call call("lctx::dilated_fwd", {LCTX_ARG(q), LCTX_ARG(k), LCTX_ARG(v), LCTX_ARG(seqlens)});
  DilatedParams params =
      make_params(call, q, k, v, seqlens,
                  {segment_lengths, dilation_rates, causal, scale, head_offset, mix_grad});
  auto outputs = set_outputs(call, params);
#ifdef LCTX_WITH_CUDA
  if (call.is_cuda()) {
    launch(call, params);
    return outputs;
  }
#endif
  cpu::dilated_fwd(params, thread_pool());
  return outputs;
}

#ifdef LCTX_WITH_CUDA
void launch_bwd(const Call& call, const DilatedParams& params, const AttnGrads& grads, bool fused) {
  const CudaCall gpu(call);
  const cuda::Stream stream = gpu.stream();
  if (zero_if_empty(params, grads, stream)) return;
  check_bwd(call, params, grads, 256);
  const cuda::DilatedSizes sizes = cuda::dilated_sizes(params, fused);
  const BwdBuffers buffers(call, params.shape, sizes.dq);
  Tensor sums = call.new_stat({2 * sizes.keys + sizes.statistics + sizes.delta});
  float* dk = static_cast<float*>(sums.mutable_data_ptr());
  float *dv = dk + sizes.keys, *statistics = dv + sizes.keys;
  float* delta = params.mix_detached ? statistics + sizes.statistics : nullptr;
  cuda::launch_bwd_rows(params, grads, buffers.scratch, 0, stream);
  cuda::launch_dilated_bwd(params, grads, buffers.scratch, {statistics, dk, dv, delta}, fused,
                           gpu.num_sms(), stream);
}
#endif

std::tuple<Tensor, Tensor, Tensor> dilated_bwd(
    const Tensor& dout, const OptTensor& dlse, const Tensor& q, const Tensor& k, const Tensor& v,
    const Tensor& out, const Tensor& lse, const OptTensor& seqlens,
    const std::vector<int64_t>& segment_lengths, const std::vector<int64_t>& dilation_rates,
    bool causal, double scale, const std::string& head_offset, const std::string& mix_grad,
    [[maybe_unused]] bool deterministic) {
  const Call call("lctx::dilated_bwd",
                  {LCTX_ARG(q), LCTX_ARG(k), LCTX_ARG(v), LCTX_ARG(out), LCTX_ARG(lse),
                   LCTX_ARG(dout), LCTX_ARG(dlse), LCTX_ARG(seqlens)});
  DilatedParams params =
      make_params(call, q, k, v, seqlens,
                  {segment_lengths, dilation_rates, causal, scale, head_offset, mix_grad});
  set_saved(call, LCTX_ARG(out), lse, params);
  AttnGrads grads;
  auto results = set_grads(call, dout, dlse, params, grads);
#ifdef LCTX_WITH_CUDA
  if (call.is_cuda()) {
    launch_bwd(call, params, grads, !deterministic && params.shape.Dk <= 128);
    return results;
  }
#endif
  cpu::dilated_bwd(params, grads, thread_pool());
  return results;
}

}  // namespace
}  // namespace lctx::api

STABLE_TORCH_LIBRARY_IMPL(lctx, CPU, m) {
  m.impl("dilated_fwd", TORCH_BOX(&lctx::api::dilated_fwd));
  m.impl("dilated_bwd", TORCH_BOX(&lctx::api::dilated_bwd));
}

#ifdef LCTX_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(lctx, CUDA, m) {
  m.impl("dilated_fwd", TORCH_BOX(&lctx::api::dilated_fwd));
  m.impl("dilated_bwd", TORCH_BOX(&lctx::api::dilated_bwd));
}
#endif
