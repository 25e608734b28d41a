// Math: the delta rule's recurrence (eq. 5 of arXiv 2404.07143) over segments,
//         M_{s+1} = M_s + G_s - T_s M_s,
//       with the gains G and decays T of infini_sums_fwd.cu. M and its sums are fp32; the product
//       takes TF32 operands (11 bits), as many as fp16 inputs have.
// Tile map: columns of M do not meet: a block is (batch, key/value head, 32 columns); warpgroup w
//       holds rows 64 w .. of M as the accumulator of the product. A producer warp loads T.
// Pipeline: T arrives in stages of 32 of its columns. Per segment: the warpgroups write -M
//       transposed into one of two tiles (B), meet once, add G, which was loaded a segment ahead,
//       and A B = T (-M) onto M.
// Memory: per segment and head reads T (each of D / 32 blocks, once from HBM) and G, writes M and
//       its 16-bit copy: 14 D^2 bytes. A chain of S dependent steps of under 1 us each.
// Limits: used by infini_fwd; D a multiple of 8 up to 256.
#include "../common/ptx_words.cuh"
#include "../common/tensor_map.h"
#include "../common/wgmma.cuh"
#include "infini_kernel.cuh"
#include "infini_scan_stages.cuh"
#include "infini_states.h"

namespace lctx::cuda {
namespace {

template <class T_, int kHeadDim_>
struct DeltaTraits {
  using T = T_;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr int kColumns = 32;  // of M, and of T in a stage: one row of 128 bytes
  static constexpr int kChunks = kHeadDim / kColumns;
  static constexpr int kConsumerThreads = 2 * kHeadDim;
  static constexpr int kThreads = kConsumerThreads + 32;
  static constexpr int kStages = kHeadDim == 256 ? 5 : 8;
  static constexpr int kStageBytes = kHeadDim * kChunkRowBytes;
  static constexpr int kTileBytes = kColumns * kHeadDim * 4;
  static constexpr int kTiles = kStages * kStageBytes;  // of -M
  static constexpr int kBarriers = kTiles + 2 * kTileBytes;
  static constexpr int kSharedBytes = kBarriers + Pipeline<kStages>::kBytes + 1024;
};

struct DeltaParams {
  CUtensorMap decay;  // column, row, 1, state, part
  InfiniStates states;
};

template <class Traits_>
struct DeltaKernel {
  using Traits = Traits_;
  using StagePipeline = Pipeline<Traits::kStages>;
  static constexpr int kColumns = Traits::kColumns;
  using Fragment = ScanFragment<kColumns>;
  using Sums = typename Fragment::Sums;

  const DeltaParams& p;
  const InfiniStates& x;
  const uint32_t smem;
  const int chain;
  const Fragment fragment;
  StagePipeline pipe;
  PipelineState<Traits::kStages> state;

  __device__ __forceinline__ DeltaKernel(const DeltaParams& params, char* base)
      : p(params),
        x(params.states),
        smem(ptx::smem_address(base)),
        chain(blockIdx.x),
        fragment(x.D, blockIdx.y * kColumns),
        pipe(smem + Traits::kBarriers) {}

  __device__ __forceinline__ void produce() {
    for (int s = 0; s < x.S; ++s) {
      for (int i = 0; i < x.splits * Traits::kChunks; ++i) {
        const uint32_t full = pipe.acquire(state, Traits::kStageBytes);
        ptx::tma_load_5d(smem + state.stage() * Traits::kStageBytes, &p.decay, full,
                         i % Traits::kChunks * kColumns, 0, 0, static_cast<int>(x.state(chain, s)),
                         i / Traits::kChunks);
        state.advance();
      }
    }
  }

  __device__ __forceinline__ void load_gain(int s, typename Fragment::Pairs& gain) const {
    fragment.load_parts(x.splits, [&](int part) { return x.gain(part, chain, s); }, gain);
  }

  // State s, and the copy that the retrieval reads.
  __device__ __forceinline__ void store_state(int s, const Sums& M) const {
    fragment.store(x.M(chain, s), M);
    if (s == x.S) return;
    auto* half = static_cast<uint32_t*>(x.half) + x.state(chain, s) * x.matrix() / 2;
    const float scale = x.norm(chain, s)[0];
    fragment.for_pairs([&](int at, int j) {
      half[at / 2] = pack2<typename Traits::T>(M[2 * j] * scale, M[2 * j + 1] * scale);
    });
  }

  // -M as the product's B: row = column of M, in chunks of 32 of M's rows.
  __device__ __forceinline__ void store_operand(uint32_t tile, const Sums& M) const {
#pragma unroll
    for (int j = 0; j < Fragment::kPairs; ++j) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int k = Fragment::row(j), n = Fragment::column(j) + i;
        const uint32_t at = tile + k / 32 * chunk_bytes(kColumns) + n * kChunkRowBytes +
                            ((k % 32 / 4 ^ n % 8) << 4) + k % 4 * 4;
        ptx::store_shared_4(at, ptx::round_tf32(-M[2 * j + i]));
      }
    }
  }

  // M += T (-M) over one part of T.
  __device__ __forceinline__ void multiply(uint32_t tile, Sums& M) {
    multiply_stages<DeltaKernel, Traits::kChunks>(*this, [&](int c, uint32_t a) {
      const uint32_t b = tile + c * chunk_bytes(kColumns);
#pragma unroll
      for (int t = 0; t < kColumns / 8; ++t) {
        ptx::Wgmma<float, kColumns>::ss(M, wgmma_descriptor(a, t * 32, 0),
                                        wgmma_descriptor(b, t * 32, 0), 1);
      }
    });
  }

  __device__ __forceinline__ void consume() {
    Sums M;
    typename Fragment::Pairs gain;
    fragment.load_first(x.M_in != nullptr ? x.M_in + chain * x.matrix() : nullptr, M);
    load_gain(0, gain);
    for (int s = 0; s < x.S; ++s) {
      const uint32_t tile = smem + Traits::kTiles + s % 2 * Traits::kTileBytes;
      store_operand(tile, M);
      ptx::fence_async_proxy();
      ptx::named_barrier_sync(1, Traits::kConsumerThreads);
      store_state(s, M);
      Fragment::add(gain, M);
      if (s + 1 < x.S) load_gain(s + 1, gain);
      for (int part = 0; part < x.splits; ++part) multiply(tile, M);
    }
    store_state(x.S, M);
  }
};

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads)
    infini_delta_scan_kernel(const __grid_constant__ DeltaParams p) {
  run_pipelined<DeltaKernel<Traits>>(p);
}

template <class Traits>
void launch(const InfiniStates& states, Stream stream) {
  const int64_t num_states = int64_t{states.chains()} * states.S;
  const int64_t D = states.D, matrix = states.matrix();
  const MapLayout layout{{D, D, 1, num_states, states.splits},
                         {D, 0, matrix, num_states * matrix},
                         {Traits::kColumns, Traits::kHeadDim, 1, 1, 1}};
  const DeltaParams p{make_map(states.decay, DType::kFloat32, layout), states};
  const dim3 grid(states.chains(), static_cast<unsigned>(ceil_div(states.D, Traits::kColumns)));
  launch_memory<Traits>("infini_delta_scan_kernel", infini_delta_scan_kernel<Traits>, p, grid,
                        stream);
}

template <class T>
void choose(const InfiniStates& states, Stream stream) {
  if (states.D <= 64) {
    launch<DeltaTraits<T, 64>>(states, stream);
  } else if (states.D <= 128) {
    launch<DeltaTraits<T, 128>>(states, stream);
  } else {
    launch<DeltaTraits<T, 256>>(states, stream);
  }
}

}  // namespace

void launch_infini_delta_scan(const InfiniStates& states, DType dtype, Stream stream) {
  if (dtype == DType::kBFloat16) {
    choose<__nv_bfloat16>(states, stream);
  } else {
    choose<__half>(states, stream);
  }
}

}  // namespace lctx::cuda
