// Math: the delta rule's recurrence (eq. 5 of arXiv 2404.07143) over segments,
//         M_{s+1} = M_s + G_s - T_s M_s,
//       with the gains G and decays T of infini_sums_fwd.cu. M and its sums are fp32; the product
//       takes TF32 operands (11 bits), as many as fp16 inputs have.
// Tile map: columns of M do not meet: a block is (batch, key/value head, 32 columns); warpgroup w
//       holds rows 64 w .. of M as the accumulator of the product. A producer warp loads T.
// Pipeline: T arrives in stages of 32 of its columns. Per segment: the warpgroups write -M
//       transposed into one of two tiles (B), meet once, add A B = T (-M) onto M, then G, which was
//       loaded a segment ahead.
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
  static constexpr int kPairs = kColumns / 4;  // pairs of neighbouring columns that a thread holds

  const DeltaParams& p;
  const InfiniStates& x;
  const uint32_t smem;
  const int chain, column0;
  StagePipeline pipe;
  PipelineState<Traits::kStages> state;

  __device__ __forceinline__ DeltaKernel(const DeltaParams& params, char* base)
      : p(params),
        x(params.states),
        smem(ptx::smem_address(base)),
        chain(blockIdx.x),
        column0(blockIdx.y * kColumns),
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

  // Pair j of this thread: registers 2 j, 2 j + 1 of the fragment.
  __device__ __forceinline__ int pair_row(int j) const {
    return threadIdx.x / 128 * 64 + fragment_row(threadIdx.x % 128) + 8 * (j % 2);
  }
  __device__ __forceinline__ int pair_column(int j) const {
    return j / 2 * 8 + fragment_column(threadIdx.x % 128);
  }
  // Where pair j lies in a matrix, or -1 outside.
  __device__ __forceinline__ int place(int j) const {
    const int row = pair_row(j), column = column0 + pair_column(j);
    return row < x.D && column < x.D ? row * x.D + column : -1;
  }

  __device__ __forceinline__ void load_gain(int s, float2 (&gain)[kPairs]) const {
#pragma unroll
    for (int j = 0; j < kPairs; ++j) {
      gain[j] = {0.f, 0.f};
      const int at = place(j);
      if (at < 0) continue;
      for (int part = 0; part < x.splits; ++part) {
        const float2 g = *reinterpret_cast<const float2*>(x.gain(part, chain, s) + at);
        gain[j].x += g.x;
        gain[j].y += g.y;
      }
    }
  }

  // State s, and the copy that the retrieval reads.
  __device__ __forceinline__ void store_state(int s, const float (&M)[2 * kPairs]) const {
    float* full = x.M(chain, s);
    uint32_t* half = static_cast<uint32_t*>(x.half) + x.state(chain, s) * x.matrix() / 2;
    const bool read = s < x.S;
    const float scale = read ? x.norm(chain, s)[0] : 0.f;
#pragma unroll
    for (int j = 0; j < kPairs; ++j) {
      const int at = place(j);
      if (at < 0) continue;
      *reinterpret_cast<float2*>(full + at) = make_float2(M[2 * j], M[2 * j + 1]);
      if (read) {
        half[at / 2] = pack2<typename Traits::T>(M[2 * j] * scale, M[2 * j + 1] * scale);
      }
    }
  }

  // -M as the product's B: row = column of M, in chunks of 32 of M's rows.
  __device__ __forceinline__ void store_operand(uint32_t tile, const float (&M)[2 * kPairs]) const {
#pragma unroll
    for (int j = 0; j < kPairs; ++j) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int k = pair_row(j), n = pair_column(j) + i;
        const uint32_t at = tile + k / 32 * chunk_bytes(kColumns) + n * kChunkRowBytes +
                            ((k % 32 / 4 ^ n % 8) << 4) + k % 4 * 4;
        ptx::store_shared_4(at, ptx::round_tf32(-M[2 * j + i]));
      }
    }
  }

  // M += T (-M) over one part of T.
  __device__ __forceinline__ void multiply(uint32_t tile, float (&M)[2 * kPairs]) {
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
    float M[2 * kPairs];
    float2 next[kPairs];
#pragma unroll
    for (int j = 0; j < kPairs; ++j) {
      const int at = place(j);
      const bool given = x.M_in != nullptr && at >= 0;
      const float* in = x.M_in + chain * x.matrix() + at;  // perhaps not aligned
      M[2 * j] = given ? in[0] : 0.f;
      M[2 * j + 1] = given ? in[1] : 0.f;
    }
    load_gain(0, next);
    for (int s = 0; s < x.S; ++s) {
      const uint32_t tile = smem + Traits::kTiles + s % 2 * Traits::kTileBytes;
      store_operand(tile, M);
      ptx::fence_async_proxy();
      ptx::named_barrier_sync(1, Traits::kConsumerThreads);
      store_state(s, M);
      float2 gain[kPairs];
#pragma unroll
      for (int j = 0; j < kPairs; ++j) gain[j] = next[j];
      if (s + 1 < x.S) load_gain(s + 1, next);
      for (int part = 0; part < x.splits; ++part) multiply(tile, M);
#pragma unroll
      for (int j = 0; j < kPairs; ++j) {
        M[2 * j] += gain[j].x;
        M[2 * j + 1] += gain[j].y;
      }
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
