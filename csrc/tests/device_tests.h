// What the device tests share. Their functions are called from Python (python_tests/device) with
// raw pointers to tensors on the GPU; they return null or what went wrong.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <exception>
#include <string>
#include <type_traits>

#include "../common/launch.h"
#include "../common/tensor_map.h"

#define LCTX_TEST extern "C" __attribute__((visibility("default"))) const char*

namespace lctx::tests {

template <class Run>
const char* guarded(Run&& run) {
  static thread_local std::string message;
  try {
    run();
    return nullptr;
  } catch (const std::exception& error) {
    message = error.what();
    return message.c_str();
  }
}

// Launches and waits, so that an error names its kernel.
template <class... Params, class... Args>
void launch(const char* name, void (*kernel)(Params...), int grid, dim3 block, int shared_bytes,
            cudaStream_t stream, const Args&... args) {
  cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
  kernel<<<grid, block, shared_bytes, stream>>>(args...);
  check_launch(name, dim3(grid), block, stream);
  const cudaError_t error = cudaStreamSynchronize(stream);
  if (error != cudaSuccess) {
    throw std::runtime_error(concat(name, " failed: ", cudaGetErrorString(error)));
  }
}

// Calls run with the element type of an index from Python: 0 bfloat16, 1 float16.
template <class Run>
void with_type(int index, Run&& run) {
  if (index == 0) {
    run(__nv_bfloat16());
  } else {
    run(__half());
  }
}

// Calls run with `value` as a compile-time constant; it must be one of kValues.
template <int... kValues, class Run>
void with_value(const char* name, int value, Run&& run) {
  const bool found =
      (... || (value == kValues && (run(std::integral_constant<int, kValues>()), true)));
  LCTX_CHECK(found, name, " = ", value, " has no test kernel");
}

// A tensor of five dimensions, innermost first, as Python describes it. Strides are in elements;
// stride[0] is 1. Type 2 is float32, in any swizzle; others as in with_type, in that of the
// kernels.
struct MapArgs {
  int32_t type, swizzle;  // swizzle: 0 or 128 bytes
  void* data;
  int64_t size[5], stride[5];
  int32_t box[5];
};

inline CUtensorMap make_float_map(const MapArgs& args) {
  cuuint64_t size[5], bytes[5];
  cuuint32_t box[5];
  const cuuint32_t step[5] = {1, 1, 1, 1, 1};
  for (int i = 0; i < 5; ++i) {
    size[i] = static_cast<cuuint64_t>(args.size[i]);
    bytes[i] = static_cast<cuuint64_t>(args.stride[i]) * 4;
    box[i] = static_cast<cuuint32_t>(args.box[i]);
  }
  CUtensorMap map;
  const CUresult result =
      encode_tiled()(&map, CU_TENSOR_MAP_DATA_TYPE_FLOAT32, 5, args.data, size, bytes + 1, box,
                     step, CU_TENSOR_MAP_INTERLEAVE_NONE,
                     args.swizzle == 128 ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_NONE,
                     CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  LCTX_CHECK(result == CUDA_SUCCESS, "the tensor map is refused: error ", result);
  return map;
}

inline DType dtype_of(int type) { return type == 0 ? DType::kBFloat16 : DType::kFloat16; }

inline CUtensorMap make_test_map(const MapArgs& args) {
  if (args.type == 2) return make_float_map(args);
  MapLayout layout;
  for (int i = 0; i < 5; ++i) {
    layout.size[i] = args.size[i];
    layout.box[i] = args.box[i];
    if (i > 0) layout.stride[i - 1] = args.stride[i];
  }
  return make_map(args.data, dtype_of(args.type), layout);
}

// A contiguous (rows, columns) matrix in boxes of `box_rows` rows and 64 columns.
inline CUtensorMap make_matrix_map(int type, void* data, int rows, int columns, int box_rows) {
  return make_rows_map({data, 0, columns, 0}, dtype_of(type), 1, rows, 1, columns, box_rows);
}

}  // namespace lctx::tests
