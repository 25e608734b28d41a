// What the host side hands to the compressive-memory kernels of Infini-attention: one problem per
// segment of one (batch, key/value head). Rows (t, g) are the segment's positions and the G query
// heads that share the memory.
#pragma once

#include "attn_problem.h"

namespace lctx::cpu {

struct MemoryLaunch {
  DType dtype = DType::kFloat32;
  int64_t Dk = 0, Dv = 0;
  bool delta = false;         // update rule
  bool first_bypass = false;  // without memory yet: out = out_local instead of (1 - g) out_local
  // Backward: true: dq_mem / dk_mem are stat rows to add to; false: rows of `dtype` to write.
  bool add_dq = false, add_dk = false;
};

// Matrices are contiguous stat: M [Dk][Dv], T [Dk][Dk], z [Dk].
struct MemoryProblem {
  int64_t N = 0, G = 1;
  bool empty = false;  // no memory yet: nothing is retrieved, the delta rule equals the linear one
  Rows q_mem, k_mem, v, out, out_local;
  const void* gate = nullptr;             // stat [G] logits; nullptr: zeros
  const void *M = nullptr, *z = nullptr;  // state this segment reads
  void *gain_M = nullptr,
       *gain_z = nullptr;  // what its keys and values add: R^T V, column sums of R
  void* decay = nullptr;   // delta rule: T = R^T diag(1 / (R z)) R, M' = M - T M + R^T V
  // Backward.
  Rows dout, delta, dq_mem, dk_mem, dv;     // dv: stat rows to add to
  const void *dM = nullptr, *dz = nullptr;  // gradient of the state this segment leaves behind
  void *ret_M = nullptr, *ret_z = nullptr;  // gradient of (M, z) through retrieval
  void* write_z = nullptr;                  // gradient of z through the delta rule's denominator
  void* dgate = nullptr;                    // stat [G]: this segment's share
};

struct MemoryKernels {
  int64_t (*scratch)(const MemoryLaunch& launch);  // bytes
  void (*gain)(const MemoryLaunch& launch, const MemoryProblem& problem, char* scratch);
  void (*decay)(const MemoryLaunch& launch, const MemoryProblem& problem, char* scratch);
  // next = state - T state + gain for columns [c0, c1) of Dv; T == nullptr: no decay. Serves M
  // forwards, dM backwards.
  void (*step)(const MemoryLaunch& launch, const void* state, const void* T, const void* gain,
               void* next, int64_t c0, int64_t c1, char* scratch);
  void (*retrieve)(const MemoryLaunch& launch, const MemoryProblem& problem, char* scratch);
  void (*retrieve_bwd)(const MemoryLaunch& launch, const MemoryProblem& problem, char* scratch);
  void (*write_z_bwd)(const MemoryLaunch& launch, const MemoryProblem& problem, char* scratch);
  void (*write_bwd)(const MemoryLaunch& launch, const MemoryProblem& problem, char* scratch);
};

}  // namespace lctx::cpu
