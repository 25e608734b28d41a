// Math: dk and dv of a rank's own keys, rounded once from fp32: what this rank added up, and for
// some
//       rows what came home from the other ranks.
// Tile map: a thread to 8 columns of one row of dk or dv.
// Pipeline: none.
// Memory: every sum once, every result once: the memory's speed.
// Limits: bf16, fp16; D a multiple of 8; rows of 16 bytes.
#include <algorithm>

#include "../common/dtype.cuh"
#include "../common/launch.h"
#include "../common/math.cuh"
#include "../common/wgmma.cuh"
#include "cuda_backend.h"

namespace lctx::cuda {
namespace {

struct KeysParams {
  KeySums of[2];                        // k, v
  FastDivisor per_row[2], per_head[2];  // of 8 columns
  FastDivisor per_batch;
  int units[2], begin, end;
};

__device__ __forceinline__ const float4* place(const TensorView& x, int b, int t, int h, int j) {
  const float* data =
      static_cast<const float*>(x.data) + b * x.stride_b + t * x.stride_t + h * x.stride_h + j * 8;
  return reinterpret_cast<const float4*>(data);
}

template <class T>
__global__ void __launch_bounds__(256) carry_keys_kernel(const __grid_constant__ KeysParams p) {
  const int which = blockIdx.y, unit = static_cast<int>(blockIdx.x * 256 + threadIdx.x);
  if (unit >= p.units[which]) return;
  const KeySums& x = p.of[which];
  const int bt = p.per_row[which].divide(unit), column = unit - bt * p.per_row[which].divisor;
  const int b = p.per_batch.divide(bt), t = bt - b * p.per_batch.divisor;
  const int h = p.per_head[which].divide(column), j = column - h * p.per_head[which].divisor;
  const float4* from = place(x.sum, b, t, h, j);
  float4 low = from[0], high = from[1];
  if (t >= p.begin && t < p.end) {
    const float4* home = place(x.home, b, t - p.begin, h, j);
    const float4 more_low = home[0], more_high = home[1];
    low =
        make_float4(low.x + more_low.x, low.y + more_low.y, low.z + more_low.z, low.w + more_low.w);
    high = make_float4(high.x + more_high.x, high.y + more_high.y, high.z + more_high.z,
                       high.w + more_high.w);
  }
  T* to = static_cast<T*>(x.out.data) + b * x.out.stride_b + t * x.out.stride_t +
          h * x.out.stride_h + j * 8;
  *reinterpret_cast<uint4*>(to) = make_uint4(pack2<T>(low.x, low.y), pack2<T>(low.z, low.w),
                                             pack2<T>(high.x, high.y), pack2<T>(high.z, high.w));
}

}  // namespace

void launch_carry_bwd_keys(const CarryKeysParams& params, Stream stream) {
  KeysParams p{};
  p.of[0] = params.k;
  p.of[1] = params.v;
  for (int i = 0; i < 2; ++i) {
    const int columns = static_cast<int>(p.of[i].D / 8);
    p.per_head[i] = FastDivisor(columns);
    p.per_row[i] = FastDivisor(columns * static_cast<int>(params.H));
    p.units[i] = static_cast<int>(params.B * params.T * params.H * columns);
  }
  p.per_batch = FastDivisor(static_cast<int>(params.T));
  p.begin = static_cast<int>(params.begin);
  p.end = static_cast<int>(params.end);
  const dim3 grid(static_cast<unsigned>(ceil_div(std::max(p.units[0], p.units[1]), 256)), 2);
  const auto kernel = params.dtype == DType::kBFloat16 ? carry_keys_kernel<__nv_bfloat16>
                                                       : carry_keys_kernel<__half>;
  kernel<<<grid, 256, 0, stream>>>(p);
  check_launch("carry_keys_kernel", grid, dim3(256), stream);
}

}  // namespace lctx::cuda
