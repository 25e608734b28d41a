// Math: O_i = sum_j softmax_j(scale q_i . k_j) v_j and lse_i, over the keys that row i sees.
//       Per block of keys: S = Q K^T, (m, l) online, O <- alpha O + P V; at the end O / l.
// Tile map: persistent blocks of one producer warpgroup (one thread issues TMA) and kConsumers
//       warpgroups of 64 query rows; a tile is (batch, query head, 64 kConsumers rows), its keys
//       are walked right to left in blocks of kBlockN, so that masked blocks come first.
//       GQA: query head h reads key/value head h / G through the tensor map's coordinate.
// Pipeline: K and V have kStages stages each with their own barriers. Inside a warpgroup S of the
//       next block is issued together with P V of the last one, and the softmax runs under P V.
//       Tile numbers come from tile_schedule.cuh, one ahead.
// Memory: Q once, K and V once per tile (L2), O and lse once. Shared: Q + O + kStages (K + V).
//       Registers: 40/232 (two consumers) or 32/160 (three), no spills.
// Limits: bf16, fp16; D = Dv <= kHeadDim (TMA fills the rest with zeros); strides and data at
//       multiples of 16 bytes; scale > 0.
#pragma once

#include <type_traits>

#include "../common/online_softmax_sm90.cuh"
#include "../common/tile_schedule.cuh"
#include "../common/wgmma.cuh"

namespace lctx::cuda {

template <class T_, int kHeadDim_, int kBlockN_, int kConsumers_, bool kShareO_, bool kPacked_>
struct FwdTraits {
  using T = T_;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr int kBlockN = kBlockN_;
  static constexpr int kConsumers = kConsumers_;
  static constexpr bool kShareO = kShareO_;  // O leaves through Q's shared memory
  static constexpr bool kPacked = kPacked_;  // cu_seqlens
  static constexpr int kStages = 2;
  static constexpr int kBlockM = 64 * kConsumers;
  static constexpr int kThreads = 128 * (1 + kConsumers);
  static constexpr int kProducerRegisters = kConsumers == 2 ? 40 : 32;
  static constexpr int kConsumerRegisters = kConsumers == 2 ? 232 : 160;
  static constexpr int kQBytes = tile_bytes(kBlockM, kHeadDim);
  static constexpr int kKVBytes = tile_bytes(kBlockN, kHeadDim);
  static constexpr int kK = kQBytes;
  static constexpr int kV = kK + kStages * kKVBytes;
  static constexpr int kO = kShareO ? 0 : kV + kStages * kKVBytes;
  static constexpr int kBarriers = kV + kStages * kKVBytes + (kShareO ? 0 : kQBytes);
  static constexpr int kSharedBytes = kBarriers + 256 + 1024;  // barriers, alignment
};

struct FwdParams {
  CUtensorMap q, k, v, out;
  TensorView out_view;  // for tiles that end inside the tensor (cu_seqlens)
  float* lse;
  int* counter;  // zero at launch
  TileOrder order;
  FastDivisor per_group;  // query heads per key/value head
  int Hq, Tq, Tk, D;
  int causal, window;  // window 0: none
  float scale_log2;
  const int32_t* cu_seqlens;  // (num_docs + 1) on the device, or nullptr
  int num_docs;
};

// One query tile: rows [row0, row_end) of the tensor; row i sits at position0 + i - row0 among the
// num_keys keys that start at row key0.
struct Work {
  int row0, row_end, position0, key0, num_keys;
  int head, batch;
};

// Row block `slot` of cu_seqlens. Document d owns slots cu[d] / kBlockM + d and up, at least as
// many as it needs, so that the number of slots is known without reading cu_seqlens.
template <int kBlockM>
__device__ __forceinline__ void find_document(const FwdParams& p, int slot, Work& work) {
  int low = 0, high = p.num_docs - 1;
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    if (p.cu_seqlens[middle] / kBlockM + middle <= slot) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  // Clamped: wrong boundaries give wrong results, never a wrong address.
  const int begin = min(max(p.cu_seqlens[low], 0), p.Tq);
  work.position0 = (slot - begin / kBlockM - low) * kBlockM;
  work.row0 = begin + work.position0;
  work.row_end = min(p.cu_seqlens[low + 1], p.Tq);
  work.key0 = begin;
  work.num_keys = work.row_end - begin;
}

template <int kBlockM, bool kPacked>
__device__ __forceinline__ Work find_work(const FwdParams& p, int index) {
  const TileOrder::Tile tile = p.order[index];
  Work work;
  work.head = tile.head;
  work.batch = tile.batch;
  if constexpr (kPacked) {
    find_document<kBlockM>(p, tile.m_block, work);
    return work;
  }
  work.row0 = tile.m_block * kBlockM;
  work.row_end = p.Tq;
  work.position0 = work.row0 + p.Tk - p.Tq;
  work.key0 = 0;
  work.num_keys = p.Tk;
  return work;
}

// Blocks [begin, end) of keys that positions first .. last see, empty if end <= begin; of these,
// blocks [full_begin, full_end) are seen whole by all of them.
template <int kBlockN>
struct KeyRange {
  int begin = 0, end = 0, full_begin = 0, full_end = 0;

  KeyRange() = default;
  __device__ __forceinline__ KeyRange(const FwdParams& p, int first, int last, int num_keys) {
    int high = p.causal ? min(last, num_keys - 1) : num_keys - 1, low = 0;
    if (p.window > 0) {
      high = min(high, last + p.window - 1);
      low = max(low, first - p.window + 1);
    }
    begin = low / kBlockN;
    end = high < 0 || last < first ? 0 : high / kBlockN + 1;
    int full_high = p.causal ? min(first, num_keys - 1) : num_keys - 1, full_low = 0;
    if (p.window > 0) {
      full_high = min(full_high, first + p.window - 1);
      full_low = max(full_low, last - p.window + 1);
    }
    full_begin = (full_low + kBlockN - 1) / kBlockN;
    full_end = full_high < 0 ? 0 : (full_high + 1) / kBlockN;
  }

  __device__ __forceinline__ bool needs_mask(int n) const {
    return n < full_begin || n >= full_end;
  }
};

// Sets the scores that a row does not see to -inf. Fragment row 0 sits at `position0`, column 0 is
// key `key`.
template <int N>
__device__ __forceinline__ void mask_scores(const FwdParams& p, int position0, int num_keys,
                                            int key, float (&s)[N / 2]) {
  const int thread = threadIdx.x % 128;
#pragma unroll
  for (int row = 0; row < 2; ++row) {
    const int position = position0 + fragment_row(thread) + 8 * row;
    int high = p.causal ? min(position, num_keys - 1) : num_keys - 1, low = 0;
    if (p.window > 0) {
      high = min(high, position + p.window - 1);
      low = max(low, position - p.window + 1);
    }
    // Relative to this thread's first column, so that the loop compares with constants.
    high -= key + fragment_column(thread);
    low -= key + fragment_column(thread);
#pragma unroll
    for (int j = 0; j < N / 8; ++j) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        if (8 * j + i > high || 8 * j + i < low) s[4 * j + 2 * row + i] = -INFINITY;
      }
    }
  }
}

template <class Traits>
struct FwdKernel {
  using T = typename Traits::T;
  static constexpr int kHeadDim = Traits::kHeadDim, kBlockN = Traits::kBlockN;
  static constexpr int kChunks = kHeadDim / kChunkColumns;
  static constexpr int kConsumerWarps = 4 * Traits::kConsumers;
  using KVPipeline = Pipeline<Traits::kStages>;
  using KVState = PipelineState<Traits::kStages>;

  const FwdParams& p;
  const uint32_t smem;
  KVPipeline k_pipe, v_pipe;
  Pipeline<1> q_pipe;
  TileQueue queue;

  __device__ __forceinline__ FwdKernel(const FwdParams& params, char* base)
      : p(params),
        smem(ptx::smem_address(base)),
        k_pipe(smem + Traits::kBarriers),
        v_pipe(smem + Traits::kBarriers + KVPipeline::kBytes),
        q_pipe(smem + Traits::kBarriers + 2 * KVPipeline::kBytes),
        queue{Pipeline<2>(smem + Traits::kBarriers + 2 * KVPipeline::kBytes + 16),
              reinterpret_cast<int*>(base + Traits::kBarriers + 2 * KVPipeline::kBytes + 16 + 32)} {
  }

  __device__ __forceinline__ void init() const {
    k_pipe.init(kConsumerWarps);
    v_pipe.init(kConsumerWarps);
    q_pipe.init(kConsumerWarps);
    queue.pipeline.init(kConsumerWarps);
    ptx::fence_mbarrier_init();
  }

  // ---- producer ----

  __device__ __forceinline__ void load_keys(const KVPipeline& pipe, KVState& state,
                                            const CUtensorMap& map, int offset, const Work& work,
                                            int n_block) const {
    const uint32_t full = pipe.acquire(state, Traits::kKVBytes);
    const uint32_t dst = smem + offset + state.stage * Traits::kKVBytes;
    const int head = p.per_group.divide(work.head);
#pragma unroll 1
    for (int c = 0; c < kChunks; ++c) {
      ptx::tma_load_4d(dst + c * chunk_bytes(kBlockN), &map, full, c * kChunkColumns,
                       work.key0 + n_block * kBlockN, head, work.batch);
    }
    state.advance();
  }

  __device__ __forceinline__ void load_queries(PipelineState<1>& state, const Work& work) const {
    const uint32_t full = q_pipe.acquire(state, Traits::kQBytes);
#pragma unroll 1
    for (int i = 0; i < Traits::kConsumers * kChunks; ++i) {
      ptx::tma_load_4d(smem + i * chunk_bytes(64), &p.q, full, i % kChunks * kChunkColumns,
                       work.row0 + i / kChunks * 64, work.head, work.batch);
    }
    state.advance();
  }

  __device__ __forceinline__ KeyRange<kBlockN> tile_keys(const Work& work) const {
    const int rows = min(Traits::kBlockM, work.row_end - work.row0);
    return KeyRange<kBlockN>(p, work.position0, work.position0 + rows - 1, work.num_keys);
  }

  __device__ __forceinline__ void produce() {
    KVState k_state, v_state;
    PipelineState<1> q_state;
    int next = blockIdx.x;
    while (true) {
      const int index = next;
      queue.publish(index);
      if (index >= p.order.num_tiles) break;
      next = gridDim.x + atomicAdd(p.counter, 1);
      const Work work = find_work<Traits::kBlockM, Traits::kPacked>(p, index);
      const KeyRange<kBlockN> keys = tile_keys(work);
      if (keys.end <= keys.begin) continue;
      // Keys run one block ahead of values, as the consumers take them.
#pragma unroll 1
      for (int n = keys.end - 1; n >= keys.begin - 1; --n) {
        if (n >= keys.begin) load_keys(k_pipe, k_state, p.k, Traits::kK, work, n);
        if (n == keys.end - 1) {
          load_queries(q_state, work);
        } else {
          load_keys(v_pipe, v_state, p.v, Traits::kV, work, n + 1);
        }
      }
    }
  }

  // ---- consumers ----

  // Rows of a partial tile in the middle of the tensor, which TMA would not clip.
  __device__ __forceinline__ void copy_rows(uint32_t tile, int rows, int row0, int head,
                                            int batch) const {
    T* out = static_cast<T*>(p.out_view.data) + batch * p.out_view.stride_b +
             row0 * p.out_view.stride_t + head * p.out_view.stride_h;
    for (int i = threadIdx.x % 128; i < rows * kChunks * 8; i += 128) {
      const int row = i / (kChunks * 8), unit = i % (kChunks * 8);
      if (unit * 8 >= p.D) continue;
      *reinterpret_cast<uint4*>(out + row * p.out_view.stride_t + unit * 8) =
          ptx::load_shared_16(tile + swizzled_unit(64, row, unit));
    }
  }

  __device__ __forceinline__ void store_out(int warpgroup, const Work& work,
                                            float (&o)[kHeadDim / 2],
                                            const float (&inverse)[2]) const {
    const int thread = threadIdx.x % 128, lane = thread % 32;
    const int row0 = work.row0 + warpgroup * 64;
    const uint32_t tile = smem + Traits::kO + warpgroup * tile_bytes(64, kHeadDim);
    // The last store must have left the tile before it is overwritten.
    if (thread == 0) ptx::tma_store_wait_read<0>();
    ptx::named_barrier_sync(1 + warpgroup, 128);
#pragma unroll
    for (int t = 0; t < kHeadDim / 16; ++t) {
      uint32_t r[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        r[i] = pack2<T>(o[8 * t + 2 * i] * inverse[i % 2], o[8 * t + 2 * i + 1] * inverse[i % 2]);
      }
      const uint32_t at = swizzled_unit(64, thread / 32 * 16 + lane % 16, 2 * t + lane / 16);
      ptx::stmatrix_x4(tile + at, r[0], r[1], r[2], r[3]);
    }
    ptx::fence_async_proxy();
    ptx::named_barrier_sync(1 + warpgroup, 128);
    const int rows = work.row_end - row0;
    if (Traits::kPacked && rows < 64 && work.row_end < p.Tq) {
      copy_rows(tile, rows, row0, work.head, work.batch);
      ptx::named_barrier_sync(1 + warpgroup, 128);
    } else if (thread == 0) {
#pragma unroll
      for (int c = 0; c < kChunks; ++c) {
        ptx::tma_store_4d(&p.out, tile + c * chunk_bytes(64), c * kChunkColumns, row0, work.head,
                          work.batch);
      }
      ptx::tma_store_commit();
      if constexpr (Traits::kShareO) ptx::tma_store_wait_read<0>();
    }
    if constexpr (Traits::kShareO) ptx::named_barrier_sync(1 + warpgroup, 128);
  }

  __device__ __forceinline__ void store_lse(int warpgroup, const Work& work,
                                            const float (&lse)[2]) const {
    const int thread = threadIdx.x % 128;
    if (thread % 4 != 0) return;
    float* head = p.lse + (static_cast<int64_t>(work.batch) * p.Hq + work.head) * p.Tq;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int row = work.row0 + warpgroup * 64 + fragment_row(thread) + 8 * i;
      if (row < work.row_end) head[row] = lse[i];
    }
  }

  // The tile again, from its number: cheaper than registers that are alive through the main loop.
  __device__ __forceinline__ Work find_work_again(int index) const {
    asm volatile("" : "+r"(index));
    return find_work<Traits::kBlockM, Traits::kPacked>(p, index);
  }

  __device__ __forceinline__ void mask_block(int index, int warpgroup, int n,
                                             float (&s)[kBlockN / 2]) const {
    const Work work = find_work_again(index);
    mask_scores<kBlockN>(p, work.position0 + warpgroup * 64, work.num_keys, n * kBlockN, s);
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

  __device__ __forceinline__ void consume(int warpgroup) {
    KVState k_state, v_state;
    PipelineState<1> q_state;
    const uint32_t q_tile = smem + warpgroup * tile_bytes(64, kHeadDim);
    while (true) {
      const int index = queue.take();
      if (index >= p.order.num_tiles) break;
      KeyRange<kBlockN> all, keys;
      {
        const Work work = find_work<Traits::kBlockM, Traits::kPacked>(p, index);
        all = tile_keys(work);
        // The warpgroup's own rows may see less than the tile; what it skips it only releases.
        const int position0 = work.position0 + warpgroup * 64;
        const int rows = min(64, work.row_end - work.row0 - warpgroup * 64);
        keys = KeyRange<kBlockN>(p, position0, position0 + rows - 1, work.num_keys);
        keys.begin = max(keys.begin, all.begin);
        keys.end = min(keys.end, all.end);
      }
      const int skip_left = keys.begin - all.begin;
      float o[kHeadDim / 2];
      float alpha[2], inverse[2], lse[2];
      RowState state;
      if (keys.end <= keys.begin) {
        if (all.end > all.begin) {
          q_pipe.wait(q_state);
          q_pipe.release(q_state);
          q_state.advance();
          skip(all.end - all.begin, k_state, v_state);
        }
#pragma unroll
        for (int i = 0; i < kHeadDim / 2; ++i) o[i] = 0.f;
        state.finish(p.scale_log2, inverse, lse);
        const Work work = find_work_again(index);
        store_out(warpgroup, work, o, inverse);
        store_lse(warpgroup, work, lse);
        continue;
      }
      skip(all.end - keys.end, k_state, v_state);

      float s[kBlockN / 2];
      uint32_t weights[kBlockN / 16][4];
      // First block: nothing to overlap with yet.
      int n = keys.end - 1;
      q_pipe.wait(q_state);
      k_pipe.wait(k_state);
      wgmma_fence();
      gemm_nt<T, kBlockN, kHeadDim>(s, q_tile, 64,
                                    smem + Traits::kK + k_state.stage * Traits::kKVBytes, kBlockN);
      wgmma_commit();
      wgmma_wait<0>();
      k_pipe.release(k_state);
      k_state.advance();
      if (keys.needs_mask(n)) mask_block(index, warpgroup, n, s);
      state.update<kBlockN>(s, p.scale_log2, alpha);
      accumulator_to_a<T, kBlockN>(s, weights);

      bool started = false;
      const auto step = [&](auto masked) {
        wgmma_fence();
        gemm_nt<T, kBlockN, kHeadDim>(
            s, q_tile, 64, smem + Traits::kK + k_state.stage * Traits::kKVBytes, kBlockN);
        wgmma_commit();
        v_pipe.wait(v_state);
        wgmma_fence();
        gemm_rn<T, kHeadDim, kBlockN>(
            o, weights, smem + Traits::kV + v_state.stage * Traits::kKVBytes, kBlockN, started);
        wgmma_commit();
        started = true;
        wgmma_wait<1>();
        k_pipe.release(k_state);
        k_state.advance();
        if constexpr (decltype(masked)::value) mask_block(index, warpgroup, n, s);
        state.update<kBlockN>(s, p.scale_log2, alpha);
        // Waiting for the next keys here keeps ptxas from hoisting the wait for P V above the
        // softmax: it does not move instructions across the spin.
        if (n > keys.begin) k_pipe.wait(k_state);
        wgmma_wait<0>();
        v_pipe.release(v_state);
        v_state.advance();
#pragma unroll
        for (int i = 0; i < kHeadDim / 2; ++i) o[i] *= alpha[i / 2 % 2];
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
      if constexpr (!Traits::kShareO) {
        q_pipe.release(q_state);
        q_state.advance();
      }

      v_pipe.wait(v_state);
      wgmma_fence();
      gemm_rn<T, kHeadDim, kBlockN>(
          o, weights, smem + Traits::kV + v_state.stage * Traits::kKVBytes, kBlockN, started);
      wgmma_commit();
      state.finish(p.scale_log2, inverse, lse);
      const Work work = find_work_again(index);
      store_lse(warpgroup, work, lse);
      wgmma_wait<0>();
      v_pipe.release(v_state);
      v_state.advance();
      skip(skip_left, k_state, v_state);
      store_out(warpgroup, work, o, inverse);
      if constexpr (Traits::kShareO) {
        q_pipe.release(q_state);
        q_state.advance();
      }
    }
    if (threadIdx.x % 128 == 0) ptx::tma_store_wait<0>();
  }
};

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, 1)
    attn_fwd_sm90_kernel(const __grid_constant__ FwdParams p) {
  extern __shared__ char shared[];
  char* base = shared + ((1024 - (ptx::smem_address(shared) & 1023)) & 1023);
  FwdKernel<Traits> kernel(p, base);
  if (threadIdx.x == 0) {
    kernel.init();
    ptx::prefetch_tensor_map(&p.q);
    ptx::prefetch_tensor_map(&p.k);
    ptx::prefetch_tensor_map(&p.v);
    ptx::prefetch_tensor_map(&p.out);
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
