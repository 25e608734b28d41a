// Math: the backward of a segment's update of the memory, R = sigma(k), from the gradient dM, dz of
//       the state that the segment leaves:
//         linear: dv = R dM, dR = V dM^T + dz
//         delta:  e = max(R z, eps), W = R M / e, U = V - W, dU = R dM:
//                 dv = dU, dR = U dM^T - (dU / e) M^T + de z + dz, de = rowsum(dU o W) / e,
//                 and the gradient of z read gets sum_n R de, where e is not clamped;
//         dk = dR o min(R, 1).
//       delta: dz, which takes the sums of later segments, is missing in dk here:
//       infini_local_bwd.cu or infini_scan_bwd.cu adds dz o min(R, 1). These sums, whose terms
//       cancel, are fp32. dM is an operand of two terms, M, R and U are rounded to the inputs'
//       type. dM comes scaled by a power of two that brings its largest element near 1, M and z as
//       in infini_states.h.
// Tile map: a unit is (batch, key/value head, segment, part of its rows); persistent blocks of two
//       warpgroups of 64 rows each, and a producer warp.
// Pipeline: stages of 128 rows of K and V. The warpgroups take turns at the tensor cores. Rows
//       leave through the memory of the keys and values that they belong to.
// Memory: k and v once, dM (and M) once a unit, dk and dv once.
// Limits: used by infini_bwd; bf16, fp16; D a multiple of 8 up to 128.
#include "../common/online_softmax_sm90.cuh"
#include "../common/tensor_map.h"
#include "infini_grads.h"
#include "infini_kernel.cuh"
#include "infini_matrix.cuh"
#include "infini_update.cuh"

namespace lctx::cuda {
namespace {

enum class Update { kLinear, kDelta };

template <class T_, int kHeadDim_, Update kUpdate_>
struct UpdateTraits {
  using T = T_;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr Update kUpdate = kUpdate_;
  static constexpr bool kReadsState = kUpdate == Update::kDelta;
  static constexpr int kRows = kGradRows;
  static constexpr int kConsumerThreads = 256, kThreads = kConsumerThreads + 128;
  static constexpr int kStages = 2;
  static constexpr int kTileBytes = tile_bytes(kRows, kHeadDim);
  static constexpr int kStageBytes = 2 * kTileBytes;  // K, V
  static constexpr int kMatrixBytes = tile_bytes(kHeadDim, kHeadDim);
  static constexpr int kMatrix = kStages * kStageBytes;  // dM: high, low; M
  static constexpr int kState = kMatrix + 2 * kMatrixBytes;
  static constexpr int kNorms = kState + (kReadsState ? kMatrixBytes : 0);
  static constexpr int kDz = kNorms + (kNormOffset + kHeadDim) * 4;
  static constexpr int kExchange = kDz + kHeadDim * 4;
  static constexpr int kBarriers = kExchange + kHeadDim * 4;
  static constexpr int kSharedBytes = kBarriers + Pipeline<kStages>::kBytes + 1024;
};

struct UpdateParams {
  CUtensorMap k, v;
  InfiniGradStates states;
  TensorView dk, dv;
  int num_units;
};

template <class Traits_>
struct UpdateKernel {
  using Traits = Traits_;
  using T = typename Traits::T;
  static constexpr int kHeadDim = Traits::kHeadDim, kRows = Traits::kRows;
  static constexpr int kSteps = kHeadDim / 16, kChunks = kHeadDim / kChunkColumns;
  static constexpr int kTurn = 2;  // barrier of the first warpgroup
  using Fragments = RowFragments<T, kSteps>;
  using Sums = float[kHeadDim / 2];
  using NormSums = float[kHeadDim / 32];  // of columns own_column() of every 32

  const UpdateParams& p;
  const InfiniGradStates& x;
  const uint32_t smem;
  float* const exchange;
  Pipeline<Traits::kStages> pipe;
  PipelineState<Traits::kStages> state;

  __device__ __forceinline__ UpdateKernel(const UpdateParams& params, char* base)
      : p(params),
        x(params.states),
        smem(ptx::smem_address(base)),
        exchange(reinterpret_cast<float*>(base + Traits::kExchange)),
        pipe(smem + Traits::kBarriers) {}

  __device__ __forceinline__ void produce() {
    for (int index = blockIdx.x; index < p.num_units; index += gridDim.x) {
      const UpdateUnit unit(x, index);
      for (int row = 0; row < unit.rows; row += kRows) {
        const uint32_t full = pipe.acquire(state, Traits::kStageBytes);
        const uint32_t k = smem + state.stage() * Traits::kStageBytes;
#pragma unroll
        for (int c = 0; c < kChunks; ++c) {
          ptx::tma_load_5d(k + c * chunk_bytes(kRows), &p.k, full, c * kChunkColumns,
                           unit.row0 + row, 0, unit.head, unit.batch);
          ptx::tma_load_5d(k + Traits::kTileBytes + c * chunk_bytes(kRows), &p.v, full,
                           c * kChunkColumns, unit.row0 + row, 0, unit.head, unit.batch);
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
  // The warpgroups issue their products in turns, so that one has the tensor cores while the other
  // one applies sigma.
  static __device__ __forceinline__ void take_turn() {
    ptx::named_barrier_sync(kTurn + warpgroup(), Traits::kConsumerThreads);
  }
  static __device__ __forceinline__ void pass_turn() {
    ptx::named_barrier_arrive(kTurn + 1 - warpgroup(), Traits::kConsumerThreads);
  }

  // dM, and where it is read the state; the inverse of dM's scale.
  __device__ __forceinline__ float load_state(const UpdateUnit& unit) const {
    const int chain = unit.batch * x.Hkv + unit.head, i = threadIdx.x;
    MatrixUnits<T, kHeadDim, Traits::kConsumerThreads> matrix;
    matrix.load(x.dM_of(0, chain, unit.segment), x.D);
    float most = matrix.largest();
#pragma unroll
    for (int step = 16; step > 0; step /= 2) most = fmaxf(most, __shfl_xor_sync(~0u, most, step));
    sync_all();  // nobody reads the last unit's any more
    if (i % 32 == 0) exchange[i / 32] = most;
    sync_all();
#pragma unroll
    for (int warp = 0; warp < Traits::kConsumerThreads / 32; ++warp) {
      most = fmaxf(most, exchange[warp]);
    }
    const float scale = memory_scale(most), inverse = 1.f / scale;
    matrix.store(scale, smem + Traits::kMatrix, smem + Traits::kMatrix + Traits::kMatrixBytes);
    if constexpr (Traits::kReadsState) {
      const float* norm = x.norm(chain, unit.segment);
      const bool empty = x.empty(unit.segment);
      matrix.load(x.M_states + x.state(0, chain, unit.segment) * x.matrix(), x.D);
      matrix.store(empty ? 0.f : norm[0], smem + Traits::kState, 0);
      if (i < kNormOffset + kHeadDim) {
        ptx::store_shared_4(smem + Traits::kNorms + i * 4,
                            i < kNormOffset + x.D ? __float_as_uint(norm[i]) : 0);
      }
    }
    if (i < kHeadDim && Traits::kUpdate == Update::kLinear) {
      const float dz = i < x.D ? x.dz_of(0, chain, unit.segment)[i] : 0.f;
      ptx::store_shared_4(smem + Traits::kDz + i * 4, __float_as_uint(dz));
    }
    ptx::fence_async_proxy();
    sync_all();
    return inverse;
  }

  __device__ __forceinline__ float2 vector(int offset, int column) const {
    return ptx::load_shared_float2(smem + offset +
                                   (fragment_column(threadIdx.x % 128) + column) * 4);
  }
  __device__ __forceinline__ uint32_t dM_tile(int term) const {
    return smem + Traits::kMatrix + term * Traits::kMatrixBytes;
  }
  __device__ __forceinline__ uint32_t keys() const {
    return smem + state.stage() * Traits::kStageBytes;
  }

  // R of this warpgroup's rows as A operand, and (delta) this thread's share of its products with
  // z.
  __device__ __forceinline__ void read_keys(const FragmentAddress<kRows>& address, Fragments& R,
                                            float (&norm)[2]) const {
    R.load(address);
    norm[0] = norm[1] = 0.f;
    R.for_pairs([&](int row, int, int column, uint32_t& pair, const float2& s) {
      if constexpr (Traits::kReadsState) {
        const float2 z = vector(Traits::kNorms + kNormOffset * 4, column);
        norm[row] += s.x * z.x + s.y * z.y;
      }
      pair = pack2<T>(s.x, s.y);
    });
  }
  // d = R dM
  __device__ __forceinline__ void issue_dv(const Fragments& R, Sums& d) const {
    gemm_rn<T, kHeadDim, kHeadDim>(d, R.x, dM_tile(0), kHeadDim, false);
    gemm_rn<T, kHeadDim, kHeadDim>(d, R.x, dM_tile(1), kHeadDim, true);
  }

  // Rows of d, times `factor`, to where the same rows of a tile were, which nobody reads any more.
  // A warp writes and reads its own rows.
  __device__ __forceinline__ void stage(const FragmentAddress<kRows>& address, const Sums& d,
                                        float factor) const {
#pragma unroll
    for (int t = 0; t < kSteps; ++t) {
      uint32_t words[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        words[i] = pack2<T>(d[8 * t + 2 * i] * factor, d[8 * t + 2 * i + 1] * factor);
      }
      ptx::stmatrix_x4(address(t), words[0], words[1], words[2], words[3]);
    }
    ptx::fence_async_proxy();  // the next keys or values come by the copy engine
    __syncwarp();
  }
  // Whole rows of them to `view`.
  __device__ __forceinline__ void store(const UpdateUnit& unit, int first, uint32_t tile,
                                        const TensorView& view) const {
    constexpr int kUnits = kHeadDim / 8, kRowsAtOnce = 32 / kUnits;
    const int lane = warpgroup_thread() % 32, column = lane % kUnits * 8;
    const int row0 = static_cast<int>(threadIdx.x / 32) * 16 + lane / kUnits;
    const int rows = column < x.D ? unit.rows - first - row0 : 0;
    T* to = static_cast<T*>(view.data) + unit.batch * view.stride_b +
            int64_t{unit.row0 + first + row0} * view.stride_t + unit.head * view.stride_h + column;
    const uint32_t from = tile + swizzled_unit(kRows, row0, column / 8);
#pragma unroll
    for (int i = 0; i < 16; i += kRowsAtOnce) {
      // The swizzle of row row0 + i: lane / kUnits and i have no bit in common.
      const uint4 x = ptx::load_shared_16((from ^ i % 8 * 16) + i * kChunkRowBytes);
      if (i < rows) ptx::store_global_16(to, x);
      to += kRowsAtOnce * view.stride_t;
    }
    __syncwarp();
  }

  // dk from dR, which is scaled, without what dz adds to it (linear: with it). delta: de, scaled
  // too, brings dR's part of z and its own of `norms`.
  __device__ __forceinline__ void finish_keys(const UpdateUnit& unit, int first,
                                              const FragmentAddress<kRows>& address, float inverse,
                                              const float (&de)[2], Sums& d,
                                              NormSums& norms) const {
    Fragments K;
    ColumnTerms terms;
    K.load(address);
    K.for_pairs([&](int row, int at, int column, uint32_t, const float2& s) {
      float2 sum{0.f, 0.f};
      if constexpr (Traits::kReadsState) {
        const float2 z = vector(Traits::kNorms + kNormOffset * 4, column);
        d[at] += de[row] * z.x;
        d[at + 1] += de[row] * z.y;
        terms.add(row, column, s.x * de[row], s.y * de[row],
                  [&](int i, float sum_of_rows) { norms[i] += sum_of_rows; });
      } else {
        sum = vector(Traits::kDz, column);
      }
      d[at] = (d[at] * inverse + sum.x) * fminf(s.x, 1.f);
      d[at + 1] = (d[at + 1] * inverse + sum.y) * fminf(s.y, 1.f);
    });
    stage(address, d, 1.f);
    store(unit, first, keys(), p.dk);
    pipe.release(state);
  }

  __device__ __forceinline__ void run_linear(const UpdateUnit& unit, int first,
                                             const FragmentAddress<kRows>& address, float inverse,
                                             NormSums& norms) const {
    const uint32_t values = keys() + Traits::kTileBytes + warpgroup() * chunk_bytes(64);
    Sums dk, dv;
    Fragments R;
    float norm[2];
    take_turn();
    wgmma_fence();
#pragma unroll
    for (int term = 0; term < 2; ++term) {
      gemm_nt<T, kHeadDim, kHeadDim>(dk, values, kRows, dM_tile(term), kHeadDim, term != 0);
    }
    wgmma_commit();
    read_keys(address, R, norm);
    wgmma_fence();
    issue_dv(R, dv);
    wgmma_commit();
    pass_turn();
    wgmma_wait<0>();
    stage({keys() + Traits::kTileBytes, warpgroup() * 64, warpgroup_thread()}, dv, inverse);
    store(unit, first, keys() + Traits::kTileBytes, p.dv);
    finish_keys(unit, first, address, inverse, {0.f, 0.f}, dk, norms);
  }

  // dU = R dM, W = R M / e and, of this thread's two rows, 1 / e and de.
  __device__ __forceinline__ void run_products(const UpdateUnit& unit,
                                               const FragmentAddress<kRows>& address, Sums& dU,
                                               Sums& W, float (&inverse_norm)[2],
                                               float (&de)[2]) const {
    Fragments R;
    float norm[2];
    read_keys(address, R, norm);
    take_turn();
    wgmma_fence();
    issue_dv(R, dU);
    gemm_rn<T, kHeadDim, kHeadDim>(W, R.x, smem + Traits::kState, kHeadDim, false);
    wgmma_commit();
    pass_turn();
    const float least = ptx::load_shared_float2(smem + Traits::kNorms).x * kMemoryEps;
    const bool empty = x.empty(unit.segment);
    bool clamped[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float e = quad_sum(norm[i]);
      clamped[i] = !(e >= least);
      inverse_norm[i] = empty ? 0.f : 1.f / fmaxf(e, least);
    }
    wgmma_wait<0>();
    float dot[2] = {0.f, 0.f};
#pragma unroll
    for (int i = 0; i < kHeadDim / 2; ++i) {
      W[i] *= inverse_norm[i / 2 % 2];
      dot[i / 2 % 2] += dU[i] * W[i];
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float sum = quad_sum(dot[i]);
      de[i] = clamped[i] ? 0.f : sum * inverse_norm[i];
    }
  }

  __device__ __forceinline__ void run_delta(const UpdateUnit& unit, int first,
                                            const FragmentAddress<kRows>& address, float inverse,
                                            NormSums& norms) const {
    Sums dU, W;
    float inverse_norm[2], de[2];
    run_products(unit, address, dU, W, inverse_norm, de);
    uint32_t U[kSteps][4], dn[kSteps][4];
    const FragmentAddress<kRows> values(keys() + Traits::kTileBytes, warpgroup() * 64,
                                        warpgroup_thread());
#pragma unroll
    for (int t = 0; t < kSteps; ++t) {
      ptx::ldmatrix_x4(values(t), U[t]);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int at = 8 * t + 2 * i;
        const float2 v = unpack2<T>(U[t][i]);
        U[t][i] = pack2<T>(v.x - W[at], v.y - W[at + 1]);
        dn[t][i] = pack2<T>(-dU[at] * inverse_norm[i % 2], -dU[at + 1] * inverse_norm[i % 2]);
      }
    }
    stage(values, dU, inverse);
    take_turn();
    wgmma_fence();
#pragma unroll
    for (int term = 0; term < 2; ++term) {
      gemm_rs<T, kHeadDim, kHeadDim, kMajorK>(W, U, dM_tile(term), kHeadDim, term != 0);
    }
    gemm_rs<T, kHeadDim, kHeadDim, kMajorK>(W, dn, smem + Traits::kState, kHeadDim, true);
    wgmma_commit();
    pass_turn();
    store(unit, first, keys() + Traits::kTileBytes, p.dv);
    wgmma_wait<0>();
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (first + first_row() + 8 * i >= unit.rows) de[i] = 0.f;
    }
    finish_keys(unit, first, address, inverse, de, W, norms);
  }

  // The norms' gradient of z, from all warps; the tiles of dM are not read any more.
  __device__ __forceinline__ void store_norms(const UpdateUnit& unit, float inverse,
                                              const NormSums& norms) const {
    constexpr int kWarps = Traits::kConsumerThreads / 32;
    const uint32_t sums = smem + Traits::kMatrix;
    const int chain = unit.batch * x.Hkv + unit.head, column = threadIdx.x;
    sync_all();
#pragma unroll
    for (int i = 0; i < kHeadDim / 32; ++i) {
      const int at = threadIdx.x / 32 * kHeadDim + 32 * i + ColumnTerms::own_column();
      ptx::store_shared_4(sums + at * 4, __float_as_uint(norms[i]));
    }
    sync_all();
    if (column >= x.D) return;
    float sum = 0.f;
    for (int warp = 0; warp < kWarps; ++warp) {
      sum += __int_as_float(ptx::load_shared_4(sums + (warp * kHeadDim + column) * 4));
    }
    const float scale = ptx::load_shared_float2(smem + Traits::kNorms).x * inverse;
    x.dz_keys[x.state(unit.part, chain, unit.segment) * x.D + column] = sum * scale;
  }

  __device__ __forceinline__ void consume() {
    if (warpgroup() == 1) pass_turn();  // the first one begins
    for (int index = blockIdx.x; index < p.num_units; index += gridDim.x) {
      const UpdateUnit unit(x, index);
      const float inverse = load_state(unit);
      NormSums norms = {};
      for (int first = 0; first < unit.rows; first += kRows) {
        const FragmentAddress<kRows> address(keys(), warpgroup() * 64, warpgroup_thread());
        pipe.wait(state);
        if constexpr (Traits::kUpdate == Update::kLinear) {
          run_linear(unit, first, address, inverse, norms);
        } else {
          run_delta(unit, first, address, inverse, norms);
        }
        state.advance();
      }
      if constexpr (Traits::kUpdate == Update::kDelta) store_norms(unit, inverse, norms);
    }
    if (warpgroup() == 0) take_turn();
  }
};

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, 1)
    infini_update_bwd_kernel(const __grid_constant__ UpdateParams p) {
  run_pipelined<UpdateKernel<Traits>>(p);
}

template <class Traits>
void launch(const InfiniParams& params, const InfiniGradStates& states, const TensorView& dk,
            const TensorView& dv, int num_sms, Stream stream) {
  const AttnShape& s = params.shape;
  const TensorView& k = params.k_mem.data != nullptr ? params.k_mem : params.k;
  const int64_t units = int64_t{states.chains()} * states.S * states.key_splits;
  LCTX_CHECK(units <= INT32_MAX, "lctx::infini_bwd: ", units,
             " parts of segments; expected at most 2^31 - 1");
  const UpdateParams p{make_rows_map(k, s.dtype, s.B, s.Tk, s.Hkv, s.Dk, Traits::kRows),
                       make_rows_map(params.v, s.dtype, s.B, s.Tk, s.Hkv, s.Dv, Traits::kRows),
                       states,
                       dk,
                       dv,
                       static_cast<int>(units)};
  launch_memory<Traits>("infini_update_bwd_kernel", infini_update_bwd_kernel<Traits>, p,
                        dim3(static_cast<unsigned>(std::min<int64_t>(num_sms, units))), stream);
}

template <Update kUpdate>
void choose(const InfiniParams& params, const InfiniGradStates& states, const TensorView& dk,
            const TensorView& dv, int num_sms, Stream stream) {
  const auto with_type = [&](auto zero) {
    using T = decltype(zero);
    if (states.D <= 64) {
      launch<UpdateTraits<T, 64, kUpdate>>(params, states, dk, dv, num_sms, stream);
    } else {
      launch<UpdateTraits<T, 128, kUpdate>>(params, states, dk, dv, num_sms, stream);
    }
  };
  if (params.shape.dtype == DType::kBFloat16) {
    with_type(__nv_bfloat16());
  } else {
    with_type(__half());
  }
}

}  // namespace

void launch_infini_update_bwd(const InfiniParams& params, const InfiniGradStates& states,
                              const TensorView& dk, const TensorView& dv, int num_sms,
                              Stream stream) {
  if (params.update == InfiniUpdate::kDelta) {
    choose<Update::kDelta>(params, states, dk, dv, num_sms, stream);
  } else {
    choose<Update::kLinear>(params, states, dk, dv, num_sms, stream);
  }
}

}  // namespace lctx::cuda
