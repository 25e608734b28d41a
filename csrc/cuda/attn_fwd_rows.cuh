// Math: what becomes of the finished rows of a tile.
//       StoreRows   out = O / l in the input dtype
//       CarryRows   continues from an earlier partial result over other keys (out, lse in fp32) and
//                   writes the union, in fp32 or in the input dtype
//       SplitRows   rows of SplitTiles: the result over a share of the keys, in fp32 for a merge,
//       or over all of them
//       A fourth, infini_rows.cuh, adds what a memory returns for the queries (kRetrieves).
// Tile map: 64 rows of a warpgroup.
// Pipeline: out leaves through shared memory by TMA and is waited for before the next tile's rows;
//       tiles without room for it write 16 bytes a thread from registers, so that Q's memory is
//       free for the next tile as soon as the last scores are computed. A carried result is read
//       into the accumulators while the first scores are computed.
// Memory: out once; carried: 8 bytes an element more, straight between registers and memory.
// Limits: the carried tensors are contiguous (B, T, H, D) and (B, H, T).
#pragma once

#include "../common/online_softmax_sm90.cuh"
#include "../common/wgmma.cuh"
#include "attn_fwd_tiles.cuh"

namespace lctx::cuda {

// The second, or the first.
template <bool kSecond, class A, class B>
__device__ __forceinline__ auto& choose(A& a, B& b) {
  if constexpr (kSecond) {
    return b;
  } else {
    return a;
  }
}

// Between two neighbours: columns of two blocks of 8 each <-> 4 columns of one of them.
__device__ __forceinline__ void pair_exchange(float (&x)[4]) {
  const bool odd = threadIdx.x % 2;
#pragma unroll
  for (int c = 0; c < 2; ++c) {
    const float got = __shfl_xor_sync(~0u, odd ? x[c] : x[c + 2], 1);
    x[c] = odd ? got : x[c];
    x[c + 2] = odd ? x[c + 2] : got;
  }
}

struct StoreRows {
  struct Params {};
  static constexpr bool kRetrieves = false, kMakesStates = false;
  static constexpr bool kFollows = false;  // what it overlaps with is part of the same result
  static constexpr bool kMarks = false;    // it lets the next kernel start by itself

  template <class Kernel>
  struct Query {};  // of a memory
  template <class Kernel>
  static constexpr bool kEarly = false;  // it is read under the last product
  // What the rows continue from: nothing. See CarryRows and JoinRows.
  template <class Kernel>
  struct Carried {
    static constexpr bool kStarts = false;  // the first product adds to the accumulators
    template <class... Args>
    __device__ __forceinline__ void start(Args&&...) const {}
    template <class... Args>
    __device__ __forceinline__ void scale(Args&&...) const {}
    template <class... Args>
    __device__ __forceinline__ void ask(Args&&...) const {}
    template <class... Args>
    __device__ __forceinline__ void join(Args&&...) const {}
    template <class... Args>
    __device__ __forceinline__ void add(Args&&...) const {}
  };

  // Whether the tile's row `row` is one to keep, and where its lse goes.
  template <class P>
  static __device__ __forceinline__ bool exists(const P&, const Work& work, int row) {
    return row < work.row_end;
  }
  template <class Kernel>
  static __device__ __forceinline__ float* lse(const Kernel& kernel, const Work& work, int row) {
    return kernel.p.lse + kernel.lse_offset(work, row);
  }

  // Rows of a partial tile in the middle of the tensor, which TMA would not clip.
  template <class Kernel>
  static __device__ __forceinline__ void copy_rows(const Kernel& kernel, const TensorView& view,
                                                   uint32_t tile, int rows, const Work& work,
                                                   int row0) {
    using T = typename Kernel::T;
    const auto& p = kernel.p;
    constexpr int kUnits = Kernel::kValueDim / 8;
    T* out = static_cast<T*>(view.data) + work.batch * view.stride_b +
             kernel.position(work, row0) * view.stride_t + work.head * view.stride_h;
    const int64_t pitch = kernel.row_step() * view.stride_t;
    for (int i = warpgroup_thread(); i < rows * kUnits; i += 128) {
      const int row = i / kUnits, unit = i % kUnits;
      if (unit * 8 >= p.D) continue;
      *reinterpret_cast<uint4*>(out + row * pitch + unit * 8) =
          ptx::load_shared_16(tile + swizzled_unit(64, row, unit));
    }
  }

  // Straight to memory. The four threads of a row exchange columns so that each holds 16 bytes.
  template <class Kernel>
  static __device__ __forceinline__ void write_rows(const Kernel& kernel, int warpgroup,
                                                    const Work& work,
                                                    float (&o)[Kernel::kValueDim / 2],
                                                    const float (&factor)[2],
                                                    const TensorView& view) {
    using T = typename Kernel::T;
    const auto& p = kernel.p;
    const int thread = warpgroup_thread(), place = thread % 4;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int row = work.row0 + warpgroup * 64 + fragment_row(thread) + 8 * i;
      T* out = static_cast<T*>(view.data) + work.batch * view.stride_b +
               kernel.position(work, row) * view.stride_t + work.head * view.stride_h;
#pragma unroll
      for (int a = 0; a < Kernel::kValueDim / 32; ++a) {
        uint32_t x[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const int at = 4 * (4 * a + j) + 2 * i;
          x[j] = pack2<T>(o[at] * factor[i], o[at + 1] * factor[i]);
        }
        quad_transpose(x);
        const int column = work.column + 32 * a + 8 * place;
        if (row < work.row_end && column < p.D) {
          *reinterpret_cast<uint4*>(out + column) = make_uint4(x[0], x[1], x[2], x[3]);
        }
      }
    }
  }

  template <class Kernel>
  static __device__ __forceinline__ void finish(const Kernel& kernel, int warpgroup,
                                                const Work& work, float (&o)[Kernel::kValueDim / 2],
                                                const float (&inverse)[2]) {
    store(kernel, warpgroup, work, o, inverse, kernel.p.out, kernel.p.out_view);
  }

  // factor * o to the tensor of `maps` and `view`.
  template <class Kernel>
  static __device__ __forceinline__ void store(const Kernel& kernel, int warpgroup,
                                               const Work& work, float (&o)[Kernel::kValueDim / 2],
                                               const float (&factor)[2], const CUtensorMap* maps,
                                               const TensorView& view) {
    using Traits = typename Kernel::Traits;
    if constexpr (!Traits::kStagesO) {
      write_rows(kernel, warpgroup, work, o, factor, view);
      return;
    }
    constexpr int kValueDim = Kernel::kValueDim;
    const int thread = warpgroup_thread();
    const int row0 = work.row0 + warpgroup * 64;
    if (row0 >= work.row_end) return;
    const uint32_t tile = kernel.smem + Traits::kO + warpgroup * tile_bytes(64, kValueDim);
    const FragmentAddress<64> address(tile, 0, thread);
    // The last store must have left the tile before it is overwritten.
    if (thread == 0) ptx::tma_store_wait_read<0>();
    ptx::named_barrier_sync(1 + warpgroup, 128);
#pragma unroll
    for (int t = 0; t < kValueDim / 16; ++t) {
      uint32_t r[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        r[i] = pack2<typename Kernel::T>(o[8 * t + 2 * i] * factor[i % 2],
                                         o[8 * t + 2 * i + 1] * factor[i % 2]);
      }
      ptx::stmatrix_x4(address(t), r[0], r[1], r[2], r[3]);
    }
    ptx::fence_async_proxy();
    ptx::named_barrier_sync(1 + warpgroup, 128);
    const int rows = work.row_end - row0;
    if (Traits::Tiles::kClipsRows && rows < 64) {
      copy_rows(kernel, view, tile, rows, work, row0);
      ptx::named_barrier_sync(1 + warpgroup, 128);
    } else if (thread == 0) {
#pragma unroll
      for (int c = 0; c < kValueDim / kChunkColumns; ++c) {
        ptx::tma_store_5d(&maps[work.map], tile + c * chunk_bytes(64),
                          work.column + c * kChunkColumns, row0, work.phase, work.head, work.batch);
      }
      ptx::tma_store_commit();
    }
  }
};

struct CarryRows : StoreRows {
  // The partial result to continue from, nullptr: none. A row whose lse is not above -inf (NaN too)
  // holds nothing yet. `partial_out`, not nullptr: the union goes there, and of the first
  // `final_rows` to FwdParams::out (of some rows that share 64 with the last of them to both).
  struct Params {
    const float* carry_out;
    const float* carry_lse;
    float* partial_out;
    float inverse_scale;  // 1 / scale
    int state_rows;       // rows of the tensors that the carried ones and lse are slices of
    int final_rows;
  };
  // The carried weight counts as kGain at exp(lse) / kGain, below the scores to come: these then
  // have their own maximum as 1, and weights as exact in 16 bits as those of a first step. Not
  // further below: the way up is rounded in every step of a ring.
  static constexpr float kGain = 1 << 10, kLogGain = 6.931472f;

  // First element of row `row` of the tile in tensors (B, T, H, D).
  template <class Kernel>
  static __device__ __forceinline__ int64_t element(const Kernel& kernel, const Work& work,
                                                    int row) {
    const auto& p = kernel.p;
    const int64_t position = kernel.position(work, row);
    return ((work.batch * int64_t{p.state_rows} + position) * p.Hq + work.head) * p.D;
  }
  template <class Kernel>
  static __device__ __forceinline__ int64_t lse_offset(const Kernel& kernel, const Work& work,
                                                       int row) {
    const auto& p = kernel.p;
    return (static_cast<int64_t>(work.batch) * p.Hq + work.head) * p.state_rows +
           kernel.position(work, row);
  }
  // Whether the rows of a tile continue from something.
  template <class P>
  static __device__ __forceinline__ bool carries(const P& p, const Work&) {
    return p.carry_out != nullptr;
  }
  template <class Kernel>
  static __device__ __forceinline__ float* lse(const Kernel& kernel, const Work& work, int row) {
    return kernel.p.lse + lse_offset(kernel, work, row);
  }

  template <class Kernel>
  struct Carried : StoreRows::Carried<Kernel> {
    static constexpr bool kStarts = true;
    template <int N>
    __device__ __forceinline__ void start(const Kernel& kernel, int warpgroup, int index,
                                          float (&o)[N], RowState& state) const {
      ptx::grid_dependency_wait();
      begin(kernel, warpgroup, kernel.find_work_again(index), o, state);
    }
    // Called after the first weights, so that nothing waits for the reads. `factor` is 1 then.
    template <int N>
    __device__ __forceinline__ void scale(float (&o)[N], float (&factor)[2],
                                          const RowState& state) const {
      CarryRows::scale(o, factor, state);
      factor[0] = factor[1] = 1.f;
    }
  };

  // Puts the carried rows into the accumulators and the row state.
  template <class Kernel>
  static __device__ __forceinline__ void begin(const Kernel& kernel, int warpgroup,
                                               const Work& work, float (&o)[Kernel::kValueDim / 2],
                                               RowState& state) {
    const auto& p = kernel.p;
    const int thread = warpgroup_thread();
    const bool carries = Kernel::Rows::carries(p, work);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int row = work.row0 + warpgroup * 64 + fragment_row(thread) + 8 * i;
      const bool inside = carries && row < work.row_end;
      const float lse = inside ? p.carry_lse[lse_offset(kernel, work, row)] : -INFINITY;
      const float* from =
          p.carry_out + (inside ? element(kernel, work, row) : 0) + fragment_column(thread);
      read_row(p, from, inside, i, o);  // without waiting for lse
      const bool carried = lse > -INFINITY;
      state.m[i] = carried ? (lse - kLogGain) * p.inverse_scale : kEmptyRowMax;  // of raw scores
      state.l[i] = carried && thread % 4 == 0 ? kGain : 0.f;                     // shares of one
    }
  }

  // Brings what begin() read to the terms of the row. Where nothing is carried, what was read may
  // be NaN, and `factor` is 0 or the row has seen nothing.
  template <int N>
  static __device__ __forceinline__ void scale(float (&o)[N], const float (&factor)[2],
                                               const RowState& state) {
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      const bool carried = factor[row] != 0.f && state.m[row] != kEmptyRowMax;
      const float weight = factor[row] * kGain;
#pragma unroll
      for (int i = 0; i < N / 4; ++i) {
        o[4 * i + 2 * row] = carried ? o[4 * i + 2 * row] * weight : 0.f;
        o[4 * i + 2 * row + 1] = carried ? o[4 * i + 2 * row + 1] * weight : 0.f;
      }
    }
  }

  template <class P, int N>
  static __device__ __forceinline__ void read_row(const P& p, const float* from, bool wanted, int i,
                                                  float (&o)[N]) {
#pragma unroll
    for (int j = 0; j < N / 4; ++j) {
      const bool inside = wanted && 8 * j < p.D;
      const float2 x =
          inside ? *reinterpret_cast<const float2*>(from + 8 * j) : make_float2(0.f, 0.f);
      o[4 * j + 2 * i] = x.x;
      o[4 * j + 2 * i + 1] = x.y;
    }
  }

  template <class Kernel>
  static __device__ __forceinline__ void finish(const Kernel& kernel, int warpgroup,
                                                const Work& work, float (&o)[Kernel::kValueDim / 2],
                                                const float (&inverse)[2]) {
    const auto& p = kernel.p;
    const int row0 = work.row0 + warpgroup * 64;
    const bool done = p.final_rows > 0 && row0 < p.final_rows;
    if (p.partial_out == nullptr || done) {
      StoreRows::finish(kernel, warpgroup, work, o, inverse);
    }
    if (p.partial_out == nullptr || (done && row0 + 64 <= p.final_rows)) return;
    // Two threads exchange halves of 8 columns each, so that both write 16 bytes.
    const int thread = warpgroup_thread(), odd = thread % 2;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int row = row0 + fragment_row(thread) + 8 * i;
      float* to = p.partial_out + element(kernel, work, row) + fragment_column(thread) + 6 * odd;
#pragma unroll
      for (int j = 0; j < Kernel::kValueDim / 8; j += 2) {
        float x[4];
#pragma unroll
        for (int c = 0; c < 4; ++c) x[c] = o[4 * (j + c / 2) + 2 * i + c % 2] * inverse[i];
        pair_exchange(x);
        if (row < work.row_end && 8 * (j + odd) < p.D) {
          *reinterpret_cast<float4*>(to + 8 * j) = make_float4(x[0], x[1], x[2], x[3]);
        }
      }
    }
  }
};

// The same with nothing to continue from.
struct FirstRows : CarryRows {
  template <class Kernel>
  using Carried = StoreRows::Carried<Kernel>;
};

struct SplitRows {
  template <class Kernel>
  using Carried = StoreRows::Carried<Kernel>;
  struct Params {
    float* partial;  // (slots, slot_rows, D), FwdParams::lse is then (slots, slot_rows); nullptr:
                     // every tile has all keys of its rows
    int slot_rows;   // rows of a tile that may exist
    int heads_of_group;  // query heads per key/value head
    bool marks;          // words of the slots are kUnset until they are written
  };
  static constexpr bool kRetrieves = false, kMakesStates = false;
  static constexpr bool kFollows = false, kMarks = true;
  // A NaN that arithmetic does not give: theirs are 0x7fffffff.
  static constexpr uint32_t kUnset = ~0u;
  static constexpr int kMarkedRows = 16;  // at most

  template <class Kernel>
  struct Query {};
  template <class Kernel>
  static constexpr bool kEarly = false;

  template <class P>
  static __device__ __forceinline__ int head_in_group(const P& p, const Work& work, int row) {
    return work.query_head + (row & ((1 << p.head_bits) - 1));
  }
  template <class P>
  static __device__ __forceinline__ bool exists(const P& p, const Work& work, int row) {
    return row < work.row_end && head_in_group(p, work, row) < p.heads_of_group;
  }
  template <class P>
  static __device__ __forceinline__ int64_t slot_row(const P& p, const Work& work, int row) {
    return static_cast<int64_t>(work.slot) * p.slot_rows + row - work.row0;
  }

  template <class Kernel>
  static __device__ __forceinline__ float* lse(const Kernel& kernel, const Work& work, int row) {
    if (kernel.p.marks) ptx::mbarrier_wait(marked(kernel), 0);
    return lse_at(kernel.p, work, row);
  }
  // The same when marks are made.
  template <class P>
  static __device__ __forceinline__ float* lse_at(const P& p, const Work& work, int row) {
    if (p.partial != nullptr) return p.lse + slot_row(p, work, row);
    const int head = work.head * p.heads_of_group + head_in_group(p, work, row);
    return p.lse + (static_cast<int64_t>(work.batch) * p.Hq + head) * p.Tq + (row >> p.head_bits);
  }

  // Barrier for what mark() has done; shared memory behind the queue.
  template <class Kernel>
  static __device__ __forceinline__ uint32_t marked(const Kernel& kernel) {
    static_assert(Kernel::kQueue + TileQueue::kBytes + 8 <=
                  Kernel::Traits::kBarriers + Kernel::Traits::kBarrierBytes);
    return kernel.smem + Kernel::kQueue + TileQueue::kBytes;
  }
  template <class Kernel>
  static __device__ __forceinline__ void init(const Kernel& kernel) {
    if (kernel.p.marks) ptx::mbarrier_init(marked(kernel), 1);
  }

  // By a warp that does nothing else. The merge starts when all thread blocks have been here, and
  // must not take for a result what was in memory before: the block's words become kUnset first.
  template <class Kernel>
  static __device__ __forceinline__ void mark(const Kernel& kernel) {
    const bool first = threadIdx.x % 32 == 0;
    if (kernel.p.marks) {
      mark_slots<typename Kernel::Tiles>(kernel.p);
      if (first) ptx::mbarrier_arrive(marked(kernel));
    }
    if (first) ptx::grid_dependents_launch();
  }
  template <class Tiles, class P>
  static __device__ __forceinline__ void mark_slots(const P& p) {
    const int lane = threadIdx.x % 32;
    const float unset = __uint_as_float(kUnset);
    const int tiles = Tiles::end(p) - Tiles::first(p), slot0 = Tiles::first(p) * p.slot_rows;
    float* const partial = p.partial + int64_t{slot0} * p.D;
    for (int i = lane; i < tiles * p.slot_rows * p.D / 4; i += 32) {
      *reinterpret_cast<float4*>(partial + 4 * i) = make_float4(unset, unset, unset, unset);
    }
    for (int i = lane; i < tiles * p.slot_rows; i += 32) p.lse[slot0 + i] = unset;
    __threadfence();
    __syncwarp();
  }

  template <class Kernel>
  static __device__ __forceinline__ void finish(const Kernel& kernel, int warpgroup,
                                                const Work& work, float (&o)[Kernel::kValueDim / 2],
                                                const float (&inverse)[2]) {
    const auto& p = kernel.p;
    const int thread = warpgroup_thread(), column = fragment_column(thread);
    if (p.marks) ptx::mbarrier_wait(marked(kernel), 0);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int row = work.row0 + warpgroup * 64 + fragment_row(thread) + 8 * i;
      if (!exists(p, work, row)) continue;
      float* partial = p.partial + slot_row(p, work, row) * p.D + column;
      const int head = work.head * p.heads_of_group + head_in_group(p, work, row);
      auto* out = static_cast<typename Kernel::T*>(p.out_view.data) +
                  work.batch * p.out_view.stride_b + (row >> p.head_bits) * p.out_view.stride_t +
                  head * p.out_view.stride_h + column;
#pragma unroll
      for (int j = 0; j < Kernel::kValueDim / 8; ++j) {
        if (8 * j >= p.D) break;
        const float x = o[4 * j + 2 * i] * inverse[i], y = o[4 * j + 2 * i + 1] * inverse[i];
        if (p.partial != nullptr) {
          *reinterpret_cast<float2*>(partial + 8 * j) = make_float2(x, y);
        } else {
          *reinterpret_cast<uint32_t*>(out + 8 * j) = pack2<typename Kernel::T>(x, y);
        }
      }
    }
  }
};

}  // namespace lctx::cuda
