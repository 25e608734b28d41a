// Math: a state as two numbers of the inputs' type, scale M = high + low, with the scale of the
//       state's norms (infini_states.h) or, for a gradient, with the power of two that brings its
//       largest element near 1.
// Tile map: kBlocks blocks a state.
// Pipeline: none; every block of a gradient looks for its largest element itself.
// Memory: reads D^2 floats a state (a gradient twice and more, from L2), writes as many bytes.
// Limits: used by infini_bwd above D = 128; D a multiple of 8.
#include "../common/launch.h"
#include "infini_matrix.cuh"
#include "infini_wide.h"

namespace lctx::cuda {
namespace {

constexpr int kThreads = 512, kBlocks = 4;  // of a state

struct SplitParams {
  InfiniGradStates states;
  uint2* terms;       // four numbers each
  float* dM_inverse;  // nullptr: states, not gradients
};

// The largest magnitude of a state, which all threads get.
__device__ __forceinline__ float largest(const float4* matrix, int count) {
  float most = 0.f;
  for (int i = threadIdx.x; i < count; i += kThreads) {
    const float4 v = matrix[i];
    most = fmaxf(most, fmaxf(fmaxf(fabsf(v.x), fabsf(v.y)), fmaxf(fabsf(v.z), fabsf(v.w))));
  }
#pragma unroll
  for (int step = 16; step > 0; step /= 2) most = fmaxf(most, __shfl_xor_sync(~0u, most, step));
  __shared__ float shares[kThreads / 32];
  if (threadIdx.x % 32 == 0) shares[threadIdx.x / 32] = most;
  __syncthreads();
  for (const float share : shares) most = fmaxf(most, share);
  return most;
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    infini_split_kernel(const __grid_constant__ SplitParams p) {
  const InfiniGradStates& x = p.states;
  const int state = blockIdx.x, count = static_cast<int>(x.matrix() / 4);
  const bool gradients = p.dM_inverse != nullptr;
  const auto* from =
      reinterpret_cast<const float4*>(gradients ? x.dM : x.M_states) + int64_t{state} * count;
  float scale;
  if (gradients) {
    scale = memory_scale(largest(from, count));
    if (blockIdx.y == 0 && threadIdx.x == 0) p.dM_inverse[state] = 1.f / scale;
  } else {
    scale = x.norms[int64_t{state} * (kNormOffset + x.D)];
  }
  uint2* high = p.terms + int64_t{state} * count;
  uint2* low = high + int64_t{x.chains()} * x.S * count;
  for (int i = blockIdx.y * kThreads + threadIdx.x; i < count; i += kBlocks * kThreads) {
    const float4 v = from[i];
    const SplitPair<T> a(v.x * scale, v.y * scale), b(v.z * scale, v.w * scale);
    high[i] = make_uint2(a.high, b.high);
    low[i] = make_uint2(a.low, b.low);
  }
}

int64_t states_of(const InfiniParams& params) {
  const AttnShape& s = params.shape;
  return s.B * s.Hkv * ceil_div(s.Tq, params.segment_len);
}

}  // namespace

int64_t infini_wide_halves(const InfiniParams& params) {
  return params.shape.Dk <= 128 ? 0 : 4 * states_of(params) * params.shape.Dk * params.shape.Dv;
}

int64_t infini_wide_floats(const InfiniParams& params) {
  const AttnShape& s = params.shape;
  return s.Dk <= 128 ? 0 : 2 * s.B * s.Hq * s.Tq + states_of(params);
}

InfiniWide make_infini_wide(const InfiniParams& params, const InfiniBwdScratch& scratch) {
  const AttnShape& s = params.shape;
  return {
      scratch.wide_halves,
      static_cast<char*>(scratch.wide_halves) + infini_wide_halves(params),  // half of the bytes
      scratch.wide_floats + 2 * s.B * s.Hq * s.Tq, scratch.wide_floats};
}

void launch_infini_split(const InfiniParams& params, const InfiniGradStates& states,
                         const InfiniWide& wide, bool gradients, Stream stream) {
  const SplitParams p{states, static_cast<uint2*>(gradients ? wide.dM : wide.M),
                      gradients ? wide.dM_inverse : nullptr};
  const dim3 grid(static_cast<unsigned>(states_of(params)), kBlocks), block(kThreads);
  const auto kernel = params.shape.dtype == DType::kBFloat16 ? infini_split_kernel<__nv_bfloat16>
                                                             : infini_split_kernel<__half>;
  kernel<<<grid, block, 0, stream>>>(p);
  check_launch("infini_split_kernel", grid, block, stream);
}

}  // namespace lctx::cuda
