#include "cuda_call.h"

#ifdef LCTX_WITH_CUDA
// Exported by torch's CUDA libraries only. Weak, so that the same binary also loads under a CPU
// build of torch.
extern "C" __attribute__((weak)) AOTITorchError
aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);

namespace lctx::api {

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
