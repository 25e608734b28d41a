// Math: the backward of one step of a ring: with lse and delta over all keys of the ring, the
//       gradients through this step's pairs are added to dq, dk and dv in fp32. Also delta itself,
//       sum_d dout_d out_d - dlse.
// Tile map: attn_bwd_sm90.cuh with positions of queries and keys that are `query_offset` apart;
//       deterministic: dq by attn_dq_sm90.cuh.
// Pipeline: statistics of the rows into blocks, the main kernel, the sum of dq added to dq. Where
//       steps share these, carry_bwd_step.cu has the main kernel alone.
// Memory: those of its parts; dk and dv are written or added to once, dq is read and written.
// Limits: those of attn_bwd_sm90.cuh.
#include "attn_dq_launch.cuh"
#include "carry_step.cuh"

namespace lctx::cuda {
namespace {

struct StateParams {
  const float *lse, *delta;
  int64_t stride_b, stride_h;
  float *lse2, *block_delta;
  int T, pitch;
  int64_t count;
  FastDivisor per_head;  // query heads
};

// lse and delta of slices, in blocks (dq_sum.cuh).
__global__ void __launch_bounds__(256) carry_rows_kernel(const __grid_constant__ StateParams p) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * 256 + threadIdx.x;
  if (i >= p.count) return;
  const int head = static_cast<int>(i / p.pitch), row = static_cast<int>(i % p.pitch);
  const int b = p.per_head.divide(head), h = p.per_head.modulo(head);
  const bool exists = row < p.T;
  const int64_t at = b * p.stride_b + h * p.stride_h + row;
  const float lse = exists ? p.lse[at] : -INFINITY;
  p.lse2[i] = lse == -INFINITY ? INFINITY : lse * 1.4426950408889634f;
  p.block_delta[i] = exists ? p.delta[at] : 0.f;
}

struct AddDqParams {
  const float* sum;
  TensorView dq;  // fp32
  int T;
  int64_t units;  // of 8 columns
  FastDivisor per_row, per_position, per_batch;
  float scale;
};

template <int kHeadDim>
__global__ void __launch_bounds__(256) add_dq_kernel(const __grid_constant__ AddDqParams p) {
  const int64_t unit = static_cast<int64_t>(blockIdx.x) * 256 + threadIdx.x;
  if (unit >= p.units) return;
  const int64_t row = unit / p.per_row.divisor;
  const int j = static_cast<int>(unit - row * p.per_row.divisor);
  const int bt = p.per_position.divide(static_cast<int>(row));
  const int h = static_cast<int>(row) - bt * p.per_position.divisor;
  const int b = p.per_batch.divide(bt), t = bt - b * p.T;
  const float* from =
      p.sum + dq_sum_columns(j) + dq_sum_place<kHeadDim>(b * p.per_position.divisor + h, p.T, t, 0);
  float* to = static_cast<float*>(p.dq.data) + b * p.dq.stride_b + t * p.dq.stride_t +
              h * p.dq.stride_h + j * 8;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 x = *reinterpret_cast<const float2*>(from + i * 4);
    float2 y = *reinterpret_cast<const float2*>(to + i * 2);
    y.x += x.x * p.scale;
    y.y += x.y * p.scale;
    *reinterpret_cast<float2*>(to + i * 2) = y;
  }
}

// Rows of dQ added to an fp32 tensor.
struct AddRows : StoreRows {
  struct Params {
    TensorView sum;
  };

  template <class Kernel>
  static __device__ __forceinline__ void finish(const Kernel& kernel, int warpgroup,
                                                const Work& work, float (&o)[Kernel::kValueDim / 2],
                                                const float (&factor)[2]) {
    const auto& p = kernel.p;
    const int thread = warpgroup_thread();
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int row = work.row0 + warpgroup * 64 + fragment_row(thread) + 8 * i;
      if (row < work.row_begin || row >= work.row_end) continue;
      float* to = static_cast<float*>(p.sum.data) + work.batch * p.sum.stride_b +
                  kernel.position(work, row) * p.sum.stride_t + work.head * p.sum.stride_h +
                  fragment_column(thread);
#pragma unroll
      for (int j = 0; j < Kernel::kValueDim / 8; ++j) {
        if (8 * j >= p.D) break;
        float2 x = *reinterpret_cast<const float2*>(to + 8 * j);
        x.x += o[4 * j + 2 * i] * factor[i];
        x.y += o[4 * j + 2 * i + 1] * factor[i];
        *reinterpret_cast<float2*>(to + 8 * j) = x;
      }
    }
  }
};

void launch_rows(const CarryParams& params, const CarryGrads& grads, const BwdScratch& scratch,
                 Stream stream) {
  const AttnShape& s = params.shape;
  StateParams p{};
  p.lse = static_cast<const float*>(params.lse);
  p.delta = static_cast<const float*>(grads.delta);
  p.stride_b = params.lse_stride_b;
  p.stride_h = params.lse_stride_h;
  p.lse2 = scratch.lse2;
  p.block_delta = scratch.delta;
  p.T = static_cast<int>(s.Tq);
  p.pitch = static_cast<int>(bwd_pitch(s));
  p.count = s.B * s.Hq * p.pitch;
  p.per_head = FastDivisor(static_cast<int>(s.Hq));
  const dim3 grid(static_cast<unsigned>(ceil_div(p.count, 256)));
  carry_rows_kernel<<<grid, 256, 0, stream>>>(p);
  check_launch("carry_rows_kernel", grid, dim3(256), stream);
}

void add_dq(const CarryParams& params, const CarryGrads& grads, const float* dq_sum,
            Stream stream) {
  const AttnShape& s = params.shape;
  AddDqParams p{};
  p.sum = dq_sum;
  p.dq = grads.dq;
  p.T = static_cast<int>(s.Tq);
  p.per_row = FastDivisor(static_cast<int>(s.Dk / 8));
  p.per_position = FastDivisor(static_cast<int>(s.Hq));
  p.per_batch = FastDivisor(p.T);
  p.units = s.B * s.Tq * s.Hq * (s.Dk / 8);
  p.scale = static_cast<float>(params.scale);
  const dim3 grid(static_cast<unsigned>(ceil_div(p.units, 256)));
  const auto kernel = s.Dk <= 64 ? add_dq_kernel<64> : add_dq_kernel<128>;
  kernel<<<grid, 256, 0, stream>>>(p);
  check_launch("add_dq_kernel", grid, dim3(256), stream);
}

template <class Tile, bool kWindowed>
void launch_queries(const CarryParams& params, const CarryGrads& grads, const BwdScratch& scratch,
                    int num_sms, Stream stream) {
  using Traits =
      FwdTraits<Tile, DenseTiles<Tile::kBlockM>, DenseGrads<Tile::kBlockN, kWindowed>, AddRows>;
  typename Traits::Params p{};
  FlashParams to_dq = params;
  to_dq.out = TensorView{};
  set_flash(to_dq, scratch.counter, p);
  set_dq<Tile>("lctx::flash_carry_bwd", to_dq, {grads.dout, scratch.lse2, scratch.delta}, p);
  p.query_offset = query_offset(params);
  p.sum = grads.dq;
  launch_dq<Traits>(p, num_sms, stream);
}

template <class T>
__global__ void __launch_bounds__(256)
    attn_delta_kernel(TensorView out, TensorView dout, const float* dlse, float* delta,
                      int64_t rows, int T_len, int H, int D) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * 8 + threadIdx.x / 32;
  if (row >= rows) return;
  const int64_t bt = row / H, h = row - bt * H, b = bt / T_len, t = bt - b * T_len;
  const auto row_of = [&](const TensorView& x) {
    return static_cast<const T*>(x.data) + b * x.stride_b + t * x.stride_t + h * x.stride_h;
  };
  float sum = 0.f;
  for (int d = threadIdx.x % 32; d < D; d += 32) {
    sum += static_cast<float>(row_of(out)[d]) * static_cast<float>(row_of(dout)[d]);
  }
  sum = sum_over_lanes(sum, 32);
  if (threadIdx.x % 32 != 0) return;
  const int64_t stat = (b * H + h) * T_len + t;
  delta[stat] = sum - (dlse != nullptr ? dlse[stat] : 0.f);
}

}  // namespace

void launch_flash_carry_bwd(const CarryParams& params, const CarryGrads& grads,
                            const BwdScratch& scratch, int64_t dq_sum_floats, bool fused,
                            int num_sms, Stream stream) {
  const AttnShape& s = params.shape;
  const int64_t blocks = dq_blocks(s.Tq, static_cast<int>(s.Dk));
  zero(scratch.dq_sum, dq_sum_floats * sizeof(float), stream);
  launch_rows(params, grads, scratch, stream);
  if (fused) {
    launch_carry_bwd_step(params, grads, scratch, s.Hq, blocks, num_sms, stream);
    return add_dq(params, grads, scratch.dq_sum, stream);
  }
  zero(scratch.counter, sizeof(int), stream);
  choose_bwd_tile<256>(params, false, [&](auto tile) {
    using Tile = typename decltype(tile)::type;
    if constexpr (!Tile::kFused) {
      const auto launch = params.window > 0 ? launch_step<Tile, true> : launch_step<Tile, false>;
      launch(params, grads, scratch, s.Hq, blocks, num_sms, stream);
    }
  });
  zero(scratch.counter, sizeof(int), stream);
  choose_type_and_dim(params.shape, [&](auto type, auto dim) {
    using Tile = typename DqTiles<typename decltype(type)::type, dim.value>::type;
    const auto launch =
        params.window > 0 ? launch_queries<Tile, true> : launch_queries<Tile, false>;
    launch(params, grads, scratch, num_sms, stream);
  });
}

void launch_attn_delta(const AttnParams& params, const AttnGrads& grads, float* delta,
                       Stream stream) {
  const AttnShape& s = params.shape;
  const int64_t rows = s.B * s.Tq * s.Hq;
  if (rows == 0) return;
  const dim3 grid(static_cast<unsigned>(ceil_div(rows, 8)));
  const auto kernel =
      s.dtype == DType::kBFloat16 ? attn_delta_kernel<__nv_bfloat16> : attn_delta_kernel<__half>;
  kernel<<<grid, 256, 0, stream>>>(params.out, grads.dout, static_cast<const float*>(grads.dlse),
                                   delta, rows, static_cast<int>(s.Tq), static_cast<int>(s.Hq),
                                   static_cast<int>(s.Dv));
  check_launch("attn_delta_kernel", grid, dim3(256), stream);
}

}  // namespace lctx::cuda
