#include "isa.h"

#include <cstdlib>
#include <cstring>

#include "cpu_backend.h"
#if defined(__x86_64__) && !defined(LCTX_NO_X86)
#include <cpuid.h>
#endif

namespace lctx::cpu {
namespace {

enum class Isa { kBase, kAvx2, kAvx512 };

Isa detect() {
#if defined(__x86_64__) && !defined(LCTX_NO_X86)
  // Not every clang knows __builtin_cpu_supports("f16c").
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  const bool f16c = __get_cpuid(1, &eax, &ebx, &ecx, &edx) && (ecx & bit_F16C);
  const bool avx2 = f16c && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
                      __builtin_cpu_supports("avx512dq");
  const char* wish = std::getenv("LCTX_CPU_ISA");
  if (wish != nullptr && std::strcmp(wish, "base") == 0) return Isa::kBase;
  const bool at_most_avx2 = wish != nullptr && std::strcmp(wish, "avx2") == 0;
  if (avx512 && !at_most_avx2) return Isa::kAvx512;
  if (avx2) return Isa::kAvx2;
#endif
  return Isa::kBase;
}

[[maybe_unused]] Isa active() {
  static const Isa isa = detect();
  return isa;
}

}  // namespace

const KernelTable& kernels(DType dtype) {
  const bool wide = dtype == DType::kFloat64;
#if defined(__x86_64__) && !defined(LCTX_NO_X86)
  if (active() == Isa::kAvx512) return wide ? avx512::kDoubleKernels : avx512::kFloatKernels;
  if (active() == Isa::kAvx2) return wide ? avx2::kDoubleKernels : avx2::kFloatKernels;
#endif
  return wide ? base::kDoubleKernels : base::kFloatKernels;
}

const char* active_isa() { return kernels(DType::kFloat32).name; }

}  // namespace lctx::cpu
