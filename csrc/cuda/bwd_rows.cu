// Math: what every backward (lctx::flash_bwd and the others) needs of the rows of its forward
//       (lctx::flash_fwd): lse2 = lse / log 2, +inf where the row sees no key (its weights are then
//       0), and delta = sum_d dout_d out_d - dlse.
// Tile map: rows in the order of memory (b, t, h), `lanes` threads to a row, 128 / lanes rows to a
//       block; a lane takes packs of 16 bytes.
// Pipeline: none. The memory of the dQ sum is zeroed on the way, and the tile counter.
// Memory: dout and out once, two statistics per row, with stride T; 4 bytes an element of zeros.
// Limits: bf16, fp16; D a multiple of 8; data and strides at multiples of 16 bytes.
#include <algorithm>

#include "../common/dtype.cuh"
#include "../common/launch.h"
#include "../common/math.cuh"
#include "cuda_backend.h"

namespace lctx::cuda {
namespace {

constexpr int kThreads = 128;

struct RowsParams {
  TensorView out, dout;
  const float *lse, *dlse;
  float *lse2, *delta;
  float4* zeros;
  int64_t num_zeros;
  int* counter;
  int64_t rows;
  int T, D, pitch;
  FastDivisor per_t, per_b;  // heads, heads and rows: of a row's number
};

template <class T>
__global__ void __launch_bounds__(kThreads) bwd_rows_kernel(const __grid_constant__ RowsParams p) {
  const int64_t threads = static_cast<int64_t>(gridDim.x) * kThreads;
  const int64_t thread =
      static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.y * blockDim.x + threadIdx.x;
  for (int64_t i = thread; i < p.num_zeros; i += threads) p.zeros[i] = float4{};
  if (thread == 0) *p.counter = 0;

  const int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  if (row >= p.rows) return;
  const int index = static_cast<int>(row);
  const int bt = p.per_t.divide(index), h = index - bt * p.per_t.divisor;
  const int b = p.per_b.divide(bt), t = bt - b * p.T;
  const auto row_of = [&](const TensorView& x) {
    return static_cast<const T*>(x.data) + b * x.stride_b + t * x.stride_t + h * x.stride_h;
  };
  const T *out = row_of(p.out), *dout = row_of(p.dout);
  float sum = 0.f;
  for (int d = threadIdx.x * 8; d < p.D; d += blockDim.x * 8) {
    const auto x = *reinterpret_cast<const Pack<T, 8>*>(out + d);
    const auto y = *reinterpret_cast<const Pack<T, 8>*>(dout + d);
#pragma unroll
    for (int i = 0; i < 8; ++i) sum += static_cast<float>(x.x[i]) * static_cast<float>(y.x[i]);
  }
  sum = sum_over_lanes(sum, blockDim.x);
  if (threadIdx.x != 0) return;
  const int64_t head = static_cast<int64_t>(b) * p.per_t.divisor + h;
  const int64_t from = head * p.T + t, to = head * p.pitch + t;
  const float lse = p.lse[from];
  p.lse2[to] = lse == -INFINITY ? INFINITY : lse * 1.4426950408889634f;
  p.delta[to] = sum - (p.dlse != nullptr ? p.dlse[from] : 0.f);
  // Rows that do not exist weigh nothing.
  for (int i = 1; t == p.T - 1 && i < p.pitch - t; ++i) {
    p.lse2[to + i] = INFINITY;
    p.delta[to + i] = 0.f;
  }
}

}  // namespace

void zero(void* data, int64_t bytes, Stream stream) {
  if (bytes > 0) cudaMemsetAsync(data, 0, bytes, stream);
}

void launch_bwd_rows(const AttnParams& params, const AttnGrads& grads, const BwdScratch& scratch,
                     int64_t dq_sum_floats, Stream stream) {
  const AttnShape& s = params.shape;
  RowsParams p{};
  p.out = params.out;
  p.dout = grads.dout;
  p.lse = static_cast<const float*>(params.lse);
  p.dlse = static_cast<const float*>(grads.dlse);
  p.lse2 = scratch.lse2;
  p.delta = scratch.delta;
  p.zeros = reinterpret_cast<float4*>(scratch.dq_sum);
  p.num_zeros = dq_sum_floats / 4;
  p.counter = scratch.counter;
  p.rows = s.B * s.Tq * s.Hq;
  LCTX_CHECK(p.rows <= INT32_MAX, "bwd_rows_kernel: ", p.rows, " rows; expected at most 2^31 - 1");
  p.T = static_cast<int>(s.Tq);
  p.D = static_cast<int>(s.Dv);
  p.pitch = static_cast<int>(bwd_pitch(s, scratch.block_rows));
  p.per_t = FastDivisor(static_cast<int>(s.Hq));
  p.per_b = FastDivisor(std::max(p.T, 1));
  const int lanes = std::min(next_power_of_two(ceil_div(s.Dv, 8)), 32);
  const dim3 block(lanes, kThreads / lanes);
  const dim3 grid(static_cast<unsigned>(std::max<int64_t>(ceil_div(p.rows, block.y), 1)));
  const auto kernel =
      s.dtype == DType::kBFloat16 ? bwd_rows_kernel<__nv_bfloat16> : bwd_rows_kernel<__half>;
  kernel<<<grid, block, 0, stream>>>(p);
  check_launch("bwd_rows_kernel", grid, block, stream);
}

}  // namespace lctx::cuda
