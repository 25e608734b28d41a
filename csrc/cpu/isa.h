// Run-time choice of the instruction set: every ISA build of kernels_isa.cpp exports the same
// tables.
#pragma once

#include "attn_problem.h"
#include "memory_problem.h"

namespace lctx::cpu {

struct KernelTable {
  const char* name;
  AttnKernels attn;
  MemoryKernels memory;
};

// Tables for an accumulation type: float for float32, bfloat16 and float16, double for float64.
const KernelTable& kernels(DType dtype);

namespace base {
extern const KernelTable kFloatKernels, kDoubleKernels;
}
namespace avx2 {
extern const KernelTable kFloatKernels, kDoubleKernels;
}
namespace avx512 {
extern const KernelTable kFloatKernels, kDoubleKernels;
}

}  // namespace lctx::cpu
