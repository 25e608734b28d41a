// Math: the backward of retrieval (math of a row, P = sigma(q), c = max(P z, eps), a = g / c):
//         Y = dO M^T,  A_mem . dO = P . Y / c,
//         dsigma(q) = a (Y - (P . Y / c) z),  dq = dsigma(q) o min(P, 1),
//         dM += (a P)^T dO,  dz -= (a P)^T (P . Y / c);
//       where c is clamped nothing passes through it. z and M come scaled by a power of two
//       (infini_states.h). M is an operand of two terms; a P is rounded to the inputs' type.
// Tile map: a unit is (batch, key/value head, segment, part of its rows of all query heads of the
//       group); persistent blocks of two warpgroups, 64 rows each for Y and, at D 128, 64 rows of
//       the sum dM over the rows of both; at D 64 each its own sum. A producer warp.
// Pipeline: stages of 128 rows of Q and dO. a P takes Q's place in shared memory; dq leaves from
//       registers while its product runs. dz, whose terms cancel, is summed in fp32 by shuffles.
// Memory: q and dO once, M once a unit, dq once: in fp32 as the start of dq_sum (dq_sum.cuh), which
//       then need not be cleared, or in the inputs' type as dq_mem.
// Limits: used by infini_bwd; bf16, fp16; D a multiple of 8 up to 128.
#include "../common/epilogue.cuh"
#include "../common/tensor_map.h"
#include "dq_sum.cuh"
#include "infini_grads.h"
#include "infini_kernel.cuh"
#include "infini_matrix.cuh"

namespace lctx::cuda {
namespace {

template <class T_, int kHeadDim_>
struct RetrieveTraits {
  using T = T_;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr int kRows = kGradRows;
  static constexpr int kConsumerThreads = 256, kThreads = kConsumerThreads + 128;
  static constexpr int kStages = kHeadDim == 128 ? 2 : 3;
  static constexpr int kTileBytes = tile_bytes(kRows, kHeadDim);
  static constexpr int kStageBytes = 2 * kTileBytes;  // Q, dO
  static constexpr int kMatrixBytes = tile_bytes(kHeadDim, kHeadDim);
  static constexpr int kMatrix = kStages * kStageBytes;      // high, low
  static constexpr int kZSums = kMatrix + 2 * kMatrixBytes;  // of every warp
  static constexpr int kNorms = kZSums + kConsumerThreads / 32 * kHeadDim * 4;
  static constexpr int kExchange = kNorms + (kNormOffset + kHeadDim) * 4;
  static constexpr int kExchangeBytes = kHeadDim == 128 ? 0 : 128 * kHeadDim / 2 * 4;
  static constexpr int kBarriers = kExchange + kExchangeBytes;
  static constexpr int kSharedBytes = kBarriers + Pipeline<kStages>::kBytes + 1024;
};

struct RetrieveParams {
  CUtensorMap q, dout;
  InfiniGradStates states;
  TensorView dq;  // of q_mem; data nullptr: to dq_sum
  float* dq_sum;
  float inverse_scale;
  int num_units;
};

struct RetrieveUnit {
  int head, batch, part, segment;  // key/value head

  __device__ __forceinline__ RetrieveUnit(const InfiniGradStates& x, int index) {
    head = index % x.Hkv;
    index /= x.Hkv;
    part = index % x.splits;
    index /= x.splits;
    segment = index % x.S;
    batch = index / x.S;
  }
};

// Rows of one query head: block b of a segment's rows of all heads of the group.
struct RowBlock {
  int head, row0, rows;

  __device__ __forceinline__ RowBlock(const InfiniGradStates& x, const RetrieveUnit& unit, int b) {
    const int length = x.segment_rows(unit.segment),
              per_head = (length + kGradRows - 1) / kGradRows;
    const int in_group = b / per_head, first = (b - in_group * per_head) * kGradRows;
    head = unit.head * x.group() + in_group;
    row0 = unit.segment * x.segment_len + first;
    rows = min(kGradRows, length - first);
  }
};

template <class Traits_>
struct RetrieveKernel {
  using Traits = Traits_;
  using T = typename Traits::T;
  static constexpr int kHeadDim = Traits::kHeadDim, kRows = Traits::kRows;
  static constexpr bool kShared = kHeadDim == 128;  // both warpgroups sum over all rows
  static constexpr int kDepth = kShared ? kRows : 64;
  using Pairs = RowPairs<T, kHeadDim / 16>;

  const RetrieveParams& p;
  const InfiniGradStates& x;
  const uint32_t smem;
  float *const z_sums, *const exchange;
  Pipeline<Traits::kStages> pipe;
  PipelineState<Traits::kStages> state;

  __device__ __forceinline__ RetrieveKernel(const RetrieveParams& params, char* base)
      : p(params),
        x(params.states),
        smem(ptx::smem_address(base)),
        z_sums(reinterpret_cast<float*>(base + Traits::kZSums)),
        exchange(reinterpret_cast<float*>(base + Traits::kExchange)),
        pipe(smem + Traits::kBarriers) {}

  // Blocks of rows of a unit.
  __device__ __forceinline__ int2 blocks(const RetrieveUnit& unit) const {
    const int length = x.segment_rows(unit.segment);
    const int all = (length + kRows - 1) / kRows * x.group();
    return make_int2(min(unit.part * x.part_blocks, all),
                     min((unit.part + 1) * x.part_blocks, all));
  }

  __device__ __forceinline__ void produce() {
    for (int index = blockIdx.x; index < p.num_units; index += gridDim.x) {
      const RetrieveUnit unit(x, index);
      if (x.empty(unit.segment)) continue;
      const int2 range = blocks(unit);
      for (int b = range.x; b < range.y; ++b) {
        const RowBlock block(x, unit, b);
        const uint32_t full = pipe.acquire(state, Traits::kStageBytes);
        const uint32_t q = smem + state.stage() * Traits::kStageBytes;
#pragma unroll
        for (int c = 0; c < kHeadDim / kChunkColumns; ++c) {
          ptx::tma_load_5d(q + c * chunk_bytes(kRows), &p.q, full, c * kChunkColumns, block.row0, 0,
                           block.head, unit.batch);
          ptx::tma_load_5d(q + Traits::kTileBytes + c * chunk_bytes(kRows), &p.dout, full,
                           c * kChunkColumns, block.row0, 0, block.head, unit.batch);
        }
        state.advance();
      }
    }
  }

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

  // scale M, scale z and the scale of the unit's state.
  __device__ __forceinline__ void load_state(const RetrieveUnit& unit) const {
    const int chain = unit.batch * x.Hkv + unit.head;
    const float* norm = x.norm(chain, unit.segment);
    MatrixUnits<T, kHeadDim, Traits::kConsumerThreads> M;
    M.load(x.M_states + x.state(0, chain, unit.segment) * x.matrix(), x.D);
    sync_all();  // nobody reads the last unit's any more
    M.store(norm[0], smem + Traits::kMatrix, smem + Traits::kMatrix + Traits::kMatrixBytes);
    const int i = threadIdx.x;
    if (i < kNormOffset + kHeadDim) {
      ptx::store_shared_4(smem + Traits::kNorms + i * 4,
                          i < kNormOffset + x.D ? __float_as_uint(norm[i]) : 0);
    }
    ptx::fence_async_proxy();
    sync_all();
  }

  // What a thread's two rows need.
  struct Row {
    float weight;     // a / scale, 0 behind the end
    float retrieved;  // P . Y / c
    float slope;      // what z is multiplied by: 0 where c is clamped
  };

  __device__ __forceinline__ uint32_t norm_address(int column) const {
    return smem + Traits::kNorms + (kNormOffset + fragment_column(threadIdx.x % 128) + column) * 4;
  }

  __device__ __forceinline__ void finish_rows(float gate, const float (&norm)[2],
                                              const float (&dot)[2], const RowBlock& block,
                                              Row (&rows)[2]) const {
    const float least = ptx::load_shared_float2(smem + Traits::kNorms).x * kMemoryEps;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int row = first_row() + 8 * i;
      const float z = quad_sum(norm[i]), sum = quad_sum(dot[i]), inverse = 1.f / fmaxf(z, least);
      rows[i].weight = row < block.rows ? gate * inverse : 0.f;
      rows[i].retrieved = row < block.rows ? sum * inverse : 0.f;
      rows[i].slope = z >= least ? rows[i].retrieved : 0.f;
    }
  }

  // dz -= (a P)^T (P . Y / c) of this warp's rows, in shared memory.
  __device__ __forceinline__ void add_z(const Pairs& P, const Row (&rows)[2], bool started) const {
    const float weight[2] = {-rows[0].weight * rows[0].slope, -rows[1].weight * rows[1].slope};
    const uint32_t to =
        smem + Traits::kZSums + (threadIdx.x / 32 * kHeadDim + ColumnTerms::own_column()) * 4;
    ColumnTerms terms;
    P.for_pairs([&](int row, int, int column, const float2& s) {
      terms.add(row, column, s.x * weight[row], s.y * weight[row], [&](int i, float sum) {
        const float before = started ? __int_as_float(ptx::load_shared_4(to + i * 128)) : 0.f;
        ptx::store_shared_4(to + i * 128, __float_as_uint(before + sum));
      });
    });
  }

  // dq, which is in y, to dq_sum or dq_mem.
  __device__ __forceinline__ void store_rows(const RetrieveUnit& unit, const RowBlock& block,
                                             const float (&y)[kHeadDim / 2]) const {
    const int first = warpgroup() * 64, thread = threadIdx.x % 128;
    if (p.dq.data != nullptr) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int row = first + fragment_row(thread) + 8 * i;
        T* to = static_cast<T*>(p.dq.data) + unit.batch * p.dq.stride_b +
                int64_t{block.row0 + row} * p.dq.stride_t + block.head * p.dq.stride_h;
        write_fragment_row<T, kHeadDim>(y, i, 1.f, to, 0, x.D, row < block.rows);
      }
      return;
    }
    const int row0 = block.row0 + first, end = block.row0 + block.rows;
    const int64_t head = int64_t{unit.batch} * x.Hq + block.head;
    const auto place = [&](int row) {
      return p.dq_sum + dq_sum_place<kHeadDim>(head, x.T, row, thread % 4);
    };
    // The last block is written to its end.
    const int padded = dq_blocks(x.T, kHeadDim) * dq_block_rows(kHeadDim);
    if (row0 % 64 == 0 && (row0 + 64 <= end || end == x.T)) {  // as dq_sum has it
      if (row0 >= (end == x.T ? padded : end)) return;
      float* to = place(row0 + fragment_row(thread));
#pragma unroll
      for (int j = 0; j < kHeadDim / 8; ++j) {
        *reinterpret_cast<float4*>(to + dq_sum_columns(j)) =
            make_float4(y[4 * j], y[4 * j + 1], y[4 * j + 2], y[4 * j + 3]);
      }
      return;
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int row = row0 + fragment_row(thread) + 8 * i;
      if (row >= end) continue;
      float* to = place(row);
#pragma unroll
      for (int j = 0; j < kHeadDim / 8; ++j) {
        *reinterpret_cast<float2*>(to + dq_sum_columns(j)) =
            make_float2(y[4 * j + 2 * i], y[4 * j + 2 * i + 1]);
      }
    }
  }

  __device__ __forceinline__ void store_retrieved(const RetrieveUnit& unit, const RowBlock& block,
                                                  const Row (&rows)[2]) const {
    if (threadIdx.x % 4 != 0) return;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int row = first_row() + 8 * i;
      if (row >= block.rows) continue;
      x.retrieved[(int64_t{unit.batch} * x.Hq + block.head) * x.T + block.row0 + row] =
          rows[i].retrieved;
    }
  }

  // One block of rows. sum: this warpgroup's rows of dM, without the state's scale.
  __device__ __forceinline__ void run_block(const RetrieveUnit& unit, const RowBlock& block,
                                            bool started, float (&sum)[kHeadDim / 2]) {
    const uint32_t q = smem + state.stage() * Traits::kStageBytes, dout = q + Traits::kTileBytes;
    const uint32_t own = warpgroup() * chunk_bytes(64);  // rows
    float y[kHeadDim / 2];
    pipe.wait(state);
    wgmma_fence();
#pragma unroll
    for (int term = 0; term < 2; ++term) {
      gemm_nt<T, kHeadDim, kHeadDim>(y, dout + own, kRows,
                                     smem + Traits::kMatrix + term * Traits::kMatrixBytes, kHeadDim,
                                     term != 0);
    }
    wgmma_commit();
    const FragmentAddress<kRows> address(q, warpgroup() * 64, warpgroup_thread());
    const float logit = x.gate != nullptr ? x.gate[block.head] : 0.f;
    const float gate = 1.f / (1.f + __expf(-logit));
    float norm[2] = {0.f, 0.f}, dot[2] = {0.f, 0.f};
    Pairs P;
    P.load(address);
    P.for_pairs([&](int row, int, int column, const float2& s) {
      const float2 z = ptx::load_shared_float2(norm_address(column));
      norm[row] += s.x * z.x + s.y * z.y;
    });
    wgmma_wait<0>();
    P.for_pairs(
        [&](int row, int at, int, const float2& s) { dot[row] += s.x * y[at] + s.y * y[at + 1]; });
    Row rows[2];
    finish_rows(gate, norm, dot, block, rows);
    add_z(P, rows, started);
    const float factor = p.dq.data != nullptr ? 1.f : p.inverse_scale;
    P.for_pairs([&](int row, int at, int column, const float2& s) {
      const float2 z = ptx::load_shared_float2(norm_address(column));
      const float weight = rows[row].weight * factor, slope = rows[row].slope;
      y[at] = weight * (y[at] - slope * z.x) * fminf(s.x, 1.f);
      y[at + 1] = weight * (y[at + 1] - slope * z.y) * fminf(s.y, 1.f);
    });
    P.store(address, rows[0].weight, rows[1].weight);
    if (block.rows < kRows) clear_rows(dout, block.rows);
    ptx::fence_async_proxy();
    if constexpr (kShared) {
      sync_all();
    } else {
      ptx::named_barrier_sync(2 + warpgroup(), 128);
    }
    const uint32_t a = q + (kShared ? warpgroup() * chunk_bytes(kRows) : own);
    wgmma_fence();
    gemm_tn<T, kHeadDim, kDepth>(sum, a, kRows, dout + (kShared ? 0 : own), kRows, started);
    wgmma_commit();
    store_rows(unit, block, y);
    store_retrieved(unit, block, rows);
    wgmma_wait<0>();
    pipe.release(state);
    state.advance();
  }

  // 0 times what stands behind the end could be NaN. Own rows only.
  __device__ __forceinline__ void clear_rows(uint32_t tile, int rows) const {
    constexpr int kUnits = kHeadDim / 8;
    const int first = warpgroup() * 64;
    for (int i = max(rows - first, 0) * kUnits + threadIdx.x % 128; i < 64 * kUnits; i += 128) {
      ptx::store_shared_16(tile + swizzled_unit(kRows, first + i / kUnits, i % kUnits),
                           {0, 0, 0, 0});
    }
  }

  // dM and dz of the unit. At D 64 the warpgroups' sums are added first.
  __device__ __forceinline__ void store_sums(const RetrieveUnit& unit,
                                             float (&sum)[kHeadDim / 2]) const {
    const int chain = unit.batch * x.Hkv + unit.head, thread = threadIdx.x % 128;
    const float scale = ptx::load_shared_float2(smem + Traits::kNorms).x;
    if (!kShared && threadIdx.x >= 128) {
#pragma unroll
      for (int i = 0; i < kHeadDim / 2; ++i) exchange[i * 128 + thread] = sum[i];
    }
    sync_all();
    if (const int column = threadIdx.x; column < x.D) {
      float z = 0.f;
      for (int warp = 0; warp < Traits::kConsumerThreads / 32; ++warp) {
        z += z_sums[warp * kHeadDim + column];
      }
      x.dz_of(unit.part, chain, unit.segment)[column] = z * scale;
    }
    if constexpr (!kShared) {
      if (threadIdx.x >= 128) return;
#pragma unroll
      for (int i = 0; i < kHeadDim / 2; ++i) sum[i] += exchange[i * 128 + thread];
    }
    float* const matrix = x.dM_of(unit.part, chain, unit.segment);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int row = first_row() + 8 * i;
      if (row >= x.D) continue;
#pragma unroll
      for (int j = 0; j < kHeadDim / 8; ++j) {
        const int column = 8 * j + fragment_column(thread);
        if (column >= x.D) continue;
        *reinterpret_cast<float2*>(matrix + row * x.D + column) =
            make_float2(sum[4 * j + 2 * i] * scale, sum[4 * j + 2 * i + 1] * scale);
      }
    }
  }

  // Segment without memory: no gradient. dM and dz of it are not read.
  __device__ __forceinline__ void clear(const RetrieveUnit& unit) const {
    const int2 range = blocks(unit);
    float y[kHeadDim / 2] = {};
    for (int b = range.x; b < range.y; ++b) store_rows(unit, RowBlock(x, unit, b), y);
  }

  __device__ __forceinline__ void consume() {
    for (int index = blockIdx.x; index < p.num_units; index += gridDim.x) {
      const RetrieveUnit unit(x, index);
      if (x.empty(unit.segment)) {
        clear(unit);
        continue;
      }
      load_state(unit);
      const int2 range = blocks(unit);
      float sum[kHeadDim / 2];
      if (range.x == range.y) {
#pragma unroll
        for (float& s : sum) s = 0.f;
        for (int i = threadIdx.x; i < Traits::kConsumerThreads / 32 * kHeadDim;
             i += Traits::kConsumerThreads) {
          z_sums[i] = 0.f;
        }
      }
      for (int b = range.x; b < range.y; ++b) {
        run_block(unit, RowBlock(x, unit, b), b != range.x, sum);
      }
      store_sums(unit, sum);
    }
  }
};

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, 1)
    infini_retrieve_bwd_kernel(const __grid_constant__ RetrieveParams p) {
  run_pipelined<RetrieveKernel<Traits>>(p);
}

template <class Traits>
void launch(const InfiniParams& params, const InfiniGrads& grads, const InfiniGradStates& states,
            float* dq_sum, int num_sms, Stream stream) {
  const AttnShape& s = params.shape;
  const TensorView& q = params.q_mem.data != nullptr ? params.q_mem : params.q;
  const int64_t units = int64_t{states.chains()} * states.S * states.splits;
  LCTX_CHECK(units <= INT32_MAX, "lctx::infini_bwd: ", units,
             " parts of segments; expected at most 2^31 - 1");
  const RetrieveParams p{make_rows_map(q, s.dtype, s.B, s.Tq, s.Hq, s.Dk, Traits::kRows),
                         make_rows_map(grads.dout, s.dtype, s.B, s.Tq, s.Hq, s.Dv, Traits::kRows),
                         states,
                         grads.dq_mem,
                         dq_sum,
                         static_cast<float>(1 / params.scale),
                         static_cast<int>(units)};
  launch_memory<Traits>("infini_retrieve_bwd_kernel", infini_retrieve_bwd_kernel<Traits>, p,
                        dim3(static_cast<unsigned>(std::min<int64_t>(num_sms, units))), stream);
}

template <class T>
void choose(const InfiniParams& params, const InfiniGrads& grads, const InfiniGradStates& states,
            float* dq_sum, int num_sms, Stream stream) {
  if (states.D <= 64) {
    launch<RetrieveTraits<T, 64>>(params, grads, states, dq_sum, num_sms, stream);
  } else {
    launch<RetrieveTraits<T, 128>>(params, grads, states, dq_sum, num_sms, stream);
  }
}

}  // namespace

void launch_infini_retrieve_bwd(const InfiniParams& params, const InfiniGrads& grads,
                                const InfiniGradStates& states, float* dq_sum, int num_sms,
                                Stream stream) {
  if (params.shape.dtype == DType::kBFloat16) {
    choose<__nv_bfloat16>(params, grads, states, dq_sum, num_sms, stream);
  } else {
    choose<__half>(params, grads, states, dq_sum, num_sms, stream);
  }
}

}  // namespace lctx::cuda
