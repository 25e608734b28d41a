// Math: what retrieval of a segment adds to the gradients of the state it reads, above D = 128:
//         dM += (a P)^T dO,  dz -= sum (a P . slope), P = sigma(q),
//       with a row's numbers from infini_wide_retrieve_bwd.cu. a P is rounded as an operand, dz is
//       summed in fp32, since its terms cancel.
// Tile map: a unit is (batch, key/value head, segment, part of its rows of all query heads of the
//       group, tile of 128 x 128 of dM); persistent blocks of two warpgroups, 64 rows of the tile
//       each, and a producer warp.
// Pipeline: six stages of 64 rows of Q and dO, 128 columns of each. a P takes Q's place, of the
//       next stage while the product of this one runs; a row's numbers come a stage ahead.
// Memory: q and dO twice (the second time out of L2), D^2 floats a part.
// Limits: used by infini_bwd; bf16, fp16; D a multiple of 8 up to 256.
#include "../common/tensor_map.h"
#include "infini_kernel.cuh"
#include "infini_keys.cuh"
#include "infini_wide.h"

namespace lctx::cuda {
namespace {

template <class T_>
struct SumTraits {
  using T = T_;
  static constexpr int kTile = 128, kRows = 64;
  static constexpr int kConsumerThreads = 256, kThreads = kConsumerThreads + 32;
  static constexpr int kTileBytes = tile_bytes(kRows, kTile);
  static constexpr int kStageBytes = 2 * kTileBytes, kStages = 6;
  using Keys = KeyTile<T, kRows, kTile, kConsumerThreads>;
  static constexpr int kSums = kStages * kStageBytes;
  static constexpr int kBarriers = kSums + Keys::kRowsAtOnce * kTile * 4;
  static constexpr int kSharedBytes = kBarriers + Pipeline<kStages>::kBytes + 1024;
};

struct SumParams {
  CUtensorMap q, dout;
  InfiniGradStates states;
  const float2* weights;
  int num_units;
};

struct Unit {
  int head, batch, part, segment, m_tile, n_tile;  // key/value head
  int begin, end;                                  // blocks of rows

  __device__ __forceinline__ Unit(const InfiniGradStates& x, int index) {
    n_tile = index % 2;
    m_tile = index / 2 % 2;
    index /= 4;
    head = index % x.Hkv;
    index /= x.Hkv;
    part = index % x.splits;
    index /= x.splits;
    segment = index % x.S;
    batch = index / x.S;
    const int all = (x.segment_rows(segment) + kGradRows - 1) / kGradRows * x.group();
    begin = min(part * x.part_blocks, all);
    end = min((part + 1) * x.part_blocks, all);
  }
};

// 64 rows of one query head: half of a block, of which there may be none.
struct Rows {
  int head, row0, rows;

  __device__ __forceinline__ Rows(const InfiniGradStates& x, const Unit& unit, int step) {
    const int length = x.segment_rows(unit.segment), block = step / 2;
    const int per_head = (length + kGradRows - 1) / kGradRows, in_group = block / per_head;
    const int first = (block - in_group * per_head) * kGradRows + step % 2 * 64;
    head = unit.head * x.group() + in_group;
    row0 = unit.segment * x.segment_len + first;
    rows = min(64, length - first);
  }
};

template <class T>
struct SumKernel {
  using Traits = SumTraits<T>;
  using Keys = typename Traits::Keys;
  static constexpr int kRows = Traits::kRows, kTile = Traits::kTile;
  static constexpr int kSteps = kRows / Keys::kRowsAtOnce;  // rows of a thread

  const SumParams& p;
  const InfiniGradStates& x;
  const uint32_t smem;
  float* const sums;
  Pipeline<Traits::kStages> pipe;
  CountedState<Traits::kStages> state;

  __device__ __forceinline__ SumKernel(const SumParams& params, char* base)
      : p(params),
        x(params.states),
        smem(ptx::smem_address(base)),
        sums(reinterpret_cast<float*>(base + Traits::kSums)),
        pipe(smem + Traits::kBarriers) {}

  __device__ __forceinline__ void produce() {
    for (int index = blockIdx.x; index < p.num_units; index += gridDim.x) {
      const Unit unit(x, index);
      if (x.empty(unit.segment)) continue;
      for (int step = 2 * unit.begin; step < 2 * unit.end; ++step) {
        const Rows rows(x, unit, step);
        if (rows.rows <= 0) continue;
        const uint32_t full = pipe.acquire(state, Traits::kStageBytes);
        const uint32_t q = smem + state.stage() * Traits::kStageBytes;
        for (int c = 0; c < kTile / kChunkColumns; ++c) {
          ptx::tma_load_5d(q + c * chunk_bytes(kRows), &p.q, full,
                           unit.m_tile * kTile + c * kChunkColumns, rows.row0, 0, rows.head,
                           unit.batch);
          ptx::tma_load_5d(q + Traits::kTileBytes + c * chunk_bytes(kRows), &p.dout, full,
                           unit.n_tile * kTile + c * kChunkColumns, rows.row0, 0, rows.head,
                           unit.batch);
        }
        state.advance();
      }
    }
  }

  // What a thread's rows of a step are multiplied with.
  struct Weights {
    float2 x[kSteps];
  };
  __device__ __forceinline__ void load(const Unit& unit, int step, Weights& weights) const {
    if (step >= 2 * unit.end) return;
    const Rows rows(x, unit, step);
#pragma unroll
    for (int i = 0; i < kSteps; ++i) {
      const int row = Keys::first_row() + i * Keys::kRowsAtOnce;
      const int64_t at = (int64_t{unit.batch} * x.Hq + rows.head) * x.T + rows.row0 + row;
      weights.x[i] = row < rows.rows ? p.weights[at] : make_float2(0.f, 0.f);
    }
  }

  // a P in place of Q, and its share of dz: eight columns of a thread.
  __device__ __forceinline__ void transform(const Weights& weights, int rows, uint32_t tile,
                                            float (&dz)[8]) const {
    pipe.wait(state);
#pragma unroll
    for (int i = 0; i < kSteps; ++i) {
      const int row = Keys::first_row() + i * Keys::kRowsAtOnce;
      const uint32_t at = tile + swizzled_unit(kRows, row, Keys::unit());
      const uint4 in = ptx::load_shared_16(at);
      const uint32_t words[4] = {in.x, in.y, in.z, in.w};
      KeyUnit query;
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        query.x[j] = elu_plus_one2<T>(words[j]);
        if (row >= rows) query.x[j] = {0.f, 0.f};
        dz[2 * j] += query.x[j].x * weights.x[i].y;
        dz[2 * j + 1] += query.x[j].y * weights.x[i].y;
      }
      ptx::store_shared_16(at, query.template pack<T>(weights.x[i].x));
    }
    if (rows < kRows) Keys::clear_rows(tile + Traits::kTileBytes, rows);
    ptx::fence_async_proxy();
  }

  __device__ __forceinline__ void store(const Unit& unit, const float (&dz)[8],
                                        const float (&acc)[kTile / 2]) const {
    const int chain = unit.batch * x.Hkv + unit.head, thread = threadIdx.x % 128;
    const float scale = x.norm(chain, unit.segment)[0];
    float* matrix = x.dM_of(unit.part, chain, unit.segment);
    const int column0 = unit.n_tile * kTile + fragment_column(thread);
    const int row0 = unit.m_tile * kTile + threadIdx.x / 128 * 64 + fragment_row(thread);
#pragma unroll
    for (int j = 0; j < kTile / 8; ++j) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int row = row0 + 8 * i;
        if (row >= x.D || column0 + 8 * j >= x.D) continue;
        *reinterpret_cast<float2*>(matrix + row * x.D + column0 + 8 * j) =
            make_float2(acc[4 * j + 2 * i] * scale, acc[4 * j + 2 * i + 1] * scale);
      }
    }
    const auto sync = [] { ptx::named_barrier_sync(1, Traits::kConsumerThreads); };
    const float sum = Keys::add_rows(sums, dz, sync);
    const int column = unit.m_tile * kTile + threadIdx.x;
    if (threadIdx.x < kTile && column < x.D && unit.n_tile == 0) {
      x.dz_of(unit.part, chain, unit.segment)[column] = sum * scale;
    }
    sync();
  }

  // acc (64 rows of this warpgroup x kTile) (+)= A^T B over the rows of a stage.
  __device__ __forceinline__ void multiply(uint32_t tile, bool accumulate,
                                           float (&acc)[kTile / 2]) const {
    wgmma_fence();
    gemm_tn<T, kTile, kRows>(acc, tile + threadIdx.x / 128 * chunk_bytes(kRows), kRows,
                             tile + Traits::kTileBytes, kRows, accumulate);
    wgmma_commit();
  }

  // The first step from `step` on that has rows, or the end.
  __device__ __forceinline__ int next_step(const Unit& unit, int step) const {
    while (step < 2 * unit.end && Rows(x, unit, step).rows <= 0) ++step;
    return step;
  }

  __device__ __forceinline__ void consume() {
    for (int index = blockIdx.x; index < p.num_units; index += gridDim.x) {
      const Unit unit(x, index);
      if (x.empty(unit.segment)) continue;  // is not read
      float acc[kTile / 2], dz[8] = {};
      int step = next_step(unit, 2 * unit.begin);
      if (step >= 2 * unit.end) {
#pragma unroll
        for (float& a : acc) a = 0.f;
        store(unit, dz, acc);
        continue;
      }
      const auto tile = [&] { return smem + state.stage() * Traits::kStageBytes; };
      Weights weights, ahead;
      load(unit, step, weights);
      int next = next_step(unit, step + 1);
      load(unit, next, ahead);
      transform(weights, Rows(x, unit, step).rows, tile(), dz);
      for (bool started = false; step < 2 * unit.end; started = true) {
        ptx::named_barrier_sync(1, Traits::kConsumerThreads);
        multiply(tile(), started, acc);
        const auto current = state;
        state.advance();
        step = next;
        if (step < 2 * unit.end) {
          weights = ahead;
          next = next_step(unit, step + 1);
          load(unit, next, ahead);
          transform(weights, Rows(x, unit, step).rows, tile(), dz);
        }
        wgmma_wait<0>();
        pipe.release(current);
      }
      store(unit, dz, acc);
    }
  }
};

template <class T>
__global__ void __launch_bounds__(SumTraits<T>::kThreads)
    infini_wide_sums_bwd_kernel(const __grid_constant__ SumParams p) {
  run_pipelined<SumKernel<T>>(p);
}

template <class T>
void launch(const InfiniParams& params, const InfiniGrads& grads, const InfiniGradStates& states,
            const InfiniWide& wide, int num_sms, Stream stream) {
  using Traits = SumTraits<T>;
  const AttnShape& s = params.shape;
  const TensorView& q = params.q_mem.data != nullptr ? params.q_mem : params.q;
  const int64_t units = int64_t{states.chains()} * states.S * states.splits * 4;
  LCTX_CHECK(units <= INT32_MAX, "lctx::infini_bwd: ", units,
             " parts of segments; expected at most 2^31 - 1");
  const SumParams p{make_rows_map(q, s.dtype, s.B, s.Tq, s.Hq, s.Dk, Traits::kRows),
                    make_rows_map(grads.dout, s.dtype, s.B, s.Tq, s.Hq, s.Dv, Traits::kRows),
                    states, reinterpret_cast<const float2*>(wide.weights), static_cast<int>(units)};
  launch_memory<Traits>("infini_wide_sums_bwd_kernel", infini_wide_sums_bwd_kernel<T>, p,
                        dim3(static_cast<unsigned>(std::min<int64_t>(num_sms, units))), stream);
}

}  // namespace

void launch_infini_wide_sums_bwd(const InfiniParams& params, const InfiniGrads& grads,
                                 const InfiniGradStates& states, const InfiniWide& wide,
                                 int num_sms, Stream stream) {
  if (params.shape.dtype == DType::kBFloat16) {
    launch<__nv_bfloat16>(params, grads, states, wide, num_sms, stream);
  } else {
    launch<__half>(params, grads, states, wide, num_sms, stream);
  }
}

}  // namespace lctx::cuda
