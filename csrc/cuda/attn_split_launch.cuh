// Math: rows whose keys were split: out = sum_s w_s out_s / sum_s w_s, w_s = exp(lse_s - max lse),
//       lse = max lse + log sum_s w_s, over the parts s in their order. A part without visible keys
//       (-inf) has weight 0, whatever its rows hold; they are written all the same.
// Tile map: SplitTiles (attn_fwd_tiles.cuh); here its host side and the merge: a thread block a
//       row, 32 lanes along it, parts dealt to the warps.
// Pipeline: the merge is launched to overlap with the attention (programmatic dependent launch):
//       its blocks start when all of the attention's run, so they may wait for these: for few rows
//       by looking at the words themselves (SplitRows::mark), else for their end. That the marks
//       are there first rests on a fence before the launch is let go, and on relaxed loads: PTX
//       promises no order to an overlapping launch. Sums are always taken in the same order.
// Memory: fp32 partial rows, written and read once, mostly in L2: for a decoded token a thousandth
//       of the keys and values.
// Limits: those of attn_fwd_sm90.cuh; 2^31 - 1 blocks of keys over all heads.
#pragma once

#include "attn_fwd_launch.cuh"
#include "split_plan.h"

namespace lctx::cuda {

struct SplitMerge {
  const float *partial, *partial_lse;
  TensorView out;
  float* lse;
  bool marked;  // slots say themselves whether they are written
  int share, extra, blocks_per_unit, slot_rows, block_m, head_bits, heads_of_group, Hq, Tq, D;
  FastDivisor per_share, per_longer;  // blocks of a thread block of the attention: share, share + 1
  FastDivisor per_span;               // blocks
  int span_ctas;
  FastDivisor per_slot, per_m, per_group, per_batch;

#if defined(__CUDACC__)
  // The thread block of the attention that has block `n` of the list.
  __device__ __forceinline__ int owner(int n) const {
    const int span = per_span.divide(n), longer = extra * (share + 1);
    n -= span * per_span.divisor;
    const int i = n < longer ? per_longer.divide(n) : extra + per_share.divide(n - longer);
    return span * span_ctas + i;
  }
#endif
};

constexpr int kMergeWarps = 16;  // most

#if defined(__CUDACC__)
__device__ __forceinline__ bool is_unset(float x) {
  return __float_as_uint(x) == SplitRows::kUnset;
}
__device__ __forceinline__ bool is_unset(const float4& x) {
  return is_unset(x.x) || is_unset(x.y) || is_unset(x.z) || is_unset(x.w);
}

// Partial rows of which `step` is the distance, in parts; kVectors of 4 elements for each of 32
// lanes. Waits for those that are not there yet.
template <int kVectors, int kParts>
struct PartialRows {
  float lse[kParts];
  float4 x[kParts][kVectors];

  __device__ __forceinline__ void read(const SplitMerge& p, const float* row_lse, const float* row,
                                       int parts, int step) {
    const float unset = __uint_as_float(SplitRows::kUnset);
    const int column = threadIdx.x * 4;
#pragma unroll
    for (int i = 0; i < kParts; ++i) {
      const bool exists = i * step < parts;
      lse[i] = exists ? unset : -INFINITY;
#pragma unroll
      for (int j = 0; j < kVectors; ++j) {
        const float first = exists && column + j * 128 < p.D ? unset : 0.f;
        x[i][j] = make_float4(first, first, first, first);
      }
    }
    while (true) {
      request(p, row_lse, row, parts, step);
      bool missing = false;
#pragma unroll
      for (int i = 0; i < kParts; ++i) {
        missing = missing || is_unset(lse[i]);
#pragma unroll
        for (int j = 0; j < kVectors; ++j) missing = missing || is_unset(x[i][j]);
      }
      if (!p.marked || !__any_sync(~0u, missing)) break;
    }
  }

  // Rows are asked for when the lse of some is there: all of them all the time would be as much to
  // read as the keys.
  __device__ __forceinline__ void request(const SplitMerge& p, const float* row_lse,
                                          const float* row, int parts, int step) {
    bool wanted = !p.marked;
#pragma unroll
    for (int i = 0; i < kParts; ++i) wanted = wanted || (i * step < parts && !is_unset(lse[i]));
#pragma unroll
    for (int i = 0; i < kParts; ++i) {
      const int64_t at = static_cast<int64_t>(i * step) * p.slot_rows;
#pragma unroll
      for (int j = 0; j < kVectors; ++j) {
        if (wanted && is_unset(x[i][j])) x[i][j] = ptx::load_relaxed_16(row + at * p.D + j * 128);
      }
      if (is_unset(lse[i])) lse[i] = ptx::load_relaxed(row_lse + at);
    }
  }
};

// sum_s w_s x_s and sum_s w_s, relative to `top`.
template <int kVectors>
struct MergedRow {
  float top = -1e38f, total = 0.f;  // finite: a row may have no key at all
  float4 sum[kVectors] = {};

  __device__ __forceinline__ void raise(float to) {
    const float scale = expf(top - to);
    top = to;
    total *= scale;
#pragma unroll
    for (int j = 0; j < kVectors; ++j) {
      sum[j] = {sum[j].x * scale, sum[j].y * scale, sum[j].z * scale, sum[j].w * scale};
    }
  }
  __device__ __forceinline__ void add(float weight, float weights, const float4 (&x)[kVectors]) {
    if (weight == 0.f) return;  // whatever x holds
    total += weights;
#pragma unroll
    for (int j = 0; j < kVectors; ++j) {
      sum[j].x += weight * x[j].x;
      sum[j].y += weight * x[j].y;
      sum[j].z += weight * x[j].z;
      sum[j].w += weight * x[j].w;
    }
  }
};
#endif

// T: of out. kVectors: of 4 elements for each of 32 lanes.
template <class T, int kVectors>
__global__ void __launch_bounds__(32 * kMergeWarps)
    split_merge_kernel(const __grid_constant__ SplitMerge p) {
  __shared__ float4 sums[kMergeWarps][32][kVectors];
  __shared__ float2 totals[kMergeWarps];  // and what they are relative to
  const int lane = threadIdx.x, warp = threadIdx.y, warps = blockDim.y;
  const int unit = p.per_slot.divide(blockIdx.x), slot_row = p.per_slot.modulo(blockIdx.x);
  const int in_group = p.per_group.modulo(unit), group = p.per_group.divide(unit);
  const int row = p.per_m.modulo(in_group) * p.block_m + slot_row;
  const int position = row >> p.head_bits;
  const int head = p.per_m.divide(in_group) * 64 + (row & ((1 << p.head_bits) - 1));
  if (position >= p.Tq || head >= p.heads_of_group) return;

  const int block0 = unit * p.blocks_per_unit, cta0 = p.owner(block0);
  const int parts = p.owner(block0 + p.blocks_per_unit - 1) - cta0 + 1;
  const int64_t first = static_cast<int64_t>(cta0 + unit) * p.slot_rows + slot_row;
  constexpr int kAhead = kVectors == 1 ? 8 : 4;
  if (!p.marked) ptx::grid_dependency_wait();
  MergedRow<kVectors> merged;
  for (int from = warp; from < parts; from += kAhead * warps) {
    PartialRows<kVectors, kAhead> rows;
    const int64_t at = first + static_cast<int64_t>(from) * p.slot_rows;
    rows.read(p, p.partial_lse + at, p.partial + at * p.D + lane * 4, parts - from, warps);
    float top = merged.top;
#pragma unroll
    for (int i = 0; i < kAhead; ++i) top = fmaxf(top, rows.lse[i]);
    merged.raise(top);
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      const float weight = expf(rows.lse[i] - top);
      merged.add(weight, weight, rows.x[i]);
    }
  }
#pragma unroll
  for (int j = 0; j < kVectors; ++j) sums[warp][lane][j] = merged.sum[j];
  if (lane == 0) totals[warp] = make_float2(merged.total, merged.top);
  __syncthreads();
  // What this kernel overlapped with has ended when it ends.
  if (p.marked && warp == warps - 1) ptx::grid_dependency_wait();
  if (warp != 0) return;
  float top = merged.top;
  for (int other = 1; other < warps; ++other) top = fmaxf(top, totals[other].y);
  merged.raise(top);
  for (int other = 1; other < warps; ++other) {
    const float weight = expf(totals[other].y - top);
    merged.add(weight, weight * totals[other].x, sums[other][lane]);
  }
  const int batch = p.per_batch.divide(group);
  const int q_head = p.per_batch.modulo(group) * p.heads_of_group + head;
  if (lane == 0) {
    p.lse[(static_cast<int64_t>(batch) * p.Hq + q_head) * p.Tq + position] =
        merged.total == 0.f ? -INFINITY : top + logf(merged.total);
  }
  const float inverse = merged.total == 0.f ? 0.f : 1.f / merged.total;
  T* out = static_cast<T*>(p.out.data) + batch * p.out.stride_b + position * p.out.stride_t +
           q_head * p.out.stride_h + lane * 4;
#pragma unroll
  for (int j = 0; j < kVectors; ++j) {
    if (lane * 4 + j * 128 >= p.D) continue;
    const float4 x = merged.sum[j];
    const float4 y = {x.x * inverse, x.y * inverse, x.z * inverse, x.w * inverse};
    if constexpr (std::is_same_v<T, float>) {
      *reinterpret_cast<float4*>(out + j * 128) = y;
    } else {
      *reinterpret_cast<uint2*>(out + j * 128) = make_uint2(pack2<T>(y.x, y.y), pack2<T>(y.z, y.w));
    }
  }
}

// Few rows for a thread block: the merge takes them as they come.
inline bool marks(const SplitPlan& plan, int block_m) {
  return block_m == 64 && plan.slot_rows <= SplitRows::kMarkedRows;
}

// T: of out.
template <class T>
void launch_split_merge(const AttnParams& params, const SplitPlan& plan, int block_m,
                        const float* scratch, Stream stream) {
  const AttnShape& s = params.shape;
  SplitMerge p{};
  p.partial = scratch;
  p.partial_lse = scratch + plan.slots * plan.slot_rows * s.Dv;
  p.out = params.out;
  p.lse = static_cast<float*>(params.lse);
  p.marked = marks(plan, block_m);
  p.share = static_cast<int>(plan.span() / plan.span_ctas);
  p.extra = static_cast<int>(plan.span() % plan.span_ctas);
  p.per_span = FastDivisor(static_cast<int>(plan.span()));
  p.span_ctas = static_cast<int>(plan.span_ctas);
  p.blocks_per_unit = static_cast<int>(plan.blocks_per_unit);
  p.slot_rows = static_cast<int>(plan.slot_rows);
  p.block_m = block_m;
  p.head_bits = static_cast<int>(plan.head_bits);
  p.heads_of_group = static_cast<int>(s.Hq / s.Hkv);
  p.Hq = static_cast<int>(s.Hq);
  p.Tq = static_cast<int>(s.Tq);
  p.D = static_cast<int>(s.Dv);
  p.per_share = FastDivisor(p.share);
  p.per_longer = FastDivisor(p.share + 1);
  p.per_slot = FastDivisor(p.slot_rows);
  p.per_m = FastDivisor(static_cast<int>(plan.m_blocks));
  p.per_group = FastDivisor(static_cast<int>(plan.m_blocks * plan.head_blocks));
  p.per_batch = FastDivisor(static_cast<int>(s.Hkv));

  const int64_t parts = ceil_div(plan.blocks_per_unit, p.share) + 1;
  const int warps = static_cast<int>(std::clamp<int64_t>(ceil_div(parts, 4), 1, kMergeWarps));
  const auto kernel = s.Dv <= 128 ? split_merge_kernel<T, 1> : split_merge_kernel<T, 2>;
  cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout,
                       cudaSharedmemCarveoutMaxShared);
  launch_overlapping("split_merge_kernel", kernel, p,
                     dim3(static_cast<unsigned>(plan.units * plan.slot_rows)), dim3(32, warps),
                     stream);
}

// One consumer warpgroup, as memory is the limit; 128 KB of keys and values on the way, which more
// did not beat.
template <class T, int kHeadDim, int kBlockN>
using DecodeTile =
    FwdTile<T, kHeadDim, kBlockN, 1, /*kStagesO=*/false,
            std::min(128 * 1024 / (2 * tile_bytes(kBlockN, kHeadDim)), 5), /*kQStages=*/2>;

// Two thread blocks a multiprocessor: one reads while the other computes.
template <class T, int kHeadDim, int kBlockN>
struct PairedTile : FwdTile<T, kHeadDim, kBlockN, 1, /*kStagesO=*/false, 2, /*kQStages=*/2> {
  static constexpr int kPerSm = 2, kProducerRegisters = 40, kConsumerRegisters = 216;
};

// What L2 fetches at least. 256 bytes, good for keys that are read again, cost a stream 5 %.
constexpr int kStreamL2Bytes = 128;

inline void set_key_maps(const AttnParams& params, int keys, FwdParams& p) {
  const AttnShape& s = params.shape;
  p.k[0] = make_rows_map(params.k, s.dtype, s.B, s.Tk, s.Hkv, s.Dk, keys, 1, kStreamL2Bytes);
  p.v[0] = make_rows_map(params.v, s.dtype, s.B, s.Tk, s.Hkv, s.Dv, keys, 1, kStreamL2Bytes);
}

// What is about the split, but for the map of the queries; the caller has set the rest.
template <class P>
void set_split(const AttnParams& params, const SplitPlan& plan, int block_m, float* scratch, P& p) {
  const AttnShape& s = params.shape;
  const int64_t span = plan.span() / plan.grain;
  p.per_group = FastDivisor(1);  // the tiles' heads are those of keys and values
  p.head_bits = static_cast<int>(plan.head_bits);
  p.first_block = static_cast<int>(plan.first_block);
  p.blocks_per_unit = static_cast<int>(plan.blocks_per_unit);
  p.grain = static_cast<int>(plan.grain);
  p.share = static_cast<int>(span / plan.span_ctas);
  p.extra = static_cast<int>(span % plan.span_ctas);
  p.span = static_cast<int>(span);
  p.per_span = FastDivisor(static_cast<int>(plan.span_ctas));
  p.per_unit = FastDivisor(p.blocks_per_unit);
  p.per_m = FastDivisor(static_cast<int>(plan.m_blocks));
  p.per_unit_group = FastDivisor(static_cast<int>(plan.m_blocks * plan.head_blocks));
  p.per_batch = FastDivisor(static_cast<int>(s.Hkv));
  p.slot_rows = static_cast<int>(plan.slot_rows);
  p.heads_of_group = static_cast<int>(s.Hq / s.Hkv);
  p.order.num_tiles = static_cast<int>(plan.ctas);
  if (plan.slots > 0) {
    p.partial = scratch;
    p.marks = marks(plan, block_m);
    p.lse = scratch + plan.slots * plan.slot_rows * s.Dv;
  }
}

// `Tile`: its type and size of blocks; attention by `kernel`, then the merge. It gets all shared
// memory, so that the merge finds room beside the attention and can wait there.
template <class Tile, class Kernel, class P>
void launch_and_merge(const char* name, Kernel kernel, const AttnParams& params,
                      const SplitPlan& plan, const P& p, float* scratch, int num_sms,
                      Stream stream) {
  cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout,
                       cudaSharedmemCarveoutMaxShared);
  launch_tiles<Tile>(name, kernel, p, num_sms, stream, /*overlap=*/false);
  if (plan.slots == 0) return;
  const auto merge =
      plan.fp32_out ? launch_split_merge<float> : launch_split_merge<typename Tile::T>;
  merge(params, plan, Tile::kBlockM, scratch, stream);
}

// Traits with SplitTiles and SplitRows.
template <class Traits>
void launch_split(const AttnParams& params, const SplitPlan& plan, typename Traits::Params& p,
                  float* scratch, int num_sms, Stream stream) {
  const AttnShape& s = params.shape;
  const int64_t G = s.Hq / s.Hkv;
  const int heads = 1 << plan.head_bits;
  p.q[0] =
      make_map(params.q.data, s.dtype,
               {{s.Dk, G, s.Tq, s.Hkv, s.B},
                {params.q.stride_h, params.q.stride_t, params.q.stride_h * G, params.q.stride_b},
                {kChunkColumns, heads, 64 / heads, 1, 1}});
  set_split(params, plan, Traits::kBlockM, scratch, p);
  launch_and_merge<Traits>("attn_fwd_sm90_kernel", attn_fwd_sm90_kernel<Traits>, params, plan, p,
                           scratch, num_sms, stream);
}

}  // namespace lctx::cuda
