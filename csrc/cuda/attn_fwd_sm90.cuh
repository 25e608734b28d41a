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
//       next block is issued together with P V of the last one, and the softmax runs under P V, or
//       under the products of the other warpgroups (TurnsTile).
//       Tile numbers come from tile_schedule.cuh, one ahead.
// Memory: Q once, K and V once per tile (L2), O and lse once. Shared: Q + O + kStages (K + V).
//       Registers: 40/232 (two consumers), 32/160 (three) or evenly (one), no spills.
// Limits: bf16, fp16; D = Dv <= kHeadDim (TMA fills the rest with zeros); strides and data at
//       multiples of 16 bytes; scale > 0.
#pragma once

#include <type_traits>

#include "../common/turns.cuh"
#include "attn_fwd_rows.cuh"
#include "attn_fwd_scores.cuh"
#include "attn_fwd_shape.cuh"

namespace lctx::cuda {

template <class Traits_>
struct FwdKernel {
  using Traits = Traits_;
  using T = typename Traits::T;
  using Tiles = typename Traits::Tiles;
  using Scores = typename Traits::Scores;
  using Rows = typename Traits::Rows;
  using State = typename Scores::State;
  using Carried = typename Rows::template Carried<FwdKernel>;
  static constexpr int kHeadDim = Traits::kHeadDim, kValueDim = Traits::kValueDim;
  static constexpr int kBlockN = Traits::kBlockN;
  static constexpr int kFirstN = Traits::kFirstN;
  static constexpr bool kShortFirst = kFirstN < kBlockN;  // then tiles have two blocks or more
  static constexpr int kChunks = kHeadDim / kChunkColumns;
  static constexpr bool kRescalesLate =
      Traits::kRescalesLate || Scores::kFolds || (Scores::kRescalesLate && kHeadDim > 64);
  using Turns = lctx::Turns<Traits::kTakesTurns, Traits::kConsumers, 1 + Traits::kConsumers>;
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
        queue(smem + kQueue) {}

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

  // Loads kColumns columns of a block of keys or values into the next stage at `offset`.
  // `work.head` is theirs.
  template <int kColumns>
  __device__ __forceinline__ void load_block(const KVPipeline& pipe, KVState& state, int offset,
                                             const CUtensorMap* map, const Work& work,
                                             const KeyBlock& block, int column) const {
    constexpr int kBytes = tile_bytes(kBlockN, kColumns);
    const uint32_t full = pipe.acquire(state, kBytes);
    const uint32_t dst = smem + offset + state.stage() * kBytes;
#pragma unroll 1
    for (int c = 0; c < kColumns / kChunkColumns; ++c) {
      ptx::tma_load_5d(dst + c * chunk_bytes(kBlockN), map, full, column + c * kChunkColumns,
                       block.row, block.phase, work.head, work.batch);
    }
    state.advance();
  }

  __device__ __forceinline__ void load_queries(QState& state, const CUtensorMap* map,
                                               const Work& work) const {
    const uint32_t full = q_pipe.acquire(state, Traits::kQBytes);
    const uint32_t dst = smem + state.stage() * Traits::kQBytes;
#pragma unroll 1
    for (int i = 0; i < Traits::kConsumers * kChunks; ++i) {
      const int2 at = Tiles::query_at(p, work, i / kChunks * 64);
      ptx::tma_load_5d(dst + i * chunk_bytes(64), map, full, i % kChunks * kChunkColumns, at.x,
                       at.y, work.head, work.batch);
    }
    state.advance();
  }

  // The blocks of the tile that `rows` rows from position0 on see.
  __device__ __forceinline__ KeyRange keys_of(const Work& work, int position0, int rows) const {
    KeyRange keys = Scores::range(p, work, position0, position0 + Tiles::position_of(p, rows - 1));
    if constexpr (Tiles::kSplitsKeys) {
      keys.begin = max(keys.begin, work.block_begin);
      keys.end = min(keys.end, work.block_end);
    }
    return keys;
  }
  __device__ __forceinline__ KeyRange tile_keys(const Work& work) const {
    return keys_of(work, work.position0, min(Traits::kBlockM, work.row_end - work.row0));
  }

  __device__ __forceinline__ void produce() {
    KVState k_state, v_state;
    QState q_state;
    int next = Tiles::first(p);
    while (true) {
      const int index = next;
      queue.publish(index);
      if (index >= Tiles::end(p)) break;
      next = Tiles::next(p, index);
      if constexpr (Rows::kMakesStates) {
        if (Tiles::makes_state(p, index)) {
          Rows::template States<FwdKernel>::load(*this, index, q_state, k_state, v_state);
          continue;
        }
      }
      Work work = Tiles::find(p, index);
      const KeyRange keys = tile_keys(work);
      if (keys.end <= keys.begin) continue;
      work.head = p.per_group.divide(work.head);
      // Keys run one block ahead of values, as the consumers take them.
#pragma unroll 1
      for (int n = keys.end - 1; n >= keys.begin - 1; --n) {
        if (n >= keys.begin) {
          const KeyBlock block = Scores::block(p, work, n);
          load_block<kHeadDim>(k_pipe, k_state, Traits::kK, block.k, work, block, 0);
        }
        if (n == keys.end - 1) {
          const Work own = find_work_again(index);
          load_queries(q_state, &p.q[own.map], own);
        } else {
          const KeyBlock block = Scores::block(p, work, n + 1);
          load_block<kValueDim>(v_pipe, v_state, Traits::kV, block.v, work, block, work.column);
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
      if (Rows::exists(p, work, row)) *Rows::lse(*this, work, row) = lse[i];
    }
  }

  template <int N>
  __device__ __forceinline__ void mask_block(int index, int warpgroup, int n, float (&s)[N],
                                             State& state) const {
    const Work work = find_work_again(index);
    Scores::mask(p, work, work.position0 + Tiles::position_of(p, warpgroup * 64), n, s, state);
  }

  // Lets `blocks` blocks of keys and values pass unread.
  __device__ __forceinline__ void skip(int blocks, KVState& k_state, KVState& v_state,
                                       int warpgroup = 0) const {
    for (; blocks > 0; --blocks) {
      Turns::take(warpgroup);
      Turns::pass(warpgroup);
      k_pipe.pass(k_state);
      v_pipe.pass(v_state);
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
    if (turn.index >= Tiles::end(p)) return turn;
    if constexpr (Rows::kMakesStates) {
      if (Tiles::makes_state(p, turn.index)) return turn;
    }
    const Work work = Tiles::find(p, turn.index);
    const KeyRange all = tile_keys(work);
    const int position0 = work.position0 + Tiles::position_of(p, warpgroup * 64);
    const int row0 = work.row0 + warpgroup * 64;
    const bool early = Traits::kShifts && row0 < work.row_begin;
    const int rows = early ? 0 : min(64, work.row_end - row0);
    KeyRange keys = keys_of(work, position0, rows);
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

  template <int N>
  __device__ __forceinline__ void issue_scores(int warpgroup, const QState& q_state,
                                               const KVState& k_state, float (&s)[N]) const {
    wgmma_fence();
    gemm_nt<T, 2 * N, kHeadDim>(
        s, smem + q_state.stage() * Traits::kQBytes + warpgroup * tile_bytes(64, kHeadDim), 64,
        smem + Traits::kK + k_state.stage() * Traits::kKBytes, kBlockN);
    wgmma_commit();
  }

  template <int N>
  __device__ __forceinline__ void issue_values(const KVState& v_state,
                                               const uint32_t (&weights)[N][4],
                                               float (&o)[kValueDim / 2], bool started) const {
    v_pipe.wait(v_state);
    wgmma_fence();
    gemm_rn<T, kValueDim, 16 * N>(o, weights, smem + Traits::kV + v_state.stage() * Traits::kVBytes,
                                  kBlockN, started);
    wgmma_commit();
  }

  // Rows without keys.
  __device__ __forceinline__ void finish_empty(int warpgroup, const Turn& turn, QState& q_state,
                                               KVState& k_state, KVState& v_state) const {
    if (turn.loaded) {
      q_pipe.pass(q_state);
      if constexpr (Traits::kTakesTurns) {  // the first block has no turn
        k_pipe.pass(k_state);
        v_pipe.pass(v_state);
      }
      skip(turn.right - Traits::kTakesTurns, k_state, v_state, warpgroup);
      if constexpr (Rows::kRetrieves) Rows::skip(*this, turn.index, q_state, v_state);
    }
    const Work work = find_work_again(turn.index);
    if (Traits::kShifts && work.row0 + warpgroup * 64 < work.row_begin) return;
    State state;
    Carried carried;
    float o[kValueDim / 2] = {}, inverse[2], lse[2];
    carried.start(*this, warpgroup, turn.index, o, state);
    state.finish(p.scale_log2, inverse, lse);
    carried.scale(o, inverse, state);
    carried.ask(*this, warpgroup, turn.index);
    carried.join(*this, warpgroup, work, inverse, lse);
    carried.add(*this, warpgroup, turn.index, o, inverse);
    Rows::finish(*this, warpgroup, work, o, inverse);
    store_lse(warpgroup, work, lse);
  }

  // What an ordinary instruction wrote to s must not meet the products: ptxas would serialise them.
  // A product of no consequence stands between.
  __device__ __forceinline__ void forget(float (&s)[kBlockN / 2]) const {
    wgmma_fence();
    gemm_nt<T, kBlockN, 16>(s, smem, 64, smem + Traits::kK, kBlockN);
    wgmma_commit();
    wgmma_wait<0>();
  }

  __device__ __forceinline__ void consume(int warpgroup) {
    constexpr bool kPrefetch = Traits::kQStages > 1;
    // The retrieval comes before the next tile's first scores, under which its rows then leave.
    constexpr bool kRetrievesFirst = kPrefetch && Rows::template kEarly<FwdKernel>;
    static_assert(!(kPrefetch && kShortFirst));
    KVState k_state, v_state;
    QState q_state;
    float s[kBlockN / 2];
    // Tiles that make states have to use the accumulators of the others: ptxas takes what nothing
    // has been written to for alive in all of the kernel. Else they end with their tile.
    float shared_o[Rows::kMakesStates ? kValueDim / 2 : 1];
    bool prefetched = false;  // s holds the first scores of `turn`
    Turns::begin(warpgroup);
    Turn turn = next_turn(warpgroup);
    while (turn.index < Tiles::end(p)) {
      if constexpr (Rows::kMakesStates) {
        if (Tiles::makes_state(p, turn.index)) {
          using States = typename Rows::template States<FwdKernel>;
          States(*this, warpgroup, turn.index).run(q_state, k_state, v_state, shared_o, s);
          forget(s);
          prefetched = false;  // as it is; but it need not be kept meanwhile
          turn = next_turn(warpgroup);
          continue;
        }
      }
      if (turn.empty) {
        finish_empty(warpgroup, turn, q_state, k_state, v_state);
        turn = next_turn(warpgroup);
        continue;
      }
      const int index = turn.index;
      const KeyRange keys = turn.keys;
      float own_o[Rows::kMakesStates ? 1 : kValueDim / 2];
      auto& o = choose<Rows::kMakesStates>(own_o, shared_o);
      float alpha[2], inverse[2], lse[2];
      State state;
      uint32_t weights[kBlockN / 16][4];
      float short_s[kShortFirst ? kFirstN / 2 : 1];  // its own: as part of s it spills
      auto& first_s = choose<kShortFirst>(s, short_s);
      auto& first_weights = reinterpret_cast<uint32_t (&)[kFirstN / 16][4]>(weights);
      // First block: nothing of this tile to overlap with yet.
      int n = keys.end - 1;
      if (!prefetched) {
        skip(turn.right, k_state, v_state, warpgroup);
        wait_first(q_state, k_state);
        issue_scores(warpgroup, q_state, k_state, first_s);
      }
      Carried carried;
      carried.start(*this, warpgroup, index, o, state);
      if constexpr (Scores::kFolds) {
        Scores::begin(*this, warpgroup, find_work_again(index), n, state);
      }
      wgmma_wait<0>();
      k_pipe.leave(k_state);
      // A share of the keys may end with a block that needs no mask; weigh<true> wants one.
      if (Tiles::kSplitsKeys || Scores::needs_mask(keys, n, state)) {
        mask_block(index, warpgroup, n, first_s, state);
      }
      Scores::template weigh<true>(p, first_s, state, alpha);
      Scores::template to_a<T>(first_s, state, first_weights);
      carried.scale(o, alpha, state);

      bool started = Carried::kStarts;
      // Brings o into the terms of the weights that it is to be multiplied with next.
      const auto rescale = [&] {
        if constexpr (Scores::kFolds) {
          if (Scores::fold(*this, warpgroup, o, alpha, state)) started = false;
        } else if constexpr (Scores::kRescalesRarely) {
          if (__any_sync(~0u, alpha[0] != 1.f || alpha[1] != 1.f)) scale_rows<kValueDim>(o, alpha);
        } else {
          scale_rows<kValueDim>(o, alpha);
        }
      };
      const auto finish_values = [&] {
        wgmma_wait<0>();
        v_pipe.leave(v_state);
        if constexpr (!kRescalesLate) rescale();
      };
      const auto step = [&](auto masked, const auto& last_weights) {
        if constexpr (Traits::kWaitsEarly) k_pipe.wait(k_state);
        Turns::take(warpgroup);
        issue_scores(warpgroup, q_state, k_state, s);
        if constexpr (kRescalesLate) rescale();
        issue_values(v_state, last_weights, o, started);
        Turns::pass(warpgroup);
        started = true;
        if constexpr (Scores::kFolds) Scores::turn(p, n, state);
        wgmma_wait<1>();
        if constexpr (!Traits::kPinsWait) k_pipe.leave(k_state);
        constexpr bool kMasked = decltype(masked)::value;
        if constexpr (kMasked) mask_block(index, warpgroup, n, s, state);
        if constexpr (Traits::kWaitsEarly) {
          const auto between = [&](uint32_t zero) {
            if constexpr (Traits::kPinsWait) k_pipe.leave(k_state, zero);
            finish_values();
          };
          Scores::template weigh_in_two<Traits::kWaitsAfter>(p, s, state, alpha, between);
        } else {
          Scores::template weigh<kMasked>(p, s, state, alpha);
          // ptxas would hoist the wait for P V above the softmax. It does not move it across a
          // spin, and this one needs the weights.
          if (n > keys.begin) k_pipe.wait(k_state, state.settled());
          finish_values();
        }
        Scores::template to_a<T>(s, state, weights);
      };
      if (!Traits::kWaitsEarly && n > keys.begin) k_pipe.wait(k_state);
      if constexpr (kShortFirst) {
        --n;
        step(std::false_type{}, first_weights);
      }
      for (--n; n >= keys.begin; --n) {
        if constexpr (Scores::kFolds) Scores::enter(n, state);
        if (!kShortFirst && Scores::needs_mask(keys, n, state)) {
          step(std::true_type{}, weights);
        } else {
          step(std::false_type{}, weights);
        }
      }
      if constexpr (!Rows::kRetrieves) q_pipe.leave(q_state);

      if constexpr (kRescalesLate) rescale();
      carried.ask(*this, warpgroup, index);
      issue_values(v_state, weights, o, started);
      const KVState last = v_state;
      v_state.advance();
      state.finish(p.scale_log2, inverse, lse);
      const Work work = find_work_again(index);
      const int left = keys.begin - tile_keys(work).begin;  // blocks to the left of those it sees
      carried.join(*this, warpgroup, work, inverse, lse);
      store_lse(warpgroup, work, lse);
      bool retrieves = false;  // and its memory holds the values' other stage
      typename Rows::template Query<FwdKernel> query;
      if constexpr (Rows::kRetrieves) {
        retrieves = Rows::plan(*this, work, q_state, v_state);
        Rows::prepare(*this, warpgroup, work, retrieves, q_state, v_state, query, inverse);
      }
      bool passed = false;         // they have been let pass
      const auto complete = [&] {  // P V has ended
        if (!Scores::kLeavesMany || !passed) {
          v_pipe.release(last);
          skip(left, k_state, v_state, warpgroup);
        }
        if constexpr (Scores::kFolds) Scores::complete(*this, warpgroup, o, state);
        if constexpr (Rows::kRetrieves) {
          Rows::retrieve(*this, warpgroup, index, retrieves, q_state, v_state, query, o, inverse);
        }
      };
      if constexpr (kPrefetch) {
        if (Scores::kLeavesMany && left > 1) {  // the next tile is known when all are loaded
          wgmma_wait<0>();
          complete();
          passed = true;
        }
        turn = next_turn(warpgroup);
        // One block may pass unread while this tile holds a stage, none while its memory holds the
        // other. Else the product is on stale data and ignored: a branch around it would serialise.
        prefetched = left == 0 && !turn.empty && turn.right <= (retrieves ? 0 : 1);
        if constexpr (kRetrievesFirst) {
          wgmma_wait<0>();
          complete();
        }
        if (prefetched) {
          skip(turn.right, k_state, v_state, warpgroup);
          wait_first(q_state, k_state);
        }
        issue_scores(warpgroup, q_state, k_state, s);
        wgmma_wait<1>();
      } else {
        wgmma_wait<0>();
      }
      if constexpr (!kRetrievesFirst) {
        complete();
      } else if (retrieves) {
        v_pipe.release(KVState{v_state.step - 1});
      }
      carried.add(*this, warpgroup, index, o, inverse);
      Rows::finish(*this, warpgroup, find_work_again(index), o, inverse);
      if constexpr (kPrefetch) {
        wgmma_wait<0>();
      } else {
        turn = next_turn(warpgroup);
      }
    }
    Turns::end(warpgroup);
    if constexpr (Rows::kMakesStates) Rows::template States<FwdKernel>::end(*this);
    if (threadIdx.x % 128 == 0) ptx::tma_store_wait<0>();
    // What this kernel overlapped with has ended when it ends.
    if constexpr (Rows::kRetrieves || Rows::kFollows) ptx::grid_dependency_wait();
  }
};

}  // namespace lctx::cuda
