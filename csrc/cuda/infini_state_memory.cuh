// Math: none; how a tile of infini_state_tiles.cuh reads a state, writes the next, hands it over.
// Tile map: a warpgroup has 64 rows of M, in the fragments of a product.
// Pipeline: consumers wait for no store: a warp of the producer's publishes what they hand over.
// Memory: M of the state is read once in fp32; of the next once in fp32 and once in 16 bits, the
//       latter in whole rows through the memory of O.
// Limits: those of infini_state_tiles.cuh.
#pragma once

#include "infini_matrix.cuh"
#include "infini_state_loads.cuh"

namespace lctx::cuda {

template <class Kernel>
struct StateMemory {
  using Traits = typename Kernel::Traits;
  using T = typename Kernel::T;
  static constexpr int kHeadDim = Kernel::kHeadDim;
  static constexpr int kThreads = 128 * Traits::kConsumers;
  static constexpr int kBarrier = 1 + 2 * Traits::kConsumers;       // behind those of attention
  static constexpr int kJob = kBarrier + 1, kNoJob = kBarrier + 2;  // with the warp of publish_all
  using Sums = float[kHeadDim / 2];

  const Kernel& kernel;
  const InfiniStates& x;
  const int warpgroup, index;

  __device__ __forceinline__ StateMemory(const Kernel& kernel, int warpgroup, int index)
      : kernel(kernel), x(kernel.p.states), warpgroup(warpgroup), index(index) {}

  // Found again wherever it is needed: cheaper than registers that are alive meanwhile.
  __device__ __forceinline__ StateWork find() const {
    return find_state_work(kernel.p, ptx::opaque(index));
  }

  static __device__ __forceinline__ void sync() { ptx::named_barrier_sync(kBarrier, kThreads); }
  __device__ __forceinline__ void wait_for_state(const StateWork& work) const {
    while (ptx::load_acquire(x.ready + work.chain) <= work.segment) __nanosleep(100);
  }

  // The same in the whole warp.
  __device__ __forceinline__ bool is_there() const {
    const StateWork work = find();
    return __all_sync(~0u, ptx::load_acquire(x.ready + work.chain) > work.segment);
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

  // The same without waiting for the stores: a warp that has nothing else to do does that
  // (publish_all). The one before must be with it.
  static __device__ __forceinline__ void hand_over(const Kernel& kernel, int chain, int ready) {
    if (threadIdx.x == 128) {
      ptx::store_shared_4(kernel.smem + Traits::kStateJob, chain);
      ptx::store_shared_4(kernel.smem + Traits::kStateJob + 4, ready);
    }
    ptx::named_barrier_arrive(kJob, kThreads + 32);
  }
  static __device__ __forceinline__ void wait_for_last() {
    ptx::named_barrier_sync(kNoJob, kThreads + 32);
  }
  static __device__ __forceinline__ void publish_all(const Kernel& kernel) {
    while (true) {
      ptx::named_barrier_arrive(kNoJob, kThreads + 32);
      ptx::named_barrier_sync(kJob, kThreads + 32);
      const int chain = ptx::load_shared_4(kernel.smem + Traits::kStateJob);
      if (chain < 0) return;
      const int ready = ptx::load_shared_4(kernel.smem + Traits::kStateJob + 4);
      if (threadIdx.x % 32 == 0) ptx::store_release(kernel.p.states.ready + chain, ready);
      __syncwarp();
    }
  }
  // Of the consumers, behind their last tile.
  static __device__ __forceinline__ void end(const Kernel& kernel) {
    wait_for_last();
    hand_over(kernel, -1, 0);
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

  // This thread's element of the z that the segment reads.
  __device__ __forceinline__ float load_z() const {
    const StateWork work = find();
    return thread() < x.D ? x.z(work.chain, work.segment)[thread()] : 0.f;
  }

  // This thread's part of the state that the segment reads, zero outside; it is there.
  __device__ __forceinline__ void load_last(Sums& last) const {
    const StateWork work = find();
    const float* from = x.M(work.chain, work.segment) + int64_t{fragment_row0()} * x.D +
                        fragment_column(warpgroup_thread());
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int j = 0; j < kHeadDim / 8; ++j) {
        const bool inside = fragment_row0() + 8 * i < x.D && 8 * j < x.D;
        const float2 pair = inside ? *reinterpret_cast<const float2*>(from + 8 * i * x.D + 8 * j)
                                   : float2{0.f, 0.f};
        last[4 * j + 2 * i] = pair.x;
        last[4 * j + 2 * i + 1] = pair.y;
      }
    }
  }

  // What is kept for the backward, through the memory of O, which all have left. A warp writes and
  // reads its own rows.
  __device__ __forceinline__ void store_decay(const SplitOperand<kHeadDim>& decay) const {
    constexpr int kUnits = kHeadDim / 8, kRowsAtOnce = 32 / kUnits;
    const StateWork work = find();
    const int thread = warpgroup_thread(), lane = thread % 32, unit = lane % kUnits;
    const int row0 = thread / 32 * 16 + lane / kUnits;
    const uint32_t tile = kernel.smem + Traits::kO + warpgroup * tile_bytes(64, kHeadDim);
    const FragmentAddress<64> address(tile, 0, thread);
    auto* to =
        static_cast<__nv_bfloat16*>(x.decays) + x.state(work.chain, work.segment) * x.matrix();
    to += int64_t{warpgroup * 64 + row0} * x.D + unit * 8;
#pragma unroll
    for (int term = 0; term < 2; ++term) {
#pragma unroll
      for (int t = 0; t < kHeadDim / 16; ++t) {
        const uint32_t (&r)[4] = decay.terms[term][t];
        ptx::stmatrix_x4(address(t), r[0], r[1], r[2], r[3]);
      }
      __syncwarp();
#pragma unroll
      for (int i = 0; i < 16; i += kRowsAtOnce) {
        if (warpgroup * 64 + row0 + i >= x.D || unit * 8 >= x.D) continue;
        ptx::store_global_16(to + int64_t{i} * x.D,
                             ptx::load_shared_16(tile + swizzled_unit(64, row0 + i, unit)));
      }
      __syncwarp();
      to += int64_t{x.chains()} * x.S * x.matrix();
    }
  }

  // In the inputs' type through the memory of O, in whole rows.
  __device__ __forceinline__ void store_next(const Sums& M, float scale) const {
    const StateWork work = find();
    const int s = work.segment + 1, row0 = warpgroup * 64;
    float* full =
        x.M(work.chain, s) + int64_t{fragment_row0()} * x.D + fragment_column(warpgroup_thread());
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (fragment_row0() + 8 * i >= x.D) continue;
#pragma unroll
      for (int j = 0; j < kHeadDim / 8; ++j) {
        if (8 * j >= x.D) continue;
        *reinterpret_cast<float2*>(full + 8 * i * x.D + 8 * j) =
            float2{M[4 * j + 2 * i], M[4 * j + 2 * i + 1]};
      }
    }
    if (s < x.S) {
      const uint32_t tile = kernel.smem + Traits::kO + warpgroup * tile_bytes(64, kHeadDim);
      const FragmentAddress<64> address(tile, 0, warpgroup_thread());
#pragma unroll
      for (int t = 0; t < kHeadDim / 16; ++t) {
        uint32_t r[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          r[i] = pack2<T>(M[8 * t + 2 * i] * scale, M[8 * t + 2 * i + 1] * scale);
        }
        ptx::stmatrix_x4(address(t), r[0], r[1], r[2], r[3]);
      }
      ptx::named_barrier_sync(1 + warpgroup, 128);
      constexpr int kUnits = kHeadDim / 8;
      const int thread = warpgroup_thread(), unit = thread % kUnits;
      T* half = static_cast<T*>(x.half) + x.state(work.chain, s) * x.matrix() +
                int64_t{row0} * x.D + unit * 8;
#pragma unroll
      for (int row = thread / kUnits; row < 64; row += 128 / kUnits) {
        if (row0 + row >= x.D || unit * 8 >= x.D) continue;
        ptx::store_global_16(half + int64_t{row} * x.D,
                             ptx::load_shared_16(tile + swizzled_unit(64, row, unit)));
      }
    }
    hand_over(kernel, work.chain, s + 1);
  }
};

}  // namespace lctx::cuda
