// Math: dilated attention, backward: with lse and delta of the union of the branches, every branch
//       adds what flash_bwd.cu computes over its own pairs (arXiv 2307.02486, section 2.3). Where
//       the mixing weights count as constants, delta is the branch's own (dilated_delta.cu).
// Tile map: attn_bwd_sm90.cuh with SegmentKeys, one launch a branch. Tensors are seen with stride
//       r: no gather, no scatter. dq: dilated_dq.cu.
// Pipeline: largest rate first; dk and dv are summed in fp32, and the last branch writes them if
//       its rate is 1. What a branch finds in the sums follows from the position of a row, so that
//       they are not zeroed before. Only the last one reads them, which it finds in the L2 cache,
//       asked for when a tile begins; the others add without waiting.
// Memory: fp32 dk and dv (B, T, Hkv, D); dq in fp32, fused of the rows that each branch selects,
//       else (B, T, Hq, D); a branch's statistics, gathered into blocks; as flash_bwd.cu for each
//       branch. T here are the positions of a span: some whole segments of every branch, one span
//       after the other, so that the sums take kSpanBytes, or what the shortest span takes.
// Limits: those of attn_bwd_sm90.cuh; any w, r, T; 16 branches.
#include <numeric>

#include "attn_bwd_launch.cuh"
#include "dilated_bwd.h"

namespace lctx::cuda {
namespace {

constexpr int64_t kSpanBytes = int64_t{1} << 30;  // of fp32 sums

// The sums over the branches, of which those of the branches before are there where these have
// been. A tile is the only one of its launch that has its keys: the order of additions is that of
// the branches, and nothing is read but by the last branch, which writes the result.
struct BranchKeys {
  struct Params {
    TensorView dk_sum, dv_sum;  // fp32
    bool last;                  // the sums go to BwdParams::dk and dv, and stay as they are
    BranchSet earlier;
  };
  static constexpr bool kPrefetches = true, kReadsKeys = false;

  template <class Kernel>
  static __device__ __forceinline__ bool reads(const Kernel& kernel, const KeyWork& work, int key) {
    const auto& p = kernel.p;
    return key < work.key_end &&
           p.earlier.select(kernel.position(work, key), work.head * p.per_group, p.per_group);
  }
  template <class Kernel>
  static __device__ __forceinline__ float* row(const Kernel& kernel, const TensorView& sum,
                                               const KeyWork& work, int key) {
    return static_cast<float*>(sum.data) + work.batch * sum.stride_b +
           kernel.position(work, key) * sum.stride_t + work.head * sum.stride_h;
  }

  // Lanes 0 to 15 see to a row of dK each, the others to those of dV.
  template <class Kernel>
  static __device__ __forceinline__ void prefetch(const Kernel& kernel, int warpgroup,
                                                  const KeyWork& work) {
    const auto& p = kernel.p;
    const int lane = threadIdx.x % 32;
    const int key = work.key0 + kernel.first_key(warpgroup) +
                    static_cast<int>(threadIdx.x % 128 / 32) * 16 + lane % 16;
    if (!reads(kernel, work, key)) return;
    const float* from = row(kernel, lane < 16 ? p.dk_sum : p.dv_sum, work, key);
    for (int column = 0; column < p.D; column += 32) ptx::prefetch_l2(from + column);
  }

  // The two rows of a thread, from its first column on: whether they have a sum or are to get one.
  struct Rows {
    bool summed[2], fresh[2];
    int columns;
    int64_t below;  // from the first to the second
  };

  template <class Kernel, int N>
  static __device__ __forceinline__ void finish(const Kernel& kernel, int warpgroup,
                                                const KeyWork& work, float (&dk)[N],
                                                float (&dv)[N]) {
    const auto& p = kernel.p;
    const int thread = warpgroup_thread(), column = kernel.first_column(warpgroup);
    const int key = work.key0 + kernel.first_key(warpgroup) + fragment_row(thread);
    Rows rows;
    rows.columns = p.D - column;
    rows.below = 8 * int64_t{p.rate} * p.dv_sum.stride_t;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      rows.summed[i] = reads(kernel, work, key + 8 * i);
      rows.fresh[i] = key + 8 * i < work.key_end && !rows.summed[i];
    }
#pragma unroll
    for (int i = 0; i < N; ++i) dk[i] *= p.scale;
    const int first = column + fragment_column(thread);
    float* const v = row(kernel, p.dv_sum, work, key) + first;
    float* const k = row(kernel, p.dk_sum, work, key) + first;
    if (!p.last) {
      add(v, rows, dv);
      add(k, rows, dk);
      return;
    }
    add_sums(v, rows, dv);
    StoreKeys::store(kernel, warpgroup, work, dv, 1.f, p.dv);
    add_sums(k, rows, dk);
    StoreKeys::store(kernel, warpgroup, work, dk, 1.f, p.dk);
  }

  // sum += d
  template <int N>
  static __device__ __forceinline__ void add(float* sum, const Rows& rows, const float (&d)[N]) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float* const to = sum + i * rows.below;
      if (rows.summed[i]) {
#pragma unroll
        for (int j = 0; j < N / 4; ++j) {
          if (8 * j >= rows.columns) break;
          ptx::red_add_v2(to + 8 * j, d[4 * j + 2 * i], d[4 * j + 2 * i + 1]);
        }
      } else if (rows.fresh[i]) {
#pragma unroll
        for (int j = 0; j < N / 4; ++j) {
          if (8 * j >= rows.columns) break;
          *reinterpret_cast<float2*>(to + 8 * j) =
              make_float2(d[4 * j + 2 * i], d[4 * j + 2 * i + 1]);
        }
      }
    }
  }

  // d += sum
  template <int N>
  static __device__ __forceinline__ void add_sums(const float* sum, const Rows& rows,
                                                  float (&d)[N]) {
    float2 x[N / 4][2] = {};
#pragma unroll
    for (int j = 0; j < N / 4; ++j) {
      if (8 * j >= rows.columns) break;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        if (rows.summed[i]) {
          x[j][i] = *reinterpret_cast<const float2*>(sum + i * rows.below + 8 * j);
        }
      }
    }
#pragma unroll
    for (int j = 0; j < N / 4; ++j) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        d[4 * j + 2 * i] += x[j][i].x;
        d[4 * j + 2 * i + 1] += x[j][i].y;
      }
    }
  }
};

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
  return s.B * s.Hq * ceil_div(s.Tq, branch.length) * branch_blocks(s, branch) *
         dq_block_rows(dq_head_dim(s));
}

// Points `scratch`, whose statistics are those by positions, at the ones of a branch, which it
// makes in `to`.
void launch_statistics(const DilatedSpan& span, const Branch& branch, float* to,
                       BwdScratch& scratch, Stream stream) {
  const DilatedParams& params = span.params;
  const AttnShape& s = params.shape;
  StatisticsParams p{};
  p.count = branch_rows(s, branch);
  p.lse2 = scratch.lse2;
  p.delta = scratch.delta;
  p.branch_lse2 = to;
  p.branch_delta = to + p.count;
  p.T = static_cast<int>(s.Tq);
  p.pitch = span.pitch;
  p.segment_len = static_cast<int>(branch.length);
  p.rate = static_cast<int>(branch.rate);
  p.per_segment =
      FastDivisor(static_cast<int>(branch_blocks(s, branch)) * dq_block_rows(dq_head_dim(s)));
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
void launch_branch(const DilatedSpan& span, const BwdScratch& scratch, size_t m,
                   const DilatedSums& sums, bool last, int num_sms, Stream stream) {
  using Traits = BwdTraits<Tile, SegmentKeys<Tile::kBlockN>, BranchKeys, false>;
  const DilatedParams& params = span.params;
  const AttnShape& s = params.shape;
  const Branch& branch = span.branches[m];
  typename Traits::Params p{};
  set_attention_bwd<Tile>(params, span.grads, scratch, p, branch.rate);
  const int64_t segments = ceil_div(s.Tq, branch.length);
  const int64_t rows = ceil_div(branch.length, branch.rate), group = s.Hq / s.Hkv;
  const int64_t sharing = ceil_div(s.Hq, branch.rate);  // heads of one offset, in blocks
  const int64_t slots =
      params.head_offset_block ? (group + sharing - 2) / sharing + 1 : std::min(group, branch.rate);
  p.head_step =
      params.head_offset_block ? 1 : static_cast<int>(std::min<int64_t>(branch.rate, s.Hq));
  p.blocks_per_segment = static_cast<int>(branch_blocks(s, branch));
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
  const auto contiguous = [&](float* data) {
    return TensorView{data, s.Tk * s.Hkv * s.Dk, s.Hkv * s.Dk, s.Dk};
  };
  p.dk_sum = contiguous(sums.dk);
  p.dv_sum = contiguous(sums.dv);
  p.earlier = BranchSet(params, span.branches, m);
  p.last = last;
  p.order = KeyOrder(make_order("lctx::dilated_bwd", ceil_div(rows, Tile::kBlockN),
                                s.Hkv * slots * segments, s.B, bwd_section(s, rows)));
  launch_bwd<Traits>(p, num_sms, stream);
}

int64_t dq_floats(const DilatedParams& params, bool fused) {
  const AttnShape& s = params.shape;
  if (!fused) return s.B * s.Tq * s.Hq * s.Dk;
  int64_t floats = 0;
  for (const Branch& branch : ordered_branches(params)) floats += branch_floats(s, branch);
  return floats;
}

// Positions whose sums are made at a time: as many as take kSpanBytes, in whole segments of every
// branch.
int64_t span_length(const DilatedParams& params, bool fused) {
  const AttnShape& s = params.shape;
  int64_t whole = 1;
  for (const Branch& branch : ordered_branches(params)) {
    whole = std::min(std::lcm(whole, branch.length), s.Tq);
  }
  if (whole >= s.Tq || params.seqlens != nullptr) return s.Tq;
  DilatedParams least = params;
  least.shape.Tq = least.shape.Tk = whole;
  const int64_t floats = dq_floats(least, fused) + 2 * s.B * whole * s.Hkv * s.Dk;
  const int64_t fit = kSpanBytes / (floats * static_cast<int64_t>(sizeof(float)));
  return std::min(std::max<int64_t>(fit, 1) * whole, s.Tq);
}

// Sums to the inputs' type, where no branch wrote the result: 0 for rows that none selects.
struct RoundParams {
  const float* sum;  // (B, T, H, D)
  TensorView to;
  int64_t units;                              // of 8 columns
  FastDivisor per_row, per_heads, per_batch;  // units, H, T
  int per_group;                              // query heads a head
  BranchSet branches;
  const int32_t* seqlens;
};

template <class T>
__global__ void __launch_bounds__(256) dilated_round_kernel(const __grid_constant__ RoundParams p) {
  const int64_t unit = static_cast<int64_t>(blockIdx.x) * 256 + threadIdx.x;
  if (unit >= p.units) return;
  const int row = static_cast<int>(unit / p.per_row.divisor);
  const int bt = p.per_heads.divide(row), h = row - bt * p.per_heads.divisor;
  const int b = p.per_batch.divide(bt), t = bt - b * p.per_batch.divisor;
  const bool exists = (p.seqlens == nullptr || t < p.seqlens[b]) &&
                      p.branches.select(t, h * p.per_group, p.per_group);
  const float2* from = reinterpret_cast<const float2*>(p.sum + unit * 8);
  uint32_t packed[4];
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const float2 x = exists ? from[j] : make_float2(0.f, 0.f);
    packed[j] = pack2<T>(x.x, x.y);
  }
  T* to = static_cast<T*>(p.to.data) + b * p.to.stride_b + t * p.to.stride_t + h * p.to.stride_h;
  reinterpret_cast<uint4*>(to)[unit - int64_t{row} * p.per_row.divisor] =
      make_uint4(packed[0], packed[1], packed[2], packed[3]);
}

void launch_round(const DilatedSpan& span, const float* sum, const TensorView& to, int64_t heads,
                  Stream stream) {
  const DilatedParams& params = span.params;
  const AttnShape& s = params.shape;
  RoundParams p{};
  p.sum = sum;
  p.to = to;
  p.units = s.B * s.Tq * heads * (s.Dk / 8);
  p.per_row = FastDivisor(static_cast<int>(s.Dk / 8));
  p.per_heads = FastDivisor(static_cast<int>(heads));
  p.per_batch = FastDivisor(static_cast<int>(s.Tq));
  p.per_group = static_cast<int>(s.Hq / heads);
  p.branches = BranchSet(params, span.branches, span.branches.size());
  p.seqlens = params.seqlens;
  const dim3 grid(static_cast<unsigned>(ceil_div(p.units, 256)));
  const auto kernel = s.dtype == DType::kBFloat16 ? dilated_round_kernel<__nv_bfloat16>
                                                  : dilated_round_kernel<__half>;
  kernel<<<grid, 256, 0, stream>>>(p);
  check_launch("dilated_round_kernel", grid, dim3(256), stream);
}

// All of the backward of a span.
void launch_span(const DilatedSpan& span, const DilatedSums& sums, bool fused, int num_sms,
                 Stream stream) {
  const DilatedParams& params = span.params;
  const AttnShape& s = params.shape;
  const size_t num_branches = span.branches.size();
  const bool last_covers = last_covers_all(params, span.branches);
  float* dq_sum = span.scratch.dq_sum;
  if (fused) cudaMemsetAsync(dq_sum, 0, dq_floats(params, fused) * sizeof(float), stream);
  for (size_t m = 0; m < num_branches; ++m) {
    const bool last = last_covers && m + 1 == num_branches;
    BwdScratch own = span.scratch;
    if (params.mix_detached) {
      launch_branch_delta(span, m, sums.delta, num_sms, stream);
      own.delta = sums.delta;
    }
    if (!fused) launch_branch_dq(span, m, own.delta, last, num_sms, stream);
    launch_statistics(span, span.branches[m], sums.statistics, own, stream);
    own.dq_sum = dq_sum;
    cudaMemsetAsync(own.counter, 0, sizeof(int), stream);
    choose_bwd_tile<256, 64>(params, fused, [&](auto tag) {
      launch_branch<typename decltype(tag)::type>(span, own, m, sums, last, num_sms, stream);
    });
    if (fused) dq_sum += branch_floats(s, span.branches[m]);
  }
  if (fused) launch_add_branches_dq(span, stream);
  if (last_covers) return;
  launch_round(span, sums.dk, span.grads.dk, s.Hkv, stream);
  launch_round(span, sums.dv, span.grads.dv, s.Hkv, stream);
  if (!fused) launch_round(span, span.scratch.dq_sum, span.grads.dq, s.Hq, stream);
}

}  // namespace

DilatedSizes dilated_sizes(const DilatedParams& params, bool fused) {
  DilatedParams span = params;
  span.shape.Tq = span.shape.Tk = span_length(params, fused);
  const AttnShape& s = span.shape;
  DilatedSizes sizes;
  sizes.dq = dq_floats(span, fused);
  sizes.keys = s.B * s.Tk * s.Hkv * s.Dk;
  for (const Branch& branch : ordered_branches(span)) {
    sizes.statistics = std::max(sizes.statistics, 2 * branch_rows(s, branch));
  }
  if (params.mix_detached) sizes.delta = s.B * s.Hq * bwd_pitch(params.shape);
  return sizes;
}

void launch_dilated_bwd(const DilatedParams& params, const AttnGrads& grads,
                        const BwdScratch& scratch, const DilatedSums& sums, bool fused, int num_sms,
                        Stream stream) {
  const AttnShape& s = params.shape;
  if (s.B * s.Tq * s.Hq == 0) return;
  LCTX_CHECK(params.num_branches <= kMaxBranches, "lctx::dilated_bwd: ", params.num_branches,
             " branches; expected at most ", kMaxBranches, " on a GPU");
  const int64_t length = span_length(params, fused);
  for (int64_t begin = 0; begin < s.Tq; begin += length) {
    DilatedSpan span{params, grads, scratch, static_cast<int>(bwd_pitch(s)), static_cast<int>(s.Tq),
                     {}};
    span.params.shape.Tq = span.params.shape.Tk = std::min(length, s.Tq - begin);
    for (TensorView* x : {&span.params.q, &span.params.k, &span.params.v, &span.params.out,
                          &span.grads.dout, &span.grads.dq, &span.grads.dk, &span.grads.dv}) {
      x->data = static_cast<char*>(x->data) + begin * x->stride_t * dtype_size(s.dtype);
    }
    if (grads.dlse != nullptr) {
      span.grads.dlse = static_cast<const float*>(grads.dlse) + begin;
    }
    span.scratch.lse2 += begin;
    span.scratch.delta += begin;
    span.branches = ordered_branches(span.params);
    DilatedSums own = sums;
    if (own.delta != nullptr) own.delta += begin;
    launch_span(span, own, fused, num_sms, stream);
  }
}

}  // namespace lctx::cuda
