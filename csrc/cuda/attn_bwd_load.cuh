// Math: none; shared memory, pipelines and producers of attn_bwd_sm90.cuh.
// Tile map: two threads of the producer warpgroup give the copy engine its orders: one for K, Q and
//       lse2, one for V, dO and delta; two more for the statistics of groups, or to add dQ in an
//       order. With 24 registers a thread can do no more.
// Pipeline: K and V are waited for once a tile; Q with lse2, dO with delta in kStages stages.
//       Statistics come by bulk copies too: gathered by 32 threads they cost 15 % of the kernel.
//       OrderedKeys: a tile waits for tiles before it alone, and all numbers come from the counter,
//       so that those have been taken by thread blocks that run: the first of them never waits.
// Memory: what attn_bwd_sm90.cuh says. Statistics lie in blocks of kBlockM rows, numbered as those
//       of dQ (dq_sum.cuh), so that a block is one copy.
// Limits: those of attn_bwd_sm90.cuh.
#pragma once

#include "../common/ptx_words.cuh"
#include "attn_bwd_keys.cuh"
#include "dq_sum.cuh"

namespace lctx::cuda {

// Statistics of rows that no key of a group is seen by.
static __device__ __align__(16) float zero_statistics[64];

// kGroups_: every 64 keys have statistics of their own, those of the group of keys that they are in
// (LandmarkKeys). kTall_: attn_bwd_tall.cuh.
template <class T_, int kHeadDim_, bool kFused_, bool kGroups_ = false, bool kTall_ = false>
struct BwdTile {
  using T = T_;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr bool kFused = kFused_, kGroups = kGroups_, kTall = kTall_;
  static constexpr bool kWide = kHeadDim > 128;  // attn_bwd_wide.cuh
  static constexpr bool kWhole =
      kFused && kHeadDim == 64 && !kGroups && !kTall;  // attn_bwd_whole.cuh
  static constexpr int kConsumers = 2, kBlockN = kWide ? 64 : 64 * kConsumers;
  static constexpr int kBlockM = kTall ? tall_block_rows(kHeadDim) : dq_block_rows(kHeadDim),
                       kHalves = kBlockM / 64;
  static constexpr int kStages = kFused ? (kHeadDim == 64 || kTall ? 2 : 3) : kWide ? 2 : 4;
  static_assert(!(kFused && kWide), "no registers for dQ");
  static constexpr int kThreads = 128 * (1 + kConsumers);
  static constexpr int kKeyBytes = tile_bytes(kBlockN, kHeadDim);
  static constexpr int kQueryBytes = tile_bytes(kBlockM, kHeadDim);
  static constexpr int kDsBytes = tile_bytes(kBlockN, kBlockM);
  static constexpr int kDsBuffers = kWhole || kTall ? kStages : 3;
  static constexpr int kK = 0, kV = kKeyBytes, kQ = 2 * kKeyBytes;
  static constexpr int kDout = kQ + kStages * kQueryBytes;
  static constexpr int kDs = kDout + kStages * kQueryBytes;
  static constexpr int kWeights = kDs;  // kWide: P^T and dS^T
  static constexpr int kDq = kDs + (kFused ? kDsBuffers : kWide ? 2 : 0) * kDsBytes;
  static constexpr int kLse2 = kDq + (kTall ? kBlockM * kHeadDim * 4 : 0);
  static constexpr int kVectors = kGroups ? kBlockN / 64 : 1;  // a piece of 64 keys has its own
  static constexpr int kVectorBytes = kStages * kVectors * kBlockM * 4;
  static constexpr int kDelta = kLse2 + kVectorBytes;
  static constexpr int kLandmark = kDelta + kVectorBytes;  // gradients of the landmark's scores
  static constexpr int kSeen = kLandmark + (kGroups ? kVectorBytes : 0);
  static constexpr int kAsideBytes = 32;  // per consumer warp; as much for the producers
  static constexpr int kAside = kSeen + 64 * kConsumers * 8;
  static constexpr int kBarriers = kAside + (4 * kConsumers + 1) * kAsideBytes;
  static constexpr int kAlignment =
      kTall && kHeadDim > 64 ? 0 : 1024;  // no room: see attn_bwd_sm90_kernel
  static constexpr int kSharedBytes = kBarriers + 256 + kAlignment;
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
  using QueryState =
      std::conditional_t<Traits::kStages == 3, CountedState<3>, PipelineState<Traits::kStages>>;
  static constexpr int kQueryBarriers = Traits::kBarriers + 2 * KeyPipeline::kBytes;
  static constexpr int kDsBarrier = kQueryBarriers + 2 * QueryPipeline::kBytes;
  static constexpr int kQueue = kDsBarrier + 8;
  static constexpr int kDqBarriers = kQueue + TileQueue::kBytes;
  static_assert(kDqBarriers + Pipeline<2>::kBytes <= Traits::kBarriers + 256,
                "no room for the barriers");
  static constexpr bool kOrdered = std::is_base_of_v<OrderedKeys<kBlockN>, Tiles>;

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
    q_pipe.init(kConsumerWarps, Traits::kGroups ? 1 : 0);
    dout_pipe.init(kConsumerWarps, Traits::kGroups ? 1 : 0);
    queue.pipeline.init(kConsumerWarps + (Traits::kGroups || kOrdered ? 3 : 1));
    for (int i = 0; kOrdered && i < 2; ++i) {
      ptx::mbarrier_init(dq_full(i), kConsumerWarps);
      ptx::mbarrier_init(dq_empty(i), 1);
    }
    ptx::mbarrier_init(smem + kDsBarrier, kConsumerWarps);
    ptx::fence_mbarrier_init();
  }

  // kOrdered: dQ of a step is in shared memory; that of the step before has been read from there.
  // Both by the stage of the step behind.
  __device__ __forceinline__ uint32_t dq_full(uint32_t stage) const {
    return smem + kDqBarriers + stage * 8;
  }
  __device__ __forceinline__ uint32_t dq_empty(uint32_t stage) const { return dq_full(stage) + 16; }

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

  // ---- consumers: what waits in shared memory, since registers are scarce ----

  __device__ __forceinline__ uint32_t aside(int warpgroup) const {
    return smem + Traits::kAside +
           static_cast<uint32_t>(warpgroup * 128 + warpgroup_thread()) / 32 * Traits::kAsideBytes;
  }

  // From the end of a head's blocks [bounds.x, bounds.y) of dq_sum to the next head's first.
  __device__ __forceinline__ int blocks_between(int2 bounds) const {
    return p.head_step * p.blocks_per_head - (bounds.y - bounds.x);
  }

  // Blocks of dq_sum that this step belongs to, in shared memory, and the step before.
  __device__ __forceinline__ int last_block(int warpgroup, int m) const {
    const int2 bounds = ptx::load_shared_int2(aside(warpgroup) + 24);
    const int block = ptx::load_shared_4(aside(warpgroup) + 12);
    return m > bounds.x ? block - 1 : block - 1 - blocks_between(bounds);
  }
  // The query block of the next step.
  __device__ __forceinline__ int next_block(int warpgroup, int m) const {
    const int2 bounds = ptx::load_shared_int2(aside(warpgroup) + 24);
    int block = ptx::load_shared_4(aside(warpgroup) + 12) + 1;
    if (++m == bounds.y) {
      m = bounds.x;
      block += blocks_between(bounds);
    }
    __syncwarp();
    ptx::store_shared_4(aside(warpgroup) + 12, block);
    __syncwarp();
    return m;
  }

  // kOrdered: in the order of for_each_block, and the query block itself is in shared memory.
  __device__ __forceinline__ int ordered_block(int warpgroup) const {
    return ptx::load_shared_4(aside(warpgroup) + 12);
  }
  __device__ __forceinline__ void go_to_next_block(int warpgroup) const {
    const int2 bounds = ptx::load_shared_int2(aside(warpgroup) + 24);
    int m = ordered_block(warpgroup);
    m += bounds.x <= bounds.y ? 1 : -1;
    __syncwarp();
    ptx::store_shared_4(aside(warpgroup) + 12, m == bounds.y ? bounds.x : m);
    __syncwarp();
  }

  // ---- producers ----

  // The place in the queue, while a tile is loaded: registers are scarce.
  __device__ __forceinline__ uint32_t place_aside() const {
    return smem + Traits::kAside + 4 * Traits::kConsumers * Traits::kAsideBytes +
           static_cast<uint32_t>(warpgroup_thread()) / 32 * 4;
  }
  __device__ __forceinline__ void put_aside() const {
    ptx::store_shared_4(place_aside(), queue.state.step);
  }
  __device__ __forceinline__ void take_back() {
    queue.state.step = ptx::load_shared_4(place_aside());
  }

  // kOfQ: keys and queries, else values and dO.
  template <bool kOfQ>
  __device__ __forceinline__ void load_keys(const KeyWork& work) const {
    const uint32_t full = (kOfQ ? k_pipe : v_pipe).acquire(key_state(), Traits::kKeyBytes);
    const uint32_t dst = smem + (kOfQ ? Traits::kK : Traits::kV);
    if constexpr (Traits::kGroups) {
#pragma unroll 1
      for (int i = 0; i < Traits::kVectors * kChunks; ++i) {
        const int chunk = i % kChunks, piece = i / kChunks;
        ptx::tma_load_5d(dst + chunk * chunk_bytes(kBlockN) + piece * chunk_bytes(64),
                         &(kOfQ ? p.k : p.v)[0], full, chunk * kChunkColumns,
                         p.tiles[work.piece + piece].row0, 0, work.head, work.batch);
      }
    } else {
      int2 at = make_int2(work.key0, work.phase);
      if constexpr (Tiles::kPadded) at = Tiles::keys_at(p, work);
#pragma unroll 1
      for (int c = 0; c < kChunks; ++c) {
        ptx::tma_load_5d(dst + c * chunk_bytes(kBlockN), &(kOfQ ? p.k : p.v)[work.map], full,
                         c * kChunkColumns, at.x, at.y, work.head, work.batch);
      }
    }
  }
  // lse2 or delta of a block of queries.
  template <bool kOfQ>
  __device__ __forceinline__ void load_statistics(uint32_t full, const QueryState& state,
                                                  const KeyWork& work, int head, int m) const {
    const uint32_t dst =
        smem + (kOfQ ? Traits::kLse2 : Traits::kDelta) + state.stage() * kBlockM * 4;
    const int block = (work.batch * p.Hq + head) * p.blocks_per_head + work.block0 + m;
    ptx::bulk_load(dst, (kOfQ ? p.lse2 : p.delta) + int64_t{block} * kBlockM, full, kBlockM * 4);
  }

  template <bool kOfQ>
  __device__ __forceinline__ void load_queries(const QueryState& state, const KeyWork& work,
                                               int head, int m) const {
    constexpr int kStatistics = Traits::kGroups ? 0 : kBlockM * 4;
    const uint32_t full =
        (kOfQ ? q_pipe : dout_pipe).acquire(state, Traits::kQueryBytes + kStatistics);
    const uint32_t dst =
        smem + (kOfQ ? Traits::kQ : Traits::kDout) + state.stage() * Traits::kQueryBytes;
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      ptx::tma_load_5d(dst + c * chunk_bytes(kBlockM), &(kOfQ ? p.q : p.dout)[work.map], full,
                       c * kChunkColumns, work.origin + m * kBlockM, work.phase, head, work.batch);
    }
    if constexpr (!Traits::kGroups) load_statistics<kOfQ>(full, state, work, head, m);
  }

  // kOrdered: blocks of queries, in the order of the steps. (Elsewhere a loop in place of this is
  // other machine code for some families.)
  template <class Do>
  __device__ __forceinline__ void for_each_block(const KeyWork& work, const QueryRange& range,
                                                 Do&& run) const {
    int m = work.down ? range.end - 1 : range.begin;
#pragma unroll 1
    for (int left = range.end - range.begin; left > 0; --left) {
      run(m);
      m += work.down ? -1 : 1;
    }
  }

  // kOrdered: tiles that others wait for are never left to a block of threads that does not run
  // yet.
  __device__ __forceinline__ int next_tile() const {
    if constexpr (kOrdered) return atomicAdd(p.counter, 1);
    return ptx::num_blocks() + atomicAdd(p.counter, 1);
  }

  template <bool kOfQ>
  __device__ __forceinline__ void produce() {
    QueryState state;
    for (int index = kOfQ ? kOrdered ? next_tile() : blockIdx.x : queue.take_alone();;
         index = kOfQ ? next_tile() : queue.take_alone()) {
      if (kOfQ) queue.publish(index);
      if (index >= p.order.num_tiles) break;
      const KeyWork work = Tiles::find(p, index);
      const QueryRange range = queries(work, 0, kBlockN);
      if (range.end <= range.begin) {
        (kOfQ ? k_pipe : v_pipe).acquire(key_state(), 0);
        continue;
      }
      load_keys<kOfQ>(work);
      put_aside();
#pragma unroll 1
      for (int head = work.first_head; head < work.end_head; head += p.head_step) {
        if constexpr (kOrdered) {
          for_each_block(work, range, [&](int m) {
            load_queries<kOfQ>(state, work, head, m);
            state.advance();
          });
        } else {
#pragma unroll 1
          for (int m = range.begin; m < range.end; ++m) {
            load_queries<kOfQ>(state, work, head, m);
            state.advance();
          }
        }
      }
      take_back();
    }
  }

  // kOrdered: adds dQ of every other step to dq_sum, each when the tile before this one has; the
  // first writes it, or adds to what other launches left. `parity`: of the steps.
  __device__ __forceinline__ void add_in_turn(uint32_t parity) {
    constexpr int kFloats = kBlockM * kHeadDim;
    uint32_t step = 0;
    while (true) {
      const int index = queue.take_alone();
      if (index >= p.order.num_tiles) break;
      const KeyWork work = Tiles::find(p, index);
      const QueryRange range = queries(work, 0, kBlockN);
      QueryRange before;
      const int place = Tiles::place(p, work);
      if (place > 0) before = queries(work, work.down ? -kBlockN : kBlockN, kBlockN);
#pragma unroll 1
      for (int head = work.first_head; head < work.end_head; ++head) {
        for_each_block(work, range, [&](int m) {
          if (step++ % 2 != parity) return;
          const int block = (work.batch * p.Hq + head) * p.blocks_per_head + m;
          const auto turn = [&] { return p.turns + ptx::opaque(block); };
          ptx::mbarrier_wait(dq_full(parity ^ 1), (step - 1) / 2 % 2);
          float* to = p.dq_sum + int64_t{block} * kFloats;
          if (m >= before.begin && m < before.end) {
            while (ptx::load_acquire(turn()) != place) {
            }
            ptx::fence_async_proxy_global();
            ptx::bulk_reduce_add(to, smem + Traits::kDq, kFloats * 4);
          } else if constexpr (Tiles::kContinues) {
            ptx::bulk_reduce_add(to, smem + Traits::kDq, kFloats * 4);
          } else {
            ptx::bulk_store(to, smem + Traits::kDq, kFloats * 4);
          }
          ptx::tma_store_commit();
          ptx::tma_store_wait_read<0>();
          ptx::mbarrier_arrive(dq_empty(parity));
          ptx::tma_store_wait<0>();
          ptx::store_release(turn(), place + 1);
        });
      }
    }
  }

  // The statistics of the groups of all pieces (landmark_bwd.h), 64 rows at a time, by a thread of
  // their own. What is not written, since none of 64 rows sees the group, is 0.
  template <bool kOfQ>
  __device__ __forceinline__ void load_group_statistics(const QueryState& state,
                                                        const KeyWork& work, int head,
                                                        int m) const {
    constexpr int kPerVector = Traits::kVectors * kHalves;
    constexpr int kLoads = kPerVector * (kOfQ ? 1 : 2);  // lam; dsum and w
    const uint32_t full = (kOfQ ? q_pipe : dout_pipe).acquire(state, kLoads * 256);
#pragma unroll 1
    for (int i = 0; i < kLoads; ++i) {
      const int piece = work.piece + i / kHalves % Traits::kVectors,
                row = m * kBlockM + i % kHalves * 64;
      const int first = p.tiles[piece].begin() - work.shift;  // that sees the group
      const float* from = zero_statistics;
      if (min(row + 63, p.Tq - 1) >= max(first, row)) {
        from = (kOfQ ? p.vectors.lam : p.vectors.dsum) + row +
               static_cast<int64_t>((work.batch * p.Hq + head) * p.vectors.num_groups +
                                    p.groups[piece]) *
                   p.vectors.pitch;
        if (i >= kPerVector) from += p.vectors.to_w;
      }
      const uint32_t dst = smem + (kOfQ ? Traits::kLse2 : Traits::kDelta) +
                           state.stage() * (Traits::kVectors * kBlockM * 4) +
                           i / kPerVector * Traits::kVectorBytes + i % kPerVector * 256;
      ptx::bulk_load(dst, from, full, 256);
    }
  }
  template <bool kOfQ>
  __device__ __forceinline__ void produce_group_statistics() {
    QueryState state;
    while (true) {
      const int index = queue.take_alone();
      if (index >= p.order.num_tiles) break;
      const KeyWork work = Tiles::find(p, index);
      const QueryRange range = queries(work, 0, kBlockN);
      put_aside();
      // There is no register for the last head.
      ptx::store_shared_4(place_aside() + 16, work.end_head);
#pragma unroll 1
      for (int head = work.first_head; head < ptx::load_shared_4(place_aside() + 16); ++head) {
#pragma unroll 1
        for (int m = range.begin; m < range.end; ++m) {
          load_group_statistics<kOfQ>(state, work, head, m);
          state.advance();
        }
      }
      take_back();
    }
  }
};

}  // namespace lctx::cuda
