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

// A tensor of up to five dimensions, innermost first, as TMA walks it: `stride[i]`, in elements, is
// the step of dimension i + 1; dimension 0 has step 1.
struct MapLayout {
  int64_t size[5];
  int64_t stride[4];
  int box[5];
};

inline CUtensorMapDataType tensor_map_type(DType dtype) {
  return dtype == DType::kBFloat16  ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
         : dtype == DType::kFloat16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16
                                    : CU_TENSOR_MAP_DATA_TYPE_FLOAT32;
}

// 128-byte swizzle (box[0] is 128 bytes of columns), elements outside read as zero and are not
// written. Used strides must be multiples of 16 bytes and the data 16-byte aligned.
// `l2_bytes`, 128 or 256: what L2 fetches at least; 256 where the neighbours are read as well.
inline CUtensorMap make_map(const void* data, DType dtype, const MapLayout& layout,
                            int l2_bytes = 256) {
  cuuint64_t dims[5], strides[4];
  cuuint32_t box[5];
  const cuuint32_t step[5] = {1, 1, 1, 1, 1};
  for (int i = 0; i < 5; ++i) {
    dims[i] = static_cast<cuuint64_t>(layout.size[i]);
    box[i] = static_cast<cuuint32_t>(layout.box[i]);
    if (i == 0) continue;
    // The stride of a dimension of size 1 is never used, but must be a multiple of 16.
    const int64_t stride = layout.stride[i - 1] * dtype_size(dtype);
    strides[i - 1] = layout.size[i] > 1 ? static_cast<cuuint64_t>(stride) : 16;
  }
  CUtensorMap map;
  const CUresult result = encode_tiled()(
      &map, tensor_map_type(dtype), 5, const_cast<void*>(data), dims, strides, box, step,
      CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
      l2_bytes == 128 ? CU_TENSOR_MAP_L2_PROMOTION_L2_128B : CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
      CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  LCTX_CHECK(result == CUDA_SUCCESS, "a tensor of sizes (", dims[4], ", ", dims[3], ", ", dims[2],
             ", ", dims[1], ", ", dims[0], ") with byte strides (", strides[3], ", ", strides[2],
             ", ", strides[1], ", ", strides[0], ") at ", data,
             " is refused by the copy engine; expected data and strides at multiples of 16 bytes");
  return map;
}

// A (B, T, H, D) tensor as (column, row, phase, head, batch): position row * step + phase. Boxes
// are `box_rows` rows of one phase and 64 columns. `rows` per phase: positions beyond the tensor
// must not be counted.
inline CUtensorMap make_rows_map(const TensorView& x, DType dtype, int64_t B, int64_t rows,
                                 int64_t H, int64_t D, int box_rows, int64_t step = 1,
                                 int l2_bytes = 256) {
  return make_map(x.data, dtype,
                  {{D, rows, step, H, B},
                   {x.stride_t * step, x.stride_t, x.stride_h, x.stride_b},
                   {kChunkColumns, box_rows, 1, 1, 1}},
                  step > 1 && D <= kChunkColumns ? 128 : l2_bytes);
}

}  // namespace lctx
