// Launchers of the CUDA backend, one pair per family. They know nothing of torch and are plain C++
// to their callers. The current device is the tensors'. A launch that fails throws
// std::runtime_error with the kernel's name and grid.
#pragma once

#include "../params.h"

struct CUstream_st;

namespace lctx::cuda {

using Stream = CUstream_st*;  // cudaStream_t

// Multiprocessors of the current device.
int num_sms();

void zero(void* data, int64_t bytes, Stream stream);

// bf16 and fp16; `scratch`: flash_fwd_scratch 32-bit words on the device.
int64_t flash_fwd_scratch(const FlashParams& params, int num_sms);
void launch_flash_fwd(const FlashParams& params, void* scratch, int num_sms, Stream stream);

// Scratch memory of a backward, on the device.
struct BwdScratch {
  float* lse2 = nullptr;    // (B, Hq, pitch): lse / log 2, +inf where a row sees no key
  float* delta = nullptr;   // (B, Hq, pitch): sum of dout * out over the columns, minus dlse
  float* dq_sum = nullptr;  // dq_sum_floats (dq_sum.cuh), fused only
  int* counter = nullptr;   // one int
  int block_rows = 0;       // queries of a block of these, where it is not dq_block_rows
  // flash_key_sum_floats zeros: sums of dk and dv of tiles that several blocks of threads share.
  float* key_sums = nullptr;
  // Where dq is added in an order (OrderedKeys): a zero for each block of dq_sum, which then needs
  // none.
  int* turns = nullptr;
};

// `block_rows` of launch_flash_bwd. `ordered`: dq is added in an order.
int flash_block_rows(const FlashParams& params, bool fused, bool ordered);
// Room for BwdScratch::turns, a multiple of 128 bytes.
int64_t flash_turns(const AttnShape& shape, int block_rows);
// Floats of dq_sum.
int64_t flash_dq_sum_floats(const AttnShape& shape, int block_rows = 0);
// Queries of a block of dq_sum: `block_rows`, or dq_block_rows where that is 0.
int64_t bwd_block_rows(const AttnShape& shape, int block_rows = 0);
// Rows of lse2 and delta per head: those of dq_sum, whole blocks.
int64_t bwd_pitch(const AttnShape& shape, int block_rows = 0);

// Fills lse2 and delta, and zeroes dq_sum where there is one, and the counter.
void launch_bwd_rows(const AttnParams& params, const AttnGrads& grads, const BwdScratch& scratch,
                     int64_t dq_sum_floats, Stream stream);
int64_t flash_key_sum_floats(const FlashParams& params, bool fused, int num_sms);
// dk and dv, and with `fused` the sum of dq.
void launch_flash_bwd(const FlashParams& params, const AttnGrads& grads, const BwdScratch& scratch,
                      bool fused, int num_sms, Stream stream);
void launch_unpack_dq(const AttnParams& params, const AttnGrads& grads, const float* dq_sum,
                      Stream stream, int block_rows = 0, const int* turns = nullptr);
// The backward's gradient of the queries: writes grads.dq. `lse2` and `delta` are fp32 (B, Hq,
// bwd_pitch): lse log2 e, +inf where lse is -inf, and rowsum(dout out) - dlse. `counter` as below.
void launch_flash_dq(const FlashParams& params, const AttnGrads& grads, const float* lse2,
                     const float* delta, int* counter, int num_sms, Stream stream);

// `scratch`: flash_carry_scratch 32-bit words on the device; `counter` is an int there that the
// launch zeroes and uses.
int64_t flash_carry_scratch(const CarryParams& params, int num_sms);
void launch_flash_carry(const CarryParams& params, void* scratch, int num_sms, Stream stream);
void launch_flash_carry_two(const CarryTwoParams& params, int* counter, int num_sms, Stream stream);

// Its backward; dq, dk and dv are fp32, and added to. Not fused: bitwise reproducible.
void launch_flash_carry_bwd(const CarryParams& params, const CarryGrads& grads,
                            const BwdScratch& scratch, int64_t dq_sum_floats, bool fused,
                            int num_sms, Stream stream);
// One step of it, fused, on rows of statistics and sums that all steps share: `scratch` points to
// the step's first, of `heads` query heads and `blocks` blocks a head; dq stays in dq_sum. With
// scratch.block_rows dq is added in an order. At scratch.counter are carry_step_counters ints,
// whose first is followed by scratch.turns.
int64_t carry_step_counters(const CarryParams& params, const BwdScratch& scratch, int64_t heads,
                            int64_t blocks);
void launch_carry_bwd_step(const CarryParams& params, const CarryGrads& grads,
                           const BwdScratch& scratch, int64_t heads, int64_t blocks, int num_sms,
                           Stream stream);
// The end of it: dk and dv in 16 bits. T, H, D > 0.
void launch_carry_bwd_keys(const CarryKeysParams& params, Stream stream);
// delta (B, Hq, Tq) of grads.dout, grads.dlse and params.out.
void launch_attn_delta(const AttnParams& params, const AttnGrads& grads, float* delta,
                       Stream stream);

// `partial`: fp32 (B, T, Hq, D) scratch, not needed for one branch of rate 1 without seqlens;
// `counters`: an int a branch, on the device.
void launch_dilated_fwd(const DilatedParams& params, float* partial, int* counters, int num_sms,
                        Stream stream);

// Floats of the backward's scratch memory.
struct DilatedSizes {
  int64_t dq = 0;    // BwdScratch::dq_sum
  int64_t keys = 0;  // dk and dv each
  int64_t statistics = 0, delta = 0;
};
struct DilatedSums {
  float *statistics = nullptr, *dk = nullptr, *dv = nullptr, *delta = nullptr;
};

// Of `scratch` lse2 and delta are read; nothing need be zero. `fused`: sums of dq are made in an
// order that changes from run to run; D is at most 128.
DilatedSizes dilated_sizes(const DilatedParams& params, bool fused);
void launch_dilated_bwd(const DilatedParams& params, const AttnGrads& grads,
                        const BwdScratch& scratch, const DilatedSums& sums, bool fused, int num_sms,
                        Stream stream);

// `scratch`: landmark_scratch_ints ints on the device.
void launch_landmark_fwd(const LandmarkParams& params, int* scratch, int num_sms, Stream stream);
int64_t landmark_scratch_ints(const LandmarkParams& params, int num_sms);

// `scratch`: landmark_decode_scratch floats on the device. Blocks may lie in pinned memory of the
// host: `blocks_on_host` checks that.
void launch_landmark_decode(const LandmarkDecodeParams& params, float* scratch, bool blocks_on_host,
                            int num_sms, Stream stream);
int64_t landmark_decode_scratch(const LandmarkDecodeParams& params);
void launch_infini_decode(const InfiniDecodeParams& params, int num_sms, Stream stream);

// dq, dk, dv. Of `scratch` lse2 and delta are read, and where there is a dq_sum (zero before,
// flash_dq_sum_floats; only if landmark_fuses) dq is summed there, in an order that changes from
// run to run. `vectors`: landmark_vector_floats, `ints`: landmark_bwd_ints on the device.
void launch_landmark_bwd(const LandmarkParams& params, const AttnGrads& grads,
                         const BwdScratch& scratch, float* vectors, int* ints, int num_sms,
                         Stream stream);
// Whether dq is made faster with a sum.
bool landmark_fuses(const LandmarkParams& params);
int64_t landmark_vector_floats(const LandmarkParams& params, bool fused);
int64_t landmark_bwd_ints(const LandmarkParams& params);

// How the forward makes its memory states.
struct InfiniPlan {
  bool beside = false;  // segment after segment, by tiles among those of attention
  int splits = 0;       // else all segments at once before it, each in so many parts
};
InfiniPlan plan_infini(const InfiniParams& params, int num_sms);

// Scratch memory of the forward, on the device. Sizes are counted in elements.
struct InfiniScratch {
  const float* M_in = nullptr;  // memory in, nullptr: zeros
  const float* z_in = nullptr;
  float* gain_parts = nullptr;  // (splits - 1, B, Hkv, S, D, D)
  float* z_parts = nullptr;     // (splits, B, Hkv, S, D)
  float* decay = nullptr;       // (splits, B, Hkv, S, D, D), delta rule only
  float* norms = nullptr;       // (B, Hkv, S, 4 + D)
  void* half = nullptr;         // (B, Hkv, S, D, D) of the inputs' type
  int* counters = nullptr;      // 1 + B Hkv
};

// bf16 and fp16; writes everything that the parameters name, state 0 of the memory too.
void launch_infini_fwd(const InfiniParams& params, const InfiniPlan& plan,
                       const InfiniScratch& scratch, int num_sms, Stream stream);

// How the backward shares out its work: parts of a segment's query rows and of its keys.
struct InfiniBwdPlan {
  int splits = 1, key_splits = 1;
  int64_t row_blocks = 0;
};
InfiniBwdPlan plan_infini_bwd(const InfiniParams& params, int num_sms);
// Elements of wide_halves and wide_floats.
int64_t infini_wide_halves(const InfiniParams& params);
int64_t infini_wide_floats(const InfiniParams& params);

// Scratch memory of the backward, on the device. Sizes are counted in elements.
struct InfiniBwdScratch {
  float* norms = nullptr;      // (B, Hkv, S, 4 + D)
  float* dM = nullptr;         // (splits, B, Hkv, S, D, D)
  float* dz = nullptr;         // (splits, B, Hkv, S, D)
  float* dz_keys = nullptr;    // (key_splits, B, Hkv, S, D), delta rule only
  float* retrieved = nullptr;  // (B, Hq, T)
  float* lse2 = nullptr;       // (B, Hq, bwd_pitch), as the next
  float* delta = nullptr;
  float* dgate_parts = nullptr;  // (Hq, B, row_blocks)
  float* dq_sum = nullptr;       // dq_sum_floats
  int* counters = nullptr;       // 2
  TensorView dk_add, dv_add;     // what the memory adds to dk and dv: in their own place
  void* wide_halves = nullptr;   // infini_wide_halves, D > 128 only, as the next
  float* wide_floats = nullptr;  // infini_wide_floats
};

// What the memory contributes to all gradients, and what the local part's backward reads: lse2,
// delta; dq_sum, or above D = 128 dq, starts with the memory's part (zero where q_mem is given).
void launch_infini_memory_bwd(const InfiniParams& params, const InfiniGrads& grads,
                              const InfiniBwdPlan& plan, const InfiniBwdScratch& scratch,
                              int num_sms, Stream stream);

// The rest, after that: dq, dk, dv.
void launch_infini_local_bwd(const InfiniParams& params, const InfiniGrads& grads,
                             const InfiniBwdScratch& scratch, bool deterministic, int num_sms,
                             Stream stream);

void launch_merge_fwd(const MergeParams& params, Stream stream);
void launch_merge_bwd(const MergeParams& params, const MergeGrads& grads, Stream stream);

}  // namespace lctx::cuda
