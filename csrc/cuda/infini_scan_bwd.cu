// Math: gradients of the states, from the last to the first. With dM the gradient of the state that
//       segment s leaves and R_s what retrieval of segment s adds, the state that it reads gets
//         linear: dM + R_s (delta: infini_delta_scan.cu), and likewise z;
//       nothing passes a state that is detached.
// Tile map: z: a block per (batch, key/value head), a thread per element. M: a thread per four
//       elements of the matrix and chain.
// Pipeline: a thread walks through the segments; the shares of the next kAhead segments are loaded
//       before they are needed.
// Memory: in place: per segment and head D^2 (4 read + 4 written) bytes: memory's speed. Parts of a
//       segment are added in their order.
// Limits: used by infini_bwd; D a multiple of 8.
#include "../common/launch.h"
#include "infini_grads.h"

namespace lctx::cuda {
namespace {

constexpr int kAhead = 4;

struct Four {
  float4 x = {0.f, 0.f, 0.f, 0.f};

  __device__ __forceinline__ void add(const float* from) {  // perhaps not aligned
    x.x += from[0];
    x.y += from[1];
    x.z += from[2];
    x.w += from[3];
  }
  __device__ __forceinline__ void add(const Four& b) {
    x.x += b.x.x;
    x.y += b.x.y;
    x.z += b.x.z;
    x.w += b.x.w;
  }
};

__global__ void __launch_bounds__(128)
    infini_linear_scan_bwd_kernel(const __grid_constant__ InfiniGradStates x) {
  const int chain = blockIdx.x;
  const int64_t at = 4 * (int64_t{blockIdx.y} * blockDim.x + threadIdx.x);
  if (at >= x.matrix()) return;
  Four carry;
  if (x.dM_out != nullptr && !x.detached(x.S)) carry.add(x.dM_out + chain * x.matrix() + at);
  for (int s0 = x.S - 1; s0 >= 0; s0 -= kAhead) {
    Four shares[kAhead];
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      const int s = s0 - i;
      if (s < 0 || x.empty(s)) continue;
      for (int part = 0; part < x.splits; ++part) {
        Four share;
        share.x = *reinterpret_cast<const float4*>(x.dM_of(part, chain, s) + at);
        shares[i].add(share);
      }
    }
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      const int s = s0 - i;
      if (s < 0) break;
      *reinterpret_cast<float4*>(x.dM_of(0, chain, s) + at) = carry.x;
      carry.add(shares[i]);
      if (x.detached(s)) carry = Four();
    }
  }
  if (x.dM_in == nullptr) return;
  float* out = x.dM_in + chain * x.matrix() + at;
  *reinterpret_cast<float4*>(out) = carry.x;
}

__global__ void __launch_bounds__(128)
    infini_z_scan_bwd_kernel(const __grid_constant__ InfiniGradStates x) {
  const int chain = blockIdx.x, column = blockIdx.y * blockDim.x + threadIdx.x;
  if (column >= x.D) return;
  float carry = 0.f;
  if (x.dz_out != nullptr && !x.detached(x.S)) carry = x.dz_out[int64_t{chain} * x.D + column];
  for (int s0 = x.S - 1; s0 >= 0; s0 -= kAhead) {
    float shares[kAhead] = {};
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      const int s = s0 - i;
      if (s < 0 || x.empty(s)) continue;
      for (int part = 0; part < x.splits; ++part) shares[i] += x.dz_of(part, chain, s)[column];
      for (int part = 0; x.dz_keys != nullptr && part < x.key_splits; ++part) {
        shares[i] += x.dz_keys[x.state(part, chain, s) * x.D + column];
      }
    }
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      const int s = s0 - i;
      if (s < 0) break;
      x.dz_of(0, chain, s)[column] = carry;
      carry += shares[i];
      if (x.detached(s)) carry = 0.f;
    }
  }
  if (x.dz_in != nullptr) x.dz_in[int64_t{chain} * x.D + column] = carry;
}

}  // namespace

void launch_infini_linear_scan_bwd(const InfiniGradStates& states, Stream stream) {
  const dim3 block(128);
  const dim3 grid(states.chains(), static_cast<unsigned>(ceil_div(states.matrix() / 4, block.x)));
  infini_linear_scan_bwd_kernel<<<grid, block, 0, stream>>>(states);
  check_launch("infini_linear_scan_bwd_kernel", grid, block, stream);
}

void launch_infini_z_scan_bwd(const InfiniGradStates& states, Stream stream) {
  const dim3 block(128), grid(states.chains(), static_cast<unsigned>(ceil_div(states.D, 128)));
  infini_z_scan_bwd_kernel<<<grid, block, 0, stream>>>(states);
  check_launch("infini_z_scan_bwd_kernel", grid, block, stream);
}

}  // namespace lctx::cuda
