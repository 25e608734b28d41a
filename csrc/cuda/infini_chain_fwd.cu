// Math: the memory of a chain (batch, key/value head), one segment after the other, linear rule
//       (arXiv 2404.07143, eq. 4): M += sigma(K)^T V, z += sum_n sigma(k_n). sigma is rounded to
//       the inputs' type as an operand, M and z stay fp32.
// Tile map: a block of two (D 64) or four (D 128) warpgroups has a chain at a time; M is spread
//       over their accumulators, 64 x 64 each, and stays there. Needs only a few multiprocessors,
//       while attention runs on the others: it may start when this kernel has (programmatic
//       dependent launch) and waits for the states it reads through a flag a chain.
// Pipeline: stages of 128 rows of K and V; thread 0 issues the loads. sigma is applied in place in
//       shared memory, to the next stage while the product of this one runs.
// Memory: K and V once; per segment M and z once, M also in 16 bits. No scratch.
// Limits: D 64 or 128; 2048 rows of a chain take 32 us: infini_fwd.cu chooses this form where
//       attention takes longer, else the one that is parallel over segments (infini_sums_fwd.cu).
//       infini_bwd does not use it.
#include "../common/tensor_map.h"
#include "infini_kernel.cuh"
#include "infini_keys.cuh"
#include "infini_states.h"

namespace lctx::cuda {
namespace {

template <class T_, int kHeadDim_>
struct ChainTraits {
  using T = T_;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr int kRows = 128;
  static constexpr int kThreads = 4 * kHeadDim;
  using Keys = KeyTile<T, kRows, kHeadDim, kThreads>;
  static constexpr int kTileBytes = tile_bytes(kRows, kHeadDim);
  static constexpr int kStageBytes = 2 * kTileBytes;  // K, V
  static constexpr int kStages = 3;
  static constexpr int kSums = kStages * kStageBytes;
  static constexpr int kZ = kSums + Keys::kRowsAtOnce * kHeadDim * 4;
  static constexpr int kBarriers = kZ + kHeadDim * 4;
  static constexpr int kSharedBytes = kBarriers + kStages * 8 + 1024;
};

struct ChainParams {
  CUtensorMap k, v;
  InfiniStates states;
  bool has_mem;
};

// A block of rows: where the loads are.
struct Cursor {
  int chain, segment = 0, block = 0;

  __device__ __forceinline__ void advance(const InfiniStates& x, int rows_per_block) {
    ++block;
    if (block * rows_per_block < x.segment_rows(segment)) return;
    block = 0;
    if (++segment < x.S) return;
    segment = 0;
    chain += gridDim.x;
  }
};

template <class Traits>
struct ChainKernel {
  using T = typename Traits::T;
  using Keys = typename Traits::Keys;
  static constexpr int kHeadDim = Traits::kHeadDim, kRows = Traits::kRows;
  static constexpr int kTiles = kHeadDim / 64;  // of M, per side

  const ChainParams& p;
  const InfiniStates& x;
  const uint32_t smem;
  float *sums, *z;
  PipelineState<Traits::kStages> state;
  Cursor next_load;  // thread 0
  uint32_t loads = 0;

  __device__ __forceinline__ ChainKernel(const ChainParams& params, char* base)
      : p(params),
        x(params.states),
        smem(ptx::smem_address(base)),
        sums(reinterpret_cast<float*>(base + Traits::kSums)),
        z(reinterpret_cast<float*>(base + Traits::kZ)),
        next_load{static_cast<int>(blockIdx.x)} {}

  __device__ __forceinline__ uint32_t barrier(uint32_t stage) const {
    return smem + Traits::kBarriers + stage * 8;
  }
  __device__ __forceinline__ uint32_t keys(uint32_t stage) const {
    return smem + stage * Traits::kStageBytes;
  }
  __device__ __forceinline__ uint32_t values(uint32_t stage) const {
    return keys(stage) + Traits::kTileBytes;
  }

  // This warpgroup's 64 x 64 tile of M. At D 64 both have the same one.
  static __device__ __forceinline__ int warpgroup() {
    return __shfl_sync(~0u, static_cast<int>(threadIdx.x / 128), 0);
  }
  static __device__ __forceinline__ int tile_row() { return warpgroup() % kTiles; }
  static __device__ __forceinline__ int tile_column() { return warpgroup() / kTiles % kTiles; }

  // Thread 0: loads the next block into the stage that became free.
  __device__ __forceinline__ void load_next() {
    if (threadIdx.x != 0 || next_load.chain >= x.chains()) return;
    const uint32_t stage = loads++ % Traits::kStages;
    const int batch = next_load.chain / x.Hkv, head = next_load.chain % x.Hkv;
    const int row = next_load.segment * x.segment_len + next_load.block * kRows;
    ptx::mbarrier_arrive_expect(barrier(stage), Traits::kStageBytes);
#pragma unroll 1
    for (int c = 0; c < kTiles; ++c) {
      ptx::tma_load_5d(keys(stage) + c * chunk_bytes(kRows), &p.k, barrier(stage),
                       c * kChunkColumns, row, 0, head, batch);
      ptx::tma_load_5d(values(stage) + c * chunk_bytes(kRows), &p.v, barrier(stage),
                       c * kChunkColumns, row, 0, head, batch);
    }
    next_load.advance(x, kRows);
  }

  // Calls use(register, element of a D x D matrix) for this thread's pairs of columns of M.
  template <class Use>
  __device__ __forceinline__ void for_pairs(Use&& use) const {
    if (warpgroup() >= kTiles * kTiles) return;
    const int thread = warpgroup_thread();
    const int row0 = tile_row() * 64 + fragment_row(thread);
    const int column0 = tile_column() * 64 + fragment_column(thread);
#pragma unroll
    for (int j = 0; j < 8; ++j) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int row = row0 + 8 * i, column = column0 + 8 * j;
        if (row < x.D && column < x.D) use(4 * j + 2 * i, row * x.D + column);
      }
    }
  }

  // z of the state after a segment, in shared memory: all threads have it after the next barrier.
  __device__ __forceinline__ void add_sums(float (&columns)[8]) const {
    const float sum = Keys::add_rows(sums, columns, [] { __syncthreads(); });
    if (threadIdx.x < kHeadDim) z[threadIdx.x] += sum;
#pragma unroll
    for (float& column : columns) column = 0.f;
  }

  // The scale of z, the same in every thread.
  __device__ __forceinline__ float scale() const {
    float sum = 0.f;
#pragma unroll
    for (int i = 0; i < kHeadDim / 32; ++i) {
      const int column = threadIdx.x % 32 + 32 * i;
      sum += column < x.D ? fabsf(z[column]) : 0.f;
    }
    return memory_scale(sum_over_lanes(sum, 32) / static_cast<float>(x.D));
  }

  // State `segment`, whose z is in shared memory, and what the retrieval reads of it.
  __device__ __forceinline__ void store_state(int chain, int segment, const float (&M)[32],
                                              float scale) const {
    float* full = x.M(chain, segment);
    uint32_t* half = static_cast<uint32_t*>(x.half) + x.state(chain, segment) * x.matrix() / 2;
    const bool read = segment < x.S;
    for_pairs([&](int i, int at) {
      *reinterpret_cast<float2*>(full + at) = {M[i], M[i + 1]};
      if (read) half[at / 2] = pack2<T>(M[i] * scale, M[i + 1] * scale);
    });
    const int column = threadIdx.x;
    if (column < x.D) {
      x.z(chain, segment)[column] = z[column];
      if (read) x.norm(chain, segment)[kNormOffset + column] = z[column] * scale;
    }
    if (read && column < kNormOffset) x.norm(chain, segment)[column] = scale;
  }

  // Waits for the stage and applies sigma.
  __device__ __forceinline__ void transform(int rows, float (&columns)[8]) const {
    ptx::mbarrier_wait(barrier(state.stage()), state.phase());
    Keys::transform(keys(state.stage()), rows,
                    [&](int, const KeyUnit& key) { key.add_to(columns); });
    if (rows < kRows) Keys::clear_rows(values(state.stage()), rows);
    ptx::fence_async_proxy();
  }

  // M += sigma(K)^T V over a stage.
  __device__ __forceinline__ void multiply(uint32_t stage, float (&M)[32]) const {
    wgmma_fence();
    gemm_tn<T, 64, kRows>(M, keys(stage) + tile_row() * chunk_bytes(kRows), kRows,
                          values(stage) + tile_column() * chunk_bytes(kRows), kRows, true);
    wgmma_commit();
  }

  __device__ __forceinline__ void run_segment(int chain, int segment, float (&M)[32],
                                              float (&columns)[8]) {
    store_state(chain, segment, M, scale());
    const int rows = x.segment_rows(segment);
    transform(rows, columns);
    for (int block = 0; block * kRows < rows; ++block) {
      // The stage is transformed, that of the block before is free, and the state is written.
      __syncthreads();
      if (block == 0 && threadIdx.x == 0) ptx::store_release(x.ready + chain, segment + 1);
      if (state.step > 0) load_next();
      multiply(state.stage(), M);
      state.advance();
      if (const int rest = rows - (block + 1) * kRows; rest > 0) transform(rest, columns);
      wgmma_wait<0>();
    }
    add_sums(columns);
    __syncthreads();
  }

  __device__ __forceinline__ void run() {
    for (int i = 0; i < Traits::kStages; ++i) load_next();
    for (int chain = blockIdx.x; chain < x.chains(); chain += gridDim.x) {
      float M[32] = {}, columns[8] = {};
      if (p.has_mem) {
        for_pairs([&](int i, int at) {
          M[i] = x.M_in[chain * x.matrix() + at];
          M[i + 1] = x.M_in[chain * x.matrix() + at + 1];
        });
      }
      if (threadIdx.x < kHeadDim) {
        const bool given = p.has_mem && threadIdx.x < x.D;
        z[threadIdx.x] = given ? x.z_in[int64_t{chain} * x.D + threadIdx.x] : 0.f;
      }
      __syncthreads();
      for (int segment = 0; segment < x.S; ++segment) run_segment(chain, segment, M, columns);
      store_state(chain, x.S, M, 0.f);
      __syncthreads();
    }
  }
};

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, 1)
    infini_chain_kernel(const __grid_constant__ ChainParams p) {
  ptx::grid_dependents_launch();
  ChainKernel<Traits> kernel(p, aligned_shared());
  if (threadIdx.x == 0) {
    for (int i = 0; i < Traits::kStages; ++i) ptx::mbarrier_init(kernel.barrier(i), 1);
    ptx::fence_mbarrier_init();
  }
  __syncthreads();
  kernel.run();
}

template <class Traits>
void launch(const InfiniParams& params, const InfiniStates& states, int blocks, Stream stream) {
  const AttnShape& s = params.shape;
  const TensorView& k = params.k_mem.data != nullptr ? params.k_mem : params.k;
  const ChainParams p{make_rows_map(k, s.dtype, s.B, s.Tk, s.Hkv, s.Dk, Traits::kRows),
                      make_rows_map(params.v, s.dtype, s.B, s.Tk, s.Hkv, s.Dv, Traits::kRows),
                      states, params.has_mem};
  launch_memory<Traits>("infini_chain_kernel", infini_chain_kernel<Traits>, p, dim3(blocks),
                        stream);
}

template <class T>
void choose(const InfiniParams& params, const InfiniStates& states, int blocks, Stream stream) {
  if (states.D == 64) {
    launch<ChainTraits<T, 64>>(params, states, blocks, stream);
  } else {
    launch<ChainTraits<T, 128>>(params, states, blocks, stream);
  }
}

}  // namespace

void launch_infini_chains(const InfiniParams& params, const InfiniStates& states, int blocks,
                          Stream stream) {
  if (params.shape.dtype == DType::kBFloat16) {
    choose<__nv_bfloat16>(params, states, blocks, stream);
  } else {
    choose<__half>(params, states, blocks, stream);
  }
}

}  // namespace lctx::cuda
