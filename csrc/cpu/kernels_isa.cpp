// Compiled once per instruction set with -DLCTX_ISA=<base|avx2|avx512>: the tables that isa.cpp
// chooses from.
#include "attn_bwd.h"
#include "isa.h"
#include "memory_kernels_bwd.h"

#define LCTX_STRINGIFY_(x) #x
#define LCTX_STRINGIFY(x) LCTX_STRINGIFY_(x)

namespace lctx::cpu::LCTX_ISA {
namespace {

template <class C>
constexpr KernelTable make_table() {
  return {LCTX_STRINGIFY(LCTX_ISA),
          {kTilePanels * kPanel<C>, fwd_scratch<C>, fwd_tile<C>, bwd_scratch<C>, bwd_partial<C>,
           bwd_split<C>, bwd_reduce<C>, delta_rows<C>, convert_rows<C>},
          {memory_scratch<C>, memory_gain<C>, memory_decay<C>, memory_step<C>, memory_retrieve<C>,
           memory_retrieve_bwd<C>, memory_write_z_bwd<C>, memory_write_bwd<C>}};
}

}  // namespace

extern const KernelTable kFloatKernels = make_table<float>();
extern const KernelTable kDoubleKernels = make_table<double>();

}  // namespace lctx::cpu::LCTX_ISA
