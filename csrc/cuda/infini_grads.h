// The gradients of Infini-attention's memory between the kernels of the backward: what lies where.
// Host and device. Names as in infini_states.h: state s of a chain is what segment s reads.
#pragma once

#include "infini_states.h"

namespace lctx::cuda {

constexpr int kGradRows = 128;  // rows of a block of the retrieval and of the update

struct InfiniGradStates {
  int B, Hq, Hkv, S, D, T, segment_len, detach_every;
  int pitch;                // of lse2 and delta
  int splits, part_blocks;  // retrieval: a segment's rows of all query heads, in parts of blocks
  int key_splits, key_part_blocks;  // delta rule: the same for the segment's keys
  bool has_mem, first_bypass;
  const float *M_states, *z_states, *norms, *gate;
  const float *dM_out, *dz_out;  // of the state that goes out; nullptr: zero
  float *dM_in, *dz_in;          // nullptr: not wanted
  // Per part, chain and segment: first what retrieval adds to the gradient of the state that the
  // segment reads. The scan leaves in part 0 the gradient of the state that the segment *leaves*.
  float *dM, *dz;
  float* dz_keys;       // delta rule, else nullptr: what the norms add to the gradient of z read
  float* retrieved;     // (B, Hq, T): dout . A_mem
  float *lse2, *delta;  // (B, Hq, pitch): what the local part reads
  float* dgate_parts;   // (Hq, B, row blocks)
  float* dgate;         // nullptr: not wanted

  __host__ __device__ int chains() const { return B * Hkv; }
  __host__ __device__ int group() const { return Hq / Hkv; }
  __host__ __device__ int64_t matrix() const { return int64_t{D} * D; }
  __host__ __device__ int segment_rows(int s) const {
    return s + 1 < S ? segment_len : T - s * segment_len;
  }
  // No memory yet: nothing is retrieved, and the delta rule equals the linear one.
  __host__ __device__ bool empty(int s) const { return s == 0 && !has_mem; }
  // State s is cut off from the gradient of what follows.
  __host__ __device__ bool detached(int s) const {
    return s > 0 && detach_every > 0 && s % detach_every == 0;
  }
  __host__ __device__ int64_t state(int part, int chain, int s) const {
    return (int64_t{part} * chains() + chain) * S + s;
  }
  __host__ __device__ float* dM_of(int part, int chain, int s) const {
    return dM + state(part, chain, s) * matrix();
  }
  __host__ __device__ float* dz_of(int part, int chain, int s) const {
    return dz + state(part, chain, s) * D;
  }
  __host__ __device__ const float* norm(int chain, int s) const {
    return norms + state(0, chain, s) * (kNormOffset + D);
  }
};

// In this order: rows' gradients through retrieval and its part of dM and dz;
// statistics of the local part, and dgate, (delta) beside the scan; scan of dM; (linear) scan of
// dz; gradients of keys and values; (delta) scan of dz, and what it adds to dk.
void launch_infini_retrieve_bwd(const InfiniParams& params, const InfiniGrads& grads,
                                const InfiniGradStates& states, float* dq_sum, int num_sms,
                                Stream stream);
int64_t infini_row_blocks(const AttnShape& shape);  // shares of dgate a batch and head
// overlap: it runs beside the kernel before it in the stream, which lets it (delta scan).
void launch_infini_row_stats(const InfiniParams& params, const InfiniGrads& grads,
                             const InfiniGradStates& states, bool overlap, Stream stream);
void launch_infini_linear_scan_bwd(const InfiniGradStates& states, Stream stream);
void launch_infini_delta_scan_bwd(const InfiniGradStates& states, const void* decays,
                                  Stream stream);
void launch_infini_z_scan_bwd(const InfiniGradStates& states, Stream stream);
// Writes what the memory adds to dk and dv to `dk` and `dv`, in the inputs' type; delta rule:
// without dz, of which it writes the norms' part.
void launch_infini_update_bwd(const InfiniParams& params, const InfiniGradStates& states,
                              const TensorView& dk, const TensorView& dv, int num_sms,
                              Stream stream);
// dk += dz o min(sigma(k), 1), with the dz (B, Hkv, S, D) of the states that segments leave.
void launch_infini_add_dz(const InfiniParams& params, const float* dz, const TensorView& k,
                          const TensorView& dk, Stream stream);

}  // namespace lctx::cuda
