// Math: O_i = sum_j softmax_j(scale q_i . k_j) v_j and lse_i, over the keys that row i sees.
//       Per block of keys: S = Q K^T, (m, l) online, O <- alpha O + P V; at the end O / l.
// Tile map: persistent blocks of one producer warpgroup (one thread issues TMA) and kConsumers
//       warpgroups of 64 query rows; a tile is (batch, query head, 64 kConsumers rows), its keys
//       are walked right to left in blocks of kBlockN, so that masked blocks come first.
//       GQA: query head h reads key/value head h / G through the tensor map's coordinate.
//       What differs between the methods is in three policies: Tiles (attn_fwd_tiles.cuh: which
//       rows and keys), Scores (attn_fwd_scores.cuh: which blocks of keys, their mask, scores to
//       weights) and Rows (attn_fwd_rows.cuh: what becomes of finished rows).
// Pipeline: K and V have kStages stages each with their own barriers. Inside a warpgroup S of the
//       next block is issued together with P V of the last one, and the softmax runs under P V.
//       Tile numbers come from tile_schedule.cuh, one ahead.
// Memory: Q once, K and V once per tile (L2), O and lse once. Shared: Q + O + kStages (K + V).
//       Registers: 40/232 (two consumers) or 32/160 (three), no spills.
// Limits: bf16, fp16; D = Dv <= kHeadDim (TMA fills the rest with zeros); strides and data at
//       multiples of 16 bytes; scale > 0.
#pragma once

#include <type_traits>

#include "attn_fwd_rows.cuh"
#include "attn_fwd_scores.cuh"

namespace lctx::cuda {

template <class T_, int kHeadDim_, int kBlockN_, int kConsumers_, bool kStagesO_>
struct FwdTile {
  using T = T_;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr int kBlockN = kBlockN_;
  static constexpr int kConsumers = kConsumers_;
  // O has shared memory of its own and leaves by TMA; else it leaves from registers.
  static constexpr bool kStagesO = kStagesO_;
  static constexpr int kStages = 2;
  // A second Q, where there is room, lets the next tile's first scores run under this one's end.
  static constexpr int kQStages = kStagesO ? 2 : 1;
  static constexpr int kBlockM = 64 * kConsumers;
  static constexpr int kThreads = 128 * (1 + kConsumers);
  static constexpr int kProducerRegisters = kConsumers == 2 ? 40 : 32;
  static constexpr int kConsumerRegisters = kConsumers == 2 ? 232 : 160;
  static constexpr int kQBytes = tile_bytes(kBlockM, kHeadDim);
  static constexpr int kKVBytes = tile_bytes(kBlockN, kHeadDim);
  static constexpr int kK = kQStages * kQBytes;
  static constexpr int kV = kK + kStages * kKVBytes;
  static constexpr int kO = kV + kStages * kKVBytes;
  static constexpr int kBarriers = kO + (kStagesO ? kQBytes : 0);
  static constexpr int kSharedBytes = kBarriers + 256 + 1024;  // barriers, alignment
};

// A tile shape and the three policies, as one type that the kernel is compiled for.
template <class Tile, class Tiles_, class Scores_, class Rows_>
struct FwdTraits : Tile {
  using Tiles = Tiles_;
  using Scores = Scores_;
  using Rows = Rows_;
  struct Params : FwdParams, Tiles::Params, Scores::Params, Rows::Params {};
};

template <class Traits_>
struct FwdKernel {
  using Traits = Traits_;
  using T = typename Traits::T;
  using Tiles = typename Traits::Tiles;
  using Scores = typename Traits::Scores;
  using Rows = typename Traits::Rows;
  using State = typename Scores::State;
  static constexpr int kHeadDim = Traits::kHeadDim, kBlockN = Traits::kBlockN;
  static constexpr int kChunks = kHeadDim / kChunkColumns;
  static constexpr int kConsumerWarps = 4 * Traits::kConsumers;
  using KVPipeline = Pipeline<Traits::kStages>;
  using KVState = PipelineState<Traits::kStages>;
  using QPipeline = Pipeline<Traits::kQStages>;
  using QState = PipelineState<Traits::kQStages>;

  static constexpr int kQueue = Traits::kBarriers + 2 * KVPipeline::kBytes + QPipeline::kBytes;

  const typename Traits::Params& p;
  const uint32_t smem;
  KVPipeline k_pipe, v_pipe;
  QPipeline q_pipe;
  TileQueue queue;

  __device__ __forceinline__ FwdKernel(const typename Traits::Params& params, char* base)
      : p(params),
        smem(ptx::smem_address(base)),
        k_pipe(smem + Traits::kBarriers),
        v_pipe(smem + Traits::kBarriers + KVPipeline::kBytes),
        q_pipe(smem + Traits::kBarriers + 2 * KVPipeline::kBytes),
        queue{TileQueue::Ring(smem + kQueue),
              reinterpret_cast<int*>(base + kQueue + TileQueue::Ring::kBytes)} {}

  __device__ __forceinline__ void init() const {
    k_pipe.init(kConsumerWarps);
    v_pipe.init(kConsumerWarps);
    q_pipe.init(kConsumerWarps);
    queue.pipeline.init(kConsumerWarps);
    ptx::fence_mbarrier_init();
  }

  // ---- tiles and rows ----

  __device__ __forceinline__ int row_step() const {
    if constexpr (Tiles::kStrided) return p.rate;
    return 1;
  }
  // Position in the sequence of a row of the tile's tensors.
  __device__ __forceinline__ int position(const Work& work, int row) const {
    return row * row_step() + work.phase;
  }
  __device__ __forceinline__ int64_t lse_offset(const Work& work, int row) const {
    return (static_cast<int64_t>(work.batch) * p.Hq + work.head) * p.Tq + position(work, row);
  }

  // The tile again, from its number: cheaper than registers that are alive through the main loop.
  __device__ __forceinline__ Work find_work_again(int index) const {
    return Tiles::find(p, ptx::opaque(index));
  }

  // ---- producer ----

  // Loads a block of keys or values into the next stage at `offset`. `work.head` is theirs.
  __device__ __forceinline__ void load_block(const KVPipeline& pipe, KVState& state, int offset,
                                             const CUtensorMap* map, const Work& work,
                                             const KeyBlock& block) const {
    const uint32_t full = pipe.acquire(state, Traits::kKVBytes);
    const uint32_t dst = smem + offset + state.stage() * Traits::kKVBytes;
#pragma unroll 1
    for (int c = 0; c < kChunks; ++c) {
      ptx::tma_load_5d(dst + c * chunk_bytes(kBlockN), map, full, c * kChunkColumns, block.row,
                       block.phase, work.head, work.batch);
    }
    state.advance();
  }

  __device__ __forceinline__ void load_queries(QState& state, const CUtensorMap* map,
                                               const Work& work) const {
    const uint32_t full = q_pipe.acquire(state, Traits::kQBytes);
    const uint32_t dst = smem + state.stage() * Traits::kQBytes;
#pragma unroll 1
    for (int i = 0; i < Traits::kConsumers * kChunks; ++i) {
      ptx::tma_load_5d(dst + i * chunk_bytes(64), map, full, i % kChunks * kChunkColumns,
                       work.row0 + i / kChunks * 64, work.phase, work.head, work.batch);
    }
    state.advance();
  }

  __device__ __forceinline__ KeyRange tile_keys(const Work& work) const {
    const int rows = min(Traits::kBlockM, work.row_end - work.row0);
    return Scores::range(p, work.position0, work.position0 + rows - 1, work.num_keys);
  }

  __device__ __forceinline__ void produce() {
    KVState k_state, v_state;
    QState q_state;
    int next = blockIdx.x;
    while (true) {
      const int index = next;
      queue.publish(index);
      if (index >= p.order.num_tiles) break;
      next = gridDim.x + atomicAdd(p.counter, 1);
      Work work = Tiles::find(p, index);
      const KeyRange keys = tile_keys(work);
      if (keys.end <= keys.begin) continue;
      work.head = p.per_group.divide(work.head);
      // Keys run one block ahead of values, as the consumers take them.
#pragma unroll 1
      for (int n = keys.end - 1; n >= keys.begin - 1; --n) {
        if (n >= keys.begin) {
          const KeyBlock block = Scores::block(p, work, n);
          load_block(k_pipe, k_state, Traits::kK, block.k, work, block);
        }
        if (n == keys.end - 1) {
          const Work own = find_work_again(index);
          load_queries(q_state, &p.q[own.map], own);
        } else {
          const KeyBlock block = Scores::block(p, work, n + 1);
          load_block(v_pipe, v_state, Traits::kV, block.v, work, block);
        }
      }
      if constexpr (Rows::kRetrieves) Rows::load(*this, index, q_state, v_state);
    }
  }

  // ---- consumers ----

  __device__ __forceinline__ void store_lse(int warpgroup, const Work& work,
                                            const float (&lse)[2]) const {
    const int thread = warpgroup_thread();
    if (thread % 4 != 0) return;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int row = work.row0 + warpgroup * 64 + fragment_row(thread) + 8 * i;
      if (row < work.row_end) p.lse[lse_offset(work, row)] = lse[i];
    }
  }

  __device__ __forceinline__ void mask_block(int index, int warpgroup, int n,
                                             float (&s)[kBlockN / 2], State& state) const {
    const Work work = find_work_again(index);
    Scores::mask(p, work, work.position0 + warpgroup * 64, n, s, state);
  }

  // What the rows start from; without a carried result they start with the first product.
  __device__ __forceinline__ void begin_rows(int warpgroup, const Work& work,
                                             float (&o)[kHeadDim / 2], State& state) const {
    if constexpr (Rows::kCarries) {
      ptx::grid_dependency_wait();
      Rows::begin(*this, warpgroup, work, o, state);
    }
  }

  static __device__ __forceinline__ void scale_rows(float (&o)[kHeadDim / 2],
                                                    const float (&alpha)[2]) {
#pragma unroll
    for (int i = 0; i < kHeadDim / 2; ++i) o[i] *= alpha[i / 2 % 2];
  }

  // Lets `blocks` blocks of keys and values pass unread.
  __device__ __forceinline__ void skip(int blocks, KVState& k_state, KVState& v_state) const {
    for (; blocks > 0; --blocks) {
      k_pipe.wait(k_state);
      k_pipe.release(k_state);
      k_state.advance();
      v_pipe.wait(v_state);
      v_pipe.release(v_state);
      v_state.advance();
    }
  }

  // A tile as one warpgroup sees it.
  struct Turn {
    int index;
    KeyRange keys;  // blocks that its rows see
    int right;      // blocks of the tile to the right of them, which it only releases
    bool empty;     // its rows see no keys
    bool loaded;    // the tile has queries and keys in shared memory
  };

  __device__ __forceinline__ Turn next_turn(int warpgroup) {
    Turn turn{queue.take(), {}, 0, true, false};
    if (turn.index >= p.order.num_tiles) return turn;
    const Work work = Tiles::find(p, turn.index);
    const KeyRange all = tile_keys(work);
    const int position0 = work.position0 + warpgroup * 64;
    const int rows = min(64, work.row_end - work.row0 - warpgroup * 64);
    KeyRange keys = Scores::range(p, position0, position0 + rows - 1, work.num_keys);
    keys.begin = max(keys.begin, all.begin);
    keys.end = min(keys.end, all.end);
    turn.keys = keys;
    turn.empty = keys.end <= keys.begin;
    turn.loaded = all.end > all.begin;
    turn.right = turn.empty ? all.end - all.begin : all.end - keys.end;
    return turn;
  }

  __device__ __forceinline__ void wait_first(const QState& q_state, const KVState& k_state) const {
    q_pipe.wait(q_state);
    k_pipe.wait(k_state);
  }

  __device__ __forceinline__ void issue_scores(int warpgroup, const QState& q_state,
                                               const KVState& k_state,
                                               float (&s)[kBlockN / 2]) const {
    wgmma_fence();
    gemm_nt<T, kBlockN, kHeadDim>(
        s, smem + q_state.stage() * Traits::kQBytes + warpgroup * tile_bytes(64, kHeadDim), 64,
        smem + Traits::kK + k_state.stage() * Traits::kKVBytes, kBlockN);
    wgmma_commit();
  }

  __device__ __forceinline__ void issue_values(const KVState& v_state,
                                               const uint32_t (&weights)[kBlockN / 16][4],
                                               float (&o)[kHeadDim / 2], bool started) const {
    v_pipe.wait(v_state);
    wgmma_fence();
    gemm_rn<T, kHeadDim, kBlockN>(
        o, weights, smem + Traits::kV + v_state.stage() * Traits::kKVBytes, kBlockN, started);
    wgmma_commit();
  }

  // Rows without keys.
  __device__ __forceinline__ void finish_empty(int warpgroup, const Turn& turn, QState& q_state,
                                               KVState& k_state, KVState& v_state) const {
    if (turn.loaded) {
      q_pipe.wait(q_state);
      q_pipe.release(q_state);
      q_state.advance();
      skip(turn.right, k_state, v_state);
      if constexpr (Rows::kRetrieves) Rows::skip(*this, turn.index, q_state, v_state);
    }
    const Work work = find_work_again(turn.index);
    State state;
    float o[kHeadDim / 2] = {}, inverse[2], lse[2];
    begin_rows(warpgroup, work, o, state);
    state.finish(p.scale_log2, inverse, lse);
    Rows::finish(*this, warpgroup, work, o, inverse);
    store_lse(warpgroup, work, lse);
  }

  __device__ __forceinline__ void consume(int warpgroup) {
    constexpr bool kPrefetch = Traits::kQStages > 1;
    KVState k_state, v_state;
    QState q_state;
    float s[kBlockN / 2];
    bool prefetched = false;  // s holds the first scores of `turn`
    Turn turn = next_turn(warpgroup);
    while (turn.index < p.order.num_tiles) {
      if (turn.empty) {
        finish_empty(warpgroup, turn, q_state, k_state, v_state);
        turn = next_turn(warpgroup);
        continue;
      }
      const int index = turn.index;
      const KeyRange keys = turn.keys;
      float o[kHeadDim / 2];
      float alpha[2], inverse[2], lse[2];
      State state;
      uint32_t weights[kBlockN / 16][4];
      // First block: nothing of this tile to overlap with yet.
      int n = keys.end - 1;
      if (!prefetched) {
        skip(turn.right, k_state, v_state);
        wait_first(q_state, k_state);
        issue_scores(warpgroup, q_state, k_state, s);
      }
      if constexpr (Rows::kCarries) {
        begin_rows(warpgroup, find_work_again(index), o, state);
      }
      wgmma_wait<0>();
      k_pipe.release(k_state);
      k_state.advance();
      if (keys.needs_mask(n)) mask_block(index, warpgroup, n, s, state);
      Scores::template weigh<true>(p, s, state, alpha);
      accumulator_to_a<T, kBlockN>(s, weights);
      if constexpr (Rows::kCarries) scale_rows(o, alpha);

      bool started = Rows::kCarries;
      const auto step = [&](auto masked) {
        issue_scores(warpgroup, q_state, k_state, s);
        issue_values(v_state, weights, o, started);
        started = true;
        wgmma_wait<1>();
        k_pipe.release(k_state);
        k_state.advance();
        constexpr bool kMasked = decltype(masked)::value;
        if constexpr (kMasked) mask_block(index, warpgroup, n, s, state);
        Scores::template weigh<kMasked>(p, s, state, alpha);
        // ptxas would hoist the wait for P V above the softmax. It does not move it across a spin,
        // and this one needs the weights.
        if (n > keys.begin) k_pipe.wait(k_state, state.settled());
        wgmma_wait<0>();
        v_pipe.release(v_state);
        v_state.advance();
        scale_rows(o, alpha);
        accumulator_to_a<T, kBlockN>(s, weights);
      };
      if (n > keys.begin) k_pipe.wait(k_state);
      for (--n; n >= keys.begin; --n) {
        if (keys.needs_mask(n)) {
          step(std::true_type{});
        } else {
          step(std::false_type{});
        }
      }
      if constexpr (!Rows::kRetrieves) {
        q_pipe.release(q_state);
        q_state.advance();
      }

      issue_values(v_state, weights, o, started);
      const KVState last = v_state;
      v_state.advance();
      state.finish(p.scale_log2, inverse, lse);
      const Work work = find_work_again(index);
      const int left = keys.begin - tile_keys(work).begin;  // blocks to the left of those it sees
      store_lse(warpgroup, work, lse);
      bool retrieves = false;  // and its memory holds the values' other stage
      if constexpr (Rows::kRetrieves) retrieves = Rows::plan(*this, work, q_state, v_state);
      if constexpr (kPrefetch) {
        turn = next_turn(warpgroup);
        // One block may pass unread while this tile still holds a stage, none while its memory
        // holds the other. Otherwise the product is on stale data and ignored: a branch around it
        // would serialise.
        prefetched = left == 0 && !turn.empty && turn.right <= (retrieves ? 0 : 1);
        if (prefetched) {
          skip(turn.right, k_state, v_state);
          wait_first(q_state, k_state);
        }
        issue_scores(warpgroup, q_state, k_state, s);
        wgmma_wait<1>();
      } else {
        wgmma_wait<0>();
      }
      v_pipe.release(last);
      skip(left, k_state, v_state);
      if constexpr (Rows::kRetrieves) {
        Rows::retrieve(*this, warpgroup, index, q_state, v_state, o, inverse);
      }
      Rows::finish(*this, warpgroup, find_work_again(index), o, inverse);
      if constexpr (kPrefetch) {
        wgmma_wait<0>();
      } else {
        turn = next_turn(warpgroup);
      }
    }
    if (threadIdx.x % 128 == 0) ptx::tma_store_wait<0>();
    // What this kernel overlapped with has ended when it ends.
    if constexpr (Rows::kRetrieves) ptx::grid_dependency_wait();
  }
};

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, 1)
    attn_fwd_sm90_kernel(const __grid_constant__ typename Traits::Params p) {
  extern __shared__ char shared[];
  char* base = shared + ((1024 - (ptx::smem_address(shared) & 1023)) & 1023);
  FwdKernel<Traits> kernel(p, base);
  if constexpr (Traits::Rows::kCarries) ptx::grid_dependents_launch();
  if constexpr (Traits::Rows::kRetrieves) Traits::Rows::init(kernel);
  if (threadIdx.x == 0) {
    kernel.init();
    ptx::prefetch_tensor_map(&p.q[0]);
    ptx::prefetch_tensor_map(&p.k[0]);
    ptx::prefetch_tensor_map(&p.v[0]);
    ptx::prefetch_tensor_map(&p.out[0]);
  }
  __syncthreads();
  if (threadIdx.x < 128) {
    ptx::setmaxnreg_dec<Traits::kProducerRegisters>();
    if (threadIdx.x == 0) kernel.produce();
  } else {
    ptx::setmaxnreg_inc<Traits::kConsumerRegisters>();
    // Through a shuffle, so that the compiler knows it is the same for the whole warp.
    kernel.consume(__shfl_sync(~0u, threadIdx.x / 128 - 1, 0));
  }
}

}  // namespace lctx::cuda
