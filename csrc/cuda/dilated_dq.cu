// Math: the gradient of the queries in dilated attention (lctx::dilated_bwd; lctx::dilated_fwd has
//       the forward): the sum over the branches that select a row of what each gives it.
// Tile map: two ways. dilated_dq_kernel: a block to 128 rows of a head, a thread to 8 columns of
//       one of them, which it looks for in the parts that attn_bwd_sm90.cuh summed branch by
//       branch. BranchDq: attn_dq_sm90.cuh with SegmentTiles, a launch a branch, largest rate
//       first; a row goes on from the sum so far.
// Pipeline: those of the kernels. Which branches have been there follows from the position of a
//       row, so that no sum is zeroed before.
// Memory: dilated_dq_kernel: every part once, dq once. BranchDq: as attn_dq_sm90.cuh for every
//       branch, 8 bytes an element of the rows that it selects.
// Limits: bf16, fp16; D a multiple of 8 up to 256 (dilated_dq_kernel: 128); 16 branches.
#include "attn_dq_launch.cuh"
#include "dilated_bwd.h"

namespace lctx::cuda {
namespace {

// Where a branch's part of dq lies in the sum.
struct DqBranch : BranchRows {
  const float* sum;
  int blocks_per_segment, blocks_per_head;
};

struct DqSumParams {
  DqBranch branches[kMaxBranches];
  int num_branches;
  TensorView dq;
  int T, D, Hq;
  FastDivisor per_row, per_tile;  // units of 8 columns; heads
  const int32_t* seqlens;
  float scale;
};

// Rows of a head that a thread block adds up: two rows of a branch that lie eight apart are
// neighbours in its sum (dq_sum.cuh), up to rate 8 both are here.
constexpr int kDqRows = 128;

template <class T, int kHeadDim>
__global__ void __launch_bounds__(256) dilated_dq_kernel(const __grid_constant__ DqSumParams p) {
  // Heads of the same rows side by side, which lie so in dq.
  const int tile = p.per_tile.divide(blockIdx.x), h = p.per_tile.modulo(blockIdx.x);
  const int b = blockIdx.y;
  const int length = p.seqlens == nullptr ? p.T : p.seqlens[b];
  const int units = kDqRows * p.per_row.divisor;
  for (int unit = threadIdx.x; unit < units; unit += 256) {
    const int row = p.per_row.divide(unit), t = tile * kDqRows + row;
    if (t >= p.T) return;
    const int j = unit - row * p.per_row.divisor;  // columns 8 j .. 8 j + 7
    float dq[8] = {};
    for (int m = 0; t < length && m < p.num_branches; ++m) {
      const DqBranch& branch = p.branches[m];
      const int segment = branch.per_segment.divide(t);
      const int at = branch.row_of(t, h, segment);
      if (at < 0) continue;
      constexpr int kRows = dq_block_rows(kHeadDim);
      const int64_t block = static_cast<int64_t>(b * p.Hq + h) * branch.blocks_per_head +
                            segment * branch.blocks_per_segment + at / kRows;
      const int64_t place = kHeadDim == 64 ? tall_block_place(block, at, 0) + j * 128
                                           : dq_block_place<128>(block, at, 0) + dq_sum_columns(j);
      const auto* sum = reinterpret_cast<const float2*>(branch.sum + place);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float2 x = sum[2 * i];
        dq[2 * i] += x.x;
        dq[2 * i + 1] += x.y;
      }
    }
    uint32_t packed[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      packed[i] = pack2<T>(dq[2 * i] * p.scale, dq[2 * i + 1] * p.scale);
    }
    T* to = static_cast<T*>(p.dq.data) + b * p.dq.stride_b + t * p.dq.stride_t + h * p.dq.stride_h +
            8 * j;
    *reinterpret_cast<uint4*>(to) = make_uint4(packed[0], packed[1], packed[2], packed[3]);
  }
}

// Adds rows of dQ to the sum over the branches. kLast: dq is written instead of the sum.
template <bool kLast>
struct BranchDq : StoreRows {
  struct Params {
    float* dq_sum;      // fp32 (B, T, Hq, D)
    BranchSet earlier;  // branches whose part is in it
  };

  template <class Kernel>
  static __device__ __forceinline__ void finish(const Kernel& kernel, int warpgroup,
                                                const Work& work, float (&o)[Kernel::kValueDim / 2],
                                                const float (&factor)[2]) {
    using T = typename Kernel::T;
    const auto& p = kernel.p;
    const int thread = warpgroup_thread();
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int row = work.row0 + warpgroup * 64 + fragment_row(thread) + 8 * i;
      const bool inside = row < work.row_end;
      const int position = kernel.position(work, inside ? row : work.row_begin);
      const bool reads = inside && p.earlier.select(position, work.head, 1);
      float* sum = p.dq_sum + ((work.batch * int64_t{p.Tq} + position) * p.Hq + work.head) * p.D +
                   fragment_column(thread);
      T* dq = static_cast<T*>(p.out_view.data) + work.batch * p.out_view.stride_b +
              position * p.out_view.stride_t + work.head * p.out_view.stride_h +
              fragment_column(thread);
#pragma unroll
      for (int j = 0; j < Kernel::kValueDim / 8; ++j) {
        float2* at = reinterpret_cast<float2*>(sum + 8 * j);
        const bool exists = 8 * j < p.D;
        float2 x = reads && exists ? *at : make_float2(0.f, 0.f);
        x.x += o[4 * j + 2 * i] * factor[i];
        x.y += o[4 * j + 2 * i + 1] * factor[i];
        if (!inside || !exists) continue;
        if constexpr (kLast) {
          *reinterpret_cast<uint32_t*>(dq + 8 * j) = pack2<T>(x.x, x.y);
        } else {
          *at = x;
        }
      }
    }
  }
};

template <class Tile, bool kLast>
void launch_rows(const DilatedSpan& span, size_t m, const float* delta, int num_sms,
                 Stream stream) {
  using Traits = FwdTraits<Tile, SegmentTiles<Tile::kBlockM>, DenseGrads<Tile::kBlockN, false>,
                           BranchDq<kLast>>;
  const AttnShape& s = span.params.shape;
  const int64_t rate = span.branches[m].rate;
  AttnParams to_dq = span.params;
  to_dq.out = span.grads.dq;
  typename Traits::Params p{};
  set_attention(to_dq, span.scratch.counter, p);
  set_maps<Tile>(to_dq, p, rate);
  for (int i = 0; i < (rate == 1 ? 1 : 2); ++i) {
    const int64_t rows = i == 0 ? ceil_div(s.Tq, rate) : s.Tq / rate;
    p.dout[i] = make_rows_map(span.grads.dout, s.dtype, s.B, std::max<int64_t>(rows, 1), s.Hq, s.Dv,
                              64, rate);
  }
  p.lse2 = span.scratch.lse2;
  p.delta = delta;
  p.stat_pitch = span.pitch;
  p.scale = static_cast<float>(span.params.scale);
  set_branch_rows<Tile>("lctx::dilated", span.params, span.branches[m], p);
  p.dq_sum = span.scratch.dq_sum;
  p.earlier = BranchSet(span.params, span.branches, m);
  launch_dq<Traits>(p, num_sms, stream);
}

// Strided rows take more registers: no third warpgroup of consumers for D 64, and at D 128 more for
// the producer.
template <class T, int kHeadDim>
struct BranchDqTile : DqTiles<T, kHeadDim>::type {};
template <class T>
struct BranchDqTile<T, 64> : DqTile<T, 64, 128, 2, 3, false> {};
template <class T>
struct BranchDqTile<T, 128> : DqTile<T, 128, 96, 2, 3, false> {
  static constexpr int kProducerRegisters = 56, kConsumerRegisters = 224;
};

}  // namespace

void launch_branch_dq(const DilatedSpan& span, size_t m, const float* delta, bool last, int num_sms,
                      Stream stream) {
  cudaMemsetAsync(span.scratch.counter, 0, sizeof(int), stream);
  choose_type_and_dim(span.params.shape, [&](auto type, auto dim) {
    using T = typename decltype(type)::type;
    using Tile = BranchDqTile<T, dim.value>;
    const auto run = last ? launch_rows<Tile, true> : launch_rows<Tile, false>;
    run(span, m, delta, num_sms, stream);
  });
}

void launch_add_branches_dq(const DilatedSpan& span, Stream stream) {
  const DilatedParams& params = span.params;
  const AttnShape& s = params.shape;
  const float* dq_sum = span.scratch.dq_sum;
  DqSumParams p{};
  for (const Branch& branch : span.branches) {
    DqBranch& at = p.branches[p.num_branches++];
    static_cast<BranchRows&>(at) = BranchRows(params, branch);
    at.sum = dq_sum;
    at.blocks_per_segment = static_cast<int>(branch_blocks(s, branch));
    at.blocks_per_head = at.blocks_per_segment * static_cast<int>(ceil_div(s.Tq, branch.length));
    dq_sum += branch_floats(s, branch);
  }
  p.dq = span.grads.dq;
  p.T = static_cast<int>(s.Tq);
  p.Hq = static_cast<int>(s.Hq);
  p.per_row = FastDivisor(static_cast<int>(s.Dk / 8));
  p.seqlens = params.seqlens;
  p.scale = static_cast<float>(params.scale);
  const bool small = s.Dk <= 64;
  const auto kernel =
      s.dtype == DType::kBFloat16
          ? (small ? dilated_dq_kernel<__nv_bfloat16, 64> : dilated_dq_kernel<__nv_bfloat16, 128>)
          : (small ? dilated_dq_kernel<__half, 64> : dilated_dq_kernel<__half, 128>);
  p.per_tile = FastDivisor(p.Hq);
  const dim3 grid(static_cast<unsigned>(s.Hq * ceil_div(s.Tq, kDqRows)),
                  static_cast<unsigned>(s.B));
  kernel<<<grid, 256, 0, stream>>>(p);
  check_launch("dilated_dq_kernel", grid, dim3(256), stream);
}

}  // namespace lctx::cuda
