// Math: what the local part's backward reads of a row, and the gradient of the gate. With w the
//       weight of A_dot, 1 - g or, where the first segment goes past the gate, 1:
//         lse2 = lse log2(e) - log2(w), so that exp2(s - lse2) is w times the row's weights,
//         delta = dout . A_dot,
//         dgate = g (1 - g) sum (dout . A_mem - delta) over the rows that the gate weighs.
// Tile map: a block has 64 rows of one query head, a few threads a row, 16 bytes each.
// Pipeline: the blocks' shares of dgate are added by a second kernel, always in the same order. May
//       run beside the kernel before it in the stream, of which it reads nothing.
// Memory: dout and A_dot once; 12 bytes a row and head.
// Limits: used by infini_bwd; D a multiple of 8 up to 256.
#include "../common/dtype.cuh"
#include "../common/feature_map.cuh"
#include "../common/launch_overlapping.h"
#include "infini_grads.h"

namespace lctx::cuda {
namespace {

constexpr int kRows = 64, kThreads = 256;

struct StatsParams {
  InfiniGradStates states;
  TensorView dout, local;
  const float* lse;
  int row_blocks;
};

template <class T>
__device__ __forceinline__ float dot8(const uint4& a, const uint4& b) {
  const uint32_t x[4] = {a.x, a.y, a.z, a.w}, y[4] = {b.x, b.y, b.z, b.w};
  float sum = 0.f;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 u = unpack2<T>(x[i]), v = unpack2<T>(y[i]);
    sum += u.x * v.x + u.y * v.y;
  }
  return sum;
}

// log2(1 / (1 + e^logit)), the logarithm of 1 - g.
__device__ __forceinline__ float log2_rest(float logit) {
  return -1.4426950408889634f * (fmaxf(logit, 0.f) + log1pf(__expf(-fabsf(logit))));
}

template <class T, int kLanes, bool kOverlaps>
__global__ void __launch_bounds__(kThreads)
    infini_row_stats_kernel(const __grid_constant__ StatsParams p) {
  constexpr int kAtOnce = kThreads / kLanes, kSteps = kRows / kAtOnce;
  const InfiniGradStates& x = p.states;
  const int head = blockIdx.x % x.Hq, block = blockIdx.x / x.Hq;
  const int batch = blockIdx.y, row0 = block * kRows;
  const int column = threadIdx.x % kLanes * 8;
  const auto at = [&](const TensorView& view, int row) {
    return static_cast<const T*>(view.data) + batch * view.stride_b + row * view.stride_t +
           head * view.stride_h + column;
  };
  const int64_t rows = (int64_t{batch} * x.Hq + head) * x.T;
  const int64_t stats = (int64_t{batch} * x.Hq + head) * x.pitch;
  // Everything is on its way before anything is waited for.
  uint4 a[kSteps], b[kSteps];
  float lse[kSteps], retrieved[kSteps];
#pragma unroll
  for (int i = 0; i < kSteps; ++i) {
    const int row = row0 + i * kAtOnce + static_cast<int>(threadIdx.x) / kLanes;
    const bool exists = row < x.T, inside = exists && column < x.D;
    const bool empty = !x.has_mem && row < x.segment_len;
    a[i] = inside ? *reinterpret_cast<const uint4*>(at(p.dout, row)) : make_uint4(0, 0, 0, 0);
    b[i] = inside ? *reinterpret_cast<const uint4*>(at(p.local, row)) : make_uint4(0, 0, 0, 0);
    lse[i] = exists ? p.lse[rows + row] : INFINITY;  // rows behind the end weigh nothing
    retrieved[i] = exists && !empty ? x.retrieved[rows + row] : 0.f;
  }
  const float logit = x.gate != nullptr ? x.gate[head] : 0.f, shift = log2_rest(logit);
  float share = 0.f;
#pragma unroll
  for (int i = 0; i < kSteps; ++i) {
    const int row = row0 + i * kAtOnce + static_cast<int>(threadIdx.x) / kLanes;
    const float delta = sum_over_lanes(dot8<T>(a[i], b[i]), kLanes);
    if (threadIdx.x % kLanes != 0 || row >= x.pitch) continue;
    const bool empty = !x.has_mem && row < x.segment_len, past = empty && x.first_bypass;
    x.lse2[stats + row] = lse[i] * 1.4426950408889634f - (past ? 0.f : shift);
    x.delta[stats + row] = delta;
    if (row < x.T && !past) share += retrieved[i] - delta;
  }
  // The kernel that this one overlaps with has ended when it ends; its last blocks come last.
  if constexpr (kOverlaps) {
    if (blockIdx.x + 1 == gridDim.x && blockIdx.y + 1 == gridDim.y) ptx::grid_dependency_wait();
  }
  if (x.dgate == nullptr) return;
  __shared__ float shares[kThreads / 32];
  share = sum_over_lanes(share, 32);
  if (threadIdx.x % 32 == 0) shares[threadIdx.x / 32] = share;
  __syncthreads();
  if (threadIdx.x != 0) return;
  for (int i = 1; i < kThreads / 32; ++i) share += shares[i];
  x.dgate_parts[(int64_t{head} * x.B + batch) * p.row_blocks + block] = share;
}

__global__ void __launch_bounds__(kThreads)
    infini_gate_kernel(const __grid_constant__ StatsParams p) {
  const InfiniGradStates& x = p.states;
  const int64_t count = int64_t{x.B} * p.row_blocks;
  float share = 0.f;
  for (int64_t i = threadIdx.x; i < count; i += kThreads) {
    share += x.dgate_parts[blockIdx.x * count + i];
  }
  __shared__ float shares[kThreads / 32];
  share = sum_over_lanes(share, 32);
  if (threadIdx.x % 32 == 0) shares[threadIdx.x / 32] = share;
  __syncthreads();
  if (threadIdx.x != 0) return;
  for (int i = 1; i < kThreads / 32; ++i) share += shares[i];
  const float logit = x.gate[blockIdx.x], e = __expf(-fabsf(logit));
  x.dgate[blockIdx.x] = share * e / ((1.f + e) * (1.f + e));
}

template <class T, bool kOverlaps>
void choose(const StatsParams& p, Stream stream) {
  const InfiniGradStates& x = p.states;
  const dim3 grid(x.Hq * p.row_blocks, x.B), block(kThreads);
  const auto kernel = x.D <= 64    ? infini_row_stats_kernel<T, 8, kOverlaps>
                      : x.D <= 128 ? infini_row_stats_kernel<T, 16, kOverlaps>
                                   : infini_row_stats_kernel<T, 32, kOverlaps>;
  launch_overlapping("infini_row_stats_kernel", kernel, p, grid, block, stream, kOverlaps);
}

}  // namespace

int64_t infini_row_blocks(const AttnShape& shape) { return ceil_div(bwd_pitch(shape), kRows); }

void launch_infini_row_stats(const InfiniParams& params, const InfiniGrads& grads,
                             const InfiniGradStates& states, bool overlap, Stream stream) {
  const StatsParams p{states, grads.dout, params.out_local, static_cast<const float*>(params.lse),
                      static_cast<int>(infini_row_blocks(params.shape))};
  if (params.shape.dtype == DType::kBFloat16) {
    overlap ? choose<__nv_bfloat16, true>(p, stream) : choose<__nv_bfloat16, false>(p, stream);
  } else {
    overlap ? choose<__half, true>(p, stream) : choose<__half, false>(p, stream);
  }
  if (states.dgate == nullptr) return;
  const dim3 grid(states.Hq), block(kThreads);
  infini_gate_kernel<<<grid, block, 0, stream>>>(p);
  check_launch("infini_gate_kernel", grid, block, stream);
}

}  // namespace lctx::cuda
