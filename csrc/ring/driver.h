// CUDA's driver interface, opened at run time: the module loads on machines without a GPU.
#pragma once

#include <cuda.h>

#include <string>

namespace lctx::ring {

// Every function of the driver that is used here, as driver().name(...).
#define LCTX_DRIVER_FUNCTIONS(X) \
  X(cuCtxGetCurrent)             \
  X(cuCtxSetCurrent)             \
  X(cuEventCreate)               \
  X(cuEventDestroy)              \
  X(cuEventQuery)                \
  X(cuEventRecord)               \
  X(cuGetErrorString)            \
  X(cuIpcCloseMemHandle)         \
  X(cuIpcGetMemHandle)           \
  X(cuIpcOpenMemHandle)          \
  X(cuMemAlloc)                  \
  X(cuMemFree)                   \
  X(cuMemcpyDtoDAsync)           \
  X(cuMemcpyDtoHAsync)           \
  X(cuMemsetD8Async)             \
  X(cuStreamBatchMemOp)          \
  X(cuStreamCreateWithPriority)  \
  X(cuStreamDestroy)             \
  X(cuStreamQuery)               \
  X(cuStreamSynchronize)         \
  X(cuStreamWaitEvent)           \
  X(cuStreamWaitValue32)         \
  X(cuStreamWriteValue32)

struct Driver {
#define LCTX_DECLARE(name) decltype(&::name) name##_;
  LCTX_DRIVER_FUNCTIONS(LCTX_DECLARE)
#undef LCTX_DECLARE
};

// Throws std::runtime_error where there is no driver.
const Driver& driver();

// What was tried and what the driver answered.
std::string text_of(CUresult result, const char* what);

// Throws it as std::runtime_error, but for CUDA_SUCCESS.
void check(CUresult result, const char* what);

// Address of `name` in a library that is loaded, or std::runtime_error.
void* symbol_of(void* library, const std::string& library_name, const char* name);

}  // namespace lctx::ring

// Calls a function of the driver; throws where it fails.
#define LCTX_CU(name, ...) ::lctx::ring::check(::lctx::ring::driver().name##_(__VA_ARGS__), #name)
