// Math: prefix sums over the segments: z_{s+1} = z_s + g_s, and for the linear rule (eq. 4 of
//       arXiv 2404.07143) M_{s+1} = M_s + G_s. Also what the retrieval reads: scaled states.
// Tile map: z: a block per (batch, key/value head), a thread per element. M: a thread per four
//       elements of the matrix and chain.
// Pipeline: a thread walks through the segments; the gains of the next kAhead segments are loaded
//       before they are needed.
// Memory: per segment and head at most D^2 (4 read + 4 + 2 written) bytes: memory's speed. Gains
//       lie where the state after them is written. Parts of a segment are added in their order.
//       Decays that are kept: 8 D^2 bytes read or written a part, 4 more for what is kept.
// Limits: used by infini_fwd, the norms by infini_bwd too; D a multiple of 8.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "../common/launch.h"
#include "infini_matrix.cuh"
#include "infini_states.h"

namespace lctx::cuda {
namespace {

constexpr int kAhead = 4;

__device__ __forceinline__ float4 operator+(const float4& a, const float4& b) {
  return {a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w};
}

// The sum of element `at` over the parts of segment s.
__device__ __forceinline__ float load_z(const InfiniStates& x, int chain, int s, int at) {
  float sum = x.z_part(0, chain, s)[at];
  for (int part = 1; part < x.splits; ++part) sum += x.z_part(part, chain, s)[at];
  return sum;
}
__device__ __forceinline__ float4 load_gain(const InfiniStates& x, int chain, int s, int64_t at) {
  float4 sum = *reinterpret_cast<const float4*>(x.gain(0, chain, s) + at);
  for (int part = 1; part < x.splits; ++part) {
    sum = sum + *reinterpret_cast<const float4*>(x.gain(part, chain, s) + at);
  }
  return sum;
}

// What the retrieval reads of z of states first, first + step, ..., by a warp.
__device__ __forceinline__ void store_norms(const InfiniStates& x, int chain, int first, int step) {
  for (int s = first; s < x.S; s += step) {
    const float* z = x.z(chain, s);
    float* norm = x.norm(chain, s);
    float sum = 0.f;
    for (int i = threadIdx.x % 32; i < x.D; i += 32) sum += fabsf(z[i]);
    const float scale = memory_scale(sum_over_lanes(sum, 32) / static_cast<float>(x.D));
    for (int i = threadIdx.x % 32; i < x.D; i += 32) norm[kNormOffset + i] = z[i] * scale;
    if (threadIdx.x % 32 < kNormOffset) norm[threadIdx.x % 32] = scale;
  }
}

// The same where the states are there already.
__global__ void __launch_bounds__(256) infini_norms_kernel(const __grid_constant__ InfiniStates x) {
  store_norms(x, blockIdx.x, blockIdx.y * 8 + threadIdx.x / 32, gridDim.y * 8);
}

__global__ void __launch_bounds__(256)
    infini_z_scan_kernel(const __grid_constant__ InfiniStates x) {
  const int chain = blockIdx.x, column = threadIdx.x;
  if (column < x.D) {
    float z = x.z_in != nullptr ? x.z_in[int64_t{chain} * x.D + column] : 0.f;
    for (int s0 = 0; s0 < x.S; s0 += kAhead) {
      float gains[kAhead];
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        gains[i] = s0 + i < x.S ? load_z(x, chain, s0 + i, column) : 0.f;
      }
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        if (s0 + i < x.S) x.z(chain, s0 + i)[column] = z;
        z += gains[i];
      }
    }
    x.z(chain, x.S)[column] = z;
  }
  __syncthreads();
  store_norms(x, chain, threadIdx.x / 32, blockDim.x / 32);
}

template <class T>
__device__ __forceinline__ void store_half(const InfiniStates& x, int chain, int s, int64_t at,
                                           const float4& M) {
  struct alignas(8) {
    T x[4];
  } out;
  const float scale = x.norm(chain, s)[0];
  out.x[0] = static_cast<T>(M.x * scale);
  out.x[1] = static_cast<T>(M.y * scale);
  out.x[2] = static_cast<T>(M.z * scale);
  out.x[3] = static_cast<T>(M.w * scale);
  T* half = static_cast<T*>(x.half) + x.state(chain, s) * x.matrix() + at;
  *reinterpret_cast<decltype(out)*>(half) = out;
}

template <class T>
__global__ void __launch_bounds__(128)
    infini_linear_scan_kernel(const __grid_constant__ InfiniStates x) {
  const int chain = blockIdx.x;
  const int64_t at = 4 * (int64_t{blockIdx.y} * blockDim.x + threadIdx.x);
  if (at >= x.matrix()) return;
  float4 M{0.f, 0.f, 0.f, 0.f};
  if (x.M_in != nullptr) {
    const float* in = x.M_in + chain * x.matrix() + at;  // perhaps not aligned
    M = {in[0], in[1], in[2], in[3]};
  }
  *reinterpret_cast<float4*>(x.M(chain, 0) + at) = M;
  for (int s0 = 0; s0 < x.S; s0 += kAhead) {
    float4 gains[kAhead];
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      if (s0 + i < x.S) gains[i] = load_gain(x, chain, s0 + i, at);
    }
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      if (s0 + i >= x.S) break;
      store_half<T>(x, chain, s0 + i, at, M);
      M = M + gains[i];
      *reinterpret_cast<float4*>(x.M(chain, s0 + i + 1) + at) = M;
    }
  }
}

// Four elements of a matrix a thread.
__global__ void __launch_bounds__(256)
    infini_keep_decays_kernel(const __grid_constant__ InfiniStates x, int64_t count) {
  const int64_t i = int64_t{blockIdx.x} * 256 + threadIdx.x;
  if (i >= count) return;
  float4 sum{0.f, 0.f, 0.f, 0.f};
#pragma unroll 4
  for (int part = 0; part < x.splits; ++part) {
    float4* at = reinterpret_cast<float4*>(x.decay) + part * count + i;
    const float4 T = *at;
    sum = sum + T;
    *reinterpret_cast<uint4*>(at) = {ptx::round_tf32(T.x), ptx::round_tf32(T.y),
                                     ptx::round_tf32(T.z), ptx::round_tf32(T.w)};
  }
  const SplitPair<__nv_bfloat16> a(-sum.x, -sum.y), b(-sum.z, -sum.w);
  uint2* terms = static_cast<uint2*>(x.decays) + i;
  terms[0] = make_uint2(a.high, b.high);
  terms[count] = make_uint2(a.low, b.low);
}

}  // namespace

void launch_infini_keep_decays(const InfiniStates& states, Stream stream) {
  const int64_t count = int64_t{states.chains()} * states.S * states.matrix() / 4;
  const dim3 grid(static_cast<unsigned>(ceil_div(count, 256))), block(256);
  infini_keep_decays_kernel<<<grid, block, 0, stream>>>(states, count);
  check_launch("infini_keep_decays_kernel", grid, block, stream);
}

void launch_infini_z_scan(const InfiniStates& states, Stream stream) {
  const dim3 grid(states.chains()), block(256);
  infini_z_scan_kernel<<<grid, block, 0, stream>>>(states);
  check_launch("infini_z_scan_kernel", grid, block, stream);
}

void launch_infini_norms(const InfiniStates& states, Stream stream) {
  const dim3 grid(states.chains(), static_cast<unsigned>(ceil_div(states.S, 8))), block(256);
  infini_norms_kernel<<<grid, block, 0, stream>>>(states);
  check_launch("infini_norms_kernel", grid, block, stream);
}

void launch_infini_linear_scan(const InfiniStates& states, DType dtype, Stream stream) {
  const dim3 block(128);
  const dim3 grid(states.chains(), static_cast<unsigned>(ceil_div(states.matrix() / 4, block.x)));
  const auto kernel = dtype == DType::kBFloat16 ? infini_linear_scan_kernel<__nv_bfloat16>
                                                : infini_linear_scan_kernel<__half>;
  kernel<<<grid, block, 0, stream>>>(states);
  check_launch("infini_linear_scan_kernel", grid, block, stream);
}

}  // namespace lctx::cuda
