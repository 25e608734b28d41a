// Products of rows with 256 x 256 states that come by in pieces, for the backward of Infini's
// memory above D = 128.
#pragma once

#include "../common/tensor_map.h"
#include "infini_kernel.cuh"
#include "infini_matrix.cuh"
#include "infini_wide.h"

namespace lctx::cuda {

// Two row tiles and stages of pieces of kPieces matrices. A piece is 64 deep and 128 of the
// product's columns wide.
template <class T_, int kPieces_>
struct WideTraits {
  using T = T_;
  static constexpr int kHeadDim = 256, kRows = kGradRows, kHalf = 128, kPieces = kPieces_;
  static constexpr int kDepth = 64, kSlices = kHeadDim / kDepth, kSteps = kDepth / 16;
  static constexpr int kConsumerThreads = 256, kThreads = kConsumerThreads + 128;
  static constexpr int kTileBytes = tile_bytes(kRows, kHeadDim);
  static constexpr int kPieceBytes = tile_bytes(kDepth, kHalf);
  static constexpr int kStageBytes = kPieces * kPieceBytes, kStages = 6 / kPieces;
  static constexpr int kFirst = 0, kSecond = kTileBytes;  // row tiles
  static constexpr int kStage = 2 * kTileBytes;
  static constexpr int kVector = kStage + kStages * kStageBytes;  // kNormOffset + kHeadDim floats
  static constexpr int kAside =
      kVector + (kNormOffset + kHeadDim) * 4;  // what registers are short of
  static constexpr int kBarriers = kAside + 32;
  static constexpr int kSharedBytes =
      kBarriers + 2 * Pipeline<1>::kBytes + Pipeline<kStages>::kBytes + 1024;
};

template <int kStages>
struct WidePipes {
  Pipeline<1> first, second;
  Pipeline<kStages> pieces;

  __device__ __forceinline__ explicit WidePipes(uint32_t base)
      : first(base), second(base + Pipeline<1>::kBytes), pieces(base + 2 * Pipeline<1>::kBytes) {}
  __device__ __forceinline__ void init(int consumer_warps) const {
    first.init(consumer_warps);
    second.init(consumer_warps);
    pieces.init(consumer_warps);
  }
};

// What the kernels share: X rows times a state.
template <class Traits_>
struct WideKernel {
  using Traits = Traits_;
  using T = typename Traits::T;
  static constexpr int kHeadDim = Traits::kHeadDim, kRows = Traits::kRows, kHalf = Traits::kHalf;
  using Sums = float[kHalf / 2];

  const uint32_t smem;
  WidePipes<Traits::kStages> pipe;
  PipelineState<1> rows;
  PipelineState<Traits::kStages> piece;

  __device__ __forceinline__ explicit WideKernel(char* base)
      : smem(ptx::smem_address(base)), pipe(smem + Traits::kBarriers) {}

  // ---- the producer ----

  static __device__ __forceinline__ void load_rows(const CUtensorMap& map, uint32_t tile,
                                                   uint32_t full, int row0, int head, int batch) {
#pragma unroll 1
    for (int c = 0; c < kHeadDim / kChunkColumns; ++c) {
      ptx::tma_load_5d(tile + c * chunk_bytes(kRows), &map, full, c * kChunkColumns, row0, 0, head,
                       batch);
    }
  }
  // 64 deep and 128 wide of state `state`, of the term or matrix that dimension 4 is. kAcross: the
  // product is with the transpose, depth lies in the state's columns.
  template <bool kAcross>
  static __device__ __forceinline__ void load_piece(const CUtensorMap& map, uint32_t to,
                                                    uint32_t full, int state, int term, int half,
                                                    int slice) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int wide = half * kHalf + i * 64, deep = slice * Traits::kDepth;
      ptx::tma_load_5d(to + i * (Traits::kPieceBytes / 2), &map, full, kAcross ? deep : wide,
                       kAcross ? wide : deep, 0, state, term);
    }
  }

  // ---- consumers ----

  // The same for the whole warp, which the compiler then knows; only where all threads are.
  static __device__ __forceinline__ int warpgroup() {
    return __shfl_sync(~0u, static_cast<int>(threadIdx.x / 128), 0);
  }
  // Of a block: this thread's rows are that one and the eighth after it.
  static __device__ __forceinline__ int first_row() {
    return static_cast<int>(threadIdx.x / 128) * 64 + fragment_row(threadIdx.x % 128);
  }
  static __device__ __forceinline__ void sync_all() {
    ptx::named_barrier_sync(1, Traits::kConsumerThreads);
  }
  __device__ __forceinline__ uint32_t piece_address(int i) const {
    return smem + Traits::kStage + piece.stage() * Traits::kStageBytes + i * Traits::kPieceBytes;
  }
  // d += (64 columns of this warpgroup's rows of `tile`) * piece^T
  __device__ __forceinline__ void multiply_across(uint32_t tile, int slice, int i, Sums& d,
                                                  bool started) const {
    gemm_nt<T, kHalf, Traits::kDepth>(
        d, tile + slice * chunk_bytes(kRows) + warpgroup() * chunk_bytes(64), kRows,
        piece_address(i), kHalf, started);
  }
  // d += a * piece
  __device__ __forceinline__ void multiply(const uint32_t (&a)[Traits::kSteps][4], int i, Sums& d,
                                           bool started) const {
    gemm_rn<T, kHalf, Traits::kDepth>(d, a, piece_address(i), Traits::kDepth, started);
  }

  // `count` numbers to kVector, from its number `first` on, 0 around them.
  __device__ __forceinline__ void load_vector(const float* from, int first, int count) const {
    sync_all();  // nobody reads the last any more
    for (int i = threadIdx.x; i < kNormOffset + kHeadDim; i += Traits::kConsumerThreads) {
      const float x = i >= first && i < first + count ? from[i - first] : 0.f;
      ptx::store_shared_4(smem + Traits::kVector + i * 4, __float_as_uint(x));
    }
    sync_all();
  }
  // Two neighbouring numbers from this thread's columns behind `column` on.
  __device__ __forceinline__ float2 vector(int offset, int column) const {
    return ptx::load_shared_float2(smem + Traits::kVector +
                                   (offset + fragment_column(threadIdx.x % 128) + column) * 4);
  }

  // The thread of the warpgroup, once more: what follows from it is not kept, in local memory, from
  // where warpgroup_thread() is used.
  static __device__ __forceinline__ int thread_again() {
    uint32_t lane;
    asm volatile("mov.u32 %0, %laneid;" : "=r"(lane));
    return static_cast<int>(threadIdx.x % 128 / 32 * 32 + lane);
  }

  // Calls use(row 0 or 1, register of the half's accumulator, first column less the thread's, sigma
  // of a pair) for the part of a row tile that `thread`, this one, has.
  template <class Use>
  static __device__ __forceinline__ void for_half(uint32_t tile, int half, int thread, Use&& use) {
    const FragmentAddress<kRows> address(tile, static_cast<int>(threadIdx.x / 128) * 64, thread);
#pragma unroll
    for (int t = 0; t < kHalf / 16; ++t) {
      uint32_t x[4];
      __syncwarp();  // or all loads come first, and there are no registers for them
      ptx::ldmatrix_x4(address(half * (kHalf / 16) + t), x);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        use(i % 2, 8 * t + 2 * i, half * kHalf + 16 * t + i / 2 * 8, elu_plus_one2<T>(x[i]));
      }
    }
  }

  // Rows of d, times `factor`, to columns `half` of `view`.
  static __device__ __forceinline__ void store_half(const TensorView& view, int batch, int row0,
                                                    int head, int rows, int half, int D,
                                                    float factor, const Sums& d) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int row = first_row() + 8 * i;
      T* to = static_cast<T*>(view.data) + batch * view.stride_b +
              int64_t{row0 + row} * view.stride_t + head * view.stride_h;
      write_fragment_row<T, kHalf>(d, i, factor, to, half * kHalf, D, row < rows);
    }
  }
};

// States as the kernels load them: columns, rows, -, state, term.
inline CUtensorMap make_states_map(const void* terms, DType dtype, const InfiniGradStates& x) {
  const int64_t D = x.D, states = int64_t{x.chains()} * x.S;
  return make_map(terms, dtype,
                  {{D, D, 1, states, 2},
                   {D, 0, x.matrix(), states * x.matrix()},
                   {kChunkColumns, 64, 1, 1, 1}});
}

}  // namespace lctx::cuda
