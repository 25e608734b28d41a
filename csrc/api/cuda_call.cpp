#include "cuda_call.h"

#ifdef LCTX_WITH_CUDA
// Exported by torch's CUDA libraries only. Weak, so that the same binary also loads under a CPU
// build of torch.
extern "C" __attribute__((weak)) AOTITorchError
aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);

namespace lctx::api {

void check_tma(const Call& call, const AttnParams& params) {
  const AttnShape& s = params.shape;
  call.check(s.dtype == DType::kBFloat16 || s.dtype == DType::kFloat16,
             "the tensors are float32 or float64; expected bfloat16 or float16 on a GPU");
  call.check(s.Dk == s.Dv && s.Dk % 8 == 0 && s.Dk <= 256, "the head sizes are ", s.Dk, " and ",
             s.Dv, "; expected one multiple of 8 up to 256 on a GPU");
  call.check(params.scale > 0, "scale = ", params.scale, "; expected a positive number on a GPU");
  call.check_aligned({{"q", params.q, s.B, s.Tq, s.Hq},
                      {"k", params.k, s.B, s.Tk, s.Hkv},
                      {"v", params.v, s.B, s.Tk, s.Hkv}});
}

void check_bwd(const Call& call, const AttnParams& params, const AttnGrads& grads, int64_t widest) {
  const AttnShape& s = params.shape;
  check_tma(call, params);
  call.check(s.Dk <= widest, "the head size is ", s.Dk, "; expected at most ", widest,
             " for gradients on a GPU");
  call.check_aligned({{"dout", grads.dout, s.B, s.Tq, s.Hq}, {"out", params.out, s.B, s.Tq, s.Hq}});
}

bool zero_if_empty(const AttnParams& params, const AttnGrads& grads, cuda::Stream stream) {
  const AttnShape& s = params.shape;
  if (s.B * s.Tq * s.Tk != 0) return false;
  const int64_t queries = s.B * s.Tq * s.Hq, keys = s.B * s.Tk * s.Hkv;
  const auto zero = [&](const TensorView& gradient, int64_t elements) {
    if (gradient.data == nullptr) return;  // not wanted
    cuda::zero(gradient.data, elements * dtype_size(s.dtype), stream);
  };
  zero(grads.dq, queries * s.Dk);
  zero(grads.dk, keys * s.Dk);
  zero(grads.dv, keys * s.Dv);
  return true;
}

BwdBuffers::BwdBuffers(const Call& call, const AttnShape& s, int64_t dq, int block_rows)
    : dq_floats(dq),
      rows_(call.new_stat({2, s.B, s.Hq, cuda::bwd_pitch(s, block_rows)})),
      dq_sum_(call.new_stat({dq})),
      counter_(call.new_plain(ScalarType::Int, {1})) {
  scratch.lse2 = static_cast<float*>(rows_.mutable_data_ptr());
  scratch.delta = scratch.lse2 + rows_.numel() / 2;
  scratch.block_rows = block_rows;
  scratch.dq_sum = static_cast<float*>(dq_sum_.mutable_data_ptr());
  scratch.counter = static_cast<int*>(counter_.mutable_data_ptr());
}

CudaCall::CudaCall(const Call& call) : guard_(call.first().get_device_index()) {
  call.check(aoti_torch_get_current_cuda_stream != nullptr,
             "the tensors are on a GPU but this torch has no CUDA");
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(
      aoti_torch_get_current_cuda_stream(call.first().get_device_index(), &stream));
  stream_ = static_cast<cuda::Stream>(stream);
}

}  // namespace lctx::api
#endif
