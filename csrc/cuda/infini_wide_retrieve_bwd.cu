// Math: that of infini_retrieve_bwd.cu for a row, above D = 128, and the two numbers that
//       infini_wide_sums_bwd.cu needs of it: a / scale and -a / scale times its slope, P . Y / c or
//       0 where c is clamped.
// Tile map: a tile is (batch, query head, segment, 128 rows); persistent blocks of two warpgroups
// of
//       64 rows each, which have Y of a row as two halves, and a producer warp.
// Pipeline: dO is multiplied with the state in pieces of 64 x 128, high and low terms together,
//       three stages; Q comes meanwhile. The next dO comes while this tile's rows are finished.
// Memory: q and dO once, dq once in the inputs' type, the state once a tile (L2): 256 KB.
// Limits: used by infini_bwd; bf16, fp16; D a multiple of 8 up to 256.
#include "../common/epilogue.cuh"
#include "infini_wide.cuh"

namespace lctx::cuda {
namespace {

struct RetrieveParams {
  CUtensorMap q, dout, M;
  InfiniGradStates states;
  TensorView dq;
  float2* weights;
  int blocks, num_tiles;  // of a segment; all
};

struct RowTile {
  int head, batch, segment, row0, rows;  // query head; rows: none behind a shorter last segment

  __device__ __forceinline__ RowTile(const RetrieveParams& p, int index) {
    const InfiniGradStates& x = p.states;
    const int first = index % p.blocks * kGradRows;
    index /= p.blocks;
    head = index % x.Hq;
    index /= x.Hq;
    segment = index % x.S;
    batch = index / x.S;
    row0 = segment * x.segment_len + first;
    rows = min(kGradRows, x.segment_rows(segment) - first);
  }
};

template <class T>
struct RetrieveKernel : WideKernel<WideTraits<T, 2>> {
  using Base = WideKernel<WideTraits<T, 2>>;
  using Base::kHeadDim, Base::kHalf, Base::smem, Base::pipe, Base::rows, Base::piece;
  using typename Base::Sums, typename Base::Traits;

  const RetrieveParams& p;
  const InfiniGradStates& x;

  __device__ __forceinline__ RetrieveKernel(const RetrieveParams& params, char* base)
      : Base(base), p(params), x(params.states) {}

  __device__ __forceinline__ int state_of(const RowTile& tile) const {
    return (tile.batch * x.Hkv + tile.head / x.group()) * x.S + tile.segment;
  }

  __device__ __forceinline__ void produce() {
#pragma unroll 1
    for (int index = blockIdx.x; index < p.num_tiles; index += gridDim.x) {
      const RowTile tile(p, index);
      if (tile.rows <= 0 || x.empty(tile.segment)) continue;
      Base::load_rows(p.dout, smem + Traits::kSecond, pipe.second.acquire(rows, Traits::kTileBytes),
                      tile.row0, tile.head, tile.batch);
#pragma unroll 1
      for (int i = 0; i < 2 * Traits::kSlices; ++i) {
        if (i == Traits::kStages) {
          const uint32_t full = pipe.first.acquire(rows, Traits::kTileBytes);
          Base::load_rows(p.q, smem + Traits::kFirst, full, tile.row0, tile.head, tile.batch);
        }
        const uint32_t full = pipe.pieces.acquire(piece, Traits::kStageBytes);
#pragma unroll
        for (int term = 0; term < 2; ++term) {
          Base::template load_piece<true>(p.M, Base::piece_address(term), full, state_of(tile),
                                          term, i / Traits::kSlices, i % Traits::kSlices);
        }
        piece.advance();
      }
      rows.advance();
    }
  }

  // What a thread's two rows need.
  struct Row {
    float weight;     // a / scale, 0 behind the end
    float retrieved;  // P . Y / c
    float slope;      // what z is multiplied by: 0 where c is clamped
  };

  __device__ __forceinline__ void finish_rows(const RowTile& tile, const float (&norm)[2],
                                              const float (&dot)[2], Row (&found)[2]) const {
    const float logit = x.gate != nullptr ? x.gate[tile.head] : 0.f;
    const float gate = __fdividef(1.f, 1.f + __expf(-logit));
    const float least = ptx::load_shared_float2(smem + Traits::kVector).x * kMemoryEps;
    const int64_t head = int64_t{tile.batch} * x.Hq + tile.head;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int row = Base::first_row() + 8 * i;
      const float z = quad_sum(norm[i]), sum = quad_sum(dot[i]);
      const float inverse = __fdividef(1.f, fmaxf(z, least));
      Row& r = found[i];
      r.weight = row < tile.rows ? gate * inverse : 0.f;
      r.retrieved = row < tile.rows ? sum * inverse : 0.f;
      r.slope = z >= least ? r.retrieved : 0.f;
      if (threadIdx.x % 4 != 0 || row >= tile.rows) continue;
      const int64_t at = head * x.T + tile.row0 + row;
      x.retrieved[at] = r.retrieved;
      p.weights[at] = make_float2(r.weight, -r.weight * r.slope);
    }
  }

  // Y, scaled as the state is.
  __device__ __forceinline__ void multiply_rows(Sums (&y)[2]) {
    PipelineState<Traits::kStages> last = piece;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int slice = 0; slice < Traits::kSlices; ++slice) {
        pipe.pieces.wait(piece);
        wgmma_fence();
#pragma unroll
        for (int term = 0; term < 2; ++term) {
          Base::multiply_across(smem + Traits::kSecond, slice, term, y[half],
                                slice != 0 || term != 0);
        }
        wgmma_commit();
        if (half + slice > 0) {
          wgmma_wait<1>();
          pipe.pieces.release(last);
        }
        last = piece;
        piece.advance();
      }
    }
    wgmma_wait<0>();
    pipe.pieces.release(last);
  }

  __device__ __forceinline__ void run(int index) {
    Sums y[2];
    pipe.second.wait(rows);
    multiply_rows(y);
    pipe.second.release(rows);
    pipe.first.wait(rows);
    const RowTile tile(p, ptx::opaque(index));  // again: there are no registers for it
    float norm[2] = {0.f, 0.f}, dot[2] = {0.f, 0.f};
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      Base::for_half(smem + Traits::kFirst, half, warpgroup_thread(),
                     [&](int row, int at, int column, const float2& s) {
                       const float2 z = Base::vector(kNormOffset, column);
                       norm[row] += s.x * z.x + s.y * z.y;
                       dot[row] += s.x * y[half][at] + s.y * y[half][at + 1];
                     });
    }
    Row found[2];
    finish_rows(tile, norm, dot, found);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      Base::for_half(smem + Traits::kFirst, half, warpgroup_thread(),
                     [&](int row, int at, int column, const float2& s) {
                       const float2 z = Base::vector(kNormOffset, column);
                       const float weight = found[row].weight, slope = found[row].slope;
                       float &a = y[half][at], &b = y[half][at + 1];
                       a = weight * (a - slope * z.x) * fminf(s.x, 1.f);
                       b = weight * (b - slope * z.y) * fminf(s.y, 1.f);
                     });
    }
    pipe.first.release(rows);
    store(RowTile(p, ptx::opaque(index)), y);
  }

  __device__ __forceinline__ void store(const RowTile& tile, const Sums (&y)[2]) const {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      Base::store_half(p.dq, tile.batch, tile.row0, tile.head, tile.rows, half, x.D, 1.f, y[half]);
    }
  }

  __device__ __forceinline__ void consume() {
    for (int index = blockIdx.x; index < p.num_tiles; index += gridDim.x) {
      const RowTile tile(p, index);
      if (tile.rows <= 0) continue;
      if (x.empty(tile.segment)) {  // no gradient; dM and dz of the segment are not read
        const Sums zero[2] = {};
        store(tile, zero);
        continue;
      }
      Base::load_vector(x.norms + int64_t{state_of(tile)} * (kNormOffset + x.D), 0,
                        kNormOffset + x.D);
      run(index);
      rows.advance();
    }
  }
};

template <class T>
__global__ void __launch_bounds__(WideTraits<T, 2>::kThreads, 1)
    infini_wide_retrieve_bwd_kernel(const __grid_constant__ RetrieveParams p) {
  run_pipelined<RetrieveKernel<T>>(p);
}

template <class T>
void launch(const InfiniParams& params, const InfiniGrads& grads, const InfiniGradStates& states,
            const InfiniWide& wide, const TensorView& dq, int num_sms, Stream stream) {
  const AttnShape& s = params.shape;
  const TensorView& q = params.q_mem.data != nullptr ? params.q_mem : params.q;
  const int64_t blocks = ceil_div(states.segment_len, kGradRows);
  const int64_t tiles = s.B * s.Hq * states.S * blocks;
  LCTX_CHECK(tiles <= INT32_MAX, "lctx::infini_bwd: ", tiles,
             " blocks of rows; expected at most 2^31 - 1");
  const RetrieveParams p{make_rows_map(q, s.dtype, s.B, s.Tq, s.Hq, s.Dk, kGradRows),
                         make_rows_map(grads.dout, s.dtype, s.B, s.Tq, s.Hq, s.Dv, kGradRows),
                         make_states_map(wide.M, s.dtype, states),
                         states,
                         dq,
                         reinterpret_cast<float2*>(wide.weights),
                         static_cast<int>(blocks),
                         static_cast<int>(tiles)};
  launch_memory<WideTraits<T, 2>>(
      "infini_wide_retrieve_bwd_kernel", infini_wide_retrieve_bwd_kernel<T>, p,
      dim3(static_cast<unsigned>(std::min<int64_t>(num_sms, tiles))), stream);
}

}  // namespace

void launch_infini_wide_retrieve_bwd(const InfiniParams& params, const InfiniGrads& grads,
                                     const InfiniGradStates& states, const InfiniWide& wide,
                                     const TensorView& dq, int num_sms, Stream stream) {
  if (params.shape.dtype == DType::kBFloat16) {
    launch<__nv_bfloat16>(params, grads, states, wide, dq, num_sms, stream);
  } else {
    launch<__half>(params, grads, states, wide, dq, num_sms, stream);
  }
}

}  // namespace lctx::cuda
