// Math: dilated attention, backward: with lse and delta of the union of the branches, every branch
//       adds what flash_bwd.cu computes over its own pairs (arXiv 2307.02486, section 2.3).
// Tile map: attn_bwd_sm90.cuh with SegmentKeys, one launch a branch. Tensors are seen with stride
//       r: no gather, no scatter.
// Pipeline: largest rate first; dk and dv are summed in fp32, and the last branch writes them if
//       its rate is 1. dq of each branch is summed apart, since rows of different branches lie
//       apart, and dilated_dq_kernel adds up the branches that select a row.
// Memory: fp32 dk and dv (B, T, Hkv, D); fp32 dq of the rows that each branch selects; their
//       statistics, gathered into blocks; as flash_bwd.cu for each branch.
// Limits: those of attn_bwd_sm90.cuh; any w, r, T.
#include "attn_bwd_launch.cuh"
#include "dilated_branches.h"

namespace lctx::cuda {
namespace {

constexpr int kMaxBranches = 16;  // that one pass adds up

// Where a branch's part of dq lies in the sum.
struct DqBranch {
  const float* sum;
  int segment_len, rate, blocks_per_segment, blocks_per_head;
  FastDivisor per_segment, per_rate;  // segment_len, rate
  FastDivisor per_offset;             // rate, or ceil(Hq / rate)
};

struct DqParams {
  DqBranch branches[kMaxBranches];
  int num_branches;
  TensorView dq;
  int T, D, Hq;
  int64_t units;             // of 8 columns of (batch, position, head)
  FastDivisor per_row;       // units of a row
  FastDivisor per_position;  // heads
  FastDivisor per_batch;     // positions
  bool offset_block;
  const int32_t* seqlens;
  float scale;
};

int64_t branch_blocks(const Branch& branch, int head_dim) {
  return dq_blocks(ceil_div(branch.length, branch.rate), head_dim);
}

// Columns 8 j .. 8 j + 7 of a row: dq_sum.cuh has the order.
template <class T, int kHeadDim>
__global__ void __launch_bounds__(256) dilated_dq_kernel(const __grid_constant__ DqParams p) {
  const int64_t unit = static_cast<int64_t>(blockIdx.x) * 256 + threadIdx.x;
  if (unit >= p.units) return;
  const int64_t row = unit / p.per_row.divisor;
  const int column = static_cast<int>(unit - row * p.per_row.divisor) * 8;
  const int bt = p.per_position.divide(static_cast<int>(row));
  const int h = static_cast<int>(row) - bt * p.per_position.divisor;
  const int b = p.per_batch.divide(bt), t = bt - b * p.T;
  float dq[8] = {};
  const bool exists = p.seqlens == nullptr || t < p.seqlens[b];
  for (int m = 0; exists && m < p.num_branches; ++m) {
    const DqBranch& branch = p.branches[m];
    const int offset = p.offset_block ? branch.per_offset.divide(h) : branch.per_offset.modulo(h);
    const int segment = branch.per_segment.divide(t);
    const int from = t - segment * branch.segment_len - offset;
    if (from < 0) continue;
    const int at = branch.per_rate.divide(from);
    if (at * branch.rate != from) continue;
    constexpr int kRows = dq_block_rows(kHeadDim);
    const int64_t block = static_cast<int64_t>(b * p.Hq + h) * branch.blocks_per_head +
                          segment * branch.blocks_per_segment + at / kRows;
    const auto* sum = reinterpret_cast<const float2*>(
        branch.sum + dq_block_place<kHeadDim>(block, at, 0) + dq_sum_columns(column / 8));
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
  T* to = static_cast<T*>(p.dq.data) + b * p.dq.stride_b + t * p.dq.stride_t + h * p.dq.stride_h;
  *reinterpret_cast<uint4*>(to + column) = make_uint4(packed[0], packed[1], packed[2], packed[3]);
}

// lse2 and delta of the rows that a branch selects, in the blocks of its dQ.
struct StatisticsParams {
  const float *lse2, *delta;  // of all rows
  float *branch_lse2, *branch_delta;
  int T, pitch, segment_len, rate;
  int64_t count;
  FastDivisor per_head, per_segment;  // rows of a head, of a segment
  FastDivisor per_batch, per_offset;  // query heads; rate, or ceil(Hq / rate)
  bool offset_block;
  const int32_t* seqlens;
};

__global__ void __launch_bounds__(256)
    branch_statistics_kernel(const __grid_constant__ StatisticsParams p) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * 256 + threadIdx.x;
  if (i >= p.count) return;
  const int head = static_cast<int>(i / p.per_head.divisor);  // batch * Hq + head
  const int row = static_cast<int>(i - int64_t{head} * p.per_head.divisor);
  const int segment = p.per_segment.divide(row), j = p.per_segment.modulo(row);
  const int batch = p.per_batch.divide(head), h = p.per_batch.modulo(head);
  const int offset = p.offset_block ? p.per_offset.divide(h) : p.per_offset.modulo(h);
  const int64_t in_segment = offset + int64_t{j} * p.rate;
  const int64_t position = int64_t{segment} * p.segment_len + in_segment;
  const int length = p.seqlens != nullptr ? min(p.seqlens[batch], p.T) : p.T;
  const bool exists = in_segment < p.segment_len && position < length;
  p.branch_lse2[i] = exists ? p.lse2[int64_t{head} * p.pitch + position] : INFINITY;
  p.branch_delta[i] = exists ? p.delta[int64_t{head} * p.pitch + position] : 0.f;
}

// Rows of a branch, padding too.
int64_t branch_rows(const AttnShape& s, const Branch& branch) {
  const int head_dim = s.Dk <= 64 ? 64 : 128;
  return s.B * s.Hq * ceil_div(s.Tq, branch.length) * branch_blocks(branch, head_dim) *
         dq_block_rows(head_dim);
}

// Points `scratch` at the statistics of a branch, which it makes in `to`.
void launch_statistics(const DilatedParams& params, const Branch& branch, float* to,
                       BwdScratch& scratch, Stream stream) {
  const AttnShape& s = params.shape;
  const int head_dim = s.Dk <= 64 ? 64 : 128;
  StatisticsParams p{};
  p.count = branch_rows(s, branch);
  p.lse2 = scratch.lse2;
  p.delta = scratch.delta;
  p.branch_lse2 = to;
  p.branch_delta = to + p.count;
  p.T = static_cast<int>(s.Tq);
  p.pitch = static_cast<int>(bwd_pitch(s));
  p.segment_len = static_cast<int>(branch.length);
  p.rate = static_cast<int>(branch.rate);
  p.per_segment =
      FastDivisor(static_cast<int>(branch_blocks(branch, head_dim)) * dq_block_rows(head_dim));
  p.per_head = FastDivisor(static_cast<int>(p.count / (s.B * s.Hq)));
  p.per_batch = FastDivisor(static_cast<int>(s.Hq));
  p.offset_block = params.head_offset_block;
  p.per_offset =
      FastDivisor(static_cast<int>(p.offset_block ? ceil_div(s.Hq, branch.rate) : branch.rate));
  p.seqlens = params.seqlens;
  const dim3 grid(static_cast<unsigned>(ceil_div(p.count, 256)));
  branch_statistics_kernel<<<grid, 256, 0, stream>>>(p);
  check_launch("branch_statistics_kernel", grid, dim3(256), stream);
  scratch.lse2 = p.branch_lse2;
  scratch.delta = p.branch_delta;
}

template <class Tile>
void launch_branch(const DilatedParams& params, const AttnGrads& grads, const BwdScratch& scratch,
                   const Branch& branch, float* dq_sum, const TensorView& dk_sum,
                   const TensorView& dv_sum, bool last, int num_sms, Stream stream) {
  using Traits = BwdTraits<Tile, SegmentKeys<Tile::kBlockN>, AddKeys, false>;
  const AttnShape& s = params.shape;
  typename Traits::Params p{};
  set_attention_bwd<Tile>(params, grads, scratch, p, branch.rate);
  p.dq_sum = dq_sum;
  const int64_t segments = ceil_div(s.Tq, branch.length);
  const int64_t rows = ceil_div(branch.length, branch.rate), group = s.Hq / s.Hkv;
  const int64_t sharing = ceil_div(s.Hq, branch.rate);  // heads of one offset, in blocks
  const int64_t slots =
      params.head_offset_block ? (group + sharing - 2) / sharing + 1 : std::min(group, branch.rate);
  p.head_step =
      params.head_offset_block ? 1 : static_cast<int>(std::min<int64_t>(branch.rate, s.Hq));
  p.blocks_per_segment = static_cast<int>(branch_blocks(branch, Tile::kHeadDim));
  p.blocks_per_head = static_cast<int>(segments) * p.blocks_per_segment;
  p.segment_len = static_cast<int>(branch.length);
  p.rate = static_cast<int>(branch.rate);
  p.long_phases = branch.rate == 1 ? 1 : static_cast<int>(s.Tq % branch.rate);
  p.offset_block = params.head_offset_block;
  p.heads_per_offset = static_cast<int>(sharing);
  p.per_segment = FastDivisor(static_cast<int>(s.Hkv * slots));
  p.per_slot = FastDivisor(static_cast<int>(slots));
  p.per_phase = FastDivisor(p.rate);
  p.per_offset = FastDivisor(p.heads_per_offset);
  p.seqlens = params.seqlens;
  p.dk_sum = dk_sum;
  p.dv_sum = dv_sum;
  p.last = last;
  p.order = KeyOrder(make_order("lctx::dilated_bwd", ceil_div(rows, Tile::kBlockN),
                                s.Hkv * slots * segments, s.B, bwd_section(s, rows)));
  launch_bwd<Traits>(p, num_sms, stream);
}

int64_t branch_floats(const AttnShape& s, const Branch& branch) {
  return s.B * s.Hq * ceil_div(s.Tq, branch.length) * branch_blocks(branch, s.Dk <= 64 ? 64 : 128) *
         2 * kDqPartFloats;
}

// Where each row's parts of dq are found.
DqParams dq_params(const DilatedParams& params, const AttnGrads& grads,
                   const std::vector<Branch>& branches, const float* dq_sum) {
  const AttnShape& s = params.shape;
  DqParams p{};
  for (const Branch& branch : branches) {
    DqBranch& at = p.branches[p.num_branches++];
    at.sum = dq_sum;
    at.segment_len = static_cast<int>(branch.length);
    at.rate = static_cast<int>(branch.rate);
    at.blocks_per_segment = static_cast<int>(branch_blocks(branch, s.Dk <= 64 ? 64 : 128));
    at.blocks_per_head = at.blocks_per_segment * static_cast<int>(ceil_div(s.Tq, branch.length));
    at.per_segment = FastDivisor(at.segment_len);
    at.per_rate = FastDivisor(at.rate);
    at.per_offset = params.head_offset_block
                        ? FastDivisor(static_cast<int>(ceil_div(s.Hq, branch.rate)))
                        : at.per_rate;
    dq_sum += branch_floats(s, branch);
  }
  p.dq = grads.dq;
  p.T = static_cast<int>(s.Tq);
  p.Hq = static_cast<int>(s.Hq);
  p.per_row = FastDivisor(static_cast<int>(s.Dk / 8));
  p.per_position = FastDivisor(p.Hq);
  p.per_batch = FastDivisor(p.T);
  p.units = s.B * s.Tq * s.Hq * (s.Dk / 8);
  p.offset_block = params.head_offset_block;
  p.seqlens = params.seqlens;
  p.scale = static_cast<float>(params.scale);
  return p;
}

void launch_dq(const DilatedParams& params, const AttnGrads& grads,
               const std::vector<Branch>& branches, const float* dq_sum, Stream stream) {
  const DqParams p = dq_params(params, grads, branches, dq_sum);
  const bool small = params.shape.Dk <= 64;
  const auto kernel =
      params.shape.dtype == DType::kBFloat16
          ? (small ? dilated_dq_kernel<__nv_bfloat16, 64> : dilated_dq_kernel<__nv_bfloat16, 128>)
          : (small ? dilated_dq_kernel<__half, 64> : dilated_dq_kernel<__half, 128>);
  const dim3 grid(static_cast<unsigned>(ceil_div(p.units, 256)));
  kernel<<<grid, 256, 0, stream>>>(p);
  check_launch("dilated_dq_kernel", grid, dim3(256), stream);
}

// dk and dv from their sums, where no branch wrote them.
template <class T>
__global__ void dilated_round_kernel(const float* dk_sum, const float* dv_sum, T* dk, T* dv,
                                     int64_t units) {
  for (int64_t i = blockIdx.x * int64_t{blockDim.x} + threadIdx.x; i < 2 * units;
       i += int64_t{gridDim.x} * blockDim.x) {
    const int64_t at = i < units ? i : i - units;
    const float2* from = reinterpret_cast<const float2*>((i < units ? dk_sum : dv_sum) + at * 8);
    uint32_t packed[4];
    for (int j = 0; j < 4; ++j) packed[j] = pack2<T>(from[j].x, from[j].y);
    reinterpret_cast<uint4*>(i < units ? dk : dv)[at] =
        make_uint4(packed[0], packed[1], packed[2], packed[3]);
  }
}

template <class T>
void round_keys(const AttnShape& s, const AttnGrads& grads, const float* dk_sum,
                const float* dv_sum, int num_sms, Stream stream) {
  const dim3 block(256), grid(num_sms * 8);
  dilated_round_kernel<T>
      <<<grid, block, 0, stream>>>(dk_sum, dv_sum, static_cast<T*>(grads.dk.data),
                                   static_cast<T*>(grads.dv.data), s.B * s.Tk * s.Hkv * s.Dk / 8);
  check_launch("dilated_round_kernel", grid, block, stream);
}

}  // namespace

int64_t dilated_dq_floats(const DilatedParams& params) {
  int64_t floats = 0;
  for (const Branch& branch : ordered_branches(params)) {
    floats += branch_floats(params.shape, branch);
  }
  return floats;
}

int64_t dilated_statistics_floats(const DilatedParams& params) {
  int64_t most = 0;
  for (const Branch& branch : ordered_branches(params)) {
    most = std::max(most, 2 * branch_rows(params.shape, branch));
  }
  return most;
}

void launch_dilated_bwd(const DilatedParams& params, const AttnGrads& grads,
                        const BwdScratch& scratch, float* statistics, float* dk_sum, float* dv_sum,
                        int num_sms, Stream stream) {
  const AttnShape& s = params.shape;
  if (s.B * s.Tq * s.Hq == 0) return;
  const std::vector<Branch> branches = ordered_branches(params);
  LCTX_CHECK(branches.size() <= kMaxBranches, "lctx::dilated_bwd: ", branches.size(),
             " branches; expected at most ", kMaxBranches);
  const bool last_covers = last_covers_all(params, branches);
  const int64_t sum_bytes = s.B * s.Tk * s.Hkv * s.Dk * sizeof(float);
  cudaMemsetAsync(dk_sum, 0, sum_bytes, stream);
  cudaMemsetAsync(dv_sum, 0, sum_bytes, stream);
  const auto contiguous = [&](float* data) {
    return TensorView{data, s.Tk * s.Hkv * s.Dk, s.Hkv * s.Dk, s.Dk};
  };
  float* dq_sum = scratch.dq_sum;
  for (size_t m = 0; m < branches.size(); ++m) {
    cudaMemsetAsync(scratch.counter, 0, sizeof(int), stream);
    BwdScratch own = scratch;
    launch_statistics(params, branches[m], statistics, own, stream);
    choose_bwd_tile(params, /*fused=*/true, [&](auto tag) {
      launch_branch<typename decltype(tag)::type>(
          params, grads, own, branches[m], dq_sum, contiguous(dk_sum), contiguous(dv_sum),
          last_covers && m + 1 == branches.size(), num_sms, stream);
    });
    dq_sum += branch_floats(s, branches[m]);
  }
  launch_dq(params, grads, branches, scratch.dq_sum, stream);
  if (last_covers) return;
  if (s.dtype == DType::kBFloat16) {
    round_keys<__nv_bfloat16>(s, grads, dk_sum, dv_sum, num_sms, stream);
  } else {
    round_keys<__half>(s, grads, dk_sum, dv_sum, num_sms, stream);
  }
}

}  // namespace lctx::cuda
