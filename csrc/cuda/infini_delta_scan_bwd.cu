// Math: the delta rule's recurrence from the last segment to the first: T is symmetric, so that
//         dM_s = dM_{s+1} + R_s - T_s dM_{s+1},
//       with what retrieval adds (infini_retrieve_bwd.cu) and the decays T that the forward kept,
//       -T as a sum of two bf16 terms. What is left of dM may be small: dM has two terms as well,
//       and the product is three of theirs. dM and its sums stay fp32.
// Tile map: columns of dM do not meet: a block is (batch, key/value head, 32 columns); warpgroup w
//       holds rows 64 w .. of dM as the accumulator of the product. A producer warp loads T.
// Pipeline: T arrives in stages of 64 columns of a term. Per segment: the warpgroups write dM
//       transposed into one of two tiles (B), meet once, add R, which was loaded a segment ahead,
//       and A B = (-T) dM onto dM. Both are asked for in the L2 cache earlier: the row statistics,
//       which run beside, keep memory busy.
// Memory: per segment and head reads T (each of D / 32 blocks, once from HBM) and R, writes dM:
//       12 D^2 bytes. A chain of S dependent steps.
// Limits: used by infini_bwd; D a multiple of 8 up to 256.
#include "../common/ptx_words.cuh"
#include "../common/tensor_map.h"
#include "../common/wgmma.cuh"
#include "infini_grads.h"
#include "infini_kernel.cuh"
#include "infini_matrix.cuh"
#include "infini_scan_stages.cuh"

namespace lctx::cuda {
namespace {

template <int kHeadDim_>
struct ScanTraits {
  static constexpr int kHeadDim = kHeadDim_, kTerms = 2;
  static constexpr int kColumns = 32;                       // of dM
  static constexpr int kChunks = kHeadDim / kChunkColumns;  // of T's columns
  static constexpr int kConsumerThreads = 2 * kHeadDim;
  static constexpr int kThreads = kConsumerThreads + 32;
  static constexpr int kStages = kHeadDim == 256 ? 4 : 8;
  static constexpr bool kFetches = kHeadDim <= 128;  // above, nothing runs beside it
  static constexpr int kAhead = 4;                   // segments
  static constexpr int kStageBytes = chunk_bytes(kHeadDim);
  static constexpr int kTermBytes = tile_bytes(kColumns, kHeadDim);
  static constexpr int kTiles = kStages * kStageBytes;  // of dM: two, of two terms
  static constexpr int kBarriers = kTiles + 2 * kTerms * kTermBytes;
  static constexpr int kSharedBytes = kBarriers + Pipeline<kStages>::kBytes + 1024;
};

struct ScanParams {
  CUtensorMap decays;  // column, row, 1, state, term
  const void* data;    // the same
  InfiniGradStates states;
};

template <class Traits_>
struct ScanKernel {
  using Traits = Traits_;
  using T = __nv_bfloat16;
  static constexpr int kColumns = Traits::kColumns;
  using Fragment = ScanFragment<kColumns>;
  using Sums = typename Fragment::Sums;

  const ScanParams& p;
  const InfiniGradStates& x;
  const uint32_t smem;
  const int chain;
  const Fragment fragment;
  Pipeline<Traits::kStages> pipe;
  PipelineState<Traits::kStages> state;

  __device__ __forceinline__ ScanKernel(const ScanParams& params, char* base)
      : p(params),
        x(params.states),
        smem(ptx::smem_address(base)),
        chain(blockIdx.x),
        fragment(x.D, blockIdx.y * kColumns),
        pipe(smem + Traits::kBarriers) {}

  // What a segment further on reads is asked for in the L2 cache, once a chain.
  __device__ __forceinline__ void fetch(int s) const {
    if (!Traits::kFetches || s < 0 || blockIdx.y != 0) return;
    const uint32_t bytes = static_cast<uint32_t>(x.matrix()) * 4;
    const int64_t terms = int64_t{x.chains()} * x.S * x.matrix(), at = x.state(0, chain, s);
    const auto* decay = static_cast<const T*>(p.data) + at * x.matrix();
    for (int term = 0; term < Traits::kTerms; ++term) {
      ptx::bulk_prefetch(decay + term * terms, bytes / 2);
    }
    for (int part = 0; part < x.splits; ++part) ptx::bulk_prefetch(x.dM_of(part, chain, s), bytes);
  }

  __device__ __forceinline__ void produce() {
    for (int i = 1; i < Traits::kAhead; ++i) fetch(x.S - 1 - i);
    for (int s = x.S - 1; s >= 0; --s) {
      fetch(s - Traits::kAhead);
      for (int i = 0; i < Traits::kTerms * Traits::kChunks; ++i) {
        const uint32_t full = pipe.acquire(state, Traits::kStageBytes);
        ptx::tma_load_5d(smem + state.stage() * Traits::kStageBytes, &p.decays, full,
                         i / Traits::kTerms * kChunkColumns, 0, 0,
                         static_cast<int>(x.state(0, chain, s)), i % Traits::kTerms);
        state.advance();
      }
    }
  }

  // What retrieval adds in segment s.
  __device__ __forceinline__ void load_share(int s, typename Fragment::Pairs& share) const {
    if (x.empty(s)) {
#pragma unroll
      for (float2& pair : share) pair = make_float2(0.f, 0.f);
    } else {
      fragment.load_parts(x.splits, [&](int part) { return x.dM_of(part, chain, s); }, share);
    }
  }

  // dM as the product's B: row = column of dM, in chunks of 64 of dM's rows.
  __device__ __forceinline__ void store_operand(uint32_t tile, const Sums& dM) const {
    const int lane = threadIdx.x % 32, row = threadIdx.x / 32 * 16 + lane / 8 % 2 * 8;
    const uint32_t at = tile + swizzled_unit(kColumns, lane / 16 * 8 + lane % 8, row / 8);
#pragma unroll
    for (int t = 0; t < kColumns / 16; ++t) {
      uint32_t high[4], low[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const SplitPair<T> pair(dM[8 * t + 2 * i], dM[8 * t + 2 * i + 1]);
        high[i] = pair.high;
        low[i] = pair.low;
      }
      const uint32_t to = at + t * 16 * kChunkRowBytes;
      ptx::stmatrix_x4_trans(to, high[0], high[1], high[2], high[3]);
      ptx::stmatrix_x4_trans(to + Traits::kTermBytes, low[0], low[1], low[2], low[3]);
    }
  }

  // dM += (-T) dM
  __device__ __forceinline__ void multiply(uint32_t tile, Sums& dM) {
    multiply_stages<ScanKernel, Traits::kTerms * Traits::kChunks>(*this, [&](int i, uint32_t a) {
      const uint32_t b = tile + i / Traits::kTerms * chunk_bytes(kColumns);
      gemm_nt<T, kColumns, kChunkColumns>(dM, a, Traits::kHeadDim, b, kColumns, true);
      if (i % Traits::kTerms == 0) {
        gemm_nt<T, kColumns, kChunkColumns>(dM, a, Traits::kHeadDim, b + Traits::kTermBytes,
                                            kColumns, true);
      }
    });
  }

  __device__ __forceinline__ void consume() {
    Sums dM;
    typename Fragment::Pairs share;
    const bool given = x.dM_out != nullptr && !x.detached(x.S);
    fragment.load_first(given ? x.dM_out + chain * x.matrix() : nullptr, dM);
    load_share(x.S - 1, share);
    for (int s = x.S - 1; s >= 0; --s) {
      const uint32_t tile = smem + Traits::kTiles + s % 2 * (Traits::kTerms * Traits::kTermBytes);
      store_operand(tile, dM);
      ptx::fence_async_proxy();
      ptx::named_barrier_sync(1, Traits::kConsumerThreads);
      fragment.store(x.dM_of(0, chain, s), dM);  // the gradient of the state that segment s leaves
      Fragment::add(share, dM);
      if (s > 0) load_share(s - 1, share);
      multiply(tile, dM);
      if (x.detached(s)) {
#pragma unroll
        for (float& element : dM) element = 0.f;
      }
    }
    if (x.dM_in != nullptr) fragment.store(x.dM_in + chain * x.matrix(), dM);
  }
};

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads)
    infini_delta_scan_bwd_kernel(const __grid_constant__ ScanParams p) {
  ptx::grid_dependents_launch();  // the row statistics, which read nothing of it
  run_pipelined<ScanKernel<Traits>>(p);
}

template <class Traits>
void launch(const InfiniGradStates& states, const void* decays, Stream stream) {
  const int64_t num_states = int64_t{states.chains()} * states.S;
  const int64_t D = states.D, matrix = states.matrix();
  const MapLayout layout{{D, D, 1, num_states, Traits::kTerms},
                         {D, 0, matrix, num_states * matrix},
                         {kChunkColumns, Traits::kHeadDim, 1, 1, 1}};
  const ScanParams p{make_map(decays, DType::kBFloat16, layout), decays, states};
  const dim3 grid(states.chains(), static_cast<unsigned>(ceil_div(states.D, Traits::kColumns)));
  launch_memory<Traits>("infini_delta_scan_bwd_kernel", infini_delta_scan_bwd_kernel<Traits>, p,
                        grid, stream);
}

}  // namespace

void launch_infini_delta_scan_bwd(const InfiniGradStates& states, const void* decays,
                                  Stream stream) {
  if (states.D <= 64) {
    launch<ScanTraits<64>>(states, decays, stream);
  } else if (states.D <= 128) {
    launch<ScanTraits<128>>(states, decays, stream);
  } else {
    launch<ScanTraits<256>>(states, decays, stream);
  }
}

}  // namespace lctx::cuda
