// Math: none; what the tiles of infini_state_tiles.cuh work on, and their producer.
// Tile map: a tile is (batch, key/value head, segment).
// Pipeline: keys and values through the stages of attention; blocks further on are asked for in the
//       L2 cache.
// Memory: K and V of the segment once.
// Limits: those of infini_state_tiles.cuh.
#pragma once

#include "attn_fwd_sm90.cuh"
#include "infini_states.h"

namespace lctx::cuda {

// What such a tile works on.
struct StateWork {
  int batch, head, chain, segment;
  int row0, rows;
};

template <class P>
__device__ __forceinline__ StateWork find_state_work(const P& p, int index) {
  const InfiniStates& x = p.states;
  const int section = p.per_section.divide(index);
  const int flat = section * p.states_per_section + index - section * p.per_section.divisor;
  StateWork work;
  work.batch = flat / (x.S * x.Hkv);
  work.head = flat % x.Hkv;
  work.chain = work.batch * x.Hkv + work.head;
  work.segment = flat / x.Hkv % x.S;
  work.row0 = work.segment * x.segment_len;
  work.rows = x.segment_rows(work.segment);
  return work;
}

template <class Kernel, bool kDelta>
struct StateLoads {
  using QState = typename Kernel::QState;
  using KVState = typename Kernel::KVState;
  static constexpr int kAhead = 6;  // blocks

  static __device__ __forceinline__ void load(const Kernel& kernel, int index, QState& q_state,
                                              KVState& k_state, KVState& v_state) {
    using Traits = typename Kernel::Traits;
    constexpr int kHeadDim = Kernel::kHeadDim, kBlockN = Kernel::kBlockN;
    const StateWork work = find_state_work(kernel.p, index);
    const auto fetch = [&](int at) {
      if (at >= work.rows) return;
      for (int c = 0; c < kHeadDim; c += kChunkColumns) {
        ptx::tma_prefetch_5d(&kernel.p.k_mem, c, work.row0 + at, 0, work.head, work.batch);
        ptx::tma_prefetch_5d(&kernel.p.v[0], c, work.row0 + at, 0, work.head, work.batch);
      }
    };
    const auto load = [&](const CUtensorMap* map, int at, uint32_t dst, uint32_t full) {
#pragma unroll 1
      for (int c = 0; c < kHeadDim / kChunkColumns; ++c) {
        ptx::tma_load_5d(dst + c * chunk_bytes(kBlockN), map, full, c * kChunkColumns,
                         work.row0 + at, 0, work.head, work.batch);
      }
    };
    const InfiniStates& x = kernel.p.states;  // the state that the segment reads
    ptx::bulk_prefetch(x.M(work.chain, work.segment), static_cast<uint32_t>(x.matrix()) * 4);
    for (int i = Traits::kStages; i < kAhead; ++i) fetch(i * kBlockN);
    for (int at = 0; at < work.rows; at += kBlockN) {
      fetch(at + kAhead * kBlockN);
      uint32_t full = kernel.k_pipe.acquire(k_state, Traits::kKBytes);
      load(&kernel.p.k_mem, at, kernel.smem + Traits::kK + k_state.stage() * Traits::kKBytes, full);
      k_state.advance();
      full = kernel.v_pipe.acquire(v_state, Traits::kVBytes);
      load(&kernel.p.v[0], at, kernel.smem + Traits::kV + v_state.stage() * Traits::kVBytes, full);
      v_state.advance();
    }
    if constexpr (kDelta) {  // a stage of queries for the consumers
      kernel.q_pipe.acquire(q_state, 0);
      q_state.advance();
    }
  }
};

}  // namespace lctx::cuda
