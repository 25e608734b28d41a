// The memory of Infini-attention between its kernels: which state lies where. Host and device.
//
// A chain is a (batch, key/value head) pair, chain = b Hkv + h. State s of a chain is what segment
// s reads; state S goes out. A segment's gain G = sigma(K)^T V is first written where state s + 1
// will be, and its sum of sigma(K) and, for the delta rule, its decay T into scratch memory.
#pragma once

#include <algorithm>

#include "../common/math.cuh"
#include "../params.h"
#include "cuda_backend.h"

namespace lctx::cuda {

constexpr float kMemoryEps = 1e-6f;  // smallest sigma(q) z that is divided by
constexpr int kNormOffset = 4;

struct InfiniStates {
  int B, Hkv, S, D, T, segment_len;
  int splits, part_rows;  // a segment is summed in `splits` parts of `part_rows` rows
  const float *M_in, *z_in;
  float *M_states, *z_states, *M_out, *z_out;
  float *gain_parts, *z_parts, *decay;
  // What the retrieval reads of a state: scale M in the inputs' type, and a row of kNormOffset + D
  // numbers: scale, which is a power of two that brings z near 1, and from kNormOffset on scale z.
  // M over z is an average of values, so that fp16 holds scale M at any length.
  void* half;
  float* norms;
  int* ready;    // states of a chain that are there, zero at launch (infini_state_tiles.cuh)
  void* decays;  // kept for the backward: two bf16 numbers whose sum is -T; nullptr: not wanted

  InfiniStates() = default;
  InfiniStates(const InfiniParams& params, const InfiniPlan& plan, const InfiniScratch& scratch)
      : B(static_cast<int>(params.shape.B)),
        Hkv(static_cast<int>(params.shape.Hkv)),
        S(static_cast<int>(ceil_div(params.shape.Tq, params.segment_len))),
        D(static_cast<int>(params.shape.Dk)),
        T(static_cast<int>(params.shape.Tq)),
        segment_len(static_cast<int>(std::min(params.segment_len, params.shape.Tq))),
        splits(plan.splits),
        part_rows(static_cast<int>(ceil_div(segment_len, std::max(splits, 1)))),
        M_in(scratch.M_in),
        z_in(scratch.z_in),
        M_states(static_cast<float*>(params.M_states)),
        z_states(static_cast<float*>(params.z_states)),
        M_out(static_cast<float*>(params.M_out)),
        z_out(static_cast<float*>(params.z_out)),
        gain_parts(scratch.gain_parts),
        z_parts(scratch.z_parts),
        decay(scratch.decay),
        half(scratch.half),
        norms(scratch.norms),
        ready(scratch.counters + 1),
        decays(const_cast<void*>(params.decays)) {}

  __host__ __device__ int chains() const { return B * Hkv; }
  __host__ __device__ int segment_rows(int s) const {
    return s + 1 < S ? segment_len : T - s * segment_len;
  }
  __host__ __device__ int64_t matrix() const { return int64_t{D} * D; }
  __host__ __device__ int64_t state(int chain, int s) const { return int64_t{chain} * S + s; }

  // State s in 0 .. S.
  __host__ __device__ float* M(int chain, int s) const {
    return s < S ? M_states + state(chain, s) * matrix() : M_out + chain * matrix();
  }
  __host__ __device__ float* z(int chain, int s) const {
    return s < S ? z_states + state(chain, s) * D : z_out + int64_t{chain} * D;
  }

  __host__ __device__ float* norm(int chain, int s) const {
    return norms + state(chain, s) * (kNormOffset + D);
  }

  // What part `part` of segment s contributes; the first part's gain lies where state s + 1 will.
  __host__ __device__ int64_t part_state(int part, int chain, int s) const {
    return (int64_t{part} * chains() + chain) * S + s;
  }
  __host__ __device__ float* gain(int part, int chain, int s) const {
    return part == 0 ? M(chain, s + 1) : gain_parts + part_state(part - 1, chain, s) * matrix();
  }
  __host__ __device__ float* z_part(int part, int chain, int s) const {
    return z_parts + part_state(part, chain, s) * D;
  }
  __host__ __device__ float* decay_part(int part, int chain, int s) const {
    return decay + part_state(part, chain, s) * matrix();
  }
};

// The memory of all chains by kernels that are parallel over the segments, in this order: gains and
// sums of all segments; prefix of z; (delta) decays, which are kept if wanted; states.
int infini_splits(const InfiniParams& params, int num_sms);  // so that all multiprocessors work
void launch_infini_gains(const InfiniParams& params, const InfiniStates& states, int num_sms,
                         Stream stream);
// tf32: rounded, as a product of such numbers takes them.
void launch_infini_decays(const InfiniParams& params, const InfiniStates& states, bool tf32,
                          int num_sms, Stream stream);
// What is kept of unrounded decays, whose parts it rounds to TF32.
void launch_infini_keep_decays(const InfiniStates& states, Stream stream);
void launch_infini_z_scan(const InfiniStates& states, Stream stream);
void launch_infini_norms(const InfiniStates& states, Stream stream);  // of z that is there already
void launch_infini_linear_scan(const InfiniStates& states, DType dtype, Stream stream);
void launch_infini_delta_scan(const InfiniStates& states, DType dtype, Stream stream);

#if defined(__CUDACC__)
// The scale of a state whose |z| is `mean` on average.
__device__ __forceinline__ float memory_scale(float mean) {
  return exp2f(-floorf(log2f(fmaxf(mean, kMemoryEps))));
}
#endif

}  // namespace lctx::cuda
