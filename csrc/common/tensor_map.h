// Tensor maps: how TMA sees a strided (B, T, H, D) tensor. Encoded on the host through the driver,
// whose entry point is looked up at run time (nothing links to libcuda).
#pragma once

#include <cuda.h>
#include <cuda_runtime_api.h>

#include "../params.h"
#include "check.h"
#include "wgmma_layout.h"

namespace lctx {
using EncodeTiled = decltype(&cuTensorMapEncodeTiled);

inline EncodeTiled encode_tiled() {
  static const EncodeTiled function = [] {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult result{};
    const cudaError_t error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found,
                                                               12000, cudaEnableDefault, &result);
    if (error != cudaSuccess || result != cudaDriverEntryPointSuccess) {
      throw std::runtime_error(
          "the CUDA driver has no cuTensorMapEncodeTiled; expected a driver for CUDA 12 or newer");
    }
    return reinterpret_cast<EncodeTiled>(found);
  }();
  return function;
}

// A box of `box_rows` positions and 64 columns, 128-byte swizzle. Dimensions, innermost first:
// column, position, head, batch. Elements outside read as zero and are not written.
// `T` positions; the view's strides must be multiples of 16 bytes and its data 16-byte aligned.
inline CUtensorMap make_rows_map(const TensorView& x, DType dtype, int64_t B, int64_t T, int64_t H,
                                 int64_t D, int box_rows) {
  const cuuint64_t size = static_cast<cuuint64_t>(dtype_size(dtype));
  const cuuint64_t dims[4] = {static_cast<cuuint64_t>(D), static_cast<cuuint64_t>(T),
                              static_cast<cuuint64_t>(H), static_cast<cuuint64_t>(B)};
  // A stride of a dimension of size 1 is never used, but must be a multiple of 16.
  const auto bytes = [&](int64_t stride, int64_t count) {
    return count > 1 ? static_cast<cuuint64_t>(stride) * size : cuuint64_t{16};
  };
  const cuuint64_t strides[3] = {bytes(x.stride_t, T), bytes(x.stride_h, H), bytes(x.stride_b, B)};
  const cuuint32_t box[4] = {kChunkColumns, static_cast<cuuint32_t>(box_rows), 1, 1};
  const cuuint32_t step[4] = {1, 1, 1, 1};
  CUtensorMap map;
  const CUresult result =
      encode_tiled()(&map,
                     dtype == DType::kBFloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
                                               : CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
                     4, x.data, dims, strides, box, step, CU_TENSOR_MAP_INTERLEAVE_NONE,
                     CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                     CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  LCTX_CHECK(result == CUDA_SUCCESS, "a tensor of (B, T, H, D) = (", B, ", ", T, ", ", H, ", ", D,
             ") with byte strides (", x.stride_b * dtype_size(dtype), ", ",
             x.stride_t * dtype_size(dtype), ", ", x.stride_h * dtype_size(dtype), ") at ", x.data,
             " is refused by the copy engine; expected data and strides at multiples of 16 bytes");
  return map;
}

}  // namespace lctx
