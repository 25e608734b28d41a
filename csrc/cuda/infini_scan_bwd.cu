// Math: gradients of the states, from the last to the first. With dM the gradient of the state that
//       segment s leaves and R_s what retrieval of segment s adds, the state that it reads gets
//         linear: dM + R_s (delta: infini_delta_scan_bwd.cu), and likewise z;
//       nothing passes a state that is detached. delta: dk += dz o min(sigma(k), 1), where
//       infini_local_bwd.cu does not.
// Tile map: z: a block per (batch, key/value head), a thread per element. M: a thread per four
//       elements of the matrix and chain. dk: a thread per 8 columns of a row.
// Pipeline: a thread walks through the segments; the shares of the next kAhead segments are loaded
//       before they are needed, of z kVectorsAhead.
// Memory: in place: per segment and head D^2 (4 read + 4 written) bytes: memory's speed. Parts of a
//       segment are added in their order.
// Limits: used by infini_bwd; D a multiple of 8; 2^31 - 1 rows.
#include <algorithm>

#include "../common/feature_map.cuh"
#include "../common/launch.h"
#include "../common/wgmma.cuh"
#include "infini_grads.h"

namespace lctx::cuda {
namespace {

constexpr int kAhead = 4, kVectorsAhead = 8;

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
  for (int s0 = x.S - 1; s0 >= 0; s0 -= kVectorsAhead) {
    // First parts, often the only ones, before anything waits for one of them.
    float shares[kVectorsAhead], keys[kVectorsAhead];
#pragma unroll
    for (int i = 0; i < kVectorsAhead; ++i) {
      const int s = s0 - i;
      const bool adds = s >= 0 && !x.empty(s);
      shares[i] = adds ? x.dz_of(0, chain, s)[column] : 0.f;
      keys[i] = adds && x.dz_keys != nullptr ? x.dz_keys[x.state(0, chain, s) * x.D + column] : 0.f;
    }
#pragma unroll
    for (int i = 0; i < kVectorsAhead; ++i) {
      const int s = s0 - i;
      if (s < 0 || x.empty(s)) continue;
      for (int part = 1; part < x.splits; ++part) shares[i] += x.dz_of(part, chain, s)[column];
      shares[i] += keys[i];
      for (int part = 1; x.dz_keys != nullptr && part < x.key_splits; ++part) {
        shares[i] += x.dz_keys[x.state(part, chain, s) * x.D + column];
      }
    }
#pragma unroll
    for (int i = 0; i < kVectorsAhead; ++i) {
      const int s = s0 - i;
      if (s < 0) break;
      x.dz_of(0, chain, s)[column] = carry;
      carry += shares[i];
      if (x.detached(s)) carry = 0.f;
    }
  }
  if (x.dz_in != nullptr) x.dz_in[int64_t{chain} * x.D + column] = carry;
}

struct AddParams {
  const float* dz;
  TensorView k, dk;
  int S, D, segment_len;
  int64_t units;                             // of 8 columns of (batch, position, head)
  FastDivisor per_row, per_head, per_batch;  // units, heads, positions
};

template <class T>
__global__ void __launch_bounds__(256) infini_add_dz_kernel(const __grid_constant__ AddParams p) {
  const int64_t unit = int64_t{blockIdx.x} * 256 + threadIdx.x;
  if (unit >= p.units) return;
  const int row = static_cast<int>(unit / p.per_row.divisor);
  const int column = static_cast<int>(unit - int64_t{row} * p.per_row.divisor) * 8;
  const int bt = p.per_head.divide(row), head = row - bt * p.per_head.divisor;
  const int batch = p.per_batch.divide(bt), t = bt - batch * p.per_batch.divisor;
  const auto at = [&](const TensorView& view) {
    return reinterpret_cast<uint4*>(static_cast<T*>(view.data) + batch * view.stride_b +
                                    t * view.stride_t + head * view.stride_h + column);
  };
  const int64_t chain = int64_t{batch} * p.per_head.divisor + head;
  const float* dz = p.dz + (chain * p.S + t / p.segment_len) * p.D + column;
  const uint4 k = *at(p.k), dk = *at(p.dk);
  const uint32_t keys[4] = {k.x, k.y, k.z, k.w};
  uint32_t sums[4] = {dk.x, dk.y, dk.z, dk.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 s = elu_plus_one2<T>(keys[i]), sum = unpack2<T>(sums[i]);
    sums[i] =
        pack2<T>(sum.x + dz[2 * i] * fminf(s.x, 1.f), sum.y + dz[2 * i + 1] * fminf(s.y, 1.f));
  }
  *at(p.dk) = make_uint4(sums[0], sums[1], sums[2], sums[3]);
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

void launch_infini_add_dz(const InfiniParams& params, const float* dz, const TensorView& k,
                          const TensorView& dk, Stream stream) {
  const AttnShape& s = params.shape;
  AddParams p{};
  p.dz = dz;
  p.k = k;
  p.dk = dk;
  p.S = static_cast<int>(ceil_div(s.Tk, params.segment_len));
  p.D = static_cast<int>(s.Dk);
  p.segment_len = static_cast<int>(std::min(params.segment_len, s.Tk));
  p.units = s.B * s.Tk * s.Hkv * (s.Dk / 8);
  p.per_row = FastDivisor(static_cast<int>(s.Dk / 8));
  p.per_head = FastDivisor(static_cast<int>(s.Hkv));
  p.per_batch = FastDivisor(static_cast<int>(s.Tk));
  const dim3 grid(static_cast<unsigned>(ceil_div(p.units, 256))), block(256);
  const auto kernel = s.dtype == DType::kBFloat16 ? infini_add_dz_kernel<__nv_bfloat16>
                                                  : infini_add_dz_kernel<__half>;
  kernel<<<grid, block, 0, stream>>>(p);
  check_launch("infini_add_dz_kernel", grid, block, stream);
}

}  // namespace lctx::cuda
