// Math: the delta rule's recurrence (eq. 5 of arXiv 2404.07143) over segments,
//         M_{s+1} = M_s + G_s - T_s M_s,
//       with the gains G and decays T of infini_sums_fwd.cu. M and its sums are fp32; the product
//       takes TF32 operands (11 bits), as many as fp16 inputs have. T is symmetric, so that the
//       backward is the same recurrence from the last segment to the first, dM_s = dM_{s+1} + R_s -
//       T_s dM_{s+1}, with what retrieval adds (infini_retrieve_bwd.cu); there, where what is left
//       of dM may be small, both operands have two terms, and the product is three of them.
// Tile map: columns of M do not meet: a block is (batch, key/value head, 32 columns); warpgroup w
//       holds rows 64 w .. of M as the accumulator of the product. A producer warp loads T.
// Pipeline: T arrives in stages of 32 of its columns. Per segment: the warpgroups write -M
//       transposed into one of two tiles (B), meet once, add A B = T (-M) onto M, then G, which was
//       loaded a segment ahead. Two terms of 256 rows leave room for one tile: they meet twice.
// Memory: per segment and head reads T (each of D / 32 blocks, once from HBM) and G, writes M and
//       its 16-bit copy: 14 D^2 bytes. A chain of S dependent steps of under 1 us each.
// Limits: used by infini_fwd and infini_bwd; D a multiple of 8 up to 256.
#include <cstring>

#include "../common/ptx_words.cuh"
#include "../common/tensor_map.h"
#include "../common/wgmma.cuh"
#include "infini_grads.h"
#include "infini_kernel.cuh"

namespace lctx::cuda {
namespace {

template <class Walk_, int kHeadDim_>
struct DeltaTraits {
  using Walk = Walk_;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr int kColumns = 32;  // of M, and of T in a stage: one row of 128 bytes
  static constexpr int kChunks = kHeadDim / kColumns;
  static constexpr int kConsumerThreads = 2 * kHeadDim;
  static constexpr int kThreads = kConsumerThreads + 32;
  static constexpr int kTerms = Walk::kTerms;
  static constexpr bool kLarge = kTerms == 2 && kHeadDim == 256;
  static constexpr int kStages = kLarge ? 2 : kTerms == 2 ? 4 : kHeadDim == 256 ? 5 : 8;
  static constexpr int kStageBytes = kHeadDim * kChunkRowBytes;
  static constexpr int kTileBytes = kColumns * kHeadDim * 4;
  static constexpr int kLow = kStages * kStageBytes;  // second terms of T
  static constexpr int kTiles = kTerms * kLow;
  static constexpr int kBuffers = kLarge ? 1 : 2;  // of -M
  static constexpr int kBarriers = kTiles + kBuffers * kTerms * kTileBytes;
  static constexpr int kSharedBytes = kBarriers + Pipeline<kStages>::kBytes + 1024;
};

struct DeltaParams {
  CUtensorMap decay;  // column, row, 1, state, part
  InfiniStates states;
  InfiniGradStates grads;  // backward
};

// The nearest TF32 number, and that to what is left.
struct SplitFloat {
  uint32_t high, low;

  __device__ __forceinline__ explicit SplitFloat(float x) : high(ptx::round_tf32(x)) {
    low = ptx::round_tf32(x - value_of(high));
  }

 private:
  static __device__ __forceinline__ float value_of(uint32_t bits) {
    float x;
    memcpy(&x, &bits, 4);
    return x;
  }
};

// What step i of the recurrence reads and leaves; element `at` of a matrix, two of a row at once.
template <class T>
struct ForwardWalk {
  static constexpr int kTerms = 1;

  static __device__ __forceinline__ int segment(const DeltaParams&, int i) { return i; }
  static __device__ __forceinline__ float2 first(const DeltaParams& p, int chain, int at) {
    const float* M = p.states.M_in;
    if (M == nullptr) return {0.f, 0.f};
    M += chain * p.states.matrix() + at;  // perhaps not aligned
    return {M[0], M[1]};
  }
  static __device__ __forceinline__ int splits(const DeltaParams& p) { return p.states.splits; }
  static __device__ __forceinline__ const float* gain(const DeltaParams& p, int part, int chain,
                                                      int s) {
    return p.states.gain(part, chain, s);
  }
  static __device__ __forceinline__ bool cuts(const DeltaParams&, int) { return false; }
  // State s, and the copy that the retrieval reads.
  template <class Values>
  static __device__ __forceinline__ void store(const DeltaParams& p, int chain, int i,
                                               Values&& for_pairs) {
    const InfiniStates& x = p.states;
    const int s = i;
    float* full = x.M(chain, s);
    uint32_t* half = static_cast<uint32_t*>(x.half) + x.state(chain, s) * x.matrix() / 2;
    const bool read = s < x.S;
    const float scale = read ? x.norm(chain, s)[0] : 0.f;
    for_pairs([&](int at, const float2& M) {
      *reinterpret_cast<float2*>(full + at) = M;
      if (read) half[at / 2] = pack2<T>(M.x * scale, M.y * scale);
    });
  }
};

struct BackwardWalk {
  static constexpr int kTerms = 2;

  static __device__ __forceinline__ int segment(const DeltaParams& p, int i) {
    return p.states.S - 1 - i;
  }
  static __device__ __forceinline__ float2 first(const DeltaParams& p, int chain, int at) {
    const InfiniGradStates& x = p.grads;
    if (x.dM_out == nullptr || x.detached(x.S)) return {0.f, 0.f};
    const float* dM = x.dM_out + chain * x.matrix() + at;
    return {dM[0], dM[1]};
  }
  static __device__ __forceinline__ int splits(const DeltaParams& p) { return p.grads.splits; }
  static __device__ __forceinline__ const float* gain(const DeltaParams& p, int part, int chain,
                                                      int s) {
    return p.grads.empty(s) ? nullptr : p.grads.dM_of(part, chain, s);
  }
  static __device__ __forceinline__ bool cuts(const DeltaParams& p, int i) {
    return p.grads.detached(segment(p, i));
  }
  // The gradient of the state that segment S - 1 - i leaves, then that of the memory in.
  template <class Values>
  static __device__ __forceinline__ void store(const DeltaParams& p, int chain, int i,
                                               Values&& for_pairs) {
    const InfiniGradStates& x = p.grads;
    float* to = i < x.S ? x.dM_of(0, chain, x.S - 1 - i)
                        : (x.dM_in != nullptr ? x.dM_in + chain * x.matrix() : nullptr);
    if (to == nullptr) return;
    for_pairs([&](int at, const float2& dM) { *reinterpret_cast<float2*>(to + at) = dM; });
  }
};

template <class Traits_>
struct DeltaKernel {
  using Traits = Traits_;
  using Walk = typename Traits::Walk;
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
    for (int step = 0; step < x.S; ++step) {
      const int s = Walk::segment(p, step);
      for (int i = 0; i < x.splits * Traits::kChunks; ++i) {
        const uint32_t full = pipe.acquire(state, Traits::kStageBytes);
        // With two terms the parts of a chunk are added up before they are multiplied.
        const int chunk = Traits::kTerms == 2 ? i / x.splits : i % Traits::kChunks;
        const int part = Traits::kTerms == 2 ? i % x.splits : i / Traits::kChunks;
        ptx::tma_load_5d(smem + state.stage() * Traits::kStageBytes, &p.decay, full,
                         chunk * kColumns, 0, 0, static_cast<int>(x.state(chain, s)), part);
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

  __device__ __forceinline__ void load_gain(int step, float2 (&gain)[kPairs]) const {
    const int s = Walk::segment(p, step);
#pragma unroll
    for (int j = 0; j < kPairs; ++j) {
      gain[j] = {0.f, 0.f};
      const int at = place(j);
      if (at < 0) continue;
      for (int part = 0; part < Walk::splits(p); ++part) {
        const float* from = Walk::gain(p, part, chain, s);
        if (from == nullptr) continue;
        const float2 g = *reinterpret_cast<const float2*>(from + at);
        gain[j].x += g.x;
        gain[j].y += g.y;
      }
    }
  }

  __device__ __forceinline__ void store_state(int step, const float (&M)[2 * kPairs]) const {
    Walk::store(p, chain, step, [&](auto&& use) {
#pragma unroll
      for (int j = 0; j < kPairs; ++j) {
        const int at = place(j);
        if (at >= 0) use(at, make_float2(M[2 * j], M[2 * j + 1]));
      }
    });
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
        const SplitFloat x(-M[2 * j + i]);
        ptx::store_shared_4(at, x.high);
        if constexpr (Traits::kTerms == 2) ptx::store_shared_4(at + Traits::kTileBytes, x.low);
      }
    }
  }

  // Waits for all parts of a chunk of T and leaves this warpgroup's rows of their sum in the last
  // stage: as two terms, the other one kLow behind.
  __device__ __forceinline__ void add_parts() {
    float4 sum[4] = {};
    for (int part = 0;; ++part) {
      pipe.wait(state);
      const uint32_t at = own_rows() + threadIdx.x % 128 * 16;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float2 low = ptx::load_shared_float2(at + i * 2048);
        const float2 high = ptx::load_shared_float2(at + i * 2048 + 8);
        sum[i] = {sum[i].x + low.x, sum[i].y + low.y, sum[i].z + high.x, sum[i].w + high.y};
      }
      if (part + 1 == x.splits) break;
      __syncwarp();
      pipe.release(state);
      state.advance();
    }
    const uint32_t at = own_rows() + threadIdx.x % 128 * 16;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const SplitFloat x(sum[i].x), y(sum[i].y), z(sum[i].z), w(sum[i].w);
      ptx::store_shared_16(at + i * 2048, {x.high, y.high, z.high, w.high});
      ptx::store_shared_16(at + i * 2048 + Traits::kLow, {x.low, y.low, z.low, w.low});
    }
    ptx::fence_async_proxy();
    ptx::named_barrier_sync(2 + threadIdx.x / 128, 128);
  }
  // This warpgroup's rows of the current stage.
  __device__ __forceinline__ uint32_t own_rows() const {
    return smem + state.stage() * Traits::kStageBytes + threadIdx.x / 128 * 8192;
  }

  // M += T (-M) over one part of T, or over all of them with two terms.
  __device__ __forceinline__ void multiply(uint32_t tile, float (&M)[2 * kPairs]) {
    PipelineState<Traits::kStages> last = state;
#pragma unroll
    for (int c = 0; c < Traits::kChunks; ++c) {
      if constexpr (Traits::kTerms == 2) {
        add_parts();
      } else {
        pipe.wait(state);
      }
      const uint32_t a = own_rows(), b = tile + c * chunk_bytes(kColumns);
      wgmma_fence();
#pragma unroll
      for (int term = 0; term < 2 * Traits::kTerms - 1; ++term) {
        const int low_a = term == 1 ? Traits::kLow : 0, low_b = term == 2 ? Traits::kTileBytes : 0;
#pragma unroll
        for (int t = 0; t < kColumns / 8; ++t) {
          ptx::Wgmma<float, kColumns>::ss(M, wgmma_descriptor(a + low_a, t * 32, 0),
                                          wgmma_descriptor(b + low_b, t * 32, 0), 1);
        }
      }
      wgmma_commit();
      if constexpr (Traits::kTerms == 2) {
        // At once: the parts of the next chunk are waited for before its product, and one of them
        // may come to this stage.
        wgmma_wait<0>();
        pipe.release(state);
      } else if (c > 0) {
        wgmma_wait<1>();
        pipe.release(last);
      }
      last = state;
      state.advance();
    }
    if constexpr (Traits::kTerms == 1) {
      wgmma_wait<0>();
      pipe.release(last);
    }
  }

  __device__ __forceinline__ void consume() {
    float M[2 * kPairs];
    float2 next[kPairs];
#pragma unroll
    for (int j = 0; j < kPairs; ++j) {
      const int at = place(j);
      const float2 pair = at >= 0 ? Walk::first(p, chain, at) : make_float2(0.f, 0.f);
      M[2 * j] = pair.x;
      M[2 * j + 1] = pair.y;
    }
    load_gain(0, next);
    for (int s = 0; s < x.S; ++s) {
      const uint32_t tile =
          smem + Traits::kTiles + s % Traits::kBuffers * (Traits::kTerms * Traits::kTileBytes);
      // With one tile all products with the last must have ended.
      if (Traits::kBuffers == 1) ptx::named_barrier_sync(1, Traits::kConsumerThreads);
      store_operand(tile, M);
      ptx::fence_async_proxy();
      ptx::named_barrier_sync(1, Traits::kConsumerThreads);
      store_state(s, M);
      float2 gain[kPairs];
#pragma unroll
      for (int j = 0; j < kPairs; ++j) gain[j] = next[j];
      if (s + 1 < x.S) load_gain(s + 1, next);
      for (int part = 0; part < (Traits::kTerms == 2 ? 1 : x.splits); ++part) multiply(tile, M);
#pragma unroll
      for (int j = 0; j < kPairs; ++j) {
        M[2 * j] += gain[j].x;
        M[2 * j + 1] += gain[j].y;
      }
      if (Walk::cuts(p, s)) {
#pragma unroll
        for (float& element : M) element = 0.f;
      }
    }
    store_state(x.S, M);
  }
};

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads)
    infini_delta_scan_kernel(const __grid_constant__ DeltaParams p) {
  // The backward's row statistics, which read nothing of it.
  if constexpr (Traits::kTerms == 2) ptx::grid_dependents_launch();
  run_pipelined<DeltaKernel<Traits>>(p);
}

template <class Traits>
void launch(const InfiniStates& states, const InfiniGradStates& grads, Stream stream) {
  const int64_t num_states = int64_t{states.chains()} * states.S;
  const int64_t D = states.D, matrix = states.matrix();
  const MapLayout layout{{D, D, 1, num_states, states.splits},
                         {D, 0, matrix, num_states * matrix},
                         {Traits::kColumns, Traits::kHeadDim, 1, 1, 1}};
  const DeltaParams p{make_map(states.decay, DType::kFloat32, layout), states, grads};
  const dim3 grid(states.chains(), static_cast<unsigned>(ceil_div(states.D, Traits::kColumns)));
  launch_memory<Traits>("infini_delta_scan_kernel", infini_delta_scan_kernel<Traits>, p, grid,
                        stream);
}

template <class Walk>
void choose(const InfiniStates& states, const InfiniGradStates& grads, Stream stream) {
  if (states.D <= 64) {
    launch<DeltaTraits<Walk, 64>>(states, grads, stream);
  } else if (states.D <= 128) {
    launch<DeltaTraits<Walk, 128>>(states, grads, stream);
  } else {
    launch<DeltaTraits<Walk, 256>>(states, grads, stream);
  }
}

}  // namespace

void launch_infini_delta_scan(const InfiniStates& states, DType dtype, Stream stream) {
  if (dtype == DType::kBFloat16) {
    choose<ForwardWalk<__nv_bfloat16>>(states, {}, stream);
  } else {
    choose<ForwardWalk<__half>>(states, {}, stream);
  }
}

void launch_infini_delta_scan_bwd(const InfiniGradStates& states, const InfiniStates& forward,
                                  Stream stream) {
  choose<BackwardWalk>(forward, states, stream);
}

}  // namespace lctx::cuda
