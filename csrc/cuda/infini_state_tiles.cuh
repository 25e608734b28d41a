// Math: the step of a chain's memory from the state that a segment reads to the next one
//       (arXiv 2404.07143, eq. 4 and 5), as tiles of attn_fwd_sm90.cuh among those of attention:
//         linear  M += sigma(K)^T V,                               z += sum_n sigma(k_n)
//         delta   M += sigma(K)^T V - sigma(K)^T (sigma(K) M / max(sigma(K) z, eps)), the same z
//       Operands are rounded to the inputs' type: sigma, the M that sigma(K) meets, and what the
//       delta rule takes back. M, z and all sums stay fp32.
// Tile map: a tile is (batch, key/value head, segment); warpgroup w has rows 64 w .. of M as
//       accumulators.
// Pipeline: keys and values come through those of attention. A operands of sigma(K)^T are made by
//       ldmatrix.trans while the product of the block before runs. Delta: sigma replaces K in
//       shared memory, M comes in place of queries, R = sigma(K) M / norm goes through the memory
//       of O; sigma of the next block is applied under the product with R.
// Memory: K and V once, which attention reads soon after from the L2 cache; per tile M twice in
//       fp32, once in 16 bits.
// Limits: D from 72 to 128: at 64 the kernel spills registers. A tile waits for the state before
//       it, at its end (linear) or at its start (delta); the tile that makes that one has a lower
//       number: a block has taken it that waits for still lower ones only.
#pragma once

#include "infini_keys.cuh"
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
struct StateTile {
  using Traits = typename Kernel::Traits;
  using T = typename Kernel::T;
  using QState = typename Kernel::QState;
  using KVState = typename Kernel::KVState;
  static constexpr int kHeadDim = Kernel::kHeadDim, kBlockN = Kernel::kBlockN;
  static constexpr int kThreads = 128 * Traits::kConsumers;
  static constexpr int kBarrier = 4;  // attention uses 1 + warpgroup
  static_assert(kHeadDim == 64 * Traits::kConsumers && kHeadDim == kBlockN,
                "every consumer has rows of M; sigma(K) and M share a shape");
  static constexpr int kAhead = 6;  // blocks that are asked for in the L2 cache beforehand
  using Operand = uint32_t[kBlockN / 16][4];
  using Sums = float[kHeadDim / 2];

  const Kernel& kernel;
  const InfiniStates& x;
  const int warpgroup, index;

  __device__ __forceinline__ StateTile(const Kernel& kernel, int warpgroup, int index)
      : kernel(kernel), x(kernel.p.states), warpgroup(warpgroup), index(index) {}

  // Found again wherever it is needed: cheaper than registers that are alive meanwhile.
  __device__ __forceinline__ StateWork find() const {
    return find_state_work(kernel.p, ptx::opaque(index));
  }

  static __device__ __forceinline__ void sync() { ptx::named_barrier_sync(kBarrier, kThreads); }
  __device__ __forceinline__ uint32_t keys(const KVState& state) const {
    return kernel.smem + Traits::kK + state.stage() * Traits::kKBytes;
  }
  __device__ __forceinline__ uint32_t values(const KVState& state) const {
    return kernel.smem + Traits::kV + state.stage() * Traits::kVBytes;
  }
  // A row of norms and z of the state the segment reads (delta), then z of the next one.
  __device__ __forceinline__ uint32_t row() const { return kernel.smem + Traits::kStateRow; }

  // ---- producer ----

  static __device__ __forceinline__ void load(const Kernel& kernel, int index, QState& q_state,
                                              KVState& k_state, KVState& v_state) {
    const StateWork work = find_state_work(kernel.p, index);
    Work place;
    place.batch = work.batch;
    place.head = work.head;
    const auto fetch = [&](int at) {
      if (at >= work.rows) return;
      for (int c = 0; c < kHeadDim; c += kChunkColumns) {
        ptx::tma_prefetch_5d(&kernel.p.k_mem, c, work.row0 + at, 0, work.head, work.batch);
        ptx::tma_prefetch_5d(&kernel.p.v[0], c, work.row0 + at, 0, work.head, work.batch);
      }
    };
    for (int i = Traits::kStages; i < kAhead; ++i) fetch(i * kBlockN);
    for (int at = 0; at < work.rows; at += kBlockN) {
      fetch(at + kAhead * kBlockN);
      const KeyBlock block{&kernel.p.k_mem, &kernel.p.v[0], work.row0 + at, 0};
      kernel.template load_block<kHeadDim>(kernel.k_pipe, k_state, Traits::kK, block.k, place,
                                           block, 0);
      if (kDelta && at == 0) load_memory(kernel, work, q_state);
      kernel.template load_block<kHeadDim>(kernel.v_pipe, v_state, Traits::kV, block.v, place,
                                           block, 0);
    }
  }

  static __device__ __forceinline__ void load_memory(const Kernel& kernel, const StateWork& work,
                                                     QState& q_state) {
    const auto& p = kernel.p;
    const uint32_t full = kernel.q_pipe.acquire(q_state, Traits::kQBytes);
    while (ptx::load_acquire(p.states.ready + work.chain) <= work.segment) __nanosleep(100);
    ptx::fence_async_proxy_global();
    for (int c = 0; c < kHeadDim / kChunkColumns; ++c) {
      ptx::tma_load_5d(kernel.smem + q_state.stage() * Traits::kQBytes + c * chunk_bytes(kHeadDim),
                       &p.memory, full, c * kChunkColumns, 0, 0,
                       static_cast<int>(p.states.state(work.chain, work.segment)), 0);
    }
    q_state.advance();
  }

  // ---- states ----

  __device__ __forceinline__ void wait_for_state(const StateWork& work) const {
    while (ptx::load_acquire(x.ready + work.chain) <= work.segment) __nanosleep(100);
  }

  // Of the consumers.
  __device__ __forceinline__ int thread() const { return warpgroup * 128 + warpgroup_thread(); }
  __device__ __forceinline__ int fragment_row0() const {
    return warpgroup * 64 + fragment_row(warpgroup_thread());
  }

  // After all stores of state `s`.
  __device__ __forceinline__ void publish(const StateWork& work, int s) const {
    sync();
    if (thread() == 0) ptx::store_release(x.ready + work.chain, s + 1);
  }

  // State 0: the memory in.
  __device__ __forceinline__ void store_first() const {
    const StateWork work = find();
    if (work.segment != 0) return;
    const bool given = x.M_in != nullptr;
    const float* M_in = x.M_in + work.chain * x.matrix();  // perhaps not aligned
    const float* z_in = x.z_in + int64_t{work.chain} * x.D;
    float sum = 0.f;
    for (int i = thread() % 32; i < x.D; i += 32) sum += given ? fabsf(z_in[i]) : 0.f;
    const float scale = memory_scale(sum_over_lanes(sum, 32) / static_cast<float>(x.D));
    float2* full = reinterpret_cast<float2*>(x.M(work.chain, 0));
    uint32_t* half = static_cast<uint32_t*>(x.half) + x.state(work.chain, 0) * (x.matrix() / 2);
#pragma unroll 4
    for (int i = thread(); i < x.D * x.D / 2; i += kThreads) {
      const float2 pair = given ? float2{M_in[2 * i], M_in[2 * i + 1]} : float2{0.f, 0.f};
      full[i] = pair;
      half[i] = pack2<T>(pair.x * scale, pair.y * scale);
    }
    float* norm = x.norm(work.chain, 0);
    for (int i = thread(); i < x.D; i += kThreads) {
      const float z = given ? z_in[i] : 0.f;
      x.z(work.chain, 0)[i] = z;
      norm[kNormOffset + i] = z * scale;
    }
    if (thread() < kNormOffset) norm[thread()] = scale;
    publish(work, 0);
  }

  // The z that the segment leaves, and its scale. sums: over this thread's rows of the segment.
  __device__ __forceinline__ float store_z(const StateWork& work, float (&sums)[2]) const {
    const int s = work.segment + 1, row0 = fragment_row0(), lane = warpgroup_thread() % 32;
    const float* last = x.z(work.chain, work.segment);
    sync();  // what was in the row of numbers has been read
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int at = row0 + 8 * i;
      sums[i] = quad_sum(sums[i]);
      sums[i] = at < x.D ? sums[i] + last[at] : 0.f;
      if (lane % 4 == 0) ptx::store_shared_4(row() + at * 4, __float_as_uint(sums[i]));
    }
    sync();
    float sum = 0.f;
#pragma unroll
    for (int i = 0; i < kHeadDim / 32; ++i) {
      sum += fabsf(__int_as_float(ptx::load_shared_4(row() + (lane + 32 * i) * 4)));
    }
    const float scale = memory_scale(sum_over_lanes(sum, 32) / static_cast<float>(x.D));
    float *z = x.z(work.chain, s), *norm = x.norm(work.chain, s);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int at = row0 + 8 * i;
      if (lane % 4 != 0 || at >= x.D) continue;
      z[at] = sums[i];
      if (s < x.S) norm[kNormOffset + at] = sums[i] * scale;
    }
    if (s < x.S && thread() < kNormOffset) norm[thread()] = scale;
    return scale;
  }

  // The next state. `M` and `sums` are what the segment adds; `last`: registers.
  __device__ __forceinline__ void store_next(Sums& M, Sums& last, float (&sums)[2]) const {
    const StateWork work = find();
    const int s = work.segment + 1;
    wait_for_state(work);
    const int64_t at = int64_t{fragment_row0()} * x.D + fragment_column(warpgroup_thread());
    const float* from = x.M(work.chain, work.segment) + at;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int j = 0; j < kHeadDim / 8; ++j) {
        if (fragment_row0() + 8 * i < x.D && 8 * j < x.D) {
          const float2 pair = *reinterpret_cast<const float2*>(from + 8 * i * x.D + 8 * j);
          last[4 * j + 2 * i] = pair.x;
          last[4 * j + 2 * i + 1] = pair.y;
        }
      }
    }
    const float scale = store_z(work, sums);
    float* full = x.M(work.chain, s) + at;
    T* half = static_cast<T*>(x.half) + x.state(work.chain, s) * x.matrix() + at;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (fragment_row0() + 8 * i >= x.D) continue;
#pragma unroll
      for (int j = 0; j < kHeadDim / 8; ++j) {
        if (8 * j >= x.D) continue;
        const float2 pair{M[4 * j + 2 * i] + last[4 * j + 2 * i],
                          M[4 * j + 2 * i + 1] + last[4 * j + 2 * i + 1]};
        *reinterpret_cast<float2*>(full + 8 * i * x.D + 8 * j) = pair;
        if (s == x.S) continue;
        *reinterpret_cast<uint32_t*>(half + 8 * i * x.D + 8 * j) =
            pack2<T>(pair.x * scale, pair.y * scale);
      }
    }
    publish(work, s);
  }

  // ---- operands ----

  static constexpr uint32_t kMinusInfinity = std::is_same_v<T, __half> ? 0xfc00u : 0xff80u;

  // The transpose of this warpgroup's columns of K, kSteps x 16 rows from the one at `tile` on.
  template <int kSteps>
  __device__ __forceinline__ void load_transposed(uint32_t tile, uint32_t (&a)[kSteps][4]) const {
    const int thread = warpgroup_thread(), lane = thread % 32;
    const uint32_t unit = static_cast<uint32_t>(thread / 32 * 2 + lane / 8 % 2 ^ lane % 8);
    const uint32_t address = tile + warpgroup * chunk_bytes(kBlockN) +
                             (lane / 16 * 8 + lane % 8) * kChunkRowBytes + unit * 16;
#pragma unroll
    for (int t = 0; t < kSteps; ++t) {
      ptx::ldmatrix_x4_trans(address + t * 16 * kChunkRowBytes, a[t]);
    }
  }

  // The same of sigma(K). Adds to `sums` this thread's share of the sums over the rows.
  template <int kSteps>
  __device__ __forceinline__ void read_transposed(uint32_t tile, uint32_t (&a)[kSteps][4],
                                                  float (&sums)[2]) const {
    load_transposed(tile, a);
#pragma unroll
    for (int t = 0; t < kSteps; ++t) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float2 key = elu_plus_one2_here<T>(a[t][i]);
        sums[i % 2] += key.x + key.y;
        a[t][i] = pack2<T>(key.x, key.y);
      }
    }
  }

  // Rows of a tile from `rows` on become `word`. Keys: sigma(-infinity) = 0. Values: 0 times what
  // they hold could be NaN.
  __device__ __forceinline__ void fill(uint32_t tile, int rows, uint32_t word) const {
    if (rows >= kBlockN) return;
    constexpr int kUnits = kHeadDim / 8;
    for (int i = rows * kUnits + thread(); i < kBlockN * kUnits; i += kThreads) {
      ptx::store_shared_16(tile + swizzled_unit(kBlockN, i / kUnits, i % kUnits),
                           {word, word, word, word});
    }
    ptx::fence_async_proxy();
    sync();
  }
  __device__ __forceinline__ void wait_for_keys(const KVState& state, int rows) const {
    kernel.k_pipe.wait(state);
    fill(keys(state), rows, kMinusInfinity * 0x10001u);
  }
  __device__ __forceinline__ void wait_for_values(const KVState& state, int rows) const {
    kernel.v_pipe.wait(state);
    fill(values(state), rows, 0);
  }

  // ---- linear rule ----

  // In parts of a block: sigma is applied to one under the product of the last one.
  __device__ __forceinline__ void add_linear(KVState& k_state, KVState& v_state, Sums& M,
                                             float (&sums)[2]) const {
    constexpr int kParts = 2;
    constexpr int kRows = kBlockN / kParts, kPartBytes = kRows * kChunkRowBytes;
    uint32_t a[2][kRows / 16][4];
    int rows = find().rows;
    bool started = false;
    wait_for_keys(k_state, rows);
    read_transposed(keys(k_state), a[0], sums);
#pragma unroll 1
    for (; rows > 0; rows -= kBlockN) {
      wait_for_values(v_state, rows);
#pragma unroll
      for (int part = 0; part < kParts; ++part) {
        wgmma_fence();
        gemm_rn<T, kHeadDim, kRows>(M, a[part % 2], values(v_state) + part * kPartBytes, kBlockN,
                                    started || part != 0);
        wgmma_commit();
        if (part + 1 < kParts) {
          read_transposed(keys(k_state) + (part + 1) * kPartBytes, a[(part + 1) % 2], sums);
        } else {
          kernel.k_pipe.release(k_state);
          k_state.advance();
          if (rows > kBlockN) {
            wait_for_keys(k_state, rows - kBlockN);
            read_transposed(keys(k_state), a[0], sums);
          }
        }
        wgmma_wait<0>();
      }
      started = true;
      kernel.v_pipe.release(v_state);
      v_state.advance();
    }
  }

  // ---- delta rule ----

  // This thread's columns of K in a sum over rows, one per 16: see add_columns.
  using ColumnSums = float[kHeadDim / 16];

  // Adds the 16 columns of a step over the eight threads that hold them, which halve their columns
  // before they exchange: sum gets column 8 (lane / 16) + 2 (lane % 4) + lane / 8 % 2. x: columns
  // 0, 1, 8, 9 of fragment_column.
  static __device__ __forceinline__ void add_columns(const float (&x)[4], float& sum) {
    const bool half = threadIdx.x & 16, odd = threadIdx.x & 8;
    float a = half ? x[2] : x[0], b = half ? x[3] : x[1];
    a += __shfl_xor_sync(~0u, half ? x[0] : x[2], 16);
    b += __shfl_xor_sync(~0u, half ? x[1] : x[3], 16);
    float c = odd ? b : a;
    c += __shfl_xor_sync(~0u, odd ? a : b, 8);
    sum += c + __shfl_xor_sync(~0u, c, 4);
  }

  // sigma in place on this warpgroup's 64 keys of a block, and as operand `a`; factor: -1 / norm of
  // this thread's two keys.
  __device__ __forceinline__ void apply_sigma(uint32_t tile, Operand& a, float (&factor)[2],
                                              ColumnSums& sums) const {
    const int thread = warpgroup_thread();
    const FragmentAddress<kBlockN> address(tile, warpgroup * 64, thread);
    const uint32_t z = row() + (kNormOffset + fragment_column(thread)) * 4;
    float norm[2] = {0.f, 0.f};
#pragma unroll
    for (int t = 0; t < kHeadDim / 16; ++t) {
      ptx::ldmatrix_x4(address(t), a[t]);
      float columns[4] = {0.f, 0.f, 0.f, 0.f};
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float2 weight = ptx::load_shared_float2(z + (16 * t + 8 * half) * 4);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          uint32_t& pair = a[t][2 * half + i];
          const float2 key = elu_plus_one2_here<T>(pair);
          norm[i] += key.x * weight.x + key.y * weight.y;
          columns[2 * half] += key.x;
          columns[2 * half + 1] += key.y;
          pair = pack2<T>(key.x, key.y);
        }
      }
      add_columns(columns, sums[t]);
      ptx::stmatrix_x4(address(t), a[t][0], a[t][1], a[t][2], a[t][3]);
    }
    const float least = ptx::load_shared_float2(row()).x * kMemoryEps;
#pragma unroll
    for (int i = 0; i < 2; ++i) factor[i] = -1.f / fmaxf(quad_sum(norm[i]), least);
  }

  // The row of norms that the state came with, and the memory of O, are this tile's.
  __device__ __forceinline__ void begin_delta() const {
    const StateWork work = find();
    if (warpgroup_thread() == 0) ptx::tma_store_wait_read<0>();
    wait_for_state(work);
    const float* norm = x.norm(work.chain, work.segment);
    sync();
    for (int i = thread(); i < kNormOffset + kHeadDim; i += kThreads) {
      ptx::store_shared_4(row() + i * 4, i < kNormOffset + x.D ? __float_as_uint(norm[i]) : 0);
    }
    sync();
  }

  __device__ __forceinline__ void add_delta(QState& q_state, KVState& k_state, KVState& v_state,
                                            Sums& M, float (&r)[kBlockN / 2],
                                            float (&sums)[2]) const {
    begin_delta();
    const uint32_t removed = kernel.smem + Traits::kO;
    const FragmentAddress<kBlockN> address(removed, warpgroup * 64, warpgroup_thread());
    int rows = find().rows;
    bool started = false;
    Operand a, transposed;
    float factor[2];
    ColumnSums columns = {};
    wait_for_keys(k_state, rows);
    apply_sigma(keys(k_state), a, factor, columns);
    kernel.q_pipe.wait(q_state);
    const uint32_t memory = kernel.smem + q_state.stage() * Traits::kQBytes;
#pragma unroll 1
    for (; rows > 0; rows -= kBlockN) {
      sync();
      wgmma_fence();
      gemm_rn<T, kHeadDim, kHeadDim>(r, a, memory, kHeadDim, false);
      wgmma_commit();
      load_transposed(keys(k_state), transposed);
      ptx::fence_async_proxy();  // what sigma wrote there, before the next keys
      kernel.k_pipe.release(k_state);
      k_state.advance();
      wait_for_values(v_state, rows);
      wgmma_fence();
      gemm_rn<T, kHeadDim, kBlockN>(M, transposed, values(v_state), kBlockN, started);
      started = true;
      wgmma_commit();
      wgmma_wait<1>();
#pragma unroll
      for (int t = 0; t < kHeadDim / 16; ++t) {
        uint32_t pairs[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          pairs[i] =
              pack2<T>(r[8 * t + 2 * i] * factor[i % 2], r[8 * t + 2 * i + 1] * factor[i % 2]);
        }
        ptx::stmatrix_x4(address(t), pairs[0], pairs[1], pairs[2], pairs[3]);
      }
      ptx::fence_async_proxy();
      sync();
      wgmma_fence();
      gemm_rn<T, kHeadDim, kBlockN>(M, transposed, removed, kBlockN, true);
      wgmma_commit();
      if (rows > kBlockN) {
        wait_for_keys(k_state, rows - kBlockN);
        apply_sigma(keys(k_state), a, factor, columns);
      }
      wgmma_wait<0>();
      kernel.v_pipe.release(v_state);
      v_state.advance();
    }
    kernel.q_pipe.release(q_state);
    q_state.advance();
    add_warps(removed, columns, sums);
  }

  // Of the columns' sums of all warps those of this thread's two rows of M, where it is the first
  // of the four that share them.
  __device__ __forceinline__ void add_warps(uint32_t buffer, const ColumnSums& columns,
                                            float (&sums)[2]) const {
    const int lane = thread() % 32;
    const int column = lane / 16 * 8 + lane % 4 * 2 + lane / 8 % 2;
    sync();
#pragma unroll
    for (int t = 0; t < kHeadDim / 16; ++t) {
      if (lane & 4) continue;
      ptx::store_shared_4(buffer + (thread() / 32 * kHeadDim + 16 * t + column) * 4,
                          __float_as_uint(columns[t]));
    }
    sync();
    if (lane % 4 != 0) return;
#pragma unroll
    for (int warp = 0; warp < kThreads / 32; ++warp) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int at = warp * kHeadDim + fragment_row0() + 8 * i;
        sums[i] += __int_as_float(ptx::load_shared_4(buffer + at * 4));
      }
    }
  }

  // ---- consumers ----

  __device__ __forceinline__ void run(QState& q_state, KVState& k_state, KVState& v_state, Sums& M,
                                      float (&r)[kBlockN / 2]) const {
    store_first();
    float sums[2] = {0.f, 0.f};
    if constexpr (kDelta) {
      add_delta(q_state, k_state, v_state, M, r, sums);
    } else {
      add_linear(k_state, v_state, M, sums);
    }
    store_next(M, r, sums);
  }
};

}  // namespace lctx::cuda
