// Math: the step of a chain's memory from the state that a segment reads to the next one
//       (arXiv 2404.07143, eq. 4 and 5), as tiles of attn_fwd_sm90.cuh among those of attention:
//         linear  M += sigma(K)^T V,            z += sum_n sigma(k_n)
//         delta   M += sigma(K)^T V - T M, T = sigma(K)^T diag(1 / max(sigma(K) z, eps)) sigma(K),
//                 the same z
//       Operands are rounded to the inputs' type: sigma and its rows over their norms. T M takes
//       both as sums of two bf16 terms. M, z and all sums stay fp32.
// Tile map: a tile is (batch, key/value head, segment); warpgroup w has rows 64 w .. of M and of T
//       as accumulators.
// Pipeline: keys and values come through those of attention; sigma is applied to 64 rows under the
//       product of the rows before. Linear: in registers, as A operand, which ldmatrix.trans reads.
//       Delta: in place; the rows over their norms go through the memory of O.
// Memory: K and V once, which attention reads soon after from the L2 cache; per tile M twice in
//       fp32, once in 16 bits.
// Limits: D from 72 to 128: at 64 the kernel spills registers. A tile waits for the state before
//       it, at its end (linear) or for its z at its start (delta); the tile that makes that one has
//       a lower number: a block has taken it that waits for still lower ones only.
#pragma once

#include "infini_keys.cuh"
#include "infini_matrix.cuh"
#include "infini_state_loads.cuh"
#include "infini_state_memory.cuh"

namespace lctx::cuda {

template <class Kernel, bool kDelta>
struct StateTile : StateMemory<Kernel>, StateLoads<Kernel, kDelta> {
  using Traits = typename Kernel::Traits;
  using T = typename Kernel::T;
  using QState = typename Kernel::QState;
  using KVState = typename Kernel::KVState;
  static constexpr int kHeadDim = Kernel::kHeadDim, kBlockN = Kernel::kBlockN;
  static_assert(kHeadDim == 64 * Traits::kConsumers && kHeadDim == kBlockN,
                "every consumer has rows of M; sigma(K) and M share a shape");
  // Sigma is applied to a part of a block under the products of the part before.
  static constexpr int kPartRows = 64, kParts = kBlockN / kPartRows;
  static constexpr int kPartBytes = kPartRows * kChunkRowBytes;
  static constexpr int kRowsAtOnce = 16, kBatch = kPartRows / kRowsAtOnce;
  static constexpr int kBatchBytes = kRowsAtOnce * kChunkRowBytes;
  using Memory = StateMemory<Kernel>;
  using Memory::find, Memory::fragment_row0, Memory::index, Memory::kernel, Memory::kThreads;
  using Memory::load_last, Memory::load_z, Memory::sync, Memory::thread, Memory::wait_for_state;
  using Memory::warpgroup, Memory::x;
  using typename Memory::Sums;
  using ColumnSums = float[kDelta ? 8 : 2];  // delta: of the columns of unit(); of the rows of M
  static constexpr int kSums = kDelta ? 16 : 1;  // shares of a column

  using Memory::Memory;

  __device__ __forceinline__ uint32_t keys(const KVState& state) const {
    return kernel.smem + Traits::kK + state.stage() * Traits::kKBytes;
  }
  __device__ __forceinline__ uint32_t values(const KVState& state) const {
    return kernel.smem + Traits::kV + state.stage() * Traits::kVBytes;
  }
  __device__ __forceinline__ uint32_t queries(const QState& state) const {
    return kernel.smem + state.stage() * Traits::kQBytes;
  }
  // z of the next state.
  __device__ __forceinline__ uint32_t row() const { return kernel.smem + Traits::kStateRow; }

  // ---- states ----

  // The z that the segment leaves, and its scale. sums: over this thread's rows of the segment.
  __device__ __forceinline__ float store_z(const ColumnSums& sums, float last_z) const {
    const StateWork work = find();
    const int s = work.segment + 1, column = thread(), lane = thread() % 32;
    const uint32_t buffer = kernel.smem + Traits::kO;
    sync();  // all products are done
    if constexpr (kDelta) {
      const uint32_t mine = buffer + (first_row() * kHeadDim + unit() * 8) * 4;
#pragma unroll
      for (int i = 0; i < 8; i += 4) {
        ptx::store_shared_16(mine + 4 * i,
                             {__float_as_uint(sums[i]), __float_as_uint(sums[i + 1]),
                              __float_as_uint(sums[i + 2]), __float_as_uint(sums[i + 3])});
      }
    } else {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float sum = quad_sum(sums[i]);
        if (lane % 4 != 0) continue;
        ptx::store_shared_4(buffer + (fragment_row0() + 8 * i) * 4, __float_as_uint(sum));
      }
    }
    sync();
    float total = 0.f;
    if (column < x.D) {
      for (int i = 0; i < kSums; ++i) {
        total += __int_as_float(ptx::load_shared_4(buffer + (i * kHeadDim + column) * 4));
      }
      total += last_z;
    }
    if (column < kHeadDim) ptx::store_shared_4(row() + column * 4, __float_as_uint(total));
    sync();
    float sum = 0.f;
#pragma unroll
    for (int i = 0; i < kHeadDim / 32; ++i) {
      sum += fabsf(__int_as_float(ptx::load_shared_4(row() + (lane + 32 * i) * 4)));
    }
    const float scale = memory_scale(sum_over_lanes(sum, 32) / static_cast<float>(x.D));
    if (column < x.D) x.z(work.chain, s)[column] = total;
    if (s < x.S) {
      float* norm = x.norm(work.chain, s);
      if (column < x.D) norm[kNormOffset + column] = total * scale;
      if (column < kNormOffset) norm[column] = scale;
    }
    return scale;
  }

  // ---- sigma ----

  static constexpr uint32_t kMinusInfinity = std::is_same_v<T, __half> ? 0xfc00u : 0xff80u;

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

  // Delta: the 16 bytes that a thread has in every kRowsAtOnce-th row of a part.
  __device__ __forceinline__ int unit() const { return thread() % 16; }
  __device__ __forceinline__ int first_row() const { return thread() / 16; }
  // Of it in a tile of kBlockN rows.
  __device__ __forceinline__ uint32_t own_unit() const {
    return swizzled_unit(kBlockN, first_row(), unit());
  }

  struct Scaling {
    float z[8];   // scale z of the thread's columns
    float least;  // of a norm
  };

  using Words = uint4[kBatch];

  // This thread's units of a part of the keys, the first of them at `at`.
  __device__ __forceinline__ void load_words(uint32_t at, Words& words) const {
#pragma unroll
    for (int i = 0; i < kBatch; ++i) words[i] = ptx::load_shared_16(at + i * kBatchBytes);
  }

  // sigma of `words` to where they come from and, over the rows' norms, to `scaled`; adds it to
  // `sums`.
  __device__ __forceinline__ void apply_sigma(const Words& words, uint32_t at, uint32_t scaled,
                                              const Scaling& scaling, ColumnSums& sums) const {
    KeyUnit key[kBatch];
    float norm[kBatch];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const uint32_t in[4] = {words[i].x, words[i].y, words[i].z, words[i].w};
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        key[i].x[j] = elu_plus_one2_here<T>(in[j]);
      }
      norm[i] = key[i].dot(scaling.z);
    }
    const RowFactors<kHeadDim / 8> factors(norm, scaling.least);
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      ptx::store_shared_16(at + i * kBatchBytes, key[i].template pack<T>());
      key[i].add_to(sums);
    }
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      ptx::store_shared_16(scaled + i * kBatchBytes, key[i].template pack<T>(factors[i]));
    }
  }

  // ---- linear rule ----

  using Transposed = uint32_t[kPartRows / 16][4];

  // The transpose of sigma of this warpgroup's columns of a part of K, as A operand. Adds to `sums`
  // this thread's share of the sums over the rows.
  __device__ __forceinline__ void read_transposed(uint32_t tile, Transposed& a,
                                                  ColumnSums& sums) const {
    const int thread = warpgroup_thread(), lane = thread % 32;
    const uint32_t unit = static_cast<uint32_t>(thread / 32 * 2 + lane / 8 % 2 ^ lane % 8);
    const uint32_t address = tile + warpgroup * chunk_bytes(kBlockN) +
                             (lane / 16 * 8 + lane % 8) * kChunkRowBytes + unit * 16;
#pragma unroll
    for (int t = 0; t < kPartRows / 16; ++t) {
      ptx::ldmatrix_x4_trans(address + t * 16 * kChunkRowBytes, a[t]);
    }
#pragma unroll
    for (int t = 0; t < kPartRows / 16; ++t) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float2 key = elu_plus_one2_here<T>(a[t][i]);
        sums[i % 2] += key.x + key.y;
        a[t][i] = pack2<T>(key.x, key.y);
      }
    }
  }

  __device__ __forceinline__ void wait_for_keys(const KVState& state, int rows) const {
    kernel.k_pipe.wait(state);
    fill(keys(state), rows, kMinusInfinity * 0x10001u);
  }
  __device__ __forceinline__ void wait_for_values(const KVState& state, int rows) const {
    kernel.v_pipe.wait(state);
    fill(values(state), rows, 0);
  }

  // Sigma is applied to a part of a block under the product of the last one.
  __device__ __forceinline__ void add_linear(KVState& k_state, KVState& v_state, Sums& M,
                                             ColumnSums& sums) const {
    Transposed a[kParts];
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
        gemm_rn<T, kHeadDim, kPartRows>(M, a[part], values(v_state) + part * kPartBytes, kBlockN,
                                        started || part != 0);
        wgmma_commit();
        if (part + 1 < kParts) {
          read_transposed(keys(k_state) + (part + 1) * kPartBytes, a[part + 1], sums);
        } else {
          kernel.k_pipe.release(k_state);
          const KVState next{k_state.step + 1};
          if (rows > kBlockN) {
            wait_for_keys(next, rows - kBlockN);
            read_transposed(keys(next), a[0], sums);
          }
        }
        wgmma_wait<0>();
      }
      started = true;
      kernel.v_pipe.release(v_state);
      k_state.advance();
      v_state.advance();
    }
  }

  // ---- delta rule ----

  // The memory of O is this tile's; z of the state that the segment reads.
  __device__ __forceinline__ Scaling begin_delta() const {
    const StateWork work = find();
    wait_for_state(work);
    const float* norm = x.norm(work.chain, work.segment);
    Scaling scaling;
    scaling.least = norm[0] * kMemoryEps;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      scaling.z[i] = 8 * unit() < x.D ? norm[kNormOffset + 8 * unit() + i] : 0.f;
    }
    return scaling;
  }

  // M: sigma(K)^T V, decay: sigma(K)^T diag(1 / norm) sigma(K), its transpose.
  __device__ __forceinline__ void add_delta(KVState& k_state, KVState& v_state, Sums& M,
                                            Sums& decay, ColumnSums& sums) const {
    const Scaling scaling = begin_delta();
    const uint32_t scaled = kernel.smem + Traits::kO;
    const uint32_t own = own_unit(), half = own / chunk_bytes(kBlockN);
    int rows = find().rows;
    bool started = false;
    Words words;
    const auto release = [&] {
      kernel.k_pipe.release(KVState{k_state.step - 1});
      kernel.v_pipe.release(KVState{v_state.step - 1});
    };
    wait_for_keys(k_state, rows);
    load_words(keys(k_state) + own, words);
#pragma unroll 1
    for (; rows > 0; rows -= kBlockN) {
#pragma unroll
      for (int part = 0; part < kParts; ++part) {
        const uint32_t tile = scaled + part * tile_bytes(kPartRows, kHeadDim);
        const uint32_t k_part = keys(k_state) + part * kPartBytes;
        // There already: keeps ptxas from laying most of sigma between the products.
        kernel.k_pipe.wait(k_state);
        apply_sigma(words, k_part + own, tile + own - half * chunk_bytes(kBlockN - kPartRows),
                    scaling, sums);
        ptx::fence_async_proxy();
        // Those of the next part, on their way while all meet and the products are issued.
        if (part + 1 < kParts) {
          load_words(k_part + kPartBytes + own, words);
        } else if (rows > kBlockN) {
          const KVState next{k_state.step + 1};
          wait_for_keys(next, rows - kBlockN);
          load_words(keys(next) + own, words);
        }
        wgmma_wait<0>();
        if (part == 0) {
          if (started) release();
          wait_for_values(v_state, rows);
        }
        sync();
        wgmma_fence();
        gemm_tn<T, kHeadDim, kPartRows>(M, k_part + warpgroup * chunk_bytes(kBlockN), kBlockN,
                                        values(v_state) + part * kPartBytes, kBlockN,
                                        started || part != 0);
        gemm_tn<T, kHeadDim, kPartRows>(decay, tile + warpgroup * chunk_bytes(kPartRows), kPartRows,
                                        k_part, kBlockN, started || part != 0);
        wgmma_commit();
      }
      started = true;
      k_state.advance();
      v_state.advance();
    }
    wgmma_wait<0>();
    release();
  }

  // M += decay last, decay = -T, both as sums of two bf16 terms: fp16 would not hold every decay.
  // `last` is of the state read, and becomes free.
  __device__ __forceinline__ void subtract(QState& q_state, const SplitOperand<kHeadDim>& decay,
                                           Sums& last, Sums& M) const {
    const uint32_t high = kernel.smem + Traits::kO, low = queries(q_state);
    const FragmentAddress<kHeadDim> address(high, warpgroup * 64, warpgroup_thread());
    kernel.q_pipe.wait(q_state);
    sync();
#pragma unroll
    for (int t = 0; t < kHeadDim / 16; ++t) {
      uint32_t h[4], l[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int at = 8 * t + 2 * i;
        const SplitPair<__nv_bfloat16> pair(last[at], last[at + 1]);
        h[i] = pair.high;
        l[i] = pair.low;
        M[at] += last[at];
        M[at + 1] += last[at + 1];
      }
      ptx::stmatrix_x4(address(t), h[0], h[1], h[2], h[3]);
      ptx::stmatrix_x4(address(t) + (low - high), l[0], l[1], l[2], l[3]);
    }
    ptx::fence_async_proxy();
    sync();
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      gemm_rn<__nv_bfloat16, kHeadDim, kHeadDim>(M, decay.terms[i], high, kHeadDim, true);
    }
    gemm_rn<__nv_bfloat16, kHeadDim, kHeadDim>(M, decay.terms[0], low, kHeadDim, true);
    wgmma_commit();
    wgmma_wait<0>();
    kernel.q_pipe.release(q_state);
    q_state.advance();
  }

  // ---- consumers ----

  __device__ __forceinline__ void run(QState& q_state, KVState& k_state, KVState& v_state, Sums& M,
                                      float (&r)[kBlockN / 2]) const {
    this->store_first();
    if (warpgroup_thread() == 0) ptx::tma_store_wait_read<0>();
    this->wait_for_last();  // and the memory of O is this tile's
    ColumnSums sums = {};
    float scale;
    if constexpr (kDelta) {
      add_delta(k_state, v_state, M, r, sums);
      const StateWork work = find();
      const SplitOperand<kHeadDim> decay(r, -x.norm(work.chain, work.segment)[0]);
      const float last_z = load_z();
      load_last(r);
      scale = store_z(sums, last_z);
      if (x.decays != nullptr) this->store_decay(decay);
      subtract(q_state, decay, r, M);
      sync();  // the memory of O, which both read
    } else {
      const bool there = this->is_there();
      float last_z = 0.f;
      const auto load = [&] {
        last_z = load_z();
        load_last(r);
      };
      if (there) load();
      add_linear(k_state, v_state, M, sums);
      if (!there) {
        wait_for_state(find());
        load();
      }
      scale = store_z(sums, last_z);
#pragma unroll
      for (int i = 0; i < kHeadDim / 2; ++i) M[i] += r[i];
    }
    this->store_next(M, scale);
  }
};

}  // namespace lctx::cuda
