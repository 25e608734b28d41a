// A ring of shared-memory stages between one producer thread and the consumer warps.
#pragma once

#include "ptx.cuh"

namespace lctx {

// Position in the ring: step i uses stage i % kStages in phase (i / kStages) & 1. One register.
template <int kStages>
struct PipelineState {
  uint32_t step = 0;
  __device__ __forceinline__ uint32_t stage() const { return step % kStages; }
  __device__ __forceinline__ uint32_t phase() const { return step / kStages & 1; }
  __device__ __forceinline__ uint32_t parity() const { return step & 1; }
  __device__ __forceinline__ void advance() { ++step; }
};

// The same for numbers of stages that are not powers of two, without a division on the way from a
// wait to the next product. Two registers.
template <int kStages>
struct CountedState {
  uint32_t index = 0;
  uint32_t parities = 0;  // bit 0 of the step, bit 1 of the phase
  __device__ __forceinline__ uint32_t stage() const { return index; }
  __device__ __forceinline__ uint32_t phase() const { return parities >> 1; }
  __device__ __forceinline__ uint32_t parity() const { return parities & 1; }
  __device__ __forceinline__ void advance() {
    const bool last = index == kStages - 1;
    index = last ? 0 : index + 1;
    parities ^= last ? 3 : 1;
  }
};

// full[s]: one arrival by the producer plus the copied bytes; empty[s]: one arrival per consumer
// warp.
template <int kStages>
struct Pipeline {
  uint32_t full, empty;  // addresses of kStages barriers each

  static constexpr int kBytes = 2 * kStages * 8;

  __device__ __forceinline__ explicit Pipeline(uint32_t base)
      : full(base), empty(base + kStages * 8) {}

  // `loaders`: threads that arrive on top, when their own loads of a stage are done.
  __device__ __forceinline__ void init(int consumer_warps, int loaders = 0) const {
    for (int s = 0; s < kStages; ++s) {
      ptx::mbarrier_init(full + s * 8, 1 + loaders);
      ptx::mbarrier_init(empty + s * 8, consumer_warps);
    }
  }

  // Producer: waits for the stage to be free (the first round falls through) and announces a copy.
  template <class State>
  __device__ __forceinline__ uint32_t acquire(const State& state, uint32_t bytes) const {
    ptx::mbarrier_wait(empty + state.stage() * 8, state.phase() ^ 1);
    ptx::mbarrier_arrive_expect(full + state.stage() * 8, bytes);
    return full + state.stage() * 8;
  }

  // `zero` must be 0: a value that the wait shall not start before (see RowState::settled).
  template <class State>
  __device__ __forceinline__ void wait(const State& state, uint32_t zero = 0) const {
    ptx::mbarrier_wait(full + state.stage() * 8, state.phase() + zero);
  }

  // Consumer: called by every thread, counted once a warp, after this warp's own reads. `zero` as
  // in wait().
  template <class State>
  __device__ __forceinline__ void release(const State& state, uint32_t zero = 0) const {
    if (threadIdx.x % 32 == 0) ptx::mbarrier_arrive(empty + state.stage() * 8 + zero);
  }
  // And goes on to the next stage.
  template <class State>
  __device__ __forceinline__ void leave(State& state, uint32_t zero = 0) const {
    release(state, zero);
    state.advance();
  }
  // Lets a stage pass unread.
  template <class State>
  __device__ __forceinline__ void pass(State& state) const {
    wait(state);
    leave(state);
  }
};

}  // namespace lctx
