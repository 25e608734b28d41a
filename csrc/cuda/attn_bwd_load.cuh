// Math: none; shared memory, pipelines and producers of attn_bwd_sm90.cuh.
// Tile map: a producer warpgroup of four warps with a task each: queries, values and dO by the copy
//       engine, lse2 and delta by 32 threads each. With 24 registers none can do more.
// Pipeline: K and V are waited for once a tile; Q with lse2, dO with delta in kStages stages.
// Memory: what attn_bwd_sm90.cuh says; statistics of a strided view are gathered 4 bytes at a time.
// Limits: those of attn_bwd_sm90.cuh.
#pragma once

#include "../common/ptx_words.cuh"
#include "attn_bwd_keys.cuh"
#include "dq_sum.cuh"

namespace lctx::cuda {

// kGroups_: each warpgroup has statistics of its own, those of the group of keys that its keys are
// in (LandmarkKeys).
template <class T_, int kHeadDim_, bool kFused_, bool kGroups_ = false>
struct BwdTile {
  using T = T_;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr bool kFused = kFused_, kGroups = kGroups_;
  static constexpr int kConsumers = 2, kBlockN = 64 * kConsumers;
  static constexpr int kBlockM = dq_block_rows(kHeadDim), kHalves = kBlockM / 64;
  static constexpr int kStages = kFused ? 2 : 4;
  static constexpr int kThreads = 128 * (1 + kConsumers);
  static constexpr int kKeyBytes = tile_bytes(kBlockN, kHeadDim);
  static constexpr int kQueryBytes = tile_bytes(kBlockM, kHeadDim);
  static constexpr int kDsBytes = tile_bytes(kBlockN, kBlockM);
  static constexpr int kDsBuffers = 3;
  static constexpr int kK = 0, kV = kKeyBytes, kQ = 2 * kKeyBytes;
  static constexpr int kDout = kQ + kStages * kQueryBytes;
  static constexpr int kDs = kDout + kStages * kQueryBytes;
  static constexpr int kLse2 = kDs + (kFused ? kDsBuffers * kDsBytes : 0);
  static constexpr int kVectors = kGroups ? 2 : 1, kVectorBytes = kStages * kVectors * kBlockM * 4;
  static constexpr int kDelta = kLse2 + kVectorBytes;
  static constexpr int kLandmark = kDelta + kVectorBytes;  // gradients of the landmark's scores
  static constexpr int kSeen = kLandmark + (kGroups ? kVectorBytes : 0);
  static constexpr int kAsideBytes = 32;  // per warp
  static constexpr int kAside = kSeen + kBlockN * 8;
  static constexpr int kBarriers = kAside + 4 * kConsumers * kAsideBytes;
  static constexpr int kSharedBytes = kBarriers + 256 + 1024;  // and alignment
};

template <class Tile, class Tiles_, class Keys_, bool kWindowed_>
struct BwdTraits : Tile {
  using Tiles = Tiles_;
  using Keys = Keys_;
  static constexpr bool kWindowed = kWindowed_;
  struct Params : BwdParams, Tiles_::Params, Keys_::Params {
    using Tiles = Tiles_;
  };
};

template <class Traits_>
struct BwdLoads {
  using Traits = Traits_;
  using T = typename Traits::T;
  using Tiles = typename Traits::Tiles;
  static constexpr int kHeadDim = Traits::kHeadDim;
  static constexpr int kBlockM = Traits::kBlockM, kBlockN = Traits::kBlockN;
  static constexpr int kHalves = Traits::kHalves;
  static constexpr int kChunks = kHeadDim / kChunkColumns;
  static constexpr int kConsumerWarps = 4 * Traits::kConsumers;
  using KeyPipeline = Pipeline<1>;
  using KeyState = PipelineState<1>;
  using QueryPipeline = Pipeline<Traits::kStages>;
  using QueryState = PipelineState<Traits::kStages>;
  static constexpr int kQueryBarriers = Traits::kBarriers + 2 * KeyPipeline::kBytes;
  static constexpr int kDsBarrier = kQueryBarriers + 2 * QueryPipeline::kBytes;
  static constexpr int kQueue = kDsBarrier + 8;
  static_assert(kQueue + TileQueue::kBytes <= Traits::kBarriers + 256, "no room for the barriers");

  const typename Traits::Params& p;
  const uint32_t smem;
  KeyPipeline k_pipe, v_pipe;
  QueryPipeline q_pipe, dout_pipe;
  TileQueue queue;

  __device__ __forceinline__ BwdLoads(const typename Traits::Params& params, char* base)
      : p(params),
        smem(ptx::smem_address(base)),
        k_pipe(smem + Traits::kBarriers),
        v_pipe(smem + Traits::kBarriers + KeyPipeline::kBytes),
        q_pipe(smem + kQueryBarriers),
        dout_pipe(smem + kQueryBarriers + QueryPipeline::kBytes),
        queue(smem + kQueue) {}

  __device__ __forceinline__ void init() const {
    k_pipe.init(kConsumerWarps);
    v_pipe.init(kConsumerWarps);
    q_pipe.init(kConsumerWarps, 32);
    dout_pipe.init(kConsumerWarps, 32);
    queue.pipeline.init(kConsumerWarps + 3);
    ptx::mbarrier_init(smem + kDsBarrier, kConsumerWarps);
    ptx::fence_mbarrier_init();
  }

  __device__ __forceinline__ int position(const KeyWork& work, int row) const {
    if constexpr (Tiles::kStrided) return row * p.rate + work.phase;
    return row;
  }
  __device__ __forceinline__ QueryRange queries(const KeyWork& work, int first, int keys) const {
    return query_range<Traits::kWindowed, kBlockM>(p, work, work.key0 + first,
                                                   work.key0 + first + keys - 1);
  }
  __device__ __forceinline__ KeyWork find_work_again(int index) const {
    return Tiles::find(p, ptx::opaque(index));
  }
  // Steps of a tile: blocks of queries, for each of its query heads.
  __device__ __forceinline__ int num_steps(const KeyWork& work, const QueryRange& range) const {
    int heads = work.end_head - work.first_head;
    if constexpr (Tiles::kStrided) {
      if (!p.offset_block) heads = p.per_phase.divide(heads + p.rate - 1);
    }
    return (range.end - range.begin) * heads;
  }

  // A tile that no query sees passes through the pipelines of the keys without a load, so that
  // there is one turn for each tile.
  __device__ __forceinline__ KeyState key_state() const { return {queue.state.step - 1}; }

  // ---- producers: of each of the two pipelines a thread that gives the copy engine its orders and
  // a warp that loads statistics. With 24 registers none can do more. ----

  // kOfQ: keys and queries, else values and dO.
  template <bool kOfQ>
  __device__ __forceinline__ void load_keys(const KeyWork& work) const {
    const uint32_t full = (kOfQ ? k_pipe : v_pipe).acquire(key_state(), Traits::kKeyBytes);
    const uint32_t dst = smem + (kOfQ ? Traits::kK : Traits::kV);
    if constexpr (Traits::kGroups) {
#pragma unroll 1
      for (int i = 0; i < 2 * kChunks; ++i) {
        const int chunk = i % kChunks, piece = i / kChunks;
        ptx::tma_load_5d(dst + chunk * chunk_bytes(kBlockN) + piece * chunk_bytes(64),
                         &(kOfQ ? p.k : p.v)[0], full, chunk * kChunkColumns,
                         p.tiles[work.piece + piece].row0, 0, work.head, work.batch);
      }
    } else {
#pragma unroll 1
      for (int c = 0; c < kChunks; ++c) {
        ptx::tma_load_5d(dst + c * chunk_bytes(kBlockN), &(kOfQ ? p.k : p.v)[work.map], full,
                         c * kChunkColumns, work.key0, work.phase, work.head, work.batch);
      }
    }
  }
  template <bool kOfQ>
  __device__ __forceinline__ void load_queries(const QueryState& state, const KeyWork& work,
                                               int head, int row) const {
    const uint32_t full = (kOfQ ? q_pipe : dout_pipe).acquire(state, Traits::kQueryBytes);
    const uint32_t dst =
        smem + (kOfQ ? Traits::kQ : Traits::kDout) + state.stage() * Traits::kQueryBytes;
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      ptx::tma_load_5d(dst + c * chunk_bytes(kBlockM), &(kOfQ ? p.q : p.dout)[work.map], full,
                       c * kChunkColumns, row, work.phase, head, work.batch);
    }
  }

  template <bool kOfQ>
  __device__ __forceinline__ void produce() {
    QueryState state;
    for (int index = kOfQ ? blockIdx.x : queue.take_alone();;
         index = kOfQ ? ptx::num_blocks() + atomicAdd(p.counter, 1) : queue.take_alone()) {
      if (kOfQ) queue.publish(index);
      if (index >= p.order.num_tiles) break;
      const KeyWork work = Tiles::find(p, index);
      const QueryRange range = queries(work, 0, kBlockN);
      if (range.end <= range.begin) {
        (kOfQ ? k_pipe : v_pipe).acquire(key_state(), 0);
        continue;
      }
      load_keys<kOfQ>(work);
#pragma unroll 1
      for (int head = work.first_head; head < work.end_head; head += p.head_step) {
#pragma unroll 1
        for (int m = range.begin; m < range.end; ++m) {
          load_queries<kOfQ>(state, work, head, work.origin + m * kBlockM);
          state.advance();
        }
      }
    }
  }

  template <bool kOfQ>
  __device__ __forceinline__ void load_row_statistics(QueryState& state, const KeyWork& work,
                                                      const QueryRange& range) const {
    const QueryPipeline& pipe = kOfQ ? q_pipe : dout_pipe;
    const int lane = static_cast<int>(threadIdx.x % 32);
#pragma unroll 1
    for (int head = work.first_head; head < work.end_head; head += p.head_step) {
      const float* from =
          (kOfQ ? p.lse2 : p.delta) + (static_cast<int64_t>(work.batch) * p.Hq + head) * p.Tq;
#pragma unroll 1
      for (int m = range.begin; m < range.end; ++m) {
        ptx::mbarrier_wait(pipe.empty + state.stage() * 8, state.phase() ^ 1);
        const uint32_t to =
            smem + (kOfQ ? Traits::kLse2 : Traits::kDelta) + (state.stage() * kBlockM + lane) * 4;
#pragma unroll
        for (int i = 0; i < kBlockM / 32; ++i) {
          const int at = position(work, work.origin + m * kBlockM + lane + 32 * i);
          ptx::cp_async_4(to + i * 128, from + (at < p.Tq ? at : 0), at < p.Tq);
        }
        ptx::cp_async_arrive(pipe.full + state.stage() * 8);
        state.advance();
      }
    }
  }

  // Those of the groups of both warpgroups (landmark_bwd.h), by half a warp each. What is not
  // written, since no row of 64 sees the group, is 0.
  template <bool kOfQ>
  __device__ __forceinline__ void load_group_statistics(QueryState& state, const KeyWork& work,
                                                        const QueryRange& range) const {
    const QueryPipeline& pipe = kOfQ ? q_pipe : dout_pipe;
    const int lane = static_cast<int>(threadIdx.x % 32), piece = work.piece + lane / 16;
    const int first = p.tiles[piece].begin() - work.shift;  // that sees the group
    const int group = first < p.Tq ? p.groups[piece] : 0;
    const float* from =
        (kOfQ ? p.vectors.lam : p.vectors.dsum) +
        static_cast<int64_t>((work.batch * p.Hq + work.first_head) * p.vectors.num_groups + group) *
            p.vectors.pitch +
        lane % 16 * 4 + range.begin * kBlockM;
    int heads = p.per_group;
#pragma unroll 1
    do {
      // 64 rows at a time.
#pragma unroll 1
      for (int row = range.begin * kBlockM; row < range.end * kBlockM; row += 64, from += 64) {
        const int half = row % kBlockM;
        if (half == 0) ptx::mbarrier_wait(pipe.empty + state.stage() * 8, state.phase() ^ 1);
        const uint32_t to = smem + (kOfQ ? Traits::kLse2 : Traits::kDelta) +
                            (state.stage() * Traits::kVectors * kBlockM + half +
                             lane / 16 * kBlockM + lane % 16 * 4) *
                                4;
        const bool valid = min(row + 63, p.Tq - 1) >= max(first, row);
        ptx::cp_async_16(to, from, valid);
        if constexpr (!kOfQ) {
          ptx::cp_async_16(to + Traits::kVectorBytes, from + p.vectors.to_w, valid);
        }
        if (half + 64 < kBlockM) continue;
        ptx::cp_async_arrive(pipe.full + state.stage() * 8);
        state.advance();
      }
      from += static_cast<int64_t>(p.vectors.num_groups) * p.vectors.pitch -
              (range.end - range.begin) * kBlockM;
    } while (--heads > 0);
  }

  // lse2 or delta, by a warp.
  template <bool kOfQ>
  __device__ __forceinline__ void produce_statistics() {
    QueryState state;
    while (true) {
      const int index = queue.take();
      if (index >= p.order.num_tiles) break;
      const KeyWork work = Tiles::find(p, index);
      const QueryRange range = queries(work, 0, kBlockN);
      if (range.end <= range.begin) continue;
      if constexpr (Traits::kGroups) {
        load_group_statistics<kOfQ>(state, work, range);
      } else {
        load_row_statistics<kOfQ>(state, work, range);
      }
    }
  }
};

}  // namespace lctx::cuda
