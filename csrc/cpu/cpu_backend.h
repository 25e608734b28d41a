// Entry points of the CPU backend, one pair per family. They know nothing of torch: the caller
// hands in the thread pool.
#pragma once

#include "../params.h"

namespace lctx::cpu {

// Runs body(context, i) once for every i in [0, count), at most `num_threads` at a time, and
// returns when all are done. `body` never throws.
struct ThreadPool {
  int num_threads = 1;
  void (*run)(int64_t count, void (*body)(void* context, int64_t i), void* context) = nullptr;
};

void flash_fwd(const FlashParams& params, const ThreadPool& pool);
void flash_bwd(const FlashParams& params, const AttnGrads& grads, const ThreadPool& pool);

void flash_carry(const CarryParams& params, const ThreadPool& pool);
void flash_carry_bwd(const CarryParams& params, const CarryGrads& grads, const ThreadPool& pool);
// delta (B, Hq, T) = rowsum(dout * out) - dlse, the row constant of every softmax backward.
void attn_delta(const AttnParams& params, const AttnGrads& grads, void* delta,
                const ThreadPool& pool);

void landmark_fwd(const LandmarkParams& params, const ThreadPool& pool);
void landmark_bwd(const LandmarkParams& params, const AttnGrads& grads, const ThreadPool& pool);

void landmark_decode(const LandmarkDecodeParams& params, const ThreadPool& pool);
void infini_decode(const InfiniDecodeParams& params, const ThreadPool& pool);

void dilated_fwd(const DilatedParams& params, const ThreadPool& pool);
void dilated_bwd(const DilatedParams& params, const AttnGrads& grads, const ThreadPool& pool);

void infini_fwd(const InfiniParams& params, const ThreadPool& pool);
void infini_bwd(const InfiniParams& params, const InfiniGrads& grads, const ThreadPool& pool);

void merge_fwd(const MergeParams& params, const ThreadPool& pool);
void merge_bwd(const MergeParams& params, const MergeGrads& grads, const ThreadPool& pool);

// "avx512", "avx2" or "base": what this processor runs; LCTX_CPU_ISA overrides downwards.
const char* active_isa();

}  // namespace lctx::cpu
