// Math: dq = scale * the sum that the fused backward (lctx::flash_bwd, of lctx::flash_fwd) made in
//       fp32 (dq_sum.cuh), in the input dtype.
// Tile map: a block of 256 threads to a part of 64 x 64; a thread takes 8 columns of two rows,
//       which lie 64 bytes in a row in the sum. kTallRows: a block to a block of the sum, through
//       shared memory.
// Pipeline: none.
// Memory: the sum once, dq once: 8 threads write 128 bytes of a row.
// Limits: bf16, fp16; D a multiple of 8 up to 128; dq contiguous.
#include <algorithm>

#include "../common/dtype.cuh"
#include "../common/launch.h"
#include "../common/ptx.cuh"
#include "../common/wgmma.cuh"
#include "cuda_backend.h"
#include "dq_sum.cuh"

namespace lctx::cuda {
namespace {

struct UnpackParams {
  const float4* sum;
  const int* turns;  // 0 for blocks that nothing was written to; or nullptr
  TensorView dq;
  int Tq, D, blocks;
  FastDivisor per_head, per_batch;  // blocks, query heads
  float scale;
};

// kByWarps: tall_block_rows.
template <class T, int kHeadDim, bool kByWarps>
__global__ void __launch_bounds__(256) unpack_dq_kernel(const __grid_constant__ UnpackParams p) {
  const int block = blockIdx.x / 2, part = blockIdx.x % 2;
  const int head = p.per_head.divide(block), m = block - head * p.blocks;
  const int b = p.per_batch.divide(head), h = head - b * p.per_batch.divisor;
  const int j = threadIdx.x % 8, row8 = threadIdx.x / 8 % 8, warp = threadIdx.x / 64;
  const float4* from = p.sum + static_cast<int64_t>(blockIdx.x) * (kDqPartFloats / 4) +
                       (kByWarps ? j * 32 + warp * 256 : j * 128 + warp * 32) + row8 * 4;
  const bool written = p.turns == nullptr || p.turns[block] != 0;
  uint32_t upper[4], lower[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float4 x = written ? from[i] : float4{};
    upper[i] = pack2<T>(x.x * p.scale, x.y * p.scale);
    lower[i] = pack2<T>(x.z * p.scale, x.w * p.scale);
  }
  const int column = (kHeadDim == 64 ? 0 : part * 64) + 8 * j;
  const int row = m * dq_block_rows(kHeadDim) + (kHeadDim == 64 ? part * 64 : 0) + warp * 16 + row8;
  if (column >= p.D) return;
  T* to = static_cast<T*>(p.dq.data) + b * p.dq.stride_b + row * p.dq.stride_t + h * p.dq.stride_h +
          column;
  if (row < p.Tq)
    *reinterpret_cast<uint4*>(to) = make_uint4(upper[0], upper[1], upper[2], upper[3]);
  if (row + 8 < p.Tq) {
    *reinterpret_cast<uint4*>(to + 8 * p.dq.stride_t) =
        make_uint4(lower[0], lower[1], lower[2], lower[3]);
  }
}

constexpr int kTallRows = tall_block_rows(128), kTallWarpFloats = tall_warp_floats(128);
constexpr int kUnits = 16;  // 16 bytes of a row of 128 columns

__device__ __forceinline__ uint32_t tall_place(uint32_t tile, int row, int unit) {
  return tile + row * kUnits * 16 + ((unit ^ row % 8) << 4);
}

template <class T>
__global__ void __launch_bounds__(256)
    unpack_tall_dq_kernel(const __grid_constant__ UnpackParams p) {
  __shared__ __align__(16) char rows[kTallRows * kUnits * 16];
  const uint32_t tile = ptx::smem_address(rows);
  const int head = p.per_head.divide(blockIdx.x), m = blockIdx.x - head * p.blocks;
  const int b = p.per_batch.divide(head), h = head - b * p.per_batch.divisor;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const float4* from = p.sum + (int64_t{blockIdx.x} * 8 + warp) * (kTallWarpFloats / 4) + lane;
  const bool written = p.turns == nullptr || p.turns[blockIdx.x] != 0;
  uint32_t x[kTallRows / 8][2];
#pragma unroll
  for (int j = 0; j < kTallRows / 8; ++j) {
    const float4 y = written ? from[j * 32] : float4{};
    x[j][0] = pack2<T>(y.x * p.scale, y.y * p.scale);
    x[j][1] = pack2<T>(y.z * p.scale, y.w * p.scale);
  }
  const int unit = warp * 2 + lane / 8 % 2, row = lane / 16 * 8 + lane % 8;
#pragma unroll
  for (int j = 0; j < kTallRows / 16; ++j) {
    ptx::stmatrix_x4_trans(tall_place(tile, 16 * j + row, unit), x[2 * j][0], x[2 * j][1],
                           x[2 * j + 1][0], x[2 * j + 1][1]);
  }
  __syncthreads();
  const int own = threadIdx.x % kUnits, end = min(p.Tq - m * kTallRows, kTallRows);
  if (own * 8 >= p.D) return;
  T* to = static_cast<T*>(p.dq.data) + b * p.dq.stride_b + m * kTallRows * p.dq.stride_t +
          h * p.dq.stride_h + own * 8;
  for (int i = threadIdx.x / kUnits; i < end; i += 256 / kUnits) {
    *reinterpret_cast<uint4*>(to + i * p.dq.stride_t) =
        ptx::load_shared_16(tall_place(tile, i, own));
  }
}

}  // namespace

int64_t bwd_block_rows(const AttnShape& s, int block_rows) {
  return block_rows > 0 ? block_rows : dq_block_rows(s.Dk <= 64 ? 64 : 128);
}

int64_t bwd_pitch(const AttnShape& s, int block_rows) {
  const int64_t rows = bwd_block_rows(s, block_rows);
  return ceil_div(s.Tq, rows) * rows;
}

int64_t flash_turns(const AttnShape& s, int block_rows) {
  return ceil_div(s.B * s.Hq * bwd_pitch(s, block_rows) / block_rows, 32) * 32;
}

int64_t flash_dq_sum_floats(const AttnShape& s, int block_rows) {
  return s.B * s.Hq * bwd_pitch(s, block_rows) * (s.Dk <= 64 ? 64 : 128);
}

void launch_unpack_dq(const AttnParams& params, const AttnGrads& grads, const float* dq_sum,
                      Stream stream, int block_rows, const int* turns) {
  const AttnShape& s = params.shape;
  const bool tall = block_rows == kTallRows;
  const int head_dim = s.Dk <= 64 ? 64 : 128;
  UnpackParams p{};
  p.sum = reinterpret_cast<const float4*>(dq_sum);
  p.turns = turns;
  p.dq = grads.dq;
  p.Tq = static_cast<int>(s.Tq);
  p.D = static_cast<int>(s.Dk);
  p.blocks = static_cast<int>(ceil_div(s.Tq, tall ? kTallRows : dq_block_rows(head_dim)));
  p.per_head = FastDivisor(std::max(p.blocks, 1));
  p.per_batch = FastDivisor(static_cast<int>(s.Hq));
  p.scale = static_cast<float>(params.scale);
  const dim3 grid(static_cast<unsigned>(s.B * s.Hq * p.blocks * (tall ? 1 : 2)));
  if (grid.x == 0) return;
  const auto launch = [&](auto type) {
    using T = typename decltype(type)::type;
    const auto kernel = tall             ? unpack_tall_dq_kernel<T>
                        : block_rows > 0 ? unpack_dq_kernel<T, 64, true>
                        : head_dim == 64 ? unpack_dq_kernel<T, 64, false>
                                         : unpack_dq_kernel<T, 128, false>;
    kernel<<<grid, 256, 0, stream>>>(p);
  };
  if (s.dtype == DType::kBFloat16) {
    launch(TypeTag<__nv_bfloat16>());
  } else {
    launch(TypeTag<__half>());
  }
  check_launch("unpack_dq_kernel", grid, dim3(256), stream);
}

}  // namespace lctx::cuda
