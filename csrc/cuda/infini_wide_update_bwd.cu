// Math: that of infini_update_bwd.cu above D = 128. delta: R is an operand of two terms for dU,
// whose
//       products with W nearly cancel in the gradient of z.
// Tile map: a unit is (batch, key/value head, segment, part of its rows); persistent blocks of two
//       warpgroups of 64 rows each, and a producer warp. A product has half of its 256 columns at a
//       time; states come by in pieces of 64 x 128: dM as high and low term and, for the delta
//       rule, M.
// Pipeline: K and V of 128 rows once, two or three stages of pieces. R goes from shared memory
//       through registers into a product. delta: U takes V's place in shared memory, dU / e waits
//       in registers, so that dR = U dM^T - (dU / e) M^T follows without another pass.
// Memory: k and v once, dk and dv once, dM (and M) twice a block of rows (L2): 512 or 768 KB.
// Limits: used by infini_bwd; bf16, fp16; D a multiple of 8 up to 256.
#include "../common/epilogue.cuh"
#include "infini_update.cuh"
#include "infini_wide.cuh"

namespace lctx::cuda {
namespace {

enum class Update { kLinear, kDelta };

struct UpdateParams {
  CUtensorMap k, v, dM, M;
  InfiniGradStates states;
  const float* dM_inverse;
  TensorView dk, dv;
  int num_units;
};

template <class T, Update kUpdate>
using UpdateTraits = WideTraits<T, kUpdate == Update::kDelta ? 3 : 2>;

template <class T, Update kUpdate>
struct UpdateKernel : WideKernel<UpdateTraits<T, kUpdate>> {
  using Base = WideKernel<UpdateTraits<T, kUpdate>>;
  using Base::kHeadDim, Base::kHalf, Base::kRows;
  using Base::smem, Base::pipe, Base::rows, Base::piece;
  using typename Base::Sums, typename Base::Traits;
  static constexpr bool kDelta = kUpdate == Update::kDelta;
  static constexpr int kSlices = Traits::kSlices, kSteps = Traits::kSteps;
  static constexpr int kKeys = Traits::kFirst, kValues = Traits::kSecond;
  using Packed = uint32_t[kHalf / 16][4];  // a half of a row's columns as operand
  using NormSums = float[kHeadDim / 32];   // of columns own_column() of every 32

  const UpdateParams& p;
  const InfiniGradStates& x;

  __device__ __forceinline__ UpdateKernel(const UpdateParams& params, char* base)
      : Base(base), p(params), x(params.states) {}

  template <bool kAcross>
  __device__ __forceinline__ void load_pieces(int state) {
#pragma unroll 1
    for (int i = 0; i < 2 * kSlices; ++i) {
      const uint32_t full = pipe.pieces.acquire(piece, Traits::kStageBytes);
#pragma unroll 1
      for (int term = 0; term < Traits::kPieces; ++term) {
        Base::template load_piece<kAcross>(term < 2 ? p.dM : p.M, Base::piece_address(term), full,
                                           state, term % 2, i / kSlices, i % kSlices);
      }
      piece.advance();
    }
  }

  __device__ __forceinline__ void produce() {
#pragma unroll 1
    for (int index = blockIdx.x; index < p.num_units; index += gridDim.x) {
      const UpdateUnit unit(x, index);
#pragma unroll 1
      for (int row = 0; row < unit.rows; row += kRows) {
        Base::load_rows(p.k, smem + kKeys, pipe.first.acquire(rows, Traits::kTileBytes),
                        unit.row0 + row, unit.head, unit.batch);
        Base::load_rows(p.v, smem + kValues, pipe.second.acquire(rows, Traits::kTileBytes),
                        unit.row0 + row, unit.head, unit.batch);
        load_pieces<false>(unit.state(x));
        load_pieces<true>(unit.state(x));
        rows.advance();
      }
    }
  }

  // Four 16-deep steps of R of this warpgroup's rows, or what rounding leaves of it.
  template <bool kRest>
  __device__ __forceinline__ void read_keys(int slice, uint32_t (&R)[kSteps][4]) const {
    const int thread = warpgroup_thread();
    const FragmentAddress<kRows> address(smem + kKeys, Base::warpgroup() * 64, thread);
#pragma unroll
    for (int t = 0; t < kSteps; ++t) {
      __syncwarp();  // one after the other: registers are scarce
      ptx::ldmatrix_x4(address(slice * kSteps + t), R[t]);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float2 s = elu_plus_one2<T>(R[t][i]);
        const SplitPair<T> pair(s.x, s.y);
        R[t][i] = kRest ? pair.low : pair.high;
      }
    }
  }
  // Columns `half` of dU = R dM and (delta) W = R M, times their scales.
  __device__ __forceinline__ void multiply_keys(Sums& dU, Sums& W) {
    uint32_t R[kSteps][4];
#pragma unroll
    for (int slice = 0; slice < kSlices; ++slice) {
      read_keys<false>(slice, R);
      pipe.pieces.wait(piece);
      wgmma_fence();
      Base::multiply(R, 0, dU, slice != 0);
      Base::multiply(R, 1, dU, true);
      if constexpr (kDelta) Base::multiply(R, 2, W, slice != 0);
      wgmma_commit();
      wgmma_wait<0>();
      if constexpr (kDelta) {
        read_keys<true>(slice, R);
        wgmma_fence();
        Base::multiply(R, 0, dU, true);
        wgmma_commit();
        wgmma_wait<0>();
      }
      pipe.pieces.release(piece);
      piece.advance();
    }
  }

  // 1 / e of this thread's two rows, scaled as the norms are; less than 0 where e is clamped.
  __device__ __forceinline__ void read_norms(bool empty, float (&inverse)[2]) const {
    float norm[2] = {0.f, 0.f};
#pragma unroll 1
    for (int half = 0; half < 2; ++half) {
      Base::for_half(smem + kKeys, half, warpgroup_thread(),
                     [&](int row, int, int column, const float2& s) {
                       const float2 z = Base::vector(kNormOffset, column);
                       norm[row] += s.x * z.x + s.y * z.y;
                     });
    }
    const float least = ptx::load_shared_float2(smem + Traits::kVector).x * kMemoryEps;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float e = quad_sum(norm[i]);
      inverse[i] = empty ? 0.f : __fdividef(e >= least ? 1.f : -1.f, fmaxf(e, least));
    }
  }

  // V - W to V's place.
  __device__ __forceinline__ void store_difference(int half, const Sums& W) const {
    const FragmentAddress<kRows> address(smem + kValues, Base::warpgroup() * 64,
                                         warpgroup_thread());
#pragma unroll
    for (int t = 0; t < kHalf / 16; ++t) {
      const uint32_t at = address(half * (kHalf / 16) + t);
      uint32_t v[4];
      ptx::ldmatrix_x4(at, v);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float2 pair = unpack2<T>(v[i]);
        v[i] = pack2<T>(pair.x - W[8 * t + 2 * i], pair.y - W[8 * t + 2 * i + 1]);
      }
      __syncwarp();
      ptx::stmatrix_x4(at, v[0], v[1], v[2], v[3]);
    }
  }

  // Columns `half` of dR = V dM^T, or U dM^T + dn M^T.
  __device__ __forceinline__ void multiply_values(const Packed (&dn)[2], Sums& d) {
    PipelineState<Traits::kStages> last = piece;
#pragma unroll
    for (int slice = 0; slice < kSlices; ++slice) {
      pipe.pieces.wait(piece);
      wgmma_fence();
      Base::multiply_across(smem + kValues, slice, 0, d, slice != 0);
      Base::multiply_across(smem + kValues, slice, 1, d, true);
      if constexpr (kDelta) {
#pragma unroll
        for (int t = 0; t < kSteps; ++t) {
          const int at = slice * kSteps + t;
          ptx::Wgmma<T, kHalf>::template rs<kMajorK>(
              d, dn[at / (kHalf / 16)][at % (kHalf / 16)],
              operand_step<kMajorK>(Base::piece_address(2), kHalf, t), true);
        }
      }
      wgmma_commit();
      if (slice > 0) {
        wgmma_wait<1>();
        pipe.pieces.release(last);
      }
      last = piece;
      piece.advance();
    }
    wgmma_wait<0>();
    pipe.pieces.release(last);
  }

  // dk from dR, which is scaled, without what dz adds to it (linear: with it). delta: de, scaled
  // too, brings dR's part of z and its own of `norms`.
  __device__ __forceinline__ void finish_keys(int half, float inverse, const float (&de)[2],
                                              Sums& d, NormSums& norms) const {
    ColumnTerms terms;
    Base::for_half(smem + kKeys, half, Base::thread_again(),
                   [&](int row, int at, int column, const float2& s) {
                     const float2 z = Base::vector(kNormOffset, column);
                     float2 sum{0.f, 0.f};
                     if constexpr (kDelta) {
                       d[at] += de[row] * z.x;
                       d[at + 1] += de[row] * z.y;
                       terms.add(row, column, s.x * de[row], s.y * de[row],
                                 [&](int i, float sum_of_rows) { norms[i] = sum_of_rows; });
                     } else {
                       sum = z;  // dz
                     }
                     d[at] = (d[at] * inverse + sum.x) * fminf(s.x, 1.f);
                     d[at + 1] = (d[at + 1] * inverse + sum.y) * fminf(s.y, 1.f);
                   });
  }

  __device__ __forceinline__ void store(const TensorView& view, const UpdateUnit& unit, int first,
                                        int half, float factor, const Sums& d) const {
    Base::store_half(view, unit.batch, unit.row0 + first, unit.head, unit.rows - first, half, x.D,
                     factor, d);
  }

  __device__ __forceinline__ float inverse_scale(const UpdateUnit& unit) const {
    return p.dM_inverse[unit.state(x)];
  }

  // The norms' gradient of z: adds this block's to the unit's. From all warps, through K's place.
  __device__ __forceinline__ void store_norms(const UpdateUnit& unit, int first,
                                              const NormSums& norms) const {
    const int column = threadIdx.x;
    Base::sync_all();
#pragma unroll
    for (int i = 0; i < kHeadDim / 32; ++i) {
      const int at = threadIdx.x / 32 * kHeadDim + 32 * i + ColumnTerms::own_column();
      ptx::store_shared_4(smem + kKeys + at * 4, __float_as_uint(norms[i]));
    }
    Base::sync_all();
    float sum = 0.f;
    for (int warp = 0; warp < Traits::kConsumerThreads / 32; ++warp) {
      sum += __int_as_float(ptx::load_shared_4(smem + kKeys + (warp * kHeadDim + column) * 4));
    }
    ptx::fence_async_proxy();
    if (column >= x.D) return;
    const float scale = ptx::load_shared_float2(smem + Traits::kVector).x * inverse_scale(unit);
    float& total = norms_of(unit)[column];
    total = (first > 0 ? total : 0.f) + sum * scale;
  }
  __device__ __forceinline__ float* norms_of(const UpdateUnit& unit) const {
    return x.dz_keys + x.state(unit.part, unit.batch * x.Hkv + unit.head, unit.segment) * x.D;
  }

  // A block of rows of the unit.
  __device__ __forceinline__ void run(int first) {
    const auto unit = [&] { return unit_again(); };
    float inverse_norm[2], de[2] = {0.f, 0.f};
    Packed dn[2];
    pipe.first.wait(rows);
    if constexpr (kDelta) read_norms(x.empty(unit().segment), inverse_norm);
    pipe.second.wait(rows);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      Sums dU, W;
      multiply_keys(dU, W);
      if constexpr (kDelta) {
#pragma unroll
        for (int i = 0; i < kHalf / 2; ++i) {
          W[i] *= fabsf(inverse_norm[i / 2 % 2]);
          de[i / 2 % 2] += dU[i] * W[i];
        }
        store_difference(half, W);
        __syncwarp();  // not before: there are no registers for it
      }
      store(p.dv, unit(), first, half, inverse_scale(unit()), dU);
      if constexpr (kDelta) {
#pragma unroll
        for (int i = 0; i < kHalf / 2; ++i) dU[i] *= -fabsf(inverse_norm[i / 2 % 2]);
        accumulator_to_a<T, kHalf>(dU, dn[half]);
      }
    }
    if constexpr (kDelta) {
      const int end = unit().rows;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float sum = quad_sum(de[i]);
        const bool counts = first + Base::first_row() + 8 * i < end;
        de[i] = counts ? sum * fmaxf(inverse_norm[i], 0.f) : 0.f;
      }
      ptx::fence_async_proxy();
      ptx::named_barrier_sync(2 + Base::warpgroup(), 128);
    }
    NormSums norms;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      Sums d;
      multiply_values(dn, d);
      if (half == 1) pipe.second.release(rows);
      finish_keys(half, inverse_scale(unit()), de, d, norms);
      store(p.dk, unit(), first, half, 1.f, d);
    }
    if constexpr (kDelta) store_norms(unit(), first, norms);
    pipe.first.release(rows);
    rows.advance();
  }

  // The unit waits in shared memory: there are no registers for it.
  __device__ __forceinline__ void put_aside(int index, const UpdateUnit& unit) const {
    const uint32_t to = smem + Traits::kAside;
    if (threadIdx.x == 0) {
      ptx::store_shared_int2(to, make_int2(unit.head, unit.batch));
      ptx::store_shared_int2(to + 8, make_int2(unit.part, unit.segment));
      ptx::store_shared_int2(to + 16, make_int2(unit.row0, unit.rows));
      ptx::store_shared_4(to + 24, index);
    }
    Base::sync_all();
  }
  __device__ __forceinline__ UpdateUnit unit_again() const {
    const uint32_t from = smem + Traits::kAside;
    const int2 place = ptx::load_shared_int2(from), which = ptx::load_shared_int2(from + 8);
    const int2 rows_of = ptx::load_shared_int2(from + 16);
    UpdateUnit unit;
    unit.head = place.x, unit.batch = place.y;
    unit.part = which.x, unit.segment = which.y;
    unit.row0 = rows_of.x, unit.rows = rows_of.y;
    return unit;
  }

  // scale z and its scale, or (linear) dz in their place.
  __device__ __forceinline__ void load_vectors(const UpdateUnit& unit) const {
    const int64_t state = unit.state(x);
    if constexpr (kDelta) {
      Base::load_vector(x.norms + state * (kNormOffset + x.D), 0, kNormOffset + x.D);
    } else {
      Base::load_vector(x.dz + state * x.D, kNormOffset, x.D);
    }
  }

  __device__ __forceinline__ void consume() {
    int index = blockIdx.x;
    while (index < p.num_units) {
      const UpdateUnit unit(x, index);
      load_vectors(unit);
      put_aside(index, unit);
      if (kDelta && unit.rows == 0 && threadIdx.x < x.D) norms_of(unit)[threadIdx.x] = 0.f;
      for (int first = 0; first < unit_again().rows; first += kRows) run(first);
      index = ptx::load_shared_4(smem + Traits::kAside + 24) + gridDim.x;
    }
  }
};

template <class T, Update kUpdate>
__global__ void __launch_bounds__(UpdateTraits<T, kUpdate>::kThreads, 1)
    infini_wide_update_bwd_kernel(const __grid_constant__ UpdateParams p) {
  run_pipelined<UpdateKernel<T, kUpdate>>(p);
}

template <class T, Update kUpdate>
void launch(const InfiniParams& params, const InfiniGradStates& states, const InfiniWide& wide,
            const TensorView& dk, const TensorView& dv, int num_sms, Stream stream) {
  const AttnShape& s = params.shape;
  const TensorView& k = params.k_mem.data != nullptr ? params.k_mem : params.k;
  const int64_t units = int64_t{states.chains()} * states.S * states.key_splits;
  LCTX_CHECK(units <= INT32_MAX, "lctx::infini_bwd: ", units,
             " parts of segments; expected at most 2^31 - 1");
  const UpdateParams p{make_rows_map(k, s.dtype, s.B, s.Tk, s.Hkv, s.Dk, kGradRows),
                       make_rows_map(params.v, s.dtype, s.B, s.Tk, s.Hkv, s.Dv, kGradRows),
                       make_states_map(wide.dM, s.dtype, states),
                       make_states_map(wide.M, s.dtype, states),
                       states,
                       wide.dM_inverse,
                       dk,
                       dv,
                       static_cast<int>(units)};
  launch_memory<UpdateTraits<T, kUpdate>>(
      "infini_wide_update_bwd_kernel", infini_wide_update_bwd_kernel<T, kUpdate>, p,
      dim3(static_cast<unsigned>(std::min<int64_t>(num_sms, units))), stream);
}

template <class T>
void choose(const InfiniParams& params, const InfiniGradStates& states, const InfiniWide& wide,
            const TensorView& dk, const TensorView& dv, int num_sms, Stream stream) {
  if (params.update == InfiniUpdate::kDelta) {
    launch<T, Update::kDelta>(params, states, wide, dk, dv, num_sms, stream);
  } else {
    launch<T, Update::kLinear>(params, states, wide, dk, dv, num_sms, stream);
  }
}

}  // namespace

void launch_infini_wide_update_bwd(const InfiniParams& params, const InfiniGradStates& states,
                                   const InfiniWide& wide, const TensorView& dk,
                                   const TensorView& dv, int num_sms, Stream stream) {
  if (params.shape.dtype == DType::kBFloat16) {
    choose<__nv_bfloat16>(params, states, wide, dk, dv, num_sms, stream);
  } else {
    choose<__half>(params, states, wide, dk, dv, num_sms, stream);
  }
}

}  // namespace lctx::cuda
