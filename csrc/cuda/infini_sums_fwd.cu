// Math: what a segment adds to the memory (arXiv 2404.07143, eq. 4 and 5), sigma(x) = elu(x) + 1:
//         gain   G = sigma(K)^T V (Dk x Dv), g = sum_n sigma(k_n)
//         decay  T = sigma(K)^T diag(1 / max(sigma(K) z, eps)) sigma(K) (Dk x Dk), for the delta
//                rule, where z is the state the segment reads: M + G - T M is its update.
//       Both are products A^T B over rows; sigma is rounded to the inputs' type as an operand, sums
//       and g stay fp32. The rows of A for the decay are scaled to be near 1, which fp16 needs.
// Tile map: a unit is (batch, key/value head, segment, part of it, tile of up to 128 x 128 of the
//       product); persistent blocks of one or two warpgroups, 64 rows of the tile each, two of them
//       a multiprocessor where they fit. Few units: a segment is cut into parts, which the scan
//       adds in order.
// Pipeline: stages of 64 rows of K (and V), which one thread asks for as they become free. sigma is
//       applied in place in shared memory, to the next stage while the product of this one runs.
// Memory: reads K and V (gain) or K (decay) once (D 256: twice, out of L2), writes D^2 floats a
//       unit: memory's speed. Floor at D 128, segment 2048: 4 N D bytes a head for the gain, 2 N D
//       for the decay.
// Limits: used by infini_fwd; csrc/api/infini.cpp checks.
#include "../common/tensor_map.h"
#include "infini_kernel.cuh"
#include "infini_keys.cuh"
#include "infini_states.h"

namespace lctx::cuda {
namespace {

template <class T_, int kHeadDim_, bool kDecay_>
struct SumTraits {
  using T = T_;
  static constexpr bool kDecay = kDecay_;
  static constexpr int kTile = kHeadDim_ < 128 ? kHeadDim_ : 128;  // of the product, both sides
  static constexpr int kTiles = kHeadDim_ / kTile;                 // per side
  static constexpr int kConsumerThreads = 2 * kTile;
  static constexpr int kRows = 64;
  // A stage holds K and V of the tile; for the decay all of K, of which every norm is made.
  static constexpr int kColumns = kDecay ? kHeadDim_ : kTile;
  static constexpr int kKBytes = tile_bytes(kRows, kColumns);
  static constexpr int kStageBytes = kKBytes + (kDecay ? 0 : tile_bytes(kRows, kTile));
  static constexpr int kScaledBytes = kDecay ? tile_bytes(kRows, kTile) : 0;
  static constexpr int kStages = kDecay && kHeadDim_ >= 128 ? 4 : 6;
  static constexpr int kThreads = kConsumerThreads;
  using Keys = KeyTile<T, kRows, kColumns, kConsumerThreads>;
  static constexpr int kScaled = kStages * kStageBytes;
  static constexpr int kSums = kScaled + 2 * kScaledBytes;
  static constexpr int kBarriers = kSums + (kDecay ? 1 : Keys::kRowsAtOnce) * kColumns * 4 + 16;
  static constexpr int kCursor = kBarriers + Pipeline<kStages>::kBytes;
  static constexpr int kSharedBytes = kCursor + 64 + 1024;
  static constexpr int kBlocks = kSharedBytes <= 113 * 1024 ? 2 : 1;  // of a multiprocessor
};

struct SumParams {
  CUtensorMap k, v;
  InfiniStates states;
  int num_units;
  bool tf32;  // decays are rounded to TF32
};

// One unit of work: a tile of the product over some rows of a segment.
struct Unit {
  int head, batch, part, segment;
  int row0, rows;      // rows may be 0: the last segment may be shorter
  int m_tile, n_tile;  // of the product's rows and columns

  __device__ __forceinline__ Unit(const InfiniStates& x, int tiles, int index) {
    n_tile = index % tiles;
    index /= tiles;
    m_tile = index % tiles;
    index /= tiles;
    head = index % x.Hkv;
    index /= x.Hkv;
    part = index % x.splits;
    index /= x.splits;
    segment = index % x.S;
    batch = index / x.S;
    const int begin = segment * x.segment_len;
    const int length = min(x.segment_len, x.T - begin);
    row0 = begin + part * x.part_rows;
    rows = max(min(x.part_rows, length - part * x.part_rows), 0);
  }
};

template <class Traits_>
struct SumKernel {
  using Traits = Traits_;
  using T = typename Traits::T;
  static constexpr int kRows = Traits::kRows, kTile = Traits::kTile;
  using Keys = typename Traits::Keys;
  using StagePipeline = Pipeline<Traits::kStages>;
  using State = PipelineState<Traits::kStages>;

  // What is loaded next, in shared memory: one thread's.
  struct Cursor {
    int index, block, rows, row0, head, batch, k_column, v_column;
  };

  const SumParams& p;
  const uint32_t smem;
  float* const sums;
  StagePipeline pipe;
  State state;
  Cursor* const cursor;

  __device__ __forceinline__ SumKernel(const SumParams& params, char* base)
      : p(params),
        smem(ptx::smem_address(base)),
        sums(reinterpret_cast<float*>(base + Traits::kSums)),
        pipe(smem + Traits::kBarriers),
        cursor(reinterpret_cast<Cursor*>(base + Traits::kCursor)) {}

  __device__ __forceinline__ void begin_unit(int index) const {
    for (; index < p.num_units; index += gridDim.x) {
      const Unit unit(p.states, Traits::kTiles, index);
      if (unit.rows == 0) continue;
      *cursor = {index,     0,          unit.rows,           unit.row0,
                 unit.head, unit.batch, unit.m_tile * kTile, unit.n_tile * kTile};
      return;
    }
    cursor->index = index;
  }

  // The next stage in the order of the blocks; `into`: free.
  __device__ __forceinline__ void load_next(int into) const {
    const Cursor at = *cursor;
    if (at.index >= p.num_units) return;
    const uint32_t full = pipe.full + into * 8, stage = smem + into * Traits::kStageBytes;
    ptx::mbarrier_arrive_expect(full, Traits::kStageBytes);
    const auto load = [&](const CUtensorMap& map, uint32_t dst, int columns, int column0) {
      for (int c = 0; c < columns; c += kChunkColumns) {
        ptx::tma_load_5d(dst + c / kChunkColumns * chunk_bytes(kRows), &map, full, column0 + c,
                         at.row0 + at.block * kRows, 0, at.head, at.batch);
      }
    };
    load(p.k, stage, Traits::kColumns, Traits::kDecay ? 0 : at.k_column);
    if (!Traits::kDecay) load(p.v, stage + Traits::kKBytes, kTile, at.v_column);
    if ((at.block + 1) * kRows < at.rows) {
      cursor->block = at.block + 1;
    } else {
      begin_unit(at.index + gridDim.x);
    }
  }

  // What runs over all rows of a unit.
  struct Columns {
    float x[8];  // gain: sums of this thread's columns of sigma(K)
  };

  __device__ __forceinline__ Columns begin(const Unit& unit) const {
    Columns columns = {};
    if constexpr (Traits::kDecay) {
      const int chain = unit.batch * p.states.Hkv + unit.head;
      const float* norm = p.states.norm(chain, unit.segment);
      __syncthreads();  // scale * z, and the scale, which brings z near 1
      for (int i = threadIdx.x; i < Traits::kColumns; i += Traits::kThreads) {
        sums[i] = i < p.states.D ? norm[kNormOffset + i] : 0.f;
      }
      if (threadIdx.x == 0) sums[Traits::kColumns] = norm[0];
      __syncthreads();
    }
    return columns;
  }

  // sigma on the K of a stage. For the decay also A, the rows divided by their norms.
  __device__ __forceinline__ void transform(int stage_index, int parity, int m_tile, int rows,
                                            Columns& columns) const {
    const uint32_t stage = smem + stage_index * Traits::kStageBytes;
    if constexpr (Traits::kDecay) {
      const auto store = [&](int row, const KeyUnit& key, float factor) {
        const int unit = Keys::unit() - m_tile * (kTile / 8);
        if (Traits::kTiles == 1 || (unit >= 0 && unit < kTile / 8)) {
          ptx::store_shared_16(scaled_tile(parity) + swizzled_unit(kRows, row, unit),
                               key.template pack<T>(factor));
        }
      };
      float z[8];  // anew every time: there are no registers for it
#pragma unroll
      for (int i = 0; i < 8; i += 4) {
        const uint4 four =
            ptx::load_shared_16(ptx::smem_address(sums) + (Keys::unit() * 8 + i) * 4);
        z[i] = __uint_as_float(four.x);
        z[i + 1] = __uint_as_float(four.y);
        z[i + 2] = __uint_as_float(four.z);
        z[i + 3] = __uint_as_float(four.w);
      }
      Keys::transform(stage, rows, z, kMemoryEps * scale(), store);
    } else {
      Keys::transform(stage, rows, [&](int, const KeyUnit& key) { key.add_to(columns.x); });
    }
    if constexpr (!Traits::kDecay) {
      if (rows < kRows) Keys::clear_rows(stage + Traits::kKBytes, rows);
    }
    ptx::fence_async_proxy();
  }

  __device__ __forceinline__ float scale() const { return sums[Traits::kColumns]; }

  __device__ __forceinline__ uint32_t scaled_tile(int parity) const {
    return smem + Traits::kScaled + parity * Traits::kScaledBytes;
  }

  // acc (64 rows of this warpgroup x kTile) (+)= A^T B over the rows of a stage.
  __device__ __forceinline__ void multiply(int stage_index, int parity, int n_tile, bool accumulate,
                                           float (&acc)[kTile / 2]) const {
    const uint32_t stage = smem + stage_index * Traits::kStageBytes;
    const uint32_t a =
        (Traits::kDecay ? scaled_tile(parity) : stage) + threadIdx.x / 128 * chunk_bytes(kRows);
    const uint32_t b =
        stage + (Traits::kDecay ? n_tile * tile_bytes(kRows, kTile) : Traits::kKBytes);
    wgmma_fence();
    gemm_tn<T, kTile, kRows>(acc, a, kRows, b, kRows, accumulate);
    wgmma_commit();
  }

  __device__ __forceinline__ void store(const Unit& unit, const Columns& columns,
                                        const float (&acc)[kTile / 2]) const {
    const InfiniStates& x = p.states;
    const int chain = unit.batch * x.Hkv + unit.head, thread = threadIdx.x % 128;
    float* matrix = Traits::kDecay ? x.decay_part(unit.part, chain, unit.segment)
                                   : x.gain(unit.part, chain, unit.segment);
    const int column0 = unit.n_tile * kTile + fragment_column(thread);
    const int row0 = unit.m_tile * kTile + threadIdx.x / 128 * 64 + fragment_row(thread);
#pragma unroll
    for (int j = 0; j < kTile / 8; ++j) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int row = row0 + 8 * i;
        if (row >= x.D || column0 + 8 * j >= x.D) continue;
        float2 pair{acc[4 * j + 2 * i], acc[4 * j + 2 * i + 1]};
        if constexpr (Traits::kDecay) {
          pair.x *= scale();
          pair.y *= scale();
          if (p.tf32) {
            pair.x = __uint_as_float(ptx::round_tf32(pair.x));
            pair.y = __uint_as_float(ptx::round_tf32(pair.y));
          }
        }
        *reinterpret_cast<float2*>(matrix + row * x.D + column0 + 8 * j) = pair;
      }
    }
    if constexpr (!Traits::kDecay) store_sums(unit, columns, chain);
  }

  __device__ __forceinline__ void store_sums(const Unit& unit, const Columns& columns,
                                             int chain) const {
    const InfiniStates& x = p.states;
    const auto sync = [] { ptx::named_barrier_sync(1, Traits::kConsumerThreads); };
    const float sum = Keys::add_rows(sums, columns.x, sync);
    const int column = unit.m_tile * kTile + threadIdx.x;
    if (threadIdx.x < Traits::kColumns && column < x.D && unit.n_tile == 0) {
      x.z_part(unit.part, chain, unit.segment)[column] = sum;
    }
    sync();
  }

  __device__ __forceinline__ void run() {
    if (threadIdx.x == 0) {
      pipe.init(1);
      ptx::fence_mbarrier_init();
      begin_unit(blockIdx.x);
      for (int i = 0; i < Traits::kStages; ++i) load_next(i);
    }
    __syncthreads();
    bool started = false;
    for (int index = blockIdx.x; index < p.num_units; index += gridDim.x) {
      const Unit unit(p.states, Traits::kTiles, index);
      Columns columns = begin(unit);
      float acc[kTile / 2];
      if (unit.rows == 0) {
#pragma unroll
        for (float& x : acc) x = 0.f;
        store(unit, columns, acc);
        continue;
      }
      pipe.wait(state);
      transform(state.stage(), 0, unit.m_tile, unit.rows, columns);
      for (int block = 0; block * kRows < unit.rows; ++block) {
        __syncthreads();  // nobody works on the stage before any more
        if (started && threadIdx.x == 0) load_next(State{state.step + Traits::kStages - 1}.stage());
        started = true;
        multiply(state.stage(), block % 2, unit.n_tile, block != 0, acc);
        state.advance();
        if (const int rest = unit.rows - (block + 1) * kRows; rest > 0) {
          pipe.wait(state);
          transform(state.stage(), (block + 1) % 2, unit.m_tile, rest, columns);
        }
        wgmma_wait<0>();
      }
      store(unit, columns, acc);
    }
  }
};

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, Traits::kBlocks)
    infini_sums_kernel(const __grid_constant__ SumParams p) {
  SumKernel<Traits>(p, aligned_shared()).run();
}

template <class Traits>
void launch(const InfiniParams& params, const InfiniStates& states, bool tf32, int num_sms,
            Stream stream) {
  const AttnShape& s = params.shape;
  const TensorView& k = params.k_mem.data != nullptr ? params.k_mem : params.k;
  const int64_t units =
      int64_t{states.chains()} * states.S * states.splits * Traits::kTiles * Traits::kTiles;
  LCTX_CHECK(units <= INT32_MAX, "lctx::infini_fwd: ", units,
             " parts of segments; expected at most 2^31 - 1");
  const SumParams p{make_rows_map(k, s.dtype, s.B, s.Tk, s.Hkv, s.Dk, Traits::kRows),
                    make_rows_map(params.v, s.dtype, s.B, s.Tk, s.Hkv, s.Dv, Traits::kRows), states,
                    static_cast<int>(units), tf32};
  const int64_t blocks = Traits::kBlocks * int64_t{num_sms};
  launch_memory<Traits>("infini_sums_kernel", infini_sums_kernel<Traits>, p,
                        dim3(static_cast<unsigned>(std::min(blocks, units))), stream);
}

template <bool kDecay, class T>
void choose(const InfiniParams& params, const InfiniStates& states, bool tf32, int num_sms,
            Stream stream) {
  if (states.D <= 64) {
    launch<SumTraits<T, 64, kDecay>>(params, states, tf32, num_sms, stream);
  } else if (states.D <= 128) {
    launch<SumTraits<T, 128, kDecay>>(params, states, tf32, num_sms, stream);
  } else {
    launch<SumTraits<T, 256, kDecay>>(params, states, tf32, num_sms, stream);
  }
}

}  // namespace

int infini_splits(const InfiniParams& params, int num_sms) {
  const AttnShape& s = params.shape;
  const int64_t units = s.B * s.Hkv * ceil_div(s.Tq, params.segment_len) * (s.Dk > 128 ? 4 : 1);
  const int64_t blocks = ceil_div(std::min(params.segment_len, s.Tq), 256);
  return static_cast<int>(std::clamp<int64_t>(num_sms / std::max<int64_t>(units, 1), 1, blocks));
}

void launch_infini_gains(const InfiniParams& params, const InfiniStates& states, int num_sms,
                         Stream stream) {
  if (params.shape.dtype == DType::kBFloat16) {
    choose<false, __nv_bfloat16>(params, states, false, num_sms, stream);
  } else {
    choose<false, __half>(params, states, false, num_sms, stream);
  }
}

void launch_infini_decays(const InfiniParams& params, const InfiniStates& states, bool tf32,
                          int num_sms, Stream stream) {
  if (params.shape.dtype == DType::kBFloat16) {
    choose<true, __nv_bfloat16>(params, states, tf32, num_sms, stream);
  } else {
    choose<true, __half>(params, states, tf32, num_sms, stream);
  }
}

}  // namespace lctx::cuda
