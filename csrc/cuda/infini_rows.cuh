// The end of a row of Infini-attention, and the tiles of its local part, for attn_fwd_sm90.cuh.
//
// out = g A_mem + (1 - g) A_dot with A_mem = sigma(q) M / max(sigma(q) z, eps). The product goes
// onto the accumulator of A_dot: with f = g / norm, norm = scale max(sigma(q) z, eps),
//   out = f (sigma(q) (scale M) + (1 - g) / f A_dot),
// so that one more product per tile, A = sigma(q) in registers, is all that the memory costs. It
// runs through the value pipeline: M comes as blocks of values behind the last ones.
#pragma once

#include "../common/feature_map.cuh"
#include "attn_fwd_sm90.cuh"
#include "infini_state_tiles.cuh"

namespace lctx::cuda {

// Row blocks of segments of `segment_len` positions. The "heads" of the order are (segment, head).
template <int kBlockM>
struct LocalTiles : OneHeadTiles {
  struct Params {
    int segment_len;
    FastDivisor per_segment;  // heads
  };
  static constexpr bool kClipsRows = true;
  static constexpr bool kStrided = false;

  template <class P>
  static __device__ __forceinline__ Work find(const P& p, int index) {
    const TileOrder::Tile tile = p.order[index];
    Work work;
    work.segment = p.per_segment.divide(tile.head);
    work.head = p.per_segment.modulo(tile.head);
    work.batch = tile.batch;
    work.key0 = work.segment * p.segment_len;
    work.num_keys = min(p.segment_len, p.Tq - work.key0);
    set_rows<kBlockM>(p, tile.m_block, work);
    return work;
  }
};

// The same among tiles that make states (infini_state_tiles.cuh), which every section of the order
// begins with.
template <int kBlockM>
struct MemoryTiles : LocalTiles<kBlockM> {
  struct Params : LocalTiles<kBlockM>::Params {
    FastDivisor per_section;  // tiles
    int states_per_section, num_tiles;
  };

  template <class P>
  static __device__ __forceinline__ int end(const P& p) {
    return p.num_tiles;
  }
  template <class P>
  static __device__ __forceinline__ bool makes_state(const P& p, int index) {
    return p.per_section.modulo(index) < p.states_per_section;
  }
  template <class P>
  static __device__ __forceinline__ Work find(const P& p, int index) {
    const int states = (p.per_section.divide(index) + 1) * p.states_per_section;
    return LocalTiles<kBlockM>::find(p, index - states);
  }
};

// A forward tile with room for a row of norms, and for one more of a state that is made.
template <class Tile, bool kMakesStates>
struct MemoryTile : Tile {
  static constexpr int kWaitsAfter = 4;  // measured; in dense attention it is more
  static constexpr int kRowBytes = (kNormOffset + Tile::kHeadDim) * 4;
  static constexpr int kNorms = Tile::kBarriers + Tile::kBarrierBytes;
  static constexpr int kStateRow = kNorms + kRowBytes;
  static constexpr int kStateJob = kStateRow + kRowBytes;  // see StateTile::publish_all
  static constexpr int kSharedBytes =
      Tile::kSharedBytes + (kMakesStates ? 2 * kRowBytes + 16 : kRowBytes);
};

// kMakesStates: there may be tiles that make states, by the delta rule if kDelta.
template <bool kMakesStates_, bool kDelta>
struct MemoryRows : StoreRows {
  struct Params {
    CUtensorMap memory;     // scale M: (column, row, 1, state, 1)
    CUtensorMap q_mem;      // as FwdParams::q, loaded after the last scores
    CUtensorMap local_out;  // as FwdParams::out
    TensorView local_view;  // data nullptr: A_dot itself is not kept
    CUtensorMap k_mem;      // as FwdParams::k, for the tiles that make states
    const float* gate;
    InfiniStates states;
    bool waits;  // states are made meanwhile
    bool has_q_mem, has_mem, first_bypass;
  };
  static constexpr bool kCarries = false, kRetrieves = true, kMakesStates = kMakesStates_;
  template <class Kernel>
  using States = StateTile<Kernel, kDelta>;

  // M comes in blocks of so many of its rows, which fit a stage of values.
  template <class Kernel>
  static constexpr int kBlockRows = Kernel::kHeadDim <= 128 ? Kernel::kHeadDim : 64;
  template <class Kernel>
  static constexpr int kBlocks = Kernel::kHeadDim / kBlockRows<Kernel>;

  // Columns of z from D on stay zero.
  template <class Kernel>
  static __device__ __forceinline__ void init(const Kernel& kernel) {
    for (int i = threadIdx.x; i < kNormOffset + Kernel::kHeadDim; i += Kernel::Traits::kThreads) {
      ptx::store_shared_4(kernel.smem + Kernel::Traits::kNorms + i * 4, 0);
    }
    ptx::fence_async_proxy();
  }

  // The first segment of a call without memory has nothing to retrieve.
  template <class P>
  static __device__ __forceinline__ bool reads(const P& p, const Work& work) {
    return p.has_mem || work.segment > 0;
  }
  // Producer: what follows the last values.
  template <class Kernel>
  static __device__ __forceinline__ void load(const Kernel& kernel, int index,
                                              typename Kernel::QState& q_state,
                                              typename Kernel::KVState& v_state) {
    using Traits = typename Kernel::Traits;
    constexpr int kRows = kBlockRows<Kernel>;
    const auto& p = kernel.p;
    const Work work = kernel.find_work_again(index);
    if (!reads(p, work)) return;
    const int chain = work.batch * p.states.Hkv + p.per_group.divide(work.head);
    const int at = chain * p.states.S + work.segment;
    if (p.has_q_mem) kernel.load_queries(q_state, &p.q_mem, kernel.find_work_again(index));
    if (p.waits) {
      while (ptx::load_acquire(p.states.ready + chain) <= work.segment) __nanosleep(100);
      ptx::fence_async_proxy_global();
    }
    const int norm_bytes = (kNormOffset + p.D) * 4;
    for (int block = 0; block < kBlocks<Kernel>; ++block) {
      const uint32_t full = kernel.v_pipe.acquire(
          v_state, tile_bytes(kRows, Kernel::kHeadDim) + (block == 0 ? norm_bytes : 0));
      const uint32_t dst = kernel.smem + Traits::kV + v_state.stage() * Traits::kVBytes;
      if (block == 0) {
        ptx::bulk_load(kernel.smem + Traits::kNorms,
                       p.states.norms + int64_t{at} * (kNormOffset + p.D), full, norm_bytes);
      }
#pragma unroll 1
      for (int c = 0; c < Kernel::kChunks; ++c) {
        ptx::tma_load_5d(dst + c * chunk_bytes(kRows), &p.memory, full, c * kChunkColumns,
                         block * kRows, 0, at, 0);
      }
      v_state.advance();
    }
  }

  // Consumer without rows in the tile: lets all of that pass.
  template <class Kernel>
  static __device__ __forceinline__ void skip(const Kernel& kernel, int index,
                                              typename Kernel::QState& q_state,
                                              typename Kernel::KVState& v_state) {
    const auto& p = kernel.p;
    if (!reads(p, kernel.find_work_again(index))) return;
    if (p.has_q_mem) {
      kernel.q_pipe.wait(q_state);
      kernel.q_pipe.release(q_state);
      q_state.advance();
    }
    for (int block = 0; block < kBlocks<Kernel>; ++block) {
      kernel.v_pipe.wait(v_state);
      kernel.v_pipe.release(v_state);
      v_state.advance();
    }
  }

  // Consumer, while the last P V runs: moves both pipelines behind what the retrieval takes from
  // them. Whether it takes anything.
  template <class Kernel>
  static __device__ __forceinline__ bool plan(const Kernel& kernel, const Work& work,
                                              typename Kernel::QState& q_state,
                                              typename Kernel::KVState& v_state) {
    const bool retrieves = reads(kernel.p, work);
    if (retrieves && kernel.p.has_q_mem) {
      kernel.q_pipe.release(q_state);
      q_state.advance();
    }
    q_state.advance();
    if (retrieves) v_state.step += kBlocks<Kernel>;
    return retrieves;
  }

  template <class Kernel>
  using Operand = uint32_t[kBlockRows<Kernel> / 16][4];

  // sigma(q) of this warpgroup's rows as A operand of a block of M. Adds this thread's share of
  // scale sigma(q) z to norm.
  template <class Kernel>
  static __device__ __forceinline__ void read_queries(const Kernel& kernel, int warpgroup,
                                                      int stage, int block, Operand<Kernel>& a,
                                                      float (&norm)[2]) {
    using T = typename Kernel::T;
    using Traits = typename Kernel::Traits;
    constexpr int kRows = kBlockRows<Kernel>;
    const int thread = warpgroup_thread();
    const FragmentAddress<64> address(
        kernel.smem + stage * Traits::kQBytes + warpgroup * tile_bytes(64, Kernel::kHeadDim), 0,
        thread);
    const uint32_t z =
        kernel.smem + Traits::kNorms + (kNormOffset + block * kRows + fragment_column(thread)) * 4;
#pragma unroll
    for (int t = 0; t < kRows / 16; ++t) {
      ptx::ldmatrix_x4(address(block * (kRows / 16) + t), a[t]);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float2 weight = ptx::load_shared_float2(z + (16 * t + 8 * half) * 4);
#pragma unroll
        for (int row = 0; row < 2; ++row) {
          uint32_t& pair = a[t][2 * half + row];
          const float2 x = elu_plus_one2_here<T>(pair);
          norm[row] += x.x * weight.x + x.y * weight.y;
          pair = pack2<T>(x.x, x.y);
        }
      }
    }
  }

  // A_dot, where the backward needs it.
  template <class Kernel>
  static __device__ __forceinline__ void store_local(const Kernel& kernel, int warpgroup, int index,
                                                     float (&o)[Kernel::kHeadDim / 2],
                                                     const float (&factor)[2]) {
    const auto& p = kernel.p;
    if (p.local_view.data == nullptr) return;
    StoreRows::store(kernel, warpgroup, kernel.find_work_again(index), o, factor, &p.local_out,
                     p.local_view);
  }

  template <class Kernel>
  static __device__ __forceinline__ float gate(const Kernel& kernel, int head) {
    return kernel.p.gate != nullptr ? kernel.p.gate[head] : 0.f;
  }

  template <class Kernel>
  static constexpr bool kWide = kBlocks<Kernel> > 1;  // no registers for all of sigma(q) at once
  template <class Kernel>
  static constexpr bool kEarly = Kernel::kHeadDim == 128;  // registers for it beside the weights

  // What the queries bring to the retrieval.
  template <class Kernel>
  struct Query {
    Operand<Kernel> a;
    float norm[2];
    float weight[2], memory[2];  // of A_dot before the product, and of all after it
  };
  template <class Kernel>
  static __device__ __forceinline__ void read_query(const Kernel& kernel, int warpgroup, int head,
                                                    const typename Kernel::QState& queries,
                                                    const typename Kernel::KVState& blocks,
                                                    const float (&factor)[2],
                                                    Query<Kernel>& query) {
    const float logit = gate(kernel, head);
    query.norm[0] = query.norm[1] = 0.f;
    if (kernel.p.has_q_mem) kernel.q_pipe.wait(queries);
    kernel.v_pipe.wait(blocks);
#pragma unroll
    for (int block = 0; block < kBlocks<Kernel>; ++block) {
      read_queries(kernel, warpgroup, queries.stage(), block, query.a, query.norm);
    }
    if constexpr (!kWide<Kernel>) kernel.q_pipe.release(queries);
    const float rest = ptx::reciprocal(1.f + __expf(logit));
    const float g = fmaxf(ptx::reciprocal(1.f + __expf(-logit)), 1e-20f);
    const float open = rest * ptx::reciprocal(g);
    const float least =
        ptx::load_shared_float2(kernel.smem + Kernel::Traits::kNorms).x * kMemoryEps;
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      const float norm = fmaxf(quad_sum(query.norm[row]), least);
      query.memory[row] = g * ptx::reciprocal(norm);
      query.weight[row] = factor[row] * open * norm;
    }
  }

  // While the last P V runs, where there are registers for it.
  template <class Kernel>
  static __device__ __forceinline__ void prepare(const Kernel& kernel, int warpgroup,
                                                 const Work& work, bool retrieves,
                                                 const typename Kernel::QState& q_state,
                                                 const typename Kernel::KVState& v_state,
                                                 Query<Kernel>& query, const float (&factor)[2]) {
    const typename Kernel::QState queries{q_state.step - 1};
    if constexpr (kEarly<Kernel>) {
      query = {};  // or ptxas takes it for alive from the beginning of the kernel
    }
    if (!retrieves) {
      kernel.q_pipe.release(queries);
    } else if constexpr (kEarly<Kernel>) {
      const typename Kernel::KVState blocks{v_state.step - 1};
      read_query(kernel, warpgroup, work.head, queries, blocks, factor, query);
    }
  }

  // Leaves in o and `factor` what is to be stored: factor * o. kEarly: when its product, which runs
  // on, has ended.
  template <class Kernel>
  static __device__ __forceinline__ void retrieve(
      const Kernel& kernel, int warpgroup, int index, bool retrieves,
      const typename Kernel::QState& q_state, const typename Kernel::KVState& v_state,
      Query<Kernel>& query, float (&o)[Kernel::kHeadDim / 2], float (&factor)[2]) {
    using Traits = typename Kernel::Traits;
    constexpr int kRows = kBlockRows<Kernel>;
    const auto& p = kernel.p;
    const typename Kernel::QState queries{q_state.step - 1};
    store_local(kernel, warpgroup, index, o, factor);
    if (!retrieves) {
      if (p.first_bypass) return;
      const float logit = gate(kernel, kernel.find_work_again(index).head);
      const float rest = ptx::reciprocal(1.f + __expf(logit));  // 1 - g
      factor[0] *= rest;
      factor[1] *= rest;
      return;
    }
    typename Kernel::KVState blocks{v_state.step - kBlocks<Kernel>};
    if constexpr (!kEarly<Kernel>) {
      read_query(kernel, warpgroup, kernel.find_work_again(index).head, queries, blocks, factor,
                 query);
    }
    factor[0] = query.memory[0];
    factor[1] = query.memory[1];
    scale_rows<Kernel::kHeadDim>(o, query.weight);
#pragma unroll
    for (int block = 0; block < kBlocks<Kernel>; ++block) {
      if constexpr (kWide<Kernel>) {
        kernel.v_pipe.wait(blocks);
        read_queries(kernel, warpgroup, queries.stage(), block, query.a, query.norm);
        if (block + 1 == kBlocks<Kernel>) kernel.q_pipe.release(queries);
      }
      wgmma_fence();
      gemm_rn<typename Kernel::T, Kernel::kHeadDim, kRows>(
          o, query.a, kernel.smem + Traits::kV + blocks.stage() * Traits::kVBytes, kRows, true);
      wgmma_commit();
      if constexpr (!kEarly<Kernel>) {
        wgmma_wait<0>();
        kernel.v_pipe.release(blocks);
        blocks.advance();
      }
    }
  }
};

}  // namespace lctx::cuda
